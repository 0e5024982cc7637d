"""Replies that follow a grammar, such as JSON by a schema: which tokens may come next. llguidance parses."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

# Measured: what these bounds let through compiles within about a second, and a mask takes a few milliseconds at most.
MAX_SCHEMA_CHARS = 2**16
MAX_SCHEMA_DEPTH = 64
MAX_LEXER_STATES = 20_000  # one or two kilobytes each
KEPT_GRAMMARS = 64
NUM_PROBED = 4  # tokens of a new grammar that are tried, where only one is allowed: some fail after the first bracket
# One blank, or a line break and an indent: a model can otherwise write blanks until its tokens are used up.
WHITESPACE = r"\x20|\x0A[\x20\x09]{0,32}"


class Constraint:
    """How far a reply has followed a grammar. For one thread at a time.

    `failure` says why it cannot be followed any further; no token is allowed then.
    """

    def __init__(self, matcher: Any, num_tokens: int):
        self.failure: ValueError | None = None
        self._matcher, self._num_tokens = matcher, num_tokens

    @property
    def complete(self) -> bool:
        """Whether nothing can follow but the end of the reply."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> Tensor:
        """True for the tokens that may come next: `v` bool, on the CPU.

        Those that end a reply are among them exactly where the grammar allows an end.
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
        """Takes the next token, which `mask` has to allow."""
        if not self._matcher.consume_token(token):
            self.failure = ValueError(f"the token {token} is not of the reply's grammar: {reason(self._matcher)}")


class Grammar:
    """A compiled grammar over the tokens of one model, which many replies may follow at once."""

    def __init__(self, matcher: Any, num_tokens: int):
        self._matcher, self._num_tokens = matcher, num_tokens

    def start(self) -> Constraint:
        """The state of a reply that has not begun."""
        return Constraint(self._matcher.deep_copy(), self._num_tokens)


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the last ones. Safe to use from several threads.

    `num_tokens` is the model's vocabulary, `ends` the ids that end a reply.
    """

    @beartype
    def __init__(self, tokenizer: Tokenizer, num_tokens: int, ends: frozenset[int]):
        self._tokenizer, self._num_tokens = guidance_tokenizer(tokenizer, ends), num_tokens
        self._compiled = lru_cache(KEPT_GRAMMARS)(self._compile)

    @beartype
    def json(self, schema: dict[str, Any]) -> Grammar:
        """JSON that conforms to a JSON Schema (Draft 2020-12), with the properties in the order of the schema.

        Raises:
            ValueError: a schema that is too large or deep, that no JSON conforms to, or with keywords that cannot be
                followed token by token.
        """
        from llguidance import LLMatcher

        source = checked_schema({key: value for key, value in schema.items() if key != "x-guidance"})
        options = {"whitespace_pattern": WHITESPACE, "whitespace_flexible": True, "lenient": False}
        return self._compiled(LLMatcher.grammar_from_json_schema(source, overrides=options))

    @beartype
    def lark(self, source: str) -> Grammar:
        """What a grammar in llguidance's form of Lark describes; ValueError where it is none."""
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
    """A tokenizer as llguidance has them, for which too no text becomes a special token.

    `ends` are the ids that end a reply. ValueError for a tokenizer that does not tell the bytes of its tokens.
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
    """The ids that are no text, the one for what the tokenizer does not know included."""
    ids = set(tokenizer.special_tokens.values())
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids |= {index for index, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    return sorted(ids)


@beartype
def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id stands for; ValueError for a tokenizer whose tokens depend on their neighbours."""
    from llguidance import LLTokenizer

    ids = range(tokenizer.num_tokens)
    if isinstance(tokenizer, ByteTokenizer):
        return [tokenizer.decode_bytes([token], with_special_tokens=True) for token in ids]
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(f"got a {type(tokenizer).__name__}; expected a ByteTokenizer or a HuggingFaceTokenizer")
    source = tokenizer.backend.to_str()
    decoder = json.loads(source)["decoder"] or {}
    if decoder.get("type") == "Metaspace":  # which llguidance does not know: a mark stands for a blank
        names = {index: name for name, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
        return [names.get(token, "").replace(decoder["replacement"], " ").encode() for token in ids]
    try:
        known = LLTokenizer(source, eos_token=tokenizer.eos_token)
    except ValueError as error:
        raise ValueError(f"this model's tokenizer does not tell the bytes of its tokens ({error})") from error
    return [known.decode_bytes([token]) for token in ids]


def checked_schema(schema: dict[str, Any]) -> str:
    """A schema as JSON; ValueError for one that is above the bounds, or asks for what a grammar cannot count."""
    every = list(parts(schema))
    if (size := len(text := json.dumps(schema))) > MAX_SCHEMA_CHARS:
        raise ValueError(f"the schema has {size:,} characters; expected at most {MAX_SCHEMA_CHARS:,}")
    for part in every:
        least = part.get("minProperties") if isinstance(part, dict) else None
        if isinstance(least, int | float) and least > 1:
            raise ValueError("minProperties above 1 is not supported: a grammar does not tell names apart")
    return text


def parts(value: Any) -> Iterator[Any]:
    """A value of JSON and all that it holds; ValueError where it is nested too deep."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        yield from level
        level = [child for part in level for child in children(part)]


def children(value: Any) -> Sequence[Any]:
    """What a list or an object of JSON holds."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def reason(matcher: Any) -> str:
    """Why llguidance gave up, in a line."""
    lines = (matcher.get_error() or "it has no end").splitlines()
    return " ".join(line.strip() for line in lines if not line.startswith("<"))[:300]
