"""The tokenizer in the metadata of a GGUF file, as one of the library `tokenizers`."""

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from palm_rlhf.data.tokenizer_gguf_words import OF_ARCHITECTURE, WORDS, splitting
from palm_rlhf.model.interop.gguf_config import ARCHITECTURE
from palm_rlhf.model.interop.gguf_header import GGUFHeader

PREFIX, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the types of tokens
# The names of the special tokens in tokenizer_config.json, and in the metadata.
SPECIAL_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
END_OF_TURN, END_OF_MESSAGE = "eot_token_id", "eom_token_id"  # beside the EOS
SPECIAL_NAME = re.compile(r"<\|.*\|>|<｜.*｜>", re.DOTALL)
BLANK = "\u2581"  # instead of spaces in the tokens of SentencePiece
# Limits for files that are damaged or hostile. The tokenizer of LLaMA has at most 16 characters in a token, and 61,000
# merges.
MAX_CHARACTERS, MAX_MERGES = 512, 2**22


def read_gguf_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], dict[str, Any]]:
    """Return the tokenizer of a GGUF file and its fields of tokenizer_config.json and generation_config.json.

    Raises FileNotFoundError where the file has none, and ValueError for a kind that is not known, or damaged metadata.
    """
    metadata = GGUFHeader(path).metadata
    fields = fields_of(metadata)
    if (model := fields.get("model", "none")) in ("none", "no_vocab"):
        raise FileNotFoundError(f"{path} has no tokenizer; expected one in its metadata: convert the model again")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{path} has the tokenizer.ggml.model {model!r}, expected gpt2 or llama: copy the tokenizer.json of the "
            "model to a folder, and name that"
        )
    tokens = strings(fields, "tokens", path)
    types = types_of(fields, tokens, path)
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if types[index] != UNUSED and vocab.setdefault(token, index) != index:
            raise ValueError(
                f"{path} has the token {token!r} as {vocab[token]} and as {index}, expected each token once: convert "
                "the model again"
            )
    config = config_of(metadata, path)
    try:
        if model == "gpt2":
            if fields.get("pre", "default") == "default":
                fields["pre"] = OF_ARCHITECTURE.get(metadata.get(ARCHITECTURE, ""), "default")
            backend = byte_level(fields, vocab, path)
        else:
            backend = sentencepiece(fields, vocab, types, path)
        add_tokens(backend, tokens, types)
        add_ends(backend, fields, config, model)
    except ValueError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} has a damaged tokenizer ({error}): copy, download or convert it again") from error
    ends = [fields.get(key) for key in (SPECIAL_TOKENS["eos"], END_OF_TURN, END_OF_MESSAGE)]
    ends = [index for index in dict.fromkeys(ends) if isinstance(index, int) and 0 <= index < len(tokens)]
    return backend, config, {"eos_token_id": ends} if len(ends) > 1 else {}


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return the fields of tokenizer_config.json: special tokens and the chat template, where the file has one."""
    return config_of(GGUFHeader(path).metadata, path)


def fields_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a tokenizer without their prefix; files of SentencePiece may omit the BOS and the EOS."""
    fields = {name.removeprefix(PREFIX): value for name, value in metadata.items() if name.startswith(PREFIX)}
    tokens = fields.get("tokens")
    if fields.get("model") == "llama" and isinstance(tokens, list) and tokens[1:3] == ["<s>", "</s>"]:
        fields = {"bos_token_id": 1, "eos_token_id": 2, **fields}
    return fields


def types_of(fields: dict[str, Any], tokens: Sequence[str], path: Path) -> list[int]:
    """Return the type of each token; special tokens are control tokens even if the file takes them for added words.

    Special tokens are those with a role, and added words with names between <| and |>, which llama.cpp and its
    converter take for special, too. Empty tokens are unused.
    """
    types = fields.get("token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{path} has {len(tokens)} tokens and not as many types of them: convert the model again")
    roles = [fields.get(key) for key in (SPECIAL_TOKENS["bos"], SPECIAL_TOKENS["eos"], END_OF_TURN, END_OF_MESSAGE)]
    padding = fields.get(SPECIAL_TOKENS["pad"])

    def type_of(index: int, token: str) -> int:
        is_added = types[index] == USER_DEFINED
        if index in roles or (is_added and (index == padding or SPECIAL_NAME.fullmatch(token))):
            return CONTROL
        return types[index] if token else UNUSED

    return [type_of(index, token) for index, token in enumerate(tokens)]


def config_of(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the names of the special tokens, which the metadata name by their ids, and the chat template."""
    fields, config = fields_of(metadata), {}
    for role, key in SPECIAL_TOKENS.items():
        index = fields.get(key)
        if index is not None and not is_dispensable(role, index, fields):
            config[f"{role}_token"] = token_at(fields.get("tokens", []), index, key, path)
    if isinstance(template := metadata.get(TEMPLATE), str):
        config["chat_template"] = template
    return config


def is_dispensable(role: str, index: Any, fields: dict[str, Any]) -> bool:
    """Return whether an id is that of no special token, and its role is one that needs none.

    Files of many models have such ids for padding, which is the EOS then, and for unknown text.
    """
    tokens, types = fields.get("tokens"), fields.get("token_type")
    if not isinstance(index, int) or not isinstance(tokens, list) or role not in ("unk", "pad"):
        return False
    if role == "unk" or not isinstance(types, list):
        return not 0 <= index < len(tokens)
    return not 0 <= index < len(types) or types[index] not in (UNKNOWN, CONTROL, USER_DEFINED)


def byte_level(fields: dict[str, Any], vocab: dict[str, int], path: Path) -> tokenizers.Tokenizer:
    """Return a byte-level BPE. Raises ValueError for an unknown way to cut texts into words."""
    kind = fields["pre"]
    if kind not in WORDS:
        raise ValueError(
            f"{path} has the tokenizer.ggml.pre {kind!r}, expected one of {sorted(WORDS)}: if the model has one of "
            "these, write it by gguf-new-metadata (option pre-tokenizer) of the package gguf; else take its folder"
        )
    normalizer, splitter, whole_words = splitting(kind)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges_of(fields, path), ignore_merges=whole_words))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    return backend


def merges_of(fields: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    """Return the merges of the metadata, in their order."""
    merges = []
    for merge in strings(fields, "merges", path):
        left, _, right = merge.partition(" ")
        if not (left and right) or " " in right:
            raise ValueError(f"{path} has the merge {merge!r}, expected two tokens and a space between them")
        merges.append((left, right))
    return merges


def sentencepiece(
    fields: dict[str, Any], vocab: dict[str, int], types: Sequence[int], path: Path
) -> tokenizers.Tokenizer:
    """Return a BPE of SentencePiece; its merges are in the metadata, or follow from the scores of the tokens."""
    tokens = strings(fields, "tokens", path)
    merges = merges_of(fields, path) if "merges" in fields else merges_by_scores(fields, vocab, types, path)
    unknown = fields.get(SPECIAL_TOKENS["unk"], 0)
    if is_dispensable("unk", unknown, fields):
        unknown = 0
    model = models.BPE(
        vocab,
        merges,
        unk_token=token_at(tokens, unknown, SPECIAL_TOKENS["unk"], path),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", BLANK)]
    ends: list[Any] = []
    if fields.get("add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(BLANK))
        ends = [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return backend


def merges_by_scores(
    fields: dict[str, Any], vocab: dict[str, int], types: Sequence[int], path: Path
) -> list[tuple[str, str]]:
    """Return the pairs of tokens that make another, the one of the highest score first.

    Of equal scores, the lower id is first: converters of a tokenizer.json give all tokens the same score, and the ids
    are in the order of the merges. Only normal tokens are made by merges.
    """
    scores = fields.get("scores", [])
    if not isinstance(scores, list) or len(scores) != len(types):
        raise ValueError(
            f"{path} has {len(types)} tokens and {len(scores)} scores, expected as many: convert the model again"
        )
    if long := next(
        (token for token, index in vocab.items() if types[index] == NORMAL and len(token) > MAX_CHARACTERS), None
    ):
        raise ValueError(
            f"{path} has the token {long[:20]!r}... of {len(long)} characters, expected at most {MAX_CHARACTERS}: "
            "convert the model again"
        )
    found = (
        (-scores[index], index, vocab[token[:cut]], vocab[token[cut:]], (token[:cut], token[cut:]))
        for token, index in vocab.items()
        if types[index] == NORMAL
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )
    if len(merges := list(islice(found, MAX_MERGES + 1))) > MAX_MERGES:
        raise ValueError(f"{path} has tokens of more than {MAX_MERGES} merges, expected fewer: convert the model again")
    return [pair for *_, pair in sorted(merges)]


def add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Mark the control tokens as special, and those that a user added as words that are never cut."""
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    control = [AddedToken(token, special=True, normalized=False) for token, kind in marked if kind == CONTROL]
    backend.add_special_tokens(control)
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in marked if kind == USER_DEFINED])


def add_ends(backend: tokenizers.Tokenizer, fields: dict[str, Any], config: dict[str, Any], model: str) -> None:
    """Let the tokenizer put the BOS before a text and the EOS after it, where the metadata say so."""
    default = model == "llama" or WORDS[fields["pre"]].after_bos
    added = {"bos": fields.get("add_bos_token", default), "eos": fields.get("add_eos_token", False)}
    names = {role: config[f"{role}_token"] for role, wanted in added.items() if wanted and f"{role}_token" in config}
    if names:
        ids = [(name, backend.token_to_id(name)) for name in set(names.values())]
        pieces = [names["bos"], "$A"] if "bos" in names else ["$A"]
        pieces += [names["eos"]] if "eos" in names else []
        backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)


def token_at(tokens: Sequence[str], index: Any, key: str, path: Path) -> str:
    """Return a token by its id. Raises ValueError for an id that the file does not have."""
    num_tokens = len(tokens) if isinstance(tokens, list) else 0
    if not isinstance(index, int) or not 0 <= index < num_tokens or not isinstance(tokens[index], str):
        raise ValueError(
            f"{path} has the {PREFIX}{key} {index!r}, expected an id of its {num_tokens} tokens: convert it again"
        )
    return tokens[index]


def strings(fields: dict[str, Any], name: str, path: Path) -> list[str]:
    """Return a list of strings of the metadata. Raises ValueError where it is missing or something else."""
    values = fields.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{path} has no list of strings {PREFIX}{name}, expected one: convert the model again")
    return values
