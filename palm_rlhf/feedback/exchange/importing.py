"""Files that come into a database: Open-Assistant's trees, and preferences in any form that the data side reads."""

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from typing import Any, Literal

from beartype import beartype
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from palm_rlhf.data.convert import form_of
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import read_records
from palm_rlhf.data.formats.oasst_messages import MessageFilter, OasstMessage
from palm_rlhf.data.formats.oasst_trees import read_trees, walk
from palm_rlhf.data.preferences.ranking_files import read_rankings
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.learning_tables import ImportedRanking
from palm_rlhf.feedback.store.table_base import new_id
from palm_rlhf.feedback.store.tree_tables import Tree, TreeEvent, TreeMessage

Kind = Literal["people", "ai"]
HERE = "people"  # the source of trees that grew in the database
STATE = "ready_for_export"
UNKNOWN_LANGUAGE = "und"  # undetermined, of BCP 47
IDS = uuid.UUID("9c1de1ae-6c38-4f3e-9a53-2f0d7f6b8f11")  # the namespace of ids that are no UUIDs in their file
HAVE_COLUMNS = ("text", "role", "parent_id", "replies", "rank", "message_tree_id", "tree_state")
NUM_IDS_IN_A_QUERY = 500


@beartype
def import_file(
    store: Store,
    path: str | os.PathLike[str],
    *,
    kind: Kind,
    source: str,
    now: datetime,
    skip_broken: bool = False,
    ignored: Collection[str] = (),
    rejected: Counter[str] | None = None,
) -> Counter[str]:
    """Add the trees or preferences of a file to a database, all or, where an error is raised, none of them.

    Trees and preferences that are there already are counted, and not added again. Of trees, those that are ready for
    export are read, without messages that were deleted or failed their review.

    Raises ValueError for a file of neither, and the errors of `read_records`.

    Args:
        store: The database.
        path: The file, which is read several times.
        kind: Who compared the replies: people, or a model.
        source: The name of the file's contents, which is kept with them.
        now: The current time.
        skip_broken: See `read_records`.
        ignored: Fields to leave out although they may hold text, see `parse_ranking`.
        rejected: Counts the records and messages that are left out by their reasons.
    """
    if not source.strip() or source == HERE:
        raise ValueError(f"got the source {source!r}, expected a name of the file's contents: give another one")
    counts = Counter() if rejected is None else rejected
    form = form_of(path, skip_broken=skip_broken)
    if form == "oasst":
        wanted = MessageFilter(synthetic=True)
        trees = list(read_trees(path, wanted, skip_broken=skip_broken, rejected=counts))
        ids = {message.message_id for root in trees for message in walk(root)}
        fields = _fields_of(path, ids, skip_broken)
        with store.writing() as session:
            return _add_trees(session, trees, fields, kind, source, now)
    if form == "hh":
        rankings = list(read_rankings(path, skip_broken=skip_broken, ignored=ignored, rejected=counts))
        with store.writing() as session:
            return _add_rankings(session, rankings, kind, source, now)
    raise ValueError(
        f"got {path}, a file of the format {form}, expected Open-Assistant's trees or messages, or preferences (chosen "
        "and rejected, ranked answers, or responses best first): nothing else says which reply is better"
    )


def _fields_of(path: str | os.PathLike[str], ids: Collection[str], skip_broken: bool) -> dict[str, Record]:
    """Return the fields of messages that have no column in the database, by the ids of the file."""
    found: dict[str, Record] = {}
    for _, record in read_records(path, skip_broken=skip_broken):
        ahead: list[Any] = [record["prompt"] if isinstance(record.get("prompt"), dict) else record]
        while ahead:
            message = ahead.pop()
            if isinstance(message, dict):
                replies = message.get("replies")
                ahead += replies if isinstance(replies, list) else []
                message_id = message.get("message_id")
                if isinstance(message_id, str) and message_id in ids:
                    more = {name: value for name, value in message.items() if name not in HAVE_COLUMNS}
                    found.setdefault(message_id, json.loads(json.dumps(more, default=str)))
    return found


def _add_trees(
    session: Session,
    trees: Iterable[OasstMessage],
    fields: dict[str, Record],
    kind: Kind,
    source: str,
    now: datetime,
) -> Counter[str]:
    counts: Counter[str] = Counter(trees=0, messages=0, already_there=0)
    by_root = {root.message_id: list(walk(root)) for root in trees}
    ids = [_row_id(message.message_id) for messages in by_root.values() for message in messages]
    known = set(_known(session, TreeMessage.id, ids))
    new: dict[type, list[dict[str, Any]]] = {Tree: [], TreeEvent: [], TreeMessage: []}
    for messages in by_root.values():
        if any(_row_id(message.message_id) in known for message in messages):
            counts["already_there"] += 1
            continue
        tree_id, language = _row_id(messages[0].message_id), messages[0].lang or UNKNOWN_LANGUAGE
        origin = {"source": source, "ranked_by": kind}
        new[Tree].append({"id": tree_id, "language": language, "state": STATE, "created_at": now, **origin})
        new[TreeEvent].append({"id": new_id(), "tree_id": tree_id, "state": STATE, "reason": source, "at": now})
        new[TreeMessage] += [_row(message, tree_id, fields[message.message_id], now) for message in messages]
        counts["trees"] += 1
        counts["messages"] += len(messages)
    for table, rows in new.items():
        if rows:
            session.execute(insert(table), rows)
    return counts


def _row(message: OasstMessage, tree_id: str, fields: Record, now: datetime) -> dict[str, Any]:
    return {
        "id": _row_id(message.message_id),
        "tree_id": tree_id,
        "parent_id": None if message.parent_id is None else _row_id(message.parent_id),
        "role": message.role,
        "text": message.text,
        "language": message.lang or UNKNOWN_LANGUAGE,
        "depth": len(message.path()) - 1,
        "accepted": True,
        "rank": message.rank,
        "imported": fields,
        "created_at": now,
    }


def _row_id(message_id: str) -> str:
    """Return the id of a message in the database: its own if that is a UUID, or one made of it."""
    try:
        return str(uuid.UUID(message_id))
    except ValueError:
        return str(uuid.uuid5(IDS, message_id))


def _add_rankings(session: Session, rankings: Iterable[Record], kind: Kind, source: str, now: datetime) -> Counter[str]:
    counts: Counter[str] = Counter(rankings=0, already_there=0)
    by_digest: dict[str, Record] = {}
    for ranking in rankings:
        digest = hashlib.sha256(json.dumps([ranking["prompt"], ranking["responses"]]).encode()).hexdigest()
        counts["already_there"] += digest in by_digest
        by_digest.setdefault(digest, ranking)
    known = set(_known(session, ImportedRanking.digest, by_digest))
    counts["already_there"] += len(known)
    origin = {"kind": kind, "source": source, "created_at": now}
    rows = [
        {"id": new_id(), "digest": digest, "prompt": ranking["prompt"], "responses": ranking["responses"], **origin}
        for digest, ranking in by_digest.items()
        if digest not in known
    ]
    counts["rankings"] = len(rows)
    if rows:
        session.execute(insert(ImportedRanking), rows)
    return counts


def _known(session: Session, column: Any, values: Iterable[str]) -> Iterator[str]:
    """Yield those of the values that a column has already."""
    every = list(values)
    for start in range(0, len(every), NUM_IDS_IN_A_QUERY):
        yield from session.scalars(select(column).where(column.in_(every[start : start + NUM_IDS_IN_A_QUERY])))
