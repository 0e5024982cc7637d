"""Deleting a person: the name goes in any case, and what the person gave stays or goes too."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from palm_rlhf.data.formats.oasst_messages import OASST_ROLES
from palm_rlhf.feedback.people.accounts import check_another_admin, end_sessions, has_accounts
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import (
    Answer,
    AnswerScore,
    ComparisonVote,
    Correction,
    Reaction,
    ShownComparison,
)
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.people_tables import Invitation, Participant
from palm_rlhf.feedback.store.table_base import Base
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, TreeMessage
from palm_rlhf.feedback.store.withdrawals import is_withdrawn
from palm_rlhf.feedback.trees.taking_back import settle_withdrawal

JUDGMENTS = (ComparisonVote, Reaction, Correction, MessageReview, ReplyRanking)


def delete_person(
    session: Session,
    person_id: str,
    now: datetime,
    settings: CollectionSettings,
    *,
    keeps_contributions: bool,
    by: Participant,
) -> Participant:
    """Delete a person, and return the row that is left: an id without a name, a password or a language.

    All sessions end, open tasks go to others, and open invitations by the person are void. With `keeps_contributions`
    all else stays as it is, without the name. Otherwise

    - votes, reactions, corrections, reviews and rankings of the person are deleted;
    - messages are withdrawn and their texts emptied; replies below them leave the tree with them, since they answer a
      text that is gone;
    - the person's chats are deleted, and answers of models to the person's prompts are withdrawn and emptied, which
      takes the votes of others on these answers out of what is learnt from.

    Files that were exported before, and models that were trained before, are not changed.

    Raises FeedbackError for somebody who is not there, and for the only admin.
    """
    person = session.get(Participant, person_id)
    if person is None or person.deleted_at is not None:
        raise FeedbackError("there is no such person", 404)
    if has_accounts(session):
        check_another_admin(session, person)
    if not keeps_contributions:
        _remove_messages(session, person, by, settings, now)
        _remove_judgments(session, person, settings, now)
        _remove_chats(session, person)
    end_sessions(session, person, now)
    open_tasks = update(Task).where(Task.person_id == person.id, Task.outcome.is_(None))
    session.execute(open_tasks.values(outcome="cancelled", closed_at=now))
    open_links = update(Invitation).where(Invitation.created_by == person.id, Invitation.used_at.is_(None))
    session.execute(open_links.values(expires_at=now))
    person.name, person.name_key, person.password_hash, person.language = "", None, None, None
    person.role, person.deleted_at = "contributor", now
    session.flush()
    return person


def _remove_messages(
    session: Session, person: Participant, by: Participant, settings: CollectionSettings, now: datetime
) -> None:
    """Withdraw and empty a person's messages, and the models' answers to prompts that hold them."""
    messages = list(session.scalars(select(TreeMessage).where(TreeMessage.person_id == person.id)))
    prompts = {prompt_key_of(prompt) for message in messages for prompt in _prompts_with(session, message)}
    for message in messages:
        message.text = ""
        _withdraw(session, message, by, now)
        settle_withdrawal(session, message, settings, now)
    chats = select(Answer.prompt_key).where(Answer.person_id == person.id)
    prompts |= set(session.scalars(chats))
    of_others = or_(Answer.person_id.is_(None), Answer.person_id != person.id)
    for answer in session.scalars(select(Answer).where(Answer.prompt_key.in_(prompts), of_others)).all():
        if answer.person_id is None:  # a chat of somebody else with the same words stays
            answer.prompt, answer.text = [], ""
            _withdraw(session, answer, by, now)


def _prompts_with(session: Session, message: TreeMessage) -> Iterable[list[dict[str, str]]]:
    """Yield the prompts of a tree, up to a message of the user, that a message is a part of."""
    before: list[dict[str, str]] = []
    parent_id = message.parent_id
    while parent_id is not None:
        parent = session.get_one(TreeMessage, parent_id)
        before.insert(0, _turn(parent))
        parent_id = parent.parent_id
    waiting = [(before, message)]
    while waiting:
        above, found = waiting.pop()
        thread = [*above, _turn(found)]
        if found.role == "prompter":
            yield thread
        replies = session.scalars(select(TreeMessage).where(TreeMessage.parent_id == found.id))
        waiting += [(thread, reply) for reply in replies]


def _turn(message: TreeMessage) -> dict[str, str]:
    return {"role": OASST_ROLES[message.role], "content": message.text}


def _remove_judgments(session: Session, person: Participant, settings: CollectionSettings, now: datetime) -> None:
    """Delete what a person said of messages and answers; trees whose ranks rested on it are ranked anew."""
    table: Any
    for table in JUDGMENTS:
        rows = session.scalars(select(table).where(table.person_id == person.id)).all()
        _forget_withdrawals(session, table, [row.id for row in rows])
        for row in rows:
            session.delete(row)
        session.flush()
        for row in rows:
            if isinstance(row, (MessageReview, ReplyRanking)):
                settle_withdrawal(session, row, settings, now)
    shown = session.scalars(select(ShownComparison).where(ShownComparison.person_id == person.id)).all()
    voted = set(session.scalars(select(ComparisonVote.comparison_id)))
    for comparison in shown:
        if comparison.id not in voted:
            session.delete(comparison)
    session.flush()


def _remove_chats(session: Session, person: Participant) -> None:
    """Delete the answers in a person's chats, or empty those that something of somebody else's refers to."""
    for answer in session.scalars(select(Answer).where(Answer.person_id == person.id)).all():
        used = [
            session.scalars(select(column).where(column == answer.id).limit(1)).first()
            for column in (
                Reaction.answer_id,
                Correction.answer_id,
                ShownComparison.left_id,
                ShownComparison.right_id,
            )
        ]
        if any(used):
            answer.prompt, answer.text = [], ""
            continue
        session.execute(delete(AnswerScore).where(AnswerScore.answer_id == answer.id))
        _forget_withdrawals(session, Answer, [answer.id])
        session.delete(answer)
    session.flush()


def _withdraw(session: Session, row: Base, by: Participant, now: datetime) -> None:
    if not is_withdrawn(session, row):
        row_id = str(getattr(row, "id"))  # noqa: B009 (every table has one)
        reason = "the author was deleted"
        session.add(Withdrawal(table=row.__tablename__, row_id=row_id, person_id=by.id, reason=reason, at=now))
        session.flush()


def _forget_withdrawals(session: Session, table: type[Base], row_ids: list[str]) -> None:
    session.execute(delete(Withdrawal).where(Withdrawal.table == table.__tablename__, Withdrawal.row_id.in_(row_ids)))
