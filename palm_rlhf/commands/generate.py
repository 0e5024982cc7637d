"""The command ``palm-rlhf generate``: a text continued by a byte-level model."""

import codecs
from pathlib import Path
from typing import Annotated

import torch
from beartype import beartype
from tyro.conf import Positional, arg

from palm_rlhf.model.palm import PaLM

NUM_BYTES = 256


@beartype
def generate(
    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")],
    *,
    prompt: str,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: Annotated[int | None, arg(metavar="INT")] = None,
) -> None:
    """Continue a text with a byte-level model, printing it as it is sampled.

    Args:
        checkpoint: A folder written by save_pretrained.
        prompt: The text to continue; it is not printed again.
        max_new_tokens: How many bytes to sample.
        temperature: Divides the logits before sampling; 0 always takes the likeliest byte.
        top_p: Samples from the fewest bytes that hold this much of the probability; 1 takes all.
        seed: Makes the sample repeatable; another one each time by default.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no folder: expected one that save_pretrained wrote")
    palm = PaLM.from_pretrained(checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    if palm.num_tokens > NUM_BYTES:
        raise ValueError(
            f"{checkpoint} has {palm.num_tokens} tokens, but this command writes each token as one byte, so it takes "
            f"at most {NUM_BYTES}: use PaLM.from_pretrained with the tokenizer that the model was trained with"
        )
    generator = None if seed is None else torch.Generator(palm.device).manual_seed(seed)
    # A character can span several bytes: the decoder holds an unfinished one back until the rest has come.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    steps = palm.stream(
        torch.tensor(list(prompt.encode("utf-8", errors="surrogateescape"))),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        generator=generator,
    )
    for token in steps:
        print(decoder.decode(bytes(token.tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))
