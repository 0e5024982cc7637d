"""Dialogues in one text, as Anthropic writes them: `Human:` and `Assistant:` at the start of paragraphs."""

import re

from beartype import beartype

START = re.compile(r"\s*(Human|Assistant):")
TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@beartype
def is_transcript(text: object) -> bool:
    """Return whether a value is a text that starts with `Human:` or `Assistant:`."""
    return isinstance(text, str) and START.match(text) is not None


@beartype
def parse_transcript(text: str, role: str) -> list[dict[str, str]]:
    """Return the messages of a dialogue; any other text is one message of `role`."""
    if not is_transcript(text):
        return [{"role": role, "content": text.strip()}]
    _, *parts = TURN.split(text)
    return [{"role": SPEAKERS[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2])]
