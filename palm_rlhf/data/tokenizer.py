"""Tokenizers whose special tokens no text can forge: bytes, and those of Hugging Face `tokenizers`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from beartype import beartype

from palm_rlhf.data.tokenizer_base import (
    CONFIG_FILE,
    DEFAULT_SPECIAL_TOKENS,
    EOS,
    NUM_BYTES,
    PAD,
    ByteTokenizer,
    Tokenizer,
)
from palm_rlhf.data.tokenizer_hugging_face import TOKENIZER_FILE, HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import resize_token_embeddings
from palm_rlhf.model.weights_folder import read_json

__all__ = [
    "CONFIG_FILE",
    "DEFAULT_SPECIAL_TOKENS",
    "EOS",
    "NUM_BYTES",
    "PAD",
    "TOKENIZER_FILE",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "add_special_tokens",
    "load_tokenizer",
    "token_name",
]


@beartype
def load_tokenizer(directory: str | Path, *, eos_token: str | None = None, pad_token: str | None = None) -> Tokenizer:
    """Opens what `save_pretrained` wrote, or a Hugging Face folder with a `tokenizer.json` (or that file itself).

    `eos_token` and `pad_token` are names, for folders that do not say them; the pad is the EOS where there is none.
    """
    folder = Path(directory)
    file = folder if folder.is_file() else folder / TOKENIZER_FILE
    config_file = file.with_name(CONFIG_FILE)
    config = read_json(config_file) if config_file.is_file() else {}
    eos_token, pad_token = (
        name if name is not None else token_name(config.get(key))
        for key, name in (("eos_token", eos_token), ("pad_token", pad_token))
    )
    is_bytes = config.get("tokenizer_class") == "ByteTokenizer"
    if not is_bytes and not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no {TOKENIZER_FILE}, and no {CONFIG_FILE} of a ByteTokenizer; expected a folder that "
            "save_pretrained wrote, or one of Hugging Face, whose save_pretrained makes a tokenizer.json of other forms"
        )
    if eos_token is None:
        raise ValueError(f"{config_file} names no eos_token: pass its name, as in eos_token='</s>'")
    if is_bytes:
        return ByteTokenizer(config.get("special_tokens", ()), eos_token=eos_token, pad_token=pad_token)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{file} is no tokenizer ({error}): copy, download or save it again") from error
    return HuggingFaceTokenizer(backend, eos_token=eos_token, pad_token=pad_token, config=config)


def token_name(value: Any) -> str | None:
    """A token of a tokenizer_config.json, where it stands as a string or as an object with the string in it."""
    return value.get("content") if isinstance(value, dict) else value


@beartype
def add_special_tokens(palm: PaLM, tokenizer: Tokenizer, names: Iterable[str]) -> None:
    """Gives a trained model and its tokenizer more special tokens, in place, whose embeddings are the mean of the old.

    Before a trainer is made; see `resize_token_embeddings`. What the model gives texts without them hardly changes.
    """
    known = tokenizer.num_tokens
    if known > palm.num_tokens:
        raise ValueError(f"the tokenizer has {known} tokens, expected at most {palm.num_tokens}, those of the model")
    tokenizer.add_special_tokens(names)
    if tokenizer.num_tokens > known:
        resize_token_embeddings(palm, max(palm.num_tokens, tokenizer.num_tokens), num_known=known)
