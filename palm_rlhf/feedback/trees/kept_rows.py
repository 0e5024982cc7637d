"""Conditions of queries that many rules share: rows that were not withdrawn, and tasks that hold a slot."""

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, exists, func, select

from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, TreeMessage


def is_kept(table: Any) -> ColumnElement[bool]:
    """Return the condition that a row of a table was not withdrawn."""
    return ~exists().where(Withdrawal.table == table.__tablename__, Withdrawal.row_id == table.id)


def holds_a_slot(now: datetime) -> ColumnElement[bool]:
    """Return the condition that a task is open: not done, not skipped, and not expired."""
    return Task.outcome.is_(None) & (Task.expires_at > now)


def num_reviews_of() -> Any:
    """Return the number of reviews of a message, for a query of `TreeMessage`."""
    kept = select(func.count()).where(MessageReview.message_id == TreeMessage.id, is_kept(MessageReview))
    return kept.correlate(TreeMessage).scalar_subquery()


def num_rankings_of() -> Any:
    """Return the number of rankings of the replies to a message, for a query of `TreeMessage`."""
    kept = select(func.count()).where(ReplyRanking.parent_id == TreeMessage.id, is_kept(ReplyRanking))
    return kept.correlate(TreeMessage).scalar_subquery()


def num_open_tasks_of(kind: str, now: datetime) -> Any:
    """Return the number of open tasks of a kind on a message, for a query of `TreeMessage`."""
    held = select(func.count()).where(Task.message_id == TreeMessage.id, Task.kind == kind, holds_a_slot(now))
    return held.correlate(TreeMessage).scalar_subquery()
