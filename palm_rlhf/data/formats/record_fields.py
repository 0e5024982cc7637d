"""The fields of a record: metadata, which only describes it, and text, which must not get lost."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

# Fields beside a conversation that tell where it comes from, how good it is and what it is about.
METADATA = frozenset(
    "id ids index idx uuid guid hash sha256 version split subset part model models generator source sources "
    "dataset origin domain url link links license author authors annotator annotators lang language languages "
    "locale country state header category categories subcategory topic topics tag model_name tags label labels "
    "type kind status skill skills difficulty quality score scores rating ratings rank margin toxicity "
    "redacted created updated date time timestamp tstamp metadata meta metrics stats moderation annotation "
    "annotations judge feedback critique".split()
)
METADATA_ENDS = re.compile(
    r"_(?:ids?|idx|index|hash|scores?|ratings?|rank|models?|source|url|date|time|at|type|count|lang|language|"
    r"tokens|length|version|labels?|category|license|moderation|identifier|feedback|critique|annotations?)$"
)
METADATA_STARTS = ("num_", "is_", "has_")
# Fields in which even one word is text: those of all formats, since a record may mix two, and some more.
TEXT_FIELDS = frozenset(
    "system system_prompt system_message system_instruction conversations items messages conversation prompt "
    "question instruction query problem user user_prompt user_input human input context history output "
    "response answer completion solution reply assistant chosen rejected response_j response_k responses "
    "answers completions text content value instructions persona character background hint reasoning "
    "reasoning_content thinking explanation document".split()
)
RENDERED = "text"
UNKNOWN_FIELD = "unknown field"
LABEL = re.compile(r"[!-~]{1,200}")


def is_metadata(name: str) -> bool:
    """Return whether a field of this name describes a record and holds no part of its conversation."""
    name = re.sub(r"[\s-]", "_", name.strip().lower())
    return name in METADATA or name.startswith(METADATA_STARTS) or METADATA_ENDS.search(name) is not None


def is_label(text: str) -> bool:
    """Return whether a text is one word of ASCII, as names, links and keys are."""
    return LABEL.fullmatch(text) is not None


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts in a value, in its lists and objects too, without blanks around them; empty ones are left out."""
    ahead = [value]
    while ahead:
        value = ahead.pop()
        if isinstance(value, str):
            if value.strip():
                yield value.strip()
        elif isinstance(value, dict):
            ahead += value.values()
        elif isinstance(value, list):
            ahead += value


def check_fields(
    record: dict[str, Any],
    known: Collection[str],
    texts: Collection[str],
    *,
    ignored: Collection[str] = (),
    mended: Counter[str] | None = None,
) -> None:
    """Raise ValueError if a field of a record holds text that no format knows, since a reply may depend on it.

    The text of a field is not lost if its name is in `known` or `ignored` or is that of metadata, if `texts` repeat it,
    or if it is the rendered `text` of the whole conversation. A field of labels, each one word, is left out and counted
    in `mended`, unless its name is in `TEXT_FIELDS`.

    Args:
        record: The record.
        known: The fields that the format reads.
        texts: The texts that were read from the record.
        ignored: Fields to leave out although they may hold text.
        mended: Counts the fields that are left out.
    """
    for name, value in record.items():
        if name in known or name in ignored or is_metadata(name):
            continue
        found = list(texts_in(value))
        if all(any(text in part for part in texts) for text in found) or (name == RENDERED and _renders(found, texts)):
            continue
        if name in TEXT_FIELDS or not all(map(is_label, found)):
            raise ValueError(unknown_field(name))
        if mended is not None:
            mended[f"field {shown_name(name)} left out"] += 1


def unknown_field(name: str) -> str:
    """Return the reason to refuse a record for the text in a field that no format knows."""
    return f"{UNKNOWN_FIELD} {shown_name(name)}"


def shown_name(name: object) -> str:
    """Return the name of a field or role as reasons show it."""
    return repr(name if not isinstance(name, str) or len(name) <= 32 else name[:31] + "…")[:40]


def _renders(found: list[str], texts: Collection[str]) -> bool:
    """Return whether one text holds every line of a whole conversation, as a chat template renders it."""
    lines = [line for part in texts for line in map(str.strip, part.splitlines()) if line]
    return len(texts) > 1 and len(found) == 1 and all(line in found[0] for line in lines)
