"""One message of an Open-Assistant tree: its fields, and filters for messages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from beartype import beartype

# The languages of the Open-Assistant Conversations (https://arxiv.org/abs/2304.07327), those with most messages first.
LANGUAGES = tuple(
    "en es ru de zh fr th pt-BR ca ko uk-UA it ja vi eu pl hu ar nl sv tr fi cs da gl he ro nb-NO id bg bn fa "
    "el eo sk".split()
)
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
REVIEWS = {"passed": (True,), "not_failed": (True, None), "any": (True, None, False)}


@dataclass(eq=False, slots=True)
class OasstMessage:
    """A message with its place in the tree; `replies` are sorted by rank, and replies without a rank come last.

    `rank` counts from 0, the best. `contested` is whether the message had siblings before any was left out.
    `tree_state` is None below the root, and `review_result` is None before a review.
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
    parent: "OasstMessage | None" = field(default=None, repr=False)
    replies: "list[OasstMessage]" = field(default_factory=list, repr=False)
    contested: bool = False

    @property
    def sort_key(self) -> tuple[float, str]:
        return math.inf if self.rank is None else self.rank, self.message_id

    def path(self) -> "list[OasstMessage]":
        """Return the messages from the root to this one."""
        path = [self]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        return path[::-1]


def parse_oasst_message(record: Any, parent_id: str | None, tree_state: Any) -> OasstMessage:
    """Return the message of a record; ValueError with the reason if it is malformed."""
    if not isinstance(record, Mapping):
        raise ValueError("malformed message")
    message_id, text = record.get("message_id"), record.get("text")
    if not (isinstance(message_id, str) and message_id and isinstance(text, str)):
        raise ValueError("malformed message")
    role: Any = record.get("role")  # checked below
    rank = record.get("rank")
    if isinstance(rank, float) and rank.is_integer():
        rank = int(rank)  # a column with missing values holds floats
    message = OasstMessage(
        message_id=message_id,
        parent_id=parent_id,
        role=role,
        text=text,
        rank=rank,
        lang=record.get("lang"),
        review_result=record.get("review_result"),
        deleted=record.get("deleted") or False,
        synthetic=record.get("synthetic") or False,
        tree_state=tree_state,
        labels=_columns(record.get("labels"), "value"),
        emojis=_columns(record.get("emojis"), "count"),
    )
    _check_types(message)
    return message


def _check_types(message: OasstMessage) -> None:
    """Raise ValueError for a value that the JSON of a record should not have."""
    optional_texts = (message.parent_id, message.lang, message.tree_state)
    flags = (message.deleted, message.synthetic, message.review_result or False)
    numbers = (*message.labels.values(), *message.emojis.values())
    if not (
        all(text is None or isinstance(text, str) for text in optional_texts)
        and all(isinstance(flag, bool) for flag in flags)
        and (message.rank is None or (type(message.rank) is int and message.rank >= 0))
        and all(type(number) in (int, float) for number in numbers)
    ):
        raise ValueError("malformed message")
    if not isinstance(message.role, str) or message.role not in OASST_ROLES:
        raise ValueError("unknown role")


def _columns(content: Any, value: str) -> dict[str, Any]:
    """Return numbers by name, from `{name: {value: x}}`, `{name: x}` or `{"name": [...], value: [...]}`."""
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


@beartype
@dataclass(frozen=True)
class MessageFilter:
    """The messages to read; a path of a tree holds only such messages.

    Args:
        languages: Languages out of `LANGUAGES`, with or without the region; None reads all.
        tree_states: States of trees; None reads all, and so does a tree without a state.
        review: Whether to read messages that `passed` the review, messages that have `not_failed` it, or `any`.
        deleted: Whether to read deleted messages.
        synthetic: Whether to read messages that a model wrote.
        min_labels: The lowest value of each label (quality, toxicity, ..., from 0 to 1); a message without the
            label is below it.
        max_labels: The highest value of each label; a message without the label is not above it.
    """

    languages: Sequence[str] | None = None
    tree_states: Sequence[str] | None = ("ready_for_export",)
    review: Literal["passed", "not_failed", "any"] = "not_failed"
    deleted: bool = False
    synthetic: bool = False
    min_labels: Mapping[str, int | float] = field(default_factory=dict)
    max_labels: Mapping[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.languages, str) or isinstance(self.tree_states, str):
            raise ValueError("got a string, expected a sequence of languages or tree states: put it in a list")
        known = {tag for language in LANGUAGES for tag in (language.lower(), _primary(language))}
        if unknown := [tag for tag in self.languages or () if tag.lower() not in known]:
            raise ValueError(f"got the language {unknown[0]!r}, expected one of {', '.join(LANGUAGES)}")

    def refusal(self, message: OasstMessage) -> str | None:
        """Return why the message is not wanted, or None if it is."""
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
