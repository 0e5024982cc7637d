"""Tokenizers with special tokens that no text can forge: bytes, and those of the library `tokenizers`."""

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
from palm_rlhf.data.tokenizer_gguf import read_gguf_tokenizer
from palm_rlhf.data.tokenizer_hugging_face import (
    GENERATION_FILE,
    TOKENIZER_FILE,
    HuggingFaceTokenizer,
    unmarked,
)
from palm_rlhf.model.interop.gguf_header import is_gguf
from palm_rlhf.model.interop.peft_base import base_of, is_adapter
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import resize_token_embeddings
from palm_rlhf.model.weights_folder import CONFIG, TOKENIZER_FILES, read_json

NAMES_FILE = "special_tokens_map.json"  # in folders of transformers 4, some of which name special tokens only there
ROLES = ("bos_token", "eos_token", "pad_token")
# The forms of SentencePiece, of GPT-2 and BERT, and of Mistral.
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")

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
    """Open a tokenizer that `save_pretrained` wrote, or that of a GGUF file, or of a Hugging Face folder.

    An adapter of PEFT without a tokenizer has that of its base.

    Args:
        directory: The folder, which has a tokenizer.json, or that file, or a GGUF file.
        eos_token: The name of the token that ends a text, for folders that do not name it.
        pad_token: The name of the padding token, for folders that do not name it; else the EOS.

    Raises FileNotFoundError where there is no tokenizer, and ValueError for one in another form.
    """
    folder = Path(directory)
    if is_adapter(folder) and not any((folder / name).is_file() for name in (TOKENIZER_FILE, CONFIG_FILE)):
        folder = base_of(folder, files=TOKENIZER_FILES)
    file = folder if folder.is_file() else folder / TOKENIZER_FILE
    if is_gguf(file):
        config_file, (backend, config, generation) = file, read_gguf_tokenizer(file)
    else:
        config_file = file.with_name(CONFIG_FILE)
        backend, config, generation = None, _beside(file, CONFIG_FILE), _generation_of(file)
    named = _beside(file, NAMES_FILE) | {key: value for key, value in config.items() if value is not None}
    names = {key: token_name(value) for key, value in named.items() if key in ROLES}
    names |= {key: name for key, name in (("eos_token", eos_token), ("pad_token", pad_token)) if name is not None}
    is_bytes = config.get("tokenizer_class") == "ByteTokenizer"
    if not is_bytes and not file.is_file():
        raise _without_tokenizer(directory, file, config)
    if (eos_token := names.get("eos_token")) is None:
        raise ValueError(f"{config_file} names no eos_token, expected its name: pass it, as in eos_token='</s>'")
    roles: dict[str, Any] = {"eos_token": eos_token, "pad_token": names.get("pad_token")}
    if is_bytes:
        return ByteTokenizer(config.get("special_tokens", ()), **roles)
    try:
        backend = backend or tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(
            f"{file} is not a tokenizer of the library tokenizers ({error}): copy, download or save it again"
        ) from error
    if config.get("bos_token") is None and (bos_token := names.get("bos_token")) is not None:
        config = config | {"bos_token": bos_token}
    return HuggingFaceTokenizer(
        backend, unmarked(backend, names.values()), **roles, config=config, generation=generation
    )


def _generation_of(file: Path) -> dict[str, Any]:
    """Return the settings of generation of the model that a tokenizer.json is beside; of an adapter's base, as in PEFT.

    The tokens that end a text are in config.json where generation_config.json does not name them.
    """
    if is_adapter(file.parent) and not file.with_name(GENERATION_FILE).is_file():
        try:
            return getattr(load_tokenizer(base_of(file.parent, files=TOKENIZER_FILES)), "generation", {})
        except FileNotFoundError:  # the base has no tokenizer
            return {}
    ends = _beside(file, CONFIG).get("eos_token_id")
    return ({} if ends is None else {"eos_token_id": ends}) | _beside(file, GENERATION_FILE)


def _without_tokenizer(directory: str | Path, file: Path, config: dict[str, Any]) -> Exception:
    """Return the error for a folder without a tokenizer.json; it says whether there is a tokenizer of another form."""
    others = [name for name in OTHER_TOKENIZERS if file.with_name(name).is_file()]
    if others or "tokenizer_class" in config:
        kind = ", ".join(others) or f"the form of {config['tokenizer_class']}"
        return ValueError(
            f"{directory} has its tokenizer in {kind}, expected a {TOKENIZER_FILE}: let transformers write it, by "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return FileNotFoundError(
        f"{directory} has no {TOKENIZER_FILE}, and no {CONFIG_FILE} of a ByteTokenizer, expected one of them: name "
        "a folder of save_pretrained (that of transformers writes a tokenizer.json for other formats, too)"
    )


def _beside(file: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file beside a tokenizer.json; nothing where it is missing, or beside a GGUF file."""
    path = file.with_name(name)
    return read_json(path) if path.is_file() and not is_gguf(file) else {}


def token_name(value: Any) -> str | None:
    """Return the name of a token in tokenizer_config.json, where it is a string or an object that contains it."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


@beartype
def add_special_tokens(palm: PaLM, tokenizer: Tokenizer, names: Iterable[str]) -> None:
    """Add special tokens to a tokenizer and its trained model, in place; their embeddings are the mean of all others.

    Call it before a trainer is made; see `resize_token_embeddings`. The logits of the model for texts without the new
    tokens hardly change.
    """
    known = tokenizer.num_tokens
    if known > palm.num_tokens:
        raise ValueError(
            f"got a tokenizer of {known} tokens, expected at most {palm.num_tokens}: take that of the model"
        )
    tokenizer.add_special_tokens(names)
    if tokenizer.num_tokens > known:
        resize_token_embeddings(palm, max(palm.num_tokens, tokenizer.num_tokens), num_known=known)
