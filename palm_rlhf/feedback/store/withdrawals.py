"""Contributions that are taken back: the row stays, a row of `Withdrawal` says so, and it counts no more."""

from datetime import datetime
from typing import Any

from beartype import beartype
from sqlalchemy import ColumnElement, exists
from sqlalchemy.orm import Session

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import Base

MODERATORS = ("moderator", "admin")


@beartype
def not_withdrawn(table: Any) -> ColumnElement[bool]:
    """Return the condition that a row of a table, or of an alias of it, was not withdrawn."""
    return ~exists().where(Withdrawal.table == table.__tablename__, Withdrawal.row_id == table.id)


@beartype
def is_withdrawn(session: Session, row: Base) -> bool:
    """Return whether a row was withdrawn."""
    return bool(session.scalar(exists().where(*_of(row)).select()))


@beartype
def withdraw(session: Session, row: Base, person_id: str, *, reason: str | None = None, now: datetime) -> Withdrawal:
    """Take a contribution back, one's own or, for a moderator, anybody's.

    Raises FeedbackError for somebody else's contribution, and for one that was taken back before.

    Args:
        session: A session of `Store.writing`.
        row: The contribution, such as a vote, a correction or a message.
        person_id: Who takes it back.
        reason: Why, for other people to read.
        now: The current time.
    """
    person = session.get(Participant, person_id)
    owner = getattr(row, "person_id", None)
    if person is None or (owner != person_id and person.role not in MODERATORS):
        raise FeedbackError("this is somebody else's contribution: only they and moderators can take it back", 403)
    if is_withdrawn(session, row):
        raise FeedbackError("this was taken back already", 409)
    withdrawal = Withdrawal(table=row.__tablename__, row_id=_id_of(row), person_id=person_id, reason=reason, at=now)
    session.add(withdrawal)
    session.flush()
    return withdrawal


def _of(row: Base) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return Withdrawal.table == row.__tablename__, Withdrawal.row_id == _id_of(row)


def _id_of(row: Any) -> str:
    return row.id
