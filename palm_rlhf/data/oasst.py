"""Open-Assistant message trees, and what is learnt from them: threads, rankings and prompts.

Köpf et al., "OpenAssistant Conversations" (https://arxiv.org/abs/2304.07327).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from beartype import beartype

from palm_rlhf.data.oasst_messages import ROLES, Message, MessageFilter, parse_message
from palm_rlhf.data.records import MAX_RECORD_BYTES, Record, read_records

# The deepest tree of Open-Assistant has about twenty; the threads of a chain of n messages hold n^2 of them.
MAX_DEPTH = 1000


@beartype
def is_oasst(record: Record) -> bool:
    """Whether a record is an Open-Assistant tree or message."""
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
) -> Iterator[Message]:
    """The roots of the message trees of a file, with the wanted messages only.

    The file holds trees, or messages in any order that point to their parents (labels and emojis by name, or in the
    columns of Hugging Face). Trees come one by one in the order of the file; messages are all held in memory until
    the last is read, and their trees come in the order of the ids of their roots.

    Every message that is left out is counted in ``rejected``, by its reason or as "below a message left out". Beside
    the filter's, the reasons are: a malformed message, no text, an unknown role or one that does not alternate (the
    root is a prompter), more than ``MAX_DEPTH`` levels, an id that an earlier message or tree has, a parent that is
    missing (an orphan), and cycles. ``skip_broken`` and errors are those of ``read_records``; a ``ValueError`` also
    says if a file has neither trees nor messages.
    """
    wanted = MessageFilter() if wanted is None else wanted
    rejected = Counter() if rejected is None else rejected
    flat: list[Message] = []
    roots: set[str] = set()
    known = None
    options = {"skip_broken": skip_broken, "rejected": rejected, "max_record_bytes": max_record_bytes}
    for line, record in read_records(path, **options):
        if _is_tree(record):
            known, messages = True, list(_nested(record, rejected))
            for root in _link(messages, rejected):
                if root.message_id in roots:
                    rejected["duplicate message"] += sum(1 for _ in walk(root))
                    continue
                roots.add(root.message_id)
                yield from _pruned(root, wanted, rejected)
        elif _is_message(record):
            known = True
            flat += _parsed(record, record.get("parent_id"), record.get("tree_state"), rejected)
        elif known is None:
            raise ValueError(
                f"{path}, line {line}: got a record with the keys {sorted(record)[:8]}, expected an Open-Assistant "
                "tree (message_tree_id, prompt) or message (message_id, parent_id, role, text)"
            )
        else:
            rejected["no tree or message"] += 1
    for root in sorted(_link(flat, rejected), key=lambda message: message.message_id):
        yield from _pruned(root, wanted, rejected)


def _parsed(record: Any, parent_id: Any, tree_state: Any, rejected: Counter[str]) -> list[Message]:
    try:
        return [parse_message(record, parent_id, tree_state)]
    except ValueError as error:
        rejected[str(error)] += 1
        return []


def _nested(tree: Record, rejected: Counter[str]) -> Iterator[Message]:
    """The messages of a tree, each with the parent that it is nested in."""
    ahead: list[tuple[Any, str | None, Any]] = [(tree["prompt"], None, tree.get("tree_state"))]
    while ahead:
        record, parent_id, tree_state = ahead.pop()
        messages = _parsed(record, parent_id, tree_state, rejected)
        yield from messages
        ...
