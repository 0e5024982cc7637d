"""What a finished task did, to thank the person for it."""

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn


@dataclass(frozen=True)
class Thanks:
    """What a task of a kind did: the number of reviews or rankings that there are now, of those that are needed.

    `accepted` is the verdict of the reviews, None before there is one; `is_ranked` is whether the replies have ranks.
    """

    task_id: str
    kind: str
    number: int = 0
    needed: int = 0
    accepted: bool | None = None
    is_ranked: bool = False


def thanks_for(session: Session, person: Participant, task_id: str, settings: CollectionSettings) -> Thanks | None:
    """Return what a finished task of a person did; None for any other task."""
    task = session.get(Task, task_id)
    if task is None or task.person_id != person.id or task.outcome != "done":
        return None
    if task.kind in ("label_prompt", "label_reply"):
        accepted = session.get_one(TreeMessage, task.message_id).accepted
        return Thanks(task.id, task.kind, _count(session, MessageReview, task), settings.num_reviews, accepted)
    if task.kind == "rank_replies":
        ranks = select(TreeMessage.rank).where(TreeMessage.parent_id == task.message_id, TreeMessage.rank.is_not(None))
        is_ranked = session.scalars(ranks.limit(1)).first() is not None
        number = _count(session, ReplyRanking, task)
        return Thanks(task.id, task.kind, number, settings.num_rankings, is_ranked=is_ranked)
    return Thanks(task.id, task.kind, needed=settings.num_reviews)


def _count(session: Session, table: type[MessageReview] | type[ReplyRanking], task: Task) -> int:
    column = MessageReview.message_id if table is MessageReview else ReplyRanking.parent_id
    query = select(func.count()).select_from(table).where(column == task.message_id, not_withdrawn(table))
    return session.execute(query).scalar_one()
