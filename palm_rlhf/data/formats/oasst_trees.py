"""Open-Assistant message trees, and the threads, rankings and prompts to train on.

Köpf et al., "OpenAssistant Conversations" (https://arxiv.org/abs/2304.07327).
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import MAX_RECORD_BYTES, read_records, unexpected_record
from palm_rlhf.data.formats.oasst_messages import OASST_ROLES, MessageFilter, OasstMessage, parse_oasst_message

# The deepest tree of Open-Assistant has about 20 levels; the threads of a chain of n messages hold n^2 messages.
MAX_DEPTH = 1000


@beartype
def is_oasst(record: Record) -> bool:
    """Return whether a record is an Open-Assistant tree or message."""
    return _is_tree(record) or _is_message(record)


def _is_tree(record: Record) -> bool:
    return isinstance(record.get("prompt"), dict) and "message_id" in record["prompt"]


def _is_message(record: Record) -> bool:
    return "message_id" in record and "role" in record


@beartype
def read_trees(
    path: str | os.PathLike[str],
    wanted: MessageFilter | None = None,
    *,
    skip_broken: bool = False,
    rejected: Counter[str] | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[OasstMessage]:
    """Yield the roots of the message trees of a file, with the wanted messages only.

    The file holds trees, or messages in any order that name their parents (with labels and emojis by name, or in the
    columns of Hugging Face). Trees come one by one in the order of the file. Single messages are held in memory until
    the last is read, and their trees come in the order of the ids of their roots.

    A message that is left out is counted in `rejected` by its reason: that of `wanted`; malformed, without text, of an
    unknown role or of one that does not alternate (a root is a prompter); deeper than `MAX_DEPTH`; with the id of
    another; an orphan (its parent is missing); or in a cycle. Messages below it are counted as such.

    Raises the errors of `read_records`, and ValueError if the first record is neither a tree nor a message.

    Args:
        path: The file.
        wanted: The messages to read.
        skip_broken: See `read_records`.
        rejected: Counts the messages that are left out by their reasons.
        max_record_bytes: The longest record to read.
    """
    wanted = MessageFilter() if wanted is None else wanted
    rejected = Counter() if rejected is None else rejected
    flat: list[OasstMessage] = []
    seen: set[str] = set()
    records = read_records(path, skip_broken=skip_broken, rejected=rejected, max_record_bytes=max_record_bytes)
    for number, (line, record) in enumerate(records):
        if _is_tree(record):
            yield from _usable(_link(_nested(record, rejected), rejected), seen, wanted, rejected)
        elif _is_message(record):
            flat += _parsed(record, record.get("parent_id"), record.get("tree_state"), rejected)
        elif number == 0:
            expected = "an Open-Assistant tree (message_tree_id, prompt) or message (message_id, parent_id, role, text)"
            raise unexpected_record(path, line, record, expected)
        else:
            rejected["no tree or message"] += 1
    roots = sorted(_link(flat, rejected), key=lambda root: root.message_id)
    yield from _usable(roots, seen, wanted, rejected)


@beartype
def walk(root: OasstMessage, top_k: int | None = None) -> Iterator[OasstMessage]:
    """Yield the messages of a tree, each before its replies, the best replies first.

    With `top_k`, messages of the assistant with a rank of `top_k` or more (counted from 0), or with siblings but
    without a rank, are left out, and so are the messages below them.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"got top_k={top_k}, expected at least 1, the best reply only")
    ahead = [root]
    while ahead:
        message = ahead.pop()
        if _ranks(message, top_k):
            yield message
            ahead += reversed(message.replies)


@beartype
def threads(root: OasstMessage, top_k: int | None = None) -> Iterator[Record]:
    """Yield conversations to fine-tune on, `{"messages": [...]}`: the paths to the last messages of the assistant.

    A message is last if no message of the assistant is below it, or with `top_k`, none that `walk` yields.
    """
    for message in walk(root, top_k):
        if message.role == "assistant":
            below = (answer for reply in message.replies for answer in reply.replies)
            if not any(_ranks(answer, top_k) for answer in below):
                yield {"messages": conversation(message)}


@beartype
def rankings(
    root: OasstMessage,
    top_k: int | None = None,
    *,
    max_replies: int | None = None,
    rejected: Counter[str] | None = None,
) -> Iterator[Record]:
    """Yield ranked replies for a reward model, `{"prompt": [...], "responses": [best first]}`.

    Each path that ends on a prompter with more than one ranked reply has one. A reply with the rank of an earlier one
    (ordered by id), or with the text of an earlier one, is left out and counted in `rejected`.

    Args:
        root: The tree.
        top_k: See `walk`; it holds for the messages of the prompt.
        max_replies: Keeps the best replies only.
        rejected: Counts the replies that are left out by their reasons.
    """
    if max_replies is not None and max_replies < 2:
        raise ValueError(f"got max_replies={max_replies}, expected at least 2: a single reply has no rank")
    rejected = Counter() if rejected is None else rejected
    for message in walk(root, top_k):
        if message.role != "prompter":
            continue
        ranked: dict[int, str] = {}
        for reply in message.replies:
            if reply.rank is None:
                continue
            if reply.rank in ranked:
                rejected["tied replies"] += 1
            elif reply.text in ranked.values():
                rejected["equal replies"] += 1
            else:
                ranked[reply.rank] = reply.text
        if len(ranked) > 1:
            yield {"prompt": conversation(message), "responses": list(ranked.values())[:max_replies]}


@beartype
def prompts(root: OasstMessage) -> Iterator[Record]:
    """Yield the prompts for reinforcement learning, `{"prompt": [...]}`: every path that ends on a prompter."""
    for message in walk(root):
        if message.role == "prompter":
            yield {"prompt": conversation(message)}


@beartype
def conversation(message: OasstMessage) -> list[dict[str, str]]:
    """Return the path from the root to the message, in the usual names of roles."""
    return [{"role": OASST_ROLES[part.role], "content": part.text} for part in message.path()]


def _ranks(message: OasstMessage, top_k: int | None) -> bool:
    if top_k is None or message.role != "assistant":
        return True
    return not message.contested if message.rank is None else message.rank < top_k


def _parsed(record: Any, parent_id: Any, tree_state: Any, rejected: Counter[str]) -> list[OasstMessage]:
    try:
        return [parse_oasst_message(record, parent_id, tree_state)]
    except ValueError as error:
        rejected[str(error)] += 1
        return []


def _nested(tree: Record, rejected: Counter[str]) -> Iterator[OasstMessage]:
    """Yield the messages of a tree, each with the id of the message around it as its parent."""
    ahead: list[tuple[Any, str | None, Any]] = [(tree["prompt"], None, tree.get("tree_state"))]
    while ahead:
        record, parent_id, tree_state = ahead.pop()
        yield from _parsed(record, parent_id, tree_state, rejected)
        if isinstance(record, dict):
            message_id, replies = record.get("message_id"), record.get("replies") or []
            # Replies to a message without an id are orphans, as in a file of single messages.
            parent = message_id if isinstance(message_id, str) else ""
            ahead += [(reply, parent, None) for reply in (replies if isinstance(replies, list) else [replies])]


def _link(messages: Iterable[OasstMessage], rejected: Counter[str]) -> list[OasstMessage]:
    """Join messages to trees and return the roots; the order of the messages does not matter."""
    by_id: dict[str, OasstMessage] = {}
    for message in messages:
        other = by_id.setdefault(message.message_id, message)
        if other is not message:
            rejected["duplicate message"] += 1
            by_id[message.message_id] = min(message, other, key=lambda copy: (copy.parent_id is not None, repr(copy)))
    for message in by_id.values():
        message.parent = None if message.parent_id is None else by_id.get(message.parent_id)
        if message.parent is not None:
            message.parent.replies.append(message)
    for message in by_id.values():
        message.replies.sort(key=lambda reply: reply.sort_key)
        for reply in message.replies:
            reply.contested = len(message.replies) > 1
    roots = [message for message in by_id.values() if message.parent_id is None]
    verdicts = {message.message_id: "" for root in roots for message in walk(root)}
    for message in by_id.values():
        if reason := _rootless(message, verdicts):
            rejected[reason] += 1
    return roots


def _rootless(message: OasstMessage | None, verdicts: dict[str, str]) -> str:
    """Return why no root is above the message, or an empty text; `verdicts` keeps those found so far."""
    path = []
    while message is not None and message.message_id not in verdicts:
        verdicts[message.message_id] = "cycle"  # unless a missing parent ends the path
        path.append(message)
        message = message.parent
    verdict = "orphan" if message is None else verdicts[message.message_id]
    verdicts.update((passed.message_id, verdict) for passed in path)
    return verdict


def _usable(
    roots: Iterable[OasstMessage], seen: set[str], wanted: MessageFilter, rejected: Counter[str]
) -> Iterator[OasstMessage]:
    """Yield the roots that are new and wanted, without the messages below them that are not wanted."""
    for root in roots:
        if root.message_id in seen:
            rejected["duplicate message"] += sum(1 for _ in walk(root))
            continue
        seen.add(root.message_id)
        if _is_usable(root, 1, wanted, rejected):
            ahead = [(root, 1)]
            while ahead:
                message, depth = ahead.pop()
                message.replies = [reply for reply in message.replies if _is_usable(reply, depth + 1, wanted, rejected)]
                ahead += ((reply, depth + 1) for reply in message.replies)
            yield root


def _is_usable(message: OasstMessage, depth: int, wanted: MessageFilter, rejected: Counter[str]) -> bool:
    reason = _defect(message, depth) or wanted.refusal(message)
    if reason is None:
        return True
    rejected[reason] += 1
    if below := sum(1 for _ in walk(message)) - 1:
        rejected["below a message left out"] += below
    return False


def _defect(message: OasstMessage, depth: int) -> str | None:
    expected = "assistant" if message.parent is not None and message.parent.role == "prompter" else "prompter"
    if message.role != expected:
        return "role does not alternate"
    if not message.text.strip():
        return "no text"
    return "too deep" if depth > MAX_DEPTH else None
