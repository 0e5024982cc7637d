"""The names of special tokens in users' text: a guard character keeps them ordinary text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from palm_rlhf.data.tokenizer import Tokenizer


def unused_character(texts: Iterable[str]) -> str:
    """Return a character that none of the texts contains."""
    used = set().union(*texts)
    return next(character for character in map(chr, range(0x10FFFF, 0, -1)) if character not in used)


class SpecialTokenNames:
    """The names of special tokens: found in rendered text, and broken by a guard character in the text of users."""

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
    def of(names: tuple[str, ...]) -> "SpecialTokenNames":
        """Return the names of a template, in any order; they are made once."""
        return SpecialTokenNames(names)

    def guarded(self, content: str, guard: str) -> str:
        """Return the content with a guard in each name.

        A guard also stands where the content could complete a name together with the text that a template adds before
        or after it.
        """
        content = self.start.sub(lambda match: match.group() + guard, content)
        core = content.strip()  # templates may strip blanks themselves
        before = guard if core.startswith(self.tails) else ""
        after = guard if core.endswith(self.heads) else ""
        return content.replace(core, before + core + after, 1) if core else content

    def encode(self, text: str, guard: str, tokenizer: Tokenizer, before: int | None) -> list[int]:
        """Return the ids of rendered text: names as their tokens, and the text between them without guards.

        Args:
            text: The rendered text.
            guard: The guard character.
            tokenizer: Encodes the text.
            before: The token before the text, or None at the start.
        """
        special = {tokenizer.special_tokens[name] for name in self.names}
        left, right = tokenizer.stripping
        tokens: list[int] = []
        pieces = self.whole.split(text)
        for piece, following in zip(pieces, [*pieces[1:], ""], strict=True):
            if piece in self.names:
                tokens.append(tokenizer.special_tokens[piece])
                continue
            last, words = tokens[-1] if tokens else before, piece.replace(guard, "")
            words = words.lstrip() if last in right else words
            words = words.rstrip() if tokenizer.special_tokens.get(following) in left else words
            if words:
                if last is None:
                    tokens += tokenizer.encode(words)
                else:
                    tokens += tokenizer.encode_continuation(words, after_special=last in special)
        return tokens


def guarded_value(value: Any, names: SpecialTokenNames, guard: str) -> Any:
    """Return a value of JSON in which no string, and no key, contains the name of a special token."""
    match value:
        case str():
            return names.guarded(value, guard)
        case Mapping():
            return {guarded_value(key, names, guard): guarded_value(item, names, guard) for key, item in value.items()}
        case list() | tuple():
            return [guarded_value(item, names, guard) for item in value]
    return value


def strings_in(value: Any) -> list[str]:
    """Return all strings in a value of JSON, with the keys of its objects."""
    match value:
        case str():
            return [value]
        case Mapping():
            return [*value, *(text for item in value.values() for text in strings_in(item))]
        case list() | tuple():
            return [text for item in value for text in strings_in(item)]
    return []
