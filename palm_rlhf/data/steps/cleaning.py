"""Steps that mend conversations, each a generator over them: HTML, debris of buttons, turns out of order."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.steps.copied_buttons import without_debris, without_page_counter
from palm_rlhf.data.steps.html_to_markdown import html_to_markdown, without_unread
from palm_rlhf.data.steps.page_detection import are_pages

Html = Literal["auto", "always", "never"]
Messages = list[dict[str, Any]]
# A question and its reply, before which the assistant may call tools that answer it: by the first letters of roles.
EXCHANGES = re.compile(r"(?:u(?:at+)*a)*u?")


@beartype
def to_markdown(
    conversations: Iterable[Record],
    html: Html = "auto",
    *,
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
) -> Iterator[Record]:
    """The conversations with every message in Markdown, without the debris of buttons and blanks around it.

    `html`: which messages to convert; `auto` takes those of a chat's page (`are_pages`), so that HTML which was
    asked for stays. A conversation with HTML that cannot be read is
    counted in `rejected`, what was converted or removed in `mended`.
    """
    rejected = Counter() if rejected is None else rejected
    mended = Counter() if mended is None else mended
    for conversation in conversations:
        try:
            messages = _in_markdown(conversation["messages"], html, mended)
        except ValueError as error:
            rejected[str(error)] += 1
        else:
            yield {**conversation, "messages": messages}


def _in_markdown(messages: Messages, html: Html, mended: Counter[str]) -> Messages:
    pages = are_pages(messages) if html == "auto" else [html == "always"] * len(messages)
    # What a program said stays to the letter.
    return [
        message if message["role"] == "tool" else _cleaned(message, page, mended)
        for message, page in zip(messages, pages)
    ]


def _cleaned(message: dict[str, Any], is_page: bool, mended: Counter[str]) -> dict[str, Any]:
    text = message["content"]
    if is_page:
        text = html_to_markdown(without_page_counter(without_unread(text)))
        mended["HTML to Markdown"] += 1
    text = text.strip()
    plain = without_debris(text, message["role"])
    if plain != text:
        mended["debris of buttons removed"] += 1
    return {**message, "content": plain}


@beartype
def mend_turns(
    conversations: Iterable[Record],
    *,
    keep_question: bool = False,
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
) -> Iterator[Record]:
    """The conversations as a user and an assistant in turn, from a question to a reply, maybe after a system message.

    Between a question and its reply the assistant may call tools, each call before the answers to it. The assistant's
    turns before the first question and those of others after the last reply are dropped, and so is all from the first
    empty message on (both are counted in `mended`). What has no exchange left, or roles in another order, is counted
    in `rejected`. `keep_question` keeps a question at the end that has no reply, and counts what has no question.
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
        if keep_question and end < stop and turns[end]["role"] == "user":
            end += 1
        exchanges = turns[start:end]
        if not exchanges:
            rejected["no question" if keep_question else "no exchange"] += 1
        elif not EXCHANGES.fullmatch("".join(turn["role"][0] for turn in exchanges)):
            rejected["roles do not alternate"] += 1
        else:
            mended["leading assistant turns dropped"] += start
            mended["turns from an empty message on dropped"] += len(turns) - stop
            mended["trailing user turns dropped"] += stop - end
            yield {**conversation, "messages": system + exchanges}


@beartype
def whole_prompts(conversations: Iterable[Record], *, rejected: Counter[str] | None = None) -> Iterator[Record]:
    """The conversations that are prompts as they are: roles in the order of `mend_turns` up to a last question."""
    rejected = Counter() if rejected is None else rejected
    for conversation in conversations:
        _, turns = _split_system(conversation["messages"])
        roles = "".join(turn["role"][0] for turn in turns)
        if not roles.endswith("u") or any(map(_is_empty, turns)):
            rejected["no question"] += 1
        elif not EXCHANGES.fullmatch(roles):
            rejected["roles do not alternate"] += 1
        else:
            yield conversation


def _is_empty(turn: dict[str, Any]) -> bool:
    """Whether a message says nothing; a tool may answer with nothing."""
    return not (turn["content"].strip() or turn.get("tool_calls") or turn["role"] == "tool")


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    """The system message with which a conversation starts, if it says anything, and the rest."""
    if messages and messages[0]["role"] == "system":
        return [message for message in messages[:1] if message["content"].strip()], messages[1:]
    return [], messages
