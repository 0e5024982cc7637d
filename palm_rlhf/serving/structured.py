"""Grammars that replies have to follow, such as JSON by a schema: llguidance tells which tokens may come next."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

# Measured: a schema within these bounds compiles within about a second, and a mask takes a few milliseconds at most.
MAX_SCHEMA_CHARS = 2**16
MAX_SCHEMA_DEPTH = 64
MAX_LEXER_STATES = 20_000  # one or two kilobytes each
KEPT_GRAMMARS = 64
# Tokens of a new grammar that are tried, as long as only one is allowed: some grammars fail after the first bracket.
NUM_PROBED = 4
# One space, or a line break and an indent: a model could otherwise write spaces until its tokens are used up.
WHITESPACE = r"\x20|\x0A[\x20\x09]{0,32}"


class Constraint:
    """The state of one reply that follows a grammar. For one thread at a time.

    `failure` says why the reply can follow the grammar no further; no token is allowed then.
    """

    def __init__(self, matcher: Any, num_tokens: int):
        self.failure: ValueError | None = None
        self._matcher, self._num_tokens = matcher, num_tokens

    @property
    def complete(self) -> bool:
        """Whether only the end of the reply can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> Tensor:
        """Return True for the tokens that may come next: `v` bool, on the CPU.

        Tokens that end a reply are among them exactly where the grammar allows an end.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.zeros(self._num_tokens, dtype=torch.bool)
        found = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._num_tokens])
        allowed[: len(found)] = found.bool()
        if self._matcher.is_error():
            self.failure = ValueError(f"no reply can follow the grammar any further: {reason(self._matcher)}")
            allowed.zero_()
        return allowed

    def push(self, token: int) -> None:
        """Add the next token, which `mask` has to allow."""
        if not self._matcher.consume_token(token):
            message = f"got the token {token}, expected one that the grammar allows: {reason(self._matcher)}"
            self.failure = ValueError(message)


class Grammar:
    """A compiled grammar over the tokens of one model, which many replies may follow at once."""

    def __init__(self, matcher: Any, num_tokens: int):
        self._matcher, self._num_tokens = matcher, num_tokens

    def start(self) -> Constraint:
        """Return the state of a reply that has not begun."""
        return Constraint(self._matcher.deep_copy(), self._num_tokens)


class Grammars:
    """A compiler of grammars for one tokenizer, which keeps the grammars used last. Safe to use from several threads.

    Args:
        tokenizer: The tokenizer, which has to tell the bytes of its tokens.
        num_tokens: The vocabulary of the model.
        ends: The token ids that end a reply.
    """

    @beartype
    def __init__(self, tokenizer: Tokenizer, num_tokens: int, ends: frozenset[int]):
        self._tokenizer, self._num_tokens = guidance_tokenizer(tokenizer, ends), num_tokens
        self._compiled = lru_cache(KEPT_GRAMMARS)(self._compile)

    @beartype
    def json(self, schema: dict[str, Any]) -> Grammar:
        """Return the grammar of a JSON Schema (Draft 2020-12), with the properties in the order of the schema.

        Raises ValueError for a schema that is too large or too deep, that no JSON conforms to, or that has keywords
        which cannot be followed token by token.
        """
        from llguidance import LLMatcher

        source = checked_schema({key: value for key, value in schema.items() if key != "x-guidance"})
        grammar = LLMatcher.grammar_from_json_schema(
            source, overrides={"whitespace_pattern": WHITESPACE, "whitespace_flexible": True, "lenient": False}
        )
        return self._compiled(grammar)

    @beartype
    def lark(self, source: str) -> Grammar:
        """Return the grammar of a source in llguidance's form of Lark; ValueError where the source is wrong."""
        from llguidance import LLMatcher

        return self._compiled(LLMatcher.grammar_from_lark(source))

    def _compile(self, source: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        grammar = Grammar(matcher, self._num_tokens)
        if matcher.is_error():
            raise ValueError(reason(matcher))
        probe = grammar.start()
        for _ in range(NUM_PROBED):
            allowed = probe.mask().nonzero()
            if not len(allowed):
                raise ValueError("nothing conforms to it" if probe.failure is None else str(probe.failure))
            if len(allowed) > 1 or probe.complete:
                break
            probe.push(int(allowed))
        return grammar


@beartype
def guidance_tokenizer(tokenizer: Tokenizer, ends: frozenset[int]) -> Any:
    """Return llguidance's view of a tokenizer, in which no text becomes a special token either.

    `ends` are the token ids that end a reply. Raises ValueError for a tokenizer that does not tell the bytes of its
    tokens.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Tokens(tokenizer)), eos_token=sorted(ends) or [tokenizer.eos_token])


class _Tokens:
    """The attributes by which llguidance reads a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.tokens = tokenizer, token_bytes(tokenizer)
        self.special_token_ids = special_ids(tokenizer)
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token, None

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode_continuation(text)


@beartype
def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that stand for no text, including the id for text that the tokenizer does not know."""
    ids = set(tokenizer.special_tokens.values())
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids |= {index for index, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    return sorted(ids)


@beartype
def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of each token id; ValueError for a tokenizer whose tokens depend on their neighbours."""
    from llguidance import LLTokenizer

    ids = range(tokenizer.num_tokens)
    if isinstance(tokenizer, ByteTokenizer):
        return [tokenizer.decode_bytes([token], with_special_tokens=True) for token in ids]
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(f"got a {type(tokenizer).__name__}, expected a ByteTokenizer or a HuggingFaceTokenizer")
    source = tokenizer.backend.to_str()
    decoder = json.loads(source)["decoder"] or {}
    if decoder.get("type") == "Metaspace":  # llguidance does not know it: a mark stands for a space
        names = {index: name for name, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
        return [names.get(token, "").replace(decoder["replacement"], " ").encode() for token in ids]
    try:
        known = LLTokenizer(source, eos_token=tokenizer.eos_token)
    except ValueError as error:
        raise ValueError(f"this model's tokenizer does not tell the bytes of its tokens ({error})") from error
    return [known.decode_bytes([token]) for token in ids]


def checked_schema(schema: dict[str, Any]) -> str:
    """Return a schema as JSON; ValueError for a schema above the bounds, or one that asks a grammar to count."""
    values = list(nested_values(schema))
    if (size := len(text := json.dumps(schema))) > MAX_SCHEMA_CHARS:
        raise ValueError(f"the schema has {size:,} characters; expected at most {MAX_SCHEMA_CHARS:,}")
    for value in values:
        least = value.get("minProperties") if isinstance(value, dict) else None
        if isinstance(least, int | float) and least > 1:
            raise ValueError(f"minProperties is {least}; expected at most 1, since a grammar cannot count properties")
    return text


def nested_values(value: Any) -> Iterator[Any]:
    """Yield a value of JSON and everything in it; ValueError where it is nested too deep."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        yield from level
        level = [child for part in level for child in children(part)]


def children(value: Any) -> Sequence[Any]:
    """Return the values that a list or an object of JSON holds."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def reason(matcher: Any) -> str:
    """Return the error of llguidance in one line."""
    lines = (matcher.get_error() or "it has no end").splitlines()
    return " ".join(line.strip() for line in lines if not line.startswith("<"))[:300]
