"""A tokenizer and a chat template as the metadata of a GGUF file; `tokenizer_gguf.py` reads them."""

import json
from contextlib import suppress
from typing import Any

from palm_rlhf.data.conversation import end_of_turn
from palm_rlhf.data.templates import ChatTemplate, JinjaTemplate
from palm_rlhf.data.tokenizer_base import Tokenizer
from palm_rlhf.data.tokenizer_gguf import (
    BLANK,
    BYTE,
    CONTROL,
    END_OF_MESSAGE,
    END_OF_TURN,
    NORMAL,
    PREFIX,
    SPECIAL_TOKENS,
    TEMPLATE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from palm_rlhf.data.tokenizer_gguf_words import WORDS, splitting
from palm_rlhf.data.tokenizer_hugging_face import HuggingFaceTokenizer


def gguf_metadata(
    tokenizer: Tokenizer, template: ChatTemplate | JinjaTemplate | None, num_tokens: int
) -> dict[str, Any]:
    """Return the metadata for a model of `num_tokens` rows of embeddings; ids without a token are marked unused.

    Raises ValueError for a tokenizer that llama.cpp cannot represent: of another kind, or with other words.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(
            "got a tokenizer of bytes, expected a byte-level BPE or one of SentencePiece, which GGUF can hold: train "
            "the model with such a tokenizer"
        )
    if tokenizer.num_tokens > num_tokens:
        raise ValueError(
            f"got a tokenizer of {tokenizer.num_tokens} tokens, expected at most {num_tokens}: take that of the model"
        )
    backend = json.loads(tokenizer.backend.to_str())
    if backend["model"]["type"] != "BPE":
        raise ValueError(f"got a tokenizer of the type {backend['model']['type']}, expected BPE, which GGUF can hold")
    tokens, types = tokens_and_types(tokenizer, backend, num_tokens)
    fields: dict[str, Any] = {"model": "gpt2", "tokens": tokens, "token_type": types}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in backend["model"]["merges"]]
    if backend["model"]["byte_fallback"]:
        fields |= sentencepiece_fields(backend, tokens, merges)
    else:
        fields |= {"pre": words_of(backend), "merges": [" ".join(merge) for merge in merges]}
    if not merges:
        raise ValueError(
            "got a tokenizer without merges, such as one of bytes, expected one with merges, which llama.cpp needs: "
            "train the model with such a tokenizer"
        )
    fields |= ids_and_ends(tokenizer, tokens)
    fields |= further_ends(tokenizer, template)
    metadata = {PREFIX + name: value for name, value in fields.items()}
    if template is not None:
        metadata[TEMPLATE] = template.to_jinja() if isinstance(template, ChatTemplate) else template.source
    return metadata


def tokens_and_types(
    tokenizer: HuggingFaceTokenizer, backend: dict[str, Any], num_tokens: int
) -> tuple[list[str], list[int]]:
    """Return the token of every id, and its type in llama.cpp."""
    tokens, types = [f"[PAD{index}]" for index in range(num_tokens)], [UNUSED] * num_tokens
    fallback = backend["model"]["byte_fallback"]
    for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        is_byte = fallback and len(token) == 6 and token.startswith("<0x")
        tokens[index], types[index] = token, BYTE if is_byte else NORMAL
    for token in backend["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if fallback and (unknown := backend["model"]["unk_token"]) is not None:
        types[tokens.index(unknown)] = UNKNOWN
    return tokens, types


def words_of(backend: dict[str, Any]) -> str:
    """Return the tokenizer.ggml.pre of a byte-level tokenizer. Raises ValueError for one that has none."""
    found = parts_of(backend)
    for name in WORDS:
        normalizer, splitter, whole_words = splitting(name)
        expected = {"normalizer": normalizer, "pre_tokenizer": splitter}
        known = {key: None if part is None else json.loads(part.__getstate__()) for key, part in expected.items()}
        if found == parts_of({**known, "model": {"ignore_merges": whole_words}}):
            return name
    raise ValueError(
        f"got a tokenizer with the pre_tokenizer {json.dumps(backend['pre_tokenizer'])} and the normalizer "
        f"{json.dumps(backend['normalizer'])}, expected one of the tokenizers that llama.cpp knows as {sorted(WORDS)}"
    )


def parts_of(backend: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a tokenizer on which the ids of a text depend, in one form for all versions."""

    def steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
        if part is None:
            return []
        if part["type"] == "Sequence":
            return [step for inner in part.get("pretokenizers", part.get("normalizers", [])) for step in steps(inner)]
        return [{key: value for key, value in part.items() if key != "trim_offsets"}]

    return {
        "normalizer": steps(backend["normalizer"]),
        "pre_tokenizer": steps(backend["pre_tokenizer"]),
        "ignore_merges": bool(backend["model"].get("ignore_merges")),
    }


def sentencepiece_fields(backend: dict[str, Any], tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    """Return the scores of the tokens, by the merges that make them, and whether a space precedes a text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prepend = {"type": "Prepend", "prepend": BLANK}
    found = parts_of(backend)
    if found["pre_tokenizer"] or found["normalizer"] not in ([prepend, replace], [replace]):
        raise ValueError(
            f"got a tokenizer with the pre_tokenizer {json.dumps(backend['pre_tokenizer'])} and the normalizer "
            f"{json.dumps(backend['normalizer'])}, expected that of SentencePiece in llama.cpp: a space before the "
            f"text, or none, and {BLANK} for spaces"
        )
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    return {"model": "llama", "scores": scores, "add_space_prefix": found["normalizer"][0] == prepend}


def ids_and_ends(tokenizer: HuggingFaceTokenizer, tokens: list[str]) -> dict[str, Any]:
    """Return the ids of the special tokens, and whether the tokenizer puts the BOS before a text and the EOS after."""
    names = {role: tokenizer.config.get(f"{role}_token") for role in SPECIAL_TOKENS}
    names = {role: name.get("content") if isinstance(name, dict) else name for role, name in names.items()}
    ids = {role: tokens.index(name) for role, name in names.items() if name in tokens}
    ids |= {"eos": tokenizer.eos_token, "pad": tokenizer.pad_token}
    whole = tokenizer.backend.encode("a", add_special_tokens=True).ids
    plain = tokenizer.backend.encode("a", add_special_tokens=False).ids
    before, after = whole[: -len(plain)], []
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            before, after = whole[:start], whole[start + len(plain) :]
    if before not in ([], [ids.get("bos")]) or after not in ([], [ids["eos"]]):
        raise ValueError(
            f"got a tokenizer that puts {before} before a text and {after} after it, expected at most the BOS and the "
            "EOS, as in llama.cpp"
        )
    fields: dict[str, Any] = {SPECIAL_TOKENS[role]: index for role, index in ids.items()}
    return fields | {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def further_ends(tokenizer: HuggingFaceTokenizer, template: ChatTemplate | JinjaTemplate | None) -> dict[str, int]:
    """Return the ids of two special tokens that end a reply, beside the EOS: that of a turn first, if it is another."""
    ends = sorted(tokenizer.eos_tokens & set(tokenizer.special_tokens.values()))
    if template is not None:
        with suppress(ValueError):  # the template refuses the conversation from which the token is read
            ends.insert(0, end_of_turn(tokenizer, template))
    ends = [end for end in dict.fromkeys(ends) if end in tokenizer.special_tokens.values()]
    return dict(zip((END_OF_TURN, END_OF_MESSAGE), (end for end in ends if end != tokenizer.eos_token)))
