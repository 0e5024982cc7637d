"""The tokenizer of bytes as one of the library `tokenizers`, which transformers and vLLM open."""

import tokenizers
from beartype import beartype
from tokenizers import decoders, models, pre_tokenizers

from palm_rlhf.data.tokenizer_base import NUM_BYTES, ByteTokenizer
from palm_rlhf.data.tokenizer_hugging_face import HuggingFaceTokenizer


@beartype
def byte_level(tokenizer: ByteTokenizer) -> HuggingFaceTokenizer:
    """Return the tokenizer of bytes as one of the library `tokenizers`, with the same ids, for other libraries."""
    vocabulary = {letter: byte for byte, letter in enumerate(letters_of_bytes())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    return HuggingFaceTokenizer(
        backend, tokenizer.special_tokens, eos_token=names[tokenizer.eos_token], pad_token=names[tokenizer.pad_token]
    )


def letters_of_bytes() -> list[str]:
    """Return the letter that stands for each byte in a byte-level vocabulary (Radford et al. 2019).

    Visible characters of Latin-1 stand for themselves; the others take those from U+0100 on, in their order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(NUM_BYTES)]
