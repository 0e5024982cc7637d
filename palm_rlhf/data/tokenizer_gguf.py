"""The tokenizer in the metadata of a GGUF file, as one of the library `tokenizers`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from palm_rlhf.model.interop.gguf_header import GGUFHeader

PREFIX, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the types of tokens
# The names of the special tokens in tokenizer_config.json, and in the metadata.
SPECIAL_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
GPT2 = None  # the expression of GPT-2, which the library has
DIGITS = "digits"  # each digit alone, and the expression of GPT-2 between them
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is not cut, whatever the merges
# How each kind of byte-level tokenizer cuts a text into words, by its tokenizer.ggml.pre.
WORDS = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "jais"), GPT2),
    **dict.fromkeys(("smollm", "command-r", "starcoder", "refact", "codeshell"), DIGITS),
    **dict.fromkeys(WHOLE_WORDS, LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
}
COMPOSED = ("qwen2", "command-r")  # their tokenizers read letters and accents as one character, NFC
WITH_BOS = WHOLE_WORDS  # without tokenizer.ggml.add_bos_token, a text starts with the BOS
BLANK = "\u2581"  # instead of spaces in the tokens of SentencePiece


def read_gguf_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a GGUF file and its fields of tokenizer_config.json.

    Raises FileNotFoundError where the file has none, and ValueError for a kind that is not known, or damaged metadata.
    """
    metadata = GGUFHeader(path).metadata
    fields = {name.removeprefix(PREFIX): value for name, value in metadata.items() if name.startswith(PREFIX)}
    if (model := fields.get("model", "none")) in ("none", "no_vocab"):
        raise FileNotFoundError(f"{path} has no tokenizer; expected one in its metadata: convert the model again")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{path} has the tokenizer.ggml.model {model!r}, expected gpt2 or llama: copy the tokenizer.json of the "
            "model to a folder, and name that"
        )
    tokens = strings(fields, "tokens", path)
    types = fields.get("token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{path} has {len(tokens)} tokens and not as many types of them: convert the model again")
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    config = config_of(metadata, path)
    try:
        backend = (byte_level if model == "gpt2" else sentencepiece)(fields, vocab, path)
        add_tokens(backend, tokens, types)
        add_ends(backend, fields, config, model)
    except ValueError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} has a damaged tokenizer ({error}): copy, download or convert it again") from error
    return backend, config


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return the fields of tokenizer_config.json: special tokens and the chat template, where the file has one."""
    return config_of(GGUFHeader(path).metadata, path)


def config_of(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the names of the special tokens, which the metadata name by their ids, and the chat template."""
    config = {}
    for role, key in SPECIAL_TOKENS.items():
        if (index := metadata.get(PREFIX + key)) is not None:
            config[f"{role}_token"] = token_at(metadata.get(f"{PREFIX}tokens", []), index, key, path)
    if isinstance(template := metadata.get(TEMPLATE), str):
        config["chat_template"] = template
    return config


def byte_level(fields: dict[str, Any], vocab: dict[str, int], path: Path) -> tokenizers.Tokenizer:
    """Return a byte-level BPE. Raises ValueError for an unknown way to cut texts into words."""
    kind = fields.get("pre", "default")
    if kind not in WORDS:
        raise ValueError(
            f"{path} has the tokenizer.ggml.pre {kind!r}, expected one of {sorted(WORDS)}: copy the tokenizer.json of "
            "the model to a folder, and name that"
        )
    merges = []
    for merge in strings(fields, "merges", path):
        left, _, right = merge.partition(" ")
        if not (left and right) or " " in right:
            raise ValueError(f"{path} has the merge {merge!r}, expected two tokens and a space between them")
        merges.append((left, right))
    normalizer, splitter, whole_words = splitting(kind)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    return backend


def splitting(kind: str) -> tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer, bool]:
    """Return how a kind of byte-level tokenizer normalises texts, cuts words, and if a word that is a token stays."""
    words = WORDS[kind]
    steps: list[pre_tokenizers.PreTokenizer] = []
    if words == DIGITS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif words is not GPT2:
        steps.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words in (GPT2, DIGITS)))
    return (
        normalizers.NFC() if kind in COMPOSED else None,
        pre_tokenizers.Sequence(steps),
        kind in WHOLE_WORDS,
    )


def sentencepiece(fields: dict[str, Any], vocab: dict[str, int], path: Path) -> tokenizers.Tokenizer:
    """Return a BPE of SentencePiece, whose merges follow from the scores of the tokens."""
    scores = fields.get("scores", [])
    tokens = strings(fields, "tokens", path)
    if len(scores) != len(tokens):
        raise ValueError(f"{path} has {len(tokens)} tokens and {len(scores)} scores, expected as many")
    merges = [
        (-scores[index], vocab[token[:cut]], vocab[token[cut:]], (token[:cut], token[cut:]))
        for token, index in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    unknown = fields.get("unknown_token_id", 0)
    model = models.BPE(
        vocab,
        [pair for *_, pair in sorted(merges)],
        unk_token=token_at(tokens, unknown, "unknown_token_id", path),
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


def add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Mark the control tokens as special, and those that a user added as words that are never cut."""
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    control = [AddedToken(token, special=True, normalized=False) for token, kind in marked if kind == CONTROL]
    backend.add_special_tokens(control)
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in marked if kind == USER_DEFINED])


def add_ends(backend: tokenizers.Tokenizer, fields: dict[str, Any], config: dict[str, Any], model: str) -> None:
    """Let the tokenizer put the BOS before a text and the EOS after it, where the metadata say so."""
    default = model == "llama" or fields.get("pre") in WITH_BOS
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
