"""One message of an Open-Assistant tree: what a record says of it, and whether it is wanted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from beartype import BeartypeConf, beartype

# The languages of the Open-Assistant Conversations (https://arxiv.org/abs/2304.07327), those with most messages first.
LANGUAGES = (
    *("en", "es", "ru", "de", "zh", "fr", "th", "pt-BR", "ca", "ko", "uk-UA", "it", "ja", "vi", "eu", "pl", "hu", "ar"),
    *("nl", "sv", "tr", "fi", "cs", "da", "gl", "he", "ro", "nb-NO", "id", "bg", "bn", "fa", "el", "eo", "sk"),
)
ROLES = {"prompter": "user", "assistant": "assistant"}
REVIEWS = {"passed": (True,), "not_failed": (True, None), "any": (True, None, False)}


@dataclass(eq=False, slots=True)
class Message:
    """A message with its place in the tree: `replies` are sorted, the best rank first and those without one last.

    `rank` counts from 0, the best. `contested`: the message had siblings before any was left out.
    `tree_state` is None below the root, `review_result` before a review.
    """

    message_id: str
    parent_id: str | None
    role: Literal["prompter", "assistant"]
    text: str
    rank: int | None
    lang: str | None
    review_result: bool | None
    deleted: bool
    synthetic: bool
    tree_state: str | None
    labels: dict[str, float]
    emojis: dict[str, int]
    parent: "Message | None" = field(default=None, repr=False)
    replies: "list[Message]" = field(default_factory=list, repr=False)
    contested: bool = False

    @property
    def sort_key(self) -> tuple[float, str]:
        return math.inf if self.rank is None else self.rank, self.message_id

    def path(self) -> "list[Message]":
        """The messages from the root to this one."""
        path = [self]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        return path[::-1]


def parse_message(record: Any, parent_id: str | None, tree_state: Any) -> Message:
    """The message that a record describes; `ValueError` says what is wrong with it."""
    if not isinstance(record, Mapping):
        raise ValueError("malformed message")
    rank = record.get("rank")
    if isinstance(rank, float) and rank.is_integer():
        rank = int(rank)  # a column with missing values holds floats
    message = Message(
        message_id=record.get("message_id"),
        parent_id=parent_id,
        role=record.get("role"),
        text=record.get("text"),
        rank=rank,
        lang=record.get("lang"),
        review_result=record.get("review_result"),
        deleted=record.get("deleted") or False,
        synthetic=record.get("synthetic") or False,
        tree_state=tree_state,
        labels=_columns(record.get("labels"), "value"),
        emojis=_columns(record.get("emojis"), "count"),
    )
    _check(message)
    return message


def _check(message: Message) -> None:
    optional_texts = (message.parent_id, message.lang, message.tree_state)
    flags = (message.deleted, message.synthetic, message.review_result or False)
    numbers = (*message.labels.values(), *message.emojis.values())
    if not (
        isinstance(message.message_id, str)
        and message.message_id
        and isinstance(message.text, str)
        and all(text is None or isinstance(text, str) for text in optional_texts)
        and all(isinstance(flag, bool) for flag in flags)
        and (message.rank is None or (type(message.rank) is int and message.rank >= 0))
        and all(type(number) in (int, float) for number in numbers)
    ):
        raise ValueError("malformed message")
    if not isinstance(message.role, str) or message.role not in ROLES:
        raise ValueError("unknown role")


def _columns(content: Any, value: str) -> dict[str, Any]:
    """Numbers by name, from `{name: {value: x}}`, `{name: x}` or columns, `{"name": [...], value: [...]}`."""
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError("malformed message")
    names, values = content.get("name"), content.get(value)
    if isinstance(names, list):
        if not isinstance(values, list) or len(names) != len(values) or not all(isinstance(n, str) for n in names):
            raise ValueError("malformed message")
        return dict(zip(names, values))
    return {name: entry.get(value) if isinstance(entry, Mapping) else entry for name, entry in content.items()}


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class MessageFilter:
    """Which messages are wanted; a path of a tree holds wanted ones only.

    `languages`: of `LANGUAGES`, with or without the region; None takes all. `tree_states`: None takes all, and
    so does a tree that states none. `review`: takes messages that `passed`, those that have `not_failed`, or
    `any`. `min_labels` and `max_labels` bound the labels of a message (quality, toxicity, ..., from 0 to 1); a
    message that lacks a label is below every minimum and not above any maximum.
    """

    languages: Sequence[str] | None = None
    tree_states: Sequence[str] | None = ("ready_for_export",)
    review: Literal["passed", "not_failed", "any"] = "not_failed"
    deleted: bool = False
    synthetic: bool = False
    min_labels: Mapping[str, float] = field(default_factory=dict)
    max_labels: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.languages, str) or isinstance(self.tree_states, str):
            raise ValueError("got a string, expected a sequence of languages or tree states: put it in a list")
        known = {tag for language in LANGUAGES for tag in (language.lower(), _primary(language))}
        if unknown := [tag for tag in self.languages or () if tag.lower() not in known]:
            raise ValueError(f"got the language {unknown[0]!r}, expected one of {', '.join(LANGUAGES)}")

    def refusal(self, message: Message) -> str | None:
        """Why the message is not wanted, or None if it is."""
        states, low, high = self.tree_states, self.min_labels, self.max_labels
        if states is not None and message.tree_state is not None and message.tree_state not in states:
            return "tree state"
        if message.deleted and not self.deleted:
            return "deleted"
        if message.synthetic and not self.synthetic:
            return "synthetic"
        if self.languages is not None and not any(_speaks(message.lang, tag) for tag in self.languages):
            return "language"
        if message.review_result not in REVIEWS[self.review]:
            return "review"
        below = any(message.labels.get(name, -math.inf) < bound for name, bound in low.items())
        above = any(message.labels.get(name, -math.inf) > bound for name, bound in high.items())
        return "label" if below or above else None


def _primary(tag: str) -> str:
    return tag.lower().partition("-")[0]


def _speaks(lang: str | None, tag: str) -> bool:
    return lang is not None and tag.lower() in (lang.lower(), _primary(lang))
