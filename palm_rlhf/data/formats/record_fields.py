"""The fields of a record: those that only describe it, and those that hold text which must not get lost."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

# What people write beside a conversation to say where it comes from, how good it is and what it is about.
METADATA = frozenset(
    (
        *("id", "ids", "index", "idx", "uuid", "guid", "hash", "sha256", "version", "split", "subset", "part"),
        *("model", "models", "generator", "source", "sources", "dataset", "origin", "domain", "url", "link", "links"),
        *("license", "author", "authors", "annotator", "annotators", "lang", "language", "languages"),
        *("locale", "country", "state", "header", "category", "categories", "subcategory", "topic", "topics", "tag"),
        *("model_name", "tags", "label", "labels", "type", "kind", "status", "skill", "skills", "difficulty"),
        *("quality", "score", "scores", "rating", "ratings", "rank", "margin", "toxicity", "redacted", "created"),
        *("updated", "date", "time", "timestamp", "tstamp", "metadata", "meta", "metrics", "stats", "moderation"),
        *("annotation", "annotations", "judge", "feedback", "critique"),
    )
)
METADATA_ENDS = re.compile(
    r"_(?:ids?|idx|index|hash|scores?|ratings?|rank|models?|source|url|date|time|at|type|count|lang|language|"
    r"tokens|length|version|labels?|category|license|moderation|identifier|feedback|critique|annotations?)$"
)
METADATA_STARTS = ("num_", "is_", "has_")
# Names under which even one word is text: those of the forms, of which a record may mix two, and some more.
SPOKEN = frozenset(
    (
        *("system", "system_prompt", "system_message", "system_instruction", "conversations", "items", "messages"),
        *("conversation", "prompt", "question", "instruction", "query", "problem", "user", "user_prompt", "user_input"),
        *("human", "input", "context", "history", "output", "response", "answer", "completion", "solution", "reply"),
        *("assistant", "chosen", "rejected", "response_j", "response_k"),
        *("responses", "answers", "completions", "text", "content", "value", "instructions", "persona", "character"),
        *("background", "hint", "reasoning", "reasoning_content", "thinking", "explanation", "document"),
    )
)
RENDERED = "text"
UNKNOWN_FIELD = "unknown field"
LABEL = re.compile(r"[!-~]{1,200}")


def is_metadata(name: str) -> bool:
    """Whether a field of this name describes a record and holds nothing of what is said in it."""
    name = re.sub(r"[\s-]", "_", name.strip().lower())
    return name in METADATA or name.startswith(METADATA_STARTS) or METADATA_ENDS.search(name) is not None


def is_label(text: str) -> bool:
    """Whether a text is one word of ASCII, as names, links and keys are."""
    return LABEL.fullmatch(text) is not None


def texts_in(value: Any) -> Iterator[str]:
    """The texts in a value, also in the lists and objects in it, without blanks around them; no empty ones."""
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
    said: Collection[str],
    *,
    ignored: Collection[str] = (),
    mended: Counter[str] | None = None,
) -> None:
    """`ValueError` for a field of a record that holds text which nothing is known about.

    Such text may be what a reply answers to. It is no loss where the field is `known` to the form, in `ignored`
    or metadata by its name, and where it repeats a part of `said`, or is the `text` that a template made of all of
    it. A field that holds only labels, each one word, is left out and counted in `mended`, unless its name is in
    `SPOKEN`.
    """
    for name, value in record.items():
        if name in known or name in ignored or is_metadata(name):
            continue
        texts = list(texts_in(value))
        if all(any(text in part for part in said) for text in texts) or (name == RENDERED and _renders(texts, said)):
            continue
        if name in SPOKEN or not all(map(is_label, texts)):
            raise ValueError(unknown_field(name))
        if mended is not None:
            mended[f"field {shown(name)} left out"] += 1


def unknown_field(name: str) -> str:
    """The reason to refuse a record for the text in its field."""
    return f"{UNKNOWN_FIELD} {shown(name)}"


def shown(name: object) -> str:
    """The name of a field or role as reasons have it."""
    return repr(name if not isinstance(name, str) or len(name) <= 32 else name[:31] + "…")[:40]


def _renders(texts: list[str], said: Collection[str]) -> bool:
    lines = [line for part in said for line in map(str.strip, part.splitlines()) if line]
    return len(said) > 1 and len(texts) == 1 and all(line in texts[0] for line in lines)
