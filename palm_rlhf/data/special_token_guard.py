"""The names of special tokens in what people write: a guard keeps them text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from palm_rlhf.data.tokenizer import Tokenizer


def unused_character(texts: Iterable[str]) -> str:
    """A character that none of the texts has."""
    used = set().union(*texts)
    return next(character for character in map(chr, range(0x10FFFF, 0, -1)) if character not in used)


class SpecialNames:
    """The names of special tokens: found in rendered text, and broken by a guard in what people write."""

    def __init__(self, names: Sequence[str]):
        names = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        pattern = "|".join(map(re.escape, names)) or "(?!)"
        self.names = frozenset(names)
        self.whole = re.compile(f"({pattern})")
        self.start = re.compile(f"(?={pattern}).", re.DOTALL)
        self.heads = tuple({name[:end] for name in names for end in range(1, len(name))})
        self.tails = tuple({name[start:] for name in names for start in range(1, len(name))})

    @staticmethod
    @cache
    def of(names: tuple[str, ...]) -> "SpecialNames":
        """Those of a template, in any order; made once."""
        return SpecialNames(names)

    def guarded(self, content: str, guard: str) -> str:
        """The content with a guard in each name, and where a name could begin or end with what the template adds."""
        content = self.start.sub(lambda match: match.group() + guard, content)
        core = content.strip()  # templates may strip it themselves
        before = guard if core.startswith(self.tails) else ""
        after = guard if core.endswith(self.heads) else ""
        return content.replace(core, before + core + after, 1) if core else content

    def encode(self, text: str, guard: str, tokenizer: Tokenizer, before: int | None) -> list[int]:
        """Names as their tokens, and the text between them without guards; `before` is the token that stands before."""
        special = {tokenizer.special_tokens[name] for name in self.names}
        tokens: list[int] = []
        for piece in self.whole.split(text):
            if piece in self.names:
                tokens.append(tokenizer.special_tokens[piece])
            elif words := piece.replace(guard, ""):
                last = tokens[-1] if tokens else before
                if last is None:
                    tokens += tokenizer.encode(words)
                else:
                    tokens += tokenizer.encode_continuation(words, after_special=last in special)
        return tokens


def guarded_value(value: Any, names: SpecialNames, guard: str) -> Any:
    """A value of JSON whose strings, and the names of whose entries, hold no special token."""
    match value:
        case str():
            return names.guarded(value, guard)
        case Mapping():
            return {guarded_value(key, names, guard): guarded_value(item, names, guard) for key, item in value.items()}
        case list() | tuple():
            return [guarded_value(item, names, guard) for item in value]
    return value


def strings(value: Any) -> list[str]:
    """All strings in a value of JSON, the names of entries included."""
    match value:
        case str():
            return [value]
        case Mapping():
            return [*value, *(text for item in value.values() for text in strings(item))]
        case list() | tuple():
            return [text for item in value for text in strings(item)]
    return []
