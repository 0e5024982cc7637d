"""Steps that bring conversations to the length of a context, and hold some of them out."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, chain
from typing import Any, Literal

from beartype import beartype

from palm_rlhf.data.files.json_record import Record

Messages = list[dict[str, Any]]


@beartype
def num_bytes(text: str) -> int:
    """The length of a text in the tokens of bytes."""
    return len(text.encode())


@beartype
def num_tokens_of(messages: Messages, count_tokens: Callable[[str], int] = num_bytes, overhead: int = 0) -> int:
    """The length of messages, with `overhead` tokens for the marks that a template adds to each.

    Calls of tools count as the JSON that they are.
    """
    texts = (message["content"] + _calls(message) for message in messages)
    return sum(count_tokens(text) + overhead for text in texts)


def _calls(message: dict[str, Any]) -> str:
    return json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""


@beartype
def fit_context(
    conversations: Iterable[Record],
    context: int,
    *,
    overlong: Literal["split", "truncate"] = "split",
    count_tokens: Callable[[str], int] = num_bytes,
    overhead: int = 0,
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
) -> Iterator[Record]:
    """The conversations in pieces of at most `context` tokens, bytes unless told how to count.

    `split` cuts them between a reply and the next question, as late as possible, so that the pieces together have
    every message once; the system message, which is in every one, apart. The `id` of a piece ends on its number.
    An exchange that is too long by itself is counted in `rejected`, and a piece ends before it.

    `truncate` keeps the exchanges that fit, from the first on; if not even that does, the start of its reply. Only a
    reply is cut, never a question. A conversation without a message but the system's is counted as "no exchange".
    `overhead`: tokens that a template adds to each message.
    """
    if context < 1 or overhead < 0:
        raise ValueError(f"got context={context} and overhead={overhead}, expected at least 1 and 0")
    rejected = Counter() if rejected is None else rejected
    mended = Counter() if mended is None else mended
    length = partial(num_tokens_of, count_tokens=count_tokens, overhead=overhead)
    for conversation in conversations:
        system, exchanges = _exchanges(conversation["messages"])
        if not exchanges:
            rejected["no exchange"] += 1
            continue
        room = context - length(system)
        if overlong == "split":
            pieces = list(_split(exchanges, room, length, rejected))
            mended["conversations split"] += len(pieces) > 1
        else:
            pieces = _truncated(exchanges, room, length, rejected)
            mended["conversations truncated"] += bool(pieces) and pieces != [[*chain.from_iterable(exchanges)]]
        for number, piece in enumerate(pieces):
            marked = {"id": f"{conversation['id']}_{number}"} if len(pieces) > 1 and "id" in conversation else {}
            yield {**conversation, **marked, "messages": system + piece}


def _exchanges(messages: Messages) -> tuple[Messages, list[Messages]]:
    """The system messages at the start, and the others in groups that start at the user's."""
    start = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    groups: list[Messages] = []
    for message in messages[start:]:
        if message["role"] == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return messages[:start], groups


def _split(
    exchanges: list[Messages], room: int, length: Callable[[Messages], int], rejected: Counter[str]
) -> Iterator[Messages]:
    piece: Messages = []
    used = 0
    for exchange in exchanges:
        size = length(exchange)
        if piece and used + size > room:
            yield piece
            piece, used = [], 0
        if size > room:
            rejected["exchange longer than the context"] += 1
        else:
            piece, used = piece + exchange, used + size
    if piece:
        yield piece


def _truncated(
    exchanges: list[Messages], room: int, length: Callable[[Messages], int], rejected: Counter[str]
) -> list[Messages]:
    """The exchanges that fit as one piece, or none."""
    sizes = accumulate(map(length, exchanges))
    kept = [exchange for exchange, size in zip(exchanges, sizes) if size <= room] or _cut(exchanges[:1], room, length)
    if not kept:
        rejected["question longer than the context"] += 1
        return []
    return [[*chain.from_iterable(kept)]]


def _cut(exchanges: list[Messages], room: int, length: Callable[[Messages], int]) -> list[Messages]:
    """The first exchange with as much of its reply as there is room for."""
    *question, reply = exchanges[0]
    if reply["role"] != "assistant":
        return []

    def upto(end: int) -> Messages:
        return [*question, {**reply, "content": reply["content"][:end].rstrip()}]

    fits, too_long = 0, len(reply["content"])
    while fits + 1 < too_long:
        middle = (fits + too_long) // 2
        if length(upto(middle)) <= room:
            fits = middle
        else:
            too_long = middle
    return [upto(fits)] if upto(fits)[-1]["content"] else []
