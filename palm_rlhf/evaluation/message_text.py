"""Text from messages and answers in the shapes that servers and benchmarks use."""

import math
import re
from collections.abc import Sequence
from typing import Any

from beartype import beartype

TEXT_PARTS = (None, "text", "input_text", "output_text")  # other types are reasoning, images and tool calls
TEXT_FIELDS = ("text", "content", "value")
MAX_LEVELS = 4  # a message, its content, a part of the content, the text of the part

THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
# If the prompt ends with the opening tag, the reply has the closing tag only.
THOUGHT_END = re.compile(
    r"^[ \t]*</(?:think|thinking|thought|reasoning)>|</(?:think|thinking|thought|reasoning)>[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)


@beartype
def text_of(content: Any, levels: int = MAX_LEVELS) -> str | None:
    """Return the joined text parts of a message, its content or one of its parts, or None without text.

    Parts of other types, such as reasoning or images, are skipped. Raises ValueError for a value of another type.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, dict | list) or levels == 0:
        raise ValueError(f"got {repr(content)[:40]}, expected a text, or parts with one")
    if isinstance(content, list):
        texts = [text for part in content if (text := text_of(part, levels - 1)) is not None]
        return "".join(texts) if texts else None
    if content.get("type") not in TEXT_PARTS:
        return None
    fields = [content[key] for key in TEXT_FIELDS if content.get(key) is not None]
    return text_of(fields[0], levels - 1) if fields else None


@beartype
def texts_of_choice(choice: Any) -> list[str]:
    """Return the texts of one of the ``choices`` of a record: MT-bench's turns, a server's message, or a text."""
    if isinstance(choice, dict) and choice.get("turns") is not None:
        return texts_of_turns(choice["turns"])
    text = text_of(choice.get("message", choice) if isinstance(choice, dict) else choice)
    return [] if text is None else [text]


@beartype
def texts_of_turns(turns: Any) -> list[str]:
    """Return the text of each turn of a list, or a single text. Raises ValueError for a turn without text."""
    texts = []
    for place, turn in enumerate(turns if isinstance(turns, list | tuple) else [turns], start=1):
        text = text_of(turn)
        if text is None:
            raise ValueError(f"turn {place} has no text")
        texts.append(text)
    return texts


@beartype
def without_thoughts(text: str) -> str:
    """Return the text after a model's reasoning (``<think>...</think>``); nothing if the reasoning has no end."""
    while thought := THOUGHT.match(text):
        text = text[thought.end() :]
    *_, end = [0, *(found.end() for found in THOUGHT_END.finditer(text))]
    return text[end:]


@beartype
def name_of(value: Any, what: str) -> str:
    """Return a name or an id as a string. Raises ValueError unless it is a non-empty string or an integer."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"got {repr(value)[:40]} as {what}, expected a text or a number")
    return str(value)


@beartype
def finite_numbers(value: Any, count: int) -> Sequence[float] | None:
    """Return a list of `count` finite numbers as floats, or None for any other value."""
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        return None
    try:
        numbers = [float(number) for number in value]
    except OverflowError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None
