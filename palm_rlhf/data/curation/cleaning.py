"""Steps that mend conversations: HTML, the words of copied buttons, messages out of order."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from beartype import beartype

from palm_rlhf.data.curation.copied_buttons import without_copied_buttons, without_page_counter
from palm_rlhf.data.curation.html_to_markdown import html_to_markdown, without_unread
from palm_rlhf.data.curation.page_detection import are_pages
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.messages import Turn

Html = Literal["auto", "always", "never"]
# Questions and replies by the first letters of roles; before a reply the assistant may call tools, which answer it.
EXCHANGES = re.compile(r"(?:u(?:at+)*a)*u?")


@beartype
def to_markdown(
    conversations: Iterable[Record],
    html: Html = "auto",
    *,
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
) -> Iterator[Record]:
    """Yield conversations with every message in Markdown, without the words of copied buttons and blanks around it.

    Conversations with HTML that cannot be parsed are counted in `rejected`, and changes in `mended`.

    Args:
        conversations: The conversations.
        html: The messages to convert; `auto` converts pieces of a chat's page (see `are_pages`), so that HTML which
            a user asked for stays.
        rejected: Counts the conversations that are left out by their reasons.
        mended: Counts the changes by their kinds.
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


def _in_markdown(messages: list[Turn], html: Html, mended: Counter[str]) -> list[Turn]:
    pages = are_pages(messages) if html == "auto" else [html == "always"] * len(messages)
    # The results of tools stay to the letter.
    return [
        message if message["role"] == "tool" else _cleaned(message, page, mended)
        for message, page in zip(messages, pages)
    ]


def _cleaned(message: Turn, is_page: bool, mended: Counter[str]) -> Turn:
    text = message["content"]
    if is_page:
        text = html_to_markdown(without_page_counter(without_unread(text)))
        mended["HTML to Markdown"] += 1
    text = text.strip()
    plain = without_copied_buttons(text, message["role"])
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
    """Yield conversations in which user and assistant alternate, from a question to a reply.

    A system message may come first. Between a question and its reply the assistant may call tools, each call before its
    results. Messages of the assistant before the first question, messages of others after the last reply, and all
    messages from the first empty one on are dropped and counted in `mended`. A conversation without an exchange, or
    with roles in another order, is counted in `rejected`.

    Args:
        conversations: The conversations.
        keep_question: Keep a last question without a reply, and count conversations without a question.
        rejected: Counts the conversations that are left out by their reasons.
        mended: Counts the changes by their kinds.
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
    """Yield the conversations that are prompts as they are: roles as in `mend_turns`, and a last question."""
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


def _is_empty(turn: Turn) -> bool:
    """Return whether a message is empty; the result of a tool may be."""
    return not (turn["content"].strip() or turn.get("tool_calls") or turn["role"] == "tool")


def _split_system(messages: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """Return the system message at the start, unless it is empty, and the other messages."""
    if messages and messages[0]["role"] == "system":
        return [message for message in messages[:1] if message["content"].strip()], messages[1:]
    return [], messages
