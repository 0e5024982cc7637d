"""Steps that mend conversations, each a generator over them: HTML, debris of buttons, turns out of order."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from beartype import beartype

from palm_rlhf.data.markdown import html_to_markdown, is_html, without_debris
from palm_rlhf.data.records import Record

Messages = list[dict[str, Any]]


@beartype
def to_markdown(
    conversations: Iterable[Record],
    html: Literal["auto", "always", "never"] = "auto",
    *,
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
) -> Iterator[Record]:
    """The conversations with every message in Markdown, without the debris of buttons and blanks around it.

    ``html``: which messages are HTML; ``auto`` asks ``is_html``. A conversation with HTML that cannot be read is
    counted in ``rejected``, what was converted or removed in ``mended``.
    """
    rejected = Counter() if rejected is None else rejected
    mended = Counter() if mended is None else mended
    for conversation in conversations:
        try:
            messages = [_in_markdown(message, html, mended) for message in conversation["messages"]]
        except ValueError as error:
            rejected[str(error)] += 1
        else:
            yield {**conversation, "messages": messages}


def _in_markdown(message: dict[str, Any], html: str, mended: Counter[str]) -> dict[str, Any]:
    text = message["content"]
    if html == "always" or (html == "auto" and is_html(text, message["role"])):
        text = html_to_markdown(text)
        mended["HTML to Markdown"] += 1
    text = text.strip()
    plain = without_debris(text)
    if plain != text:
        mended["debris of buttons removed"] += 1
    return {**message, "content": plain}


@beartype
def mend_turns(
    conversations: Iterable[Record], *, rejected: Counter[str] | None = None, mended: Counter[str] | None = None
) -> Iterator[Record]:
    """The conversations as a user and an assistant in turn, from a question to a reply, maybe after a system message.

    The assistant's turns before the first question and the user's after the last reply are dropped, and so is all
    from the first empty message on (both are counted in ``mended``). What has no exchange left, or two turns of one
    role in a row, is counted in ``rejected``.
    """
    rejected = Counter() if rejected is None else rejected
    mended = Counter() if mended is None else mended
    for conversation in conversations:
        system, turns = _split_system(conversation["messages"])
        start = next((i for i, turn in enumerate(turns) if turn["role"] != "assistant"), len(turns))
        stop = next((i for i, turn in enumerate(turns) if i >= start and not turn["content"].strip()), len(turns))
        end = stop
        while end > start and turns[end - 1]["role"] == "user":
            end -= 1
        exchanges = turns[start:end]
        if not exchanges:
            rejected["no exchange"] += 1
        elif [turn["role"] for turn in exchanges] != ["user", "assistant"] * (len(exchanges) // 2):
            rejected["roles do not alternate"] += 1
        else:
            mended["leading assistant turns dropped"] += start
            mended["turns from an empty message on dropped"] += len(turns) - stop
            mended["trailing user turns dropped"] += stop - end
            yield {**conversation, "messages": system + exchanges}


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    """The system message with which a conversation starts, if it says anything, and the rest."""
    if messages and messages[0]["role"] == "system":
        return [message for message in messages[:1] if message["content"].strip()], messages[1:]
    return [], messages
