"""Steps that mend conversations, each a generator over them: HTML, debris of buttons, turns out of order."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from beartype import beartype

from palm_rlhf.data.markdown import html_to_markdown, is_html, without_debris
from palm_rlhf.data.records import Record

Messages = list[dict[str, Any]]
# A question and its reply, before which the assistant may call tools that answer it: by the first letters of roles.
EXCHANGES = re.compile(r"(?:u(?:at+)*a)*")


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
    if message["role"] == "tool":
        return message  # what a program said, to the letter
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

    Between a question and its reply the assistant may call tools, each call before the answers to it. The assistant's
    turns before the first question and those of others after the last reply are dropped, and so is all from the first
    empty message on (both are counted in ``mended``). What has no exchange left, or roles in another order, is counted
    in ``rejected``.
    """
    rejected = Counter() if rejected is None else rejected
    mended = Counter() if mended is None else mended
    for conversation in conversations:
        system, turns = _split_system(conversation["messages"])
        start = next((i for i, turn in enumerate(turns) if turn["role"] != "assistant"), len(turns))
        stop = next((i for i, turn in enumerate(turns) if i >= start and _is_empty(turn)), len(turns))
        end = stop
        while end > start and turns[end - 1]["role"] in ("user", "tool"):
            end -= 1
        exchanges = turns[start:end]
        if not exchanges:
            rejected["no exchange"] += 1
        elif not EXCHANGES.fullmatch("".join(turn["role"][0] for turn in exchanges)):
            rejected["roles do not alternate"] += 1
        else:
            mended["leading assistant turns dropped"] += start
            mended["turns from an empty message on dropped"] += len(turns) - stop
            mended["trailing user turns dropped"] += stop - end
            yield {**conversation, "messages": system + exchanges}


def _is_empty(turn: dict[str, Any]) -> bool:
    """Whether a message says nothing; a tool may answer with nothing."""
    return not (turn["content"].strip() or turn.get("tool_calls") or turn["role"] == "tool")


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    """The system message with which a conversation starts, if it says anything, and the rest."""
    if messages and messages[0]["role"] == "system":
        return [message for message in messages[:1] if message["content"].strip()], messages[1:]
    return [], messages
