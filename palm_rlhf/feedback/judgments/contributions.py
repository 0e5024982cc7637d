"""Everything that a person has given, newest first, and taking it back."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from beartype import beartype
from sqlalchemy import exists, literal, select, union_all
from sqlalchemy.orm import Session, aliased

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, Correction, Reaction, ShownComparison
from palm_rlhf.feedback.store.table_base import Base
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, TreeMessage
from palm_rlhf.feedback.store.withdrawals import is_withdrawn, not_withdrawn, withdraw
from palm_rlhf.feedback.trees.taking_back import settle_withdrawal
from palm_rlhf.feedback.web.catalogues import N_

TABLES: dict[str, Any] = {
    table.__tablename__: table
    for table in (ComparisonVote, Reaction, Correction, TreeMessage, MessageReview, ReplyRanking)
}
TREE_TABLES = (TreeMessage, MessageReview, ReplyRanking)


@dataclass(frozen=True)
class Contribution:
    """One contribution of a person, as the page of their contributions shows it.

    Args:
        table: The name of its table.
        row: The row.
        context: The text that it is about, such as the prompt of a comparison; "" of a prompt of a tree.
        texts: The texts that belong to it, such as two answers, or replies best first.
        is_withdrawn: Whether it was taken back.
        obstacle: Why it cannot be taken back, or None where it can be.
    """

    table: str
    row: Any
    context: str
    texts: list[str]
    is_withdrawn: bool
    obstacle: str | None


@beartype
def contributions(session: Session, person_id: str, *, offset: int = 0, limit: int = 20) -> list[Contribution]:
    """Return a part of a person's contributions, the newest first."""
    parts = [
        select(literal(name).label("name"), table.id.label("id"), table.created_at.label("at")).where(
            table.person_id == person_id
        )
        for name, table in TABLES.items()
    ]
    every = union_all(*parts).subquery()
    newest = select(every.c.name, every.c.id).order_by(every.c.at.desc(), every.c.id).offset(offset).limit(limit)
    return [
        _described(session, name, session.get_one(TABLES[name], row_id)) for name, row_id in session.execute(newest)
    ]


@beartype
def take_back(
    session: Session, person_id: str, table: str, row_id: str, settings: CollectionSettings, *, now: datetime
) -> None:
    """Take a contribution of one's own back; trees go on without it.

    Raises FeedbackError for what is not there or not the person's own, for what was taken back before, and for a
    message of a tree that others have answered.

    Args:
        session: A session of `Store.writing`.
        person_id: Who takes it back.
        table: The name of the contribution's table.
        row_id: Its id.
        settings: Settings of the collection, by which trees go on.
        now: The current time.
    """
    row = session.get(TABLES[table], row_id) if table in TABLES else None
    if row is None:
        raise FeedbackError("there is no such contribution", 404)
    if row.person_id != person_id:
        raise FeedbackError("this is somebody else's contribution, who can take it back", 403)
    if (obstacle := _obstacle(session, row)) is not None:
        raise FeedbackError(obstacle, 409)
    withdraw(session, row, person_id, now=now)
    if isinstance(row, TREE_TABLES):
        settle_withdrawal(session, row, settings, now)


def _obstacle(session: Session, row: Base) -> str | None:
    """Return why a contribution that stands cannot be taken back by its person, or None."""
    if not isinstance(row, TreeMessage):
        return None
    reply = aliased(TreeMessage)
    others = reply.person_id.is_distinct_from(row.person_id), reply.parent_id == row.id, not_withdrawn(reply)
    if session.scalar(select(exists().where(*others))):
        return N_("others have answered this message, and their work would go with it: ask a moderator")
    return None


def _described(session: Session, table: str, row: Any) -> Contribution:
    context, texts = DESCRIPTIONS[table](session, row)
    gone = is_withdrawn(session, row)
    return Contribution(table, row, context, texts, gone, None if gone else _obstacle(session, row))


def _of_vote(session: Session, row: ComparisonVote) -> tuple[str, list[str]]:
    shown = session.get_one(ShownComparison, row.comparison_id)
    answers = [session.get_one(Answer, answer_id) for answer_id in (shown.left_id, shown.right_id)]
    return _last(answers[0]), [answer.text for answer in answers]


def _of_answer(session: Session, row: Any) -> tuple[str, list[str]]:
    answer = session.get_one(Answer, row.answer_id)
    return _last(answer), [answer.text]


def _of_message(session: Session, row: TreeMessage) -> tuple[str, list[str]]:
    return _text(session, row.parent_id), [row.text]


def _of_review(session: Session, row: MessageReview) -> tuple[str, list[str]]:
    return _text(session, row.message_id), []


def _of_ranking(session: Session, row: ReplyRanking) -> tuple[str, list[str]]:
    return _text(session, row.parent_id), [_text(session, reply) for reply in row.best_first]


def _last(answer: Answer) -> str:
    return str(answer.prompt[-1]["content"])


def _text(session: Session, message_id: str | None) -> str:
    return "" if message_id is None else session.get_one(TreeMessage, message_id).text


DESCRIPTIONS: dict[str, Callable[[Session, Any], tuple[str, list[str]]]] = {
    "votes": _of_vote,
    "reactions": _of_answer,
    "corrections": _of_answer,
    "messages": _of_message,
    "reviews": _of_review,
    "rankings": _of_ranking,
}
