"""Trees of the database in the form of Open-Assistant's files, which `palm_rlhf.data.formats.oasst_trees` reads.

The form is that of https://huggingface.co/datasets/OpenAssistant/oasst1, one nested tree in a record.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.feedback.store.answer_tables import KnownModel
from palm_rlhf.feedback.store.kept_trees import KeptMessage
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import MessageReview, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn

People = Literal["pseudonyms", "names", "none"]


@beartype
def shown_people(session: Session, people: People) -> dict[str, str]:
    """Return the names under which people appear in a file, by their ids: none for `none`.

    A pseudonym is a number in the order in which people came: it stays the same in later files, and tells nothing. With
    `names`, people who were deleted have pseudonyms.
    """
    if people == "none":
        return {}
    rows = session.scalars(select(Participant).order_by(Participant.created_at, Participant.id))
    return {
        row.id: row.name if people == "names" and row.deleted_at is None else f"person-{number}"
        for number, row in enumerate(rows, 1)
    }


@beartype
def tree_record(session: Session, tree: Tree, root: KeptMessage, people: Mapping[str, str]) -> Record:
    """Return a tree as one record of Open-Assistant's form.

    An imported message has the fields of its file. `value` of a label is the mean over the people that gave it.

    Args:
        session: A session of the store.
        tree: The tree.
        root: Its root, see `kept_trees`.
        people: The names of people in the file, by their ids, see `shown_people`.
    """
    reviews = _reviews_of(session, tree)
    records: dict[str, Record] = {}
    for message in root.walk():
        record = _message_record(session, message, reviews[message.row.id], people)
        records[message.row.id] = record
        if message.parent is not None:
            parent = records[message.parent.row.id]
            record["parent_id"] = parent["message_id"]
            parent["replies"].append(record)
    first = records[root.row.id]
    return {"message_tree_id": first["message_id"], "tree_state": _state_in_files(tree), "prompt": first}


def _state_in_files(tree: Tree) -> str:
    return (
        "ready_for_export" if tree.state == "exported" else tree.state
    )  # Open-Assistant has no state of its own for it


def _message_record(
    session: Session, message: KeptMessage, reviews: list[MessageReview], people: Mapping[str, str]
) -> Record:
    row = message.row
    record: Record = {
        "message_id": row.id,
        "created_date": row.created_at.isoformat(),
        "lang": row.language,
        "review_count": len(reviews),
        "review_result": row.accepted,
        "deleted": False,
        "synthetic": row.model_id is not None,
        "labels": _labels(reviews),
    }
    if row.model_id is not None:
        record["model_name"] = session.get_one(KnownModel, row.model_id).name
    if row.person_id is not None and row.person_id in people:
        record["user_id"] = people[row.person_id]
    if row.imported is not None:
        record = {**row.imported} if people else {k: v for k, v in row.imported.items() if k != "user_id"}
    if message.rank is not None:
        record["rank"] = message.rank
    return {**record, "role": row.role, "text": row.text, "replies": []}


def _labels(reviews: list[MessageReview]) -> dict[str, dict[str, float]]:
    values: dict[str, list[float]] = defaultdict(list)
    for review in reviews:
        for name, value in review.labels.items():
            values[name].append(value)
    return {name: {"value": sum(given) / len(given), "count": len(given)} for name, given in sorted(values.items())}


def _reviews_of(session: Session, tree: Tree) -> dict[str, list[MessageReview]]:
    query = select(MessageReview).join(TreeMessage, TreeMessage.id == MessageReview.message_id)
    found: dict[str, list[Any]] = defaultdict(list)
    for review in session.scalars(
        query.where(TreeMessage.tree_id == tree.id, not_withdrawn(MessageReview)).order_by(MessageReview.created_at)
    ):
        found[review.message_id].append(review)
    return found
