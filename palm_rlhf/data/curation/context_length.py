"""Steps that fit conversations into a context."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, chain
from typing import Literal

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.messages import Turn


@beartype
def num_utf8_bytes(text: str) -> int:
    """Return the length of a text in bytes, which are the tokens of a `ByteTokenizer`."""
    return len(text.encode())


@beartype
def num_message_tokens(
    messages: list[Turn], count_tokens: Callable[[str], int] = num_utf8_bytes, overhead: int = 0
) -> int:
    """Return the length of messages in tokens; calls of tools count as JSON text.

    Args:
        messages: The messages.
        count_tokens: Counts the tokens of a text; by default its bytes.
        overhead: The tokens that a chat template adds to each message.
    """
    texts = (message["content"] + _calls(message) for message in messages)
    return sum(count_tokens(text) + overhead for text in texts)


def _calls(message: Turn) -> str:
    return json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""


@beartype
def fit_context(
    conversations: Iterable[Record],
    context: int,
    *,
    overlong: Literal["split", "truncate"] = "split",
    count_tokens: Callable[[str], int] = num_utf8_bytes,
    overhead: int = 0,
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
) -> Iterator[Record]:
    """Yield conversations in pieces of at most `context` tokens.

    `split` cuts a conversation between a reply and the next question, as late as possible. The pieces together have
    every message once, except the system message, which every piece begins with. The `id` of a piece ends on its
    number. An exchange that is too long by itself is counted in `rejected`, and a piece ends before it.

    `truncate` keeps the exchanges that fit, from the first on; if the first does not fit, its reply is cut. A question
    is never cut. A conversation with no message but the system message is counted as "no exchange".

    Args:
        conversations: The conversations.
        context: The most tokens of a piece.
        overlong: How to fit longer conversations.
        count_tokens: Counts the tokens of a text; by default its bytes.
        overhead: The tokens that a chat template adds to each message.
        rejected: Counts the conversations and exchanges that are left out by their reasons.
        mended: Counts the conversations that are split or truncated.
    """
    if context < 1 or overhead < 0:
        raise ValueError(f"got context={context} and overhead={overhead}, expected at least 1 and 0: raise them")
    rejected = Counter() if rejected is None else rejected
    mended = Counter() if mended is None else mended
    length = partial(num_message_tokens, count_tokens=count_tokens, overhead=overhead)
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


def _exchanges(messages: list[Turn]) -> tuple[list[Turn], list[list[Turn]]]:
    """Return the system messages at the start, and the others in groups that begin with the user's."""
    start = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    groups: list[list[Turn]] = []
    for message in messages[start:]:
        if message["role"] == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return messages[:start], groups


def _split(
    exchanges: list[list[Turn]], room: int, length: Callable[[list[Turn]], int], rejected: Counter[str]
) -> Iterator[list[Turn]]:
    piece: list[Turn] = []
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
    exchanges: list[list[Turn]], room: int, length: Callable[[list[Turn]], int], rejected: Counter[str]
) -> list[list[Turn]]:
    """Return the exchanges that fit as one piece, or no piece."""
    sizes = accumulate(map(length, exchanges))
    kept = [exchange for exchange, size in zip(exchanges, sizes) if size <= room] or _cut(exchanges[:1], room, length)
    if not kept:
        rejected["question longer than the context"] += 1
        return []
    return [[*chain.from_iterable(kept)]]


def _cut(exchanges: list[list[Turn]], room: int, length: Callable[[list[Turn]], int]) -> list[list[Turn]]:
    """Return the first exchange with as much of its reply as fits."""
    *question, reply = exchanges[0]
    if reply["role"] != "assistant":
        return []

    def up_to(end: int) -> list[Turn]:
        return [*question, {**reply, "content": reply["content"][:end].rstrip()}]

    fits, too_long = 0, len(reply["content"])
    while fits + 1 < too_long:
        middle = (fits + too_long) // 2
        if length(up_to(middle)) <= room:
            fits = middle
        else:
            too_long = middle
    return [up_to(fits)] if up_to(fits)[-1]["content"] else []
