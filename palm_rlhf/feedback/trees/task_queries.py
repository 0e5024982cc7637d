"""Parts of queries that many rules share: tasks that hold a slot, and what a message has so far."""

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, select

from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn


def holds_a_slot(now: datetime) -> ColumnElement[bool]:
    """Return the condition that a task is open: not done, not skipped, and not expired."""
    return Task.outcome.is_(None) & (Task.expires_at > now)


def num_reviews_of() -> Any:
    """Return the number of reviews of a message, for a query of `TreeMessage`."""
    kept = select(func.count()).where(MessageReview.message_id == TreeMessage.id, not_withdrawn(MessageReview))
    return kept.correlate(TreeMessage).scalar_subquery()


def num_rankings_of() -> Any:
    """Return the number of rankings of the replies to a message, for a query of `TreeMessage`."""
    kept = select(func.count()).where(ReplyRanking.parent_id == TreeMessage.id, not_withdrawn(ReplyRanking))
    return kept.correlate(TreeMessage).scalar_subquery()


def num_open_tasks_of(kind: str, now: datetime) -> Any:
    """Return the number of open tasks of a kind on a message, for a query of `TreeMessage`."""
    held = select(func.count()).where(Task.message_id == TreeMessage.id, Task.kind == kind, holds_a_slot(now))
    return held.correlate(TreeMessage).scalar_subquery()
