"""The command ``palm-rlhf generate``: continue a text."""

from pathlib import Path
from typing import Annotated, cast

import torch
from beartype import beartype
from torch import Tensor
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.data.stream_decoder import StreamDecoder
from palm_rlhf.data.tokenizer import NUM_BYTES, ByteTokenizer, Tokenizer, load_tokenizer
from palm_rlhf.model.interop.gguf_dtype import generation_dtype
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.model.token_ids import known_tokens, require_room
from palm_rlhf.ops.sampling import UncheckedSampling


@beartype
def generate(
    checkpoint: Annotated[Positional[str], arg(metavar="MODEL")],
    *,
    prompt: str,
    max_new_tokens: int = 256,
    sampling: OmitArgPrefixes[UncheckedSampling] = UncheckedSampling(),  # noqa: B008 (it is frozen)
    seed: Annotated[int | None, arg(metavar="INT")] = None,
    quantize: Quantisation | None = None,
) -> None:
    """Continue a text, printing it as it is sampled.

    Args:
        checkpoint: The folder of a run or of a model with its tokenizer, a .gguf file, a hub id, owner/name, or
            smollm2; without a tokenizer the tokens are bytes.
        prompt: The text to continue; it is not printed again.
        max_new_tokens: Number of tokens to sample.
        sampling: Sampling settings.
        seed: Seed of the sample; by default a different one each time.
        quantize: Keep the matrices of the blocks in int8, a byte a weight, or int4, 4.5 bits a weight (NF4), by
            bitsandbytes: less memory, and on a CPU slower steps.
    """
    options = sampling.checked().options
    folder = local_model(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = generation_dtype(folder, device)
    palm = PaLM.from_pretrained(folder, dtype=dtype, device=device if quantize is None else "cpu")
    if quantize is not None:
        palm.quantize_(quantize, device=device)
    tokenizer = _tokenizer_of(folder, palm)
    text = prompt.encode("utf-8", errors="surrogateescape")  # the bytes that were typed, in any encoding
    if isinstance(tokenizer, ByteTokenizer):
        tokens = tokenizer.encode(text)
    else:
        tokens = tokenizer.text_start + tokenizer.encode(text.decode("utf-8", errors="replace"))
    generator = None if seed is None else torch.Generator(palm.device).manual_seed(seed)
    # A character can span several tokens: the decoder holds an incomplete character back until the rest has come.
    decoder = StreamDecoder(tokenizer, after=tokens)
    steps = palm.stream(
        torch.tensor(tokens),
        max_new_tokens=max_new_tokens,
        allowed_tokens=known_tokens(tokenizer, palm.num_tokens),
        generator=generator,
        **options,
    )
    for step in steps:
        token = int(cast(Tensor, step))
        print(decoder.push(token), end="", flush=True)
        if token in tokenizer.eos_tokens:
            break
    print(decoder.finish())


def _tokenizer_of(folder: Path, palm: PaLM) -> Tokenizer:
    """Open the tokenizer beside a model, or bytes. Raises ValueError where it does not fit the vocabulary."""
    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:
        if palm.num_tokens > NUM_BYTES:
            raise ValueError(
                f"got {palm.num_tokens} tokens and no tokenizer in {folder}, expected a tokenizer, or at most "
                f"{NUM_BYTES} tokens, which are bytes: save the tokenizer of the training there, by "
                "tokenizer.save_pretrained"
            ) from None
        return ByteTokenizer()
    require_room(tokenizer.num_tokens, palm.num_tokens, folder)
    return tokenizer
