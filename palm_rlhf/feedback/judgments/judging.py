"""Votes on comparisons, thumbs under answers, and better answers: each is given once, until it is taken back."""

from datetime import datetime
from typing import Any, TypeVar

from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, Correction, Reaction, ShownComparison
from palm_rlhf.feedback.store.withdrawals import is_withdrawn, not_withdrawn

VERDICTS = ("left", "right", "tie", "both_bad")
Judgment = TypeVar("Judgment", ComparisonVote, Reaction, Correction)


@beartype
def vote(session: Session, person_id: str, comparison_id: str, verdict: str, *, now: datetime) -> ComparisonVote:
    """Write a person's verdict on a comparison that the person was shown.

    Raises FeedbackError for an unknown verdict, for a comparison of somebody else or of answers that have not ended,
    and while an earlier vote stands.

    Args:
        session: A session of `Store.writing`.
        person_id: Who votes.
        comparison_id: The comparison.
        verdict: One of `VERDICTS`.
        now: The current time.
    """
    if verdict not in VERDICTS:
        raise FeedbackError(f"got the verdict {verdict!a:.40}, expected one of {', '.join(VERDICTS)}", 422)
    comparison = session.get(ShownComparison, comparison_id)
    if comparison is None or is_withdrawn(session, comparison):
        raise FeedbackError("there is no such comparison, or its answers have not ended", 404)
    if comparison.person_id != person_id:
        raise FeedbackError("this comparison was shown to somebody else, who votes on it", 403)
    if standing(session, ComparisonVote, person_id, comparison_id=comparison_id):
        raise FeedbackError("you have voted on this comparison: take that vote back to vote anew", 409)
    return _added(session, ComparisonVote(comparison_id=comparison_id, person_id=person_id, verdict=verdict), now)


@beartype
def react(session: Session, person_id: str, answer_id: str, value: int, *, now: datetime) -> Reaction:
    """Write a person's thumb, 1 for up or -1 for down, under an answer that the person was given in the chat page.

    Raises FeedbackError for another value, for an answer that the person was not given, and while an earlier thumb
    stands.
    """
    if value not in (1, -1):
        raise FeedbackError(f"got the thumb {value}, expected 1 for up or -1 for down", 422)
    _check_answer(session, person_id, answer_id)
    if standing(session, Reaction, person_id, answer_id=answer_id):
        raise FeedbackError("you have judged this answer: take that back to judge it anew", 409)
    return _added(session, Reaction(answer_id=answer_id, person_id=person_id, value=value), now)


@beartype
def correct(
    session: Session, person_id: str, answer_id: str, text: str, settings: CollectionSettings, *, now: datetime
) -> Correction:
    """Write a better answer in place of one that the person was given in the chat page.

    Raises FeedbackError for a text that is empty, too long or the answer itself, for an answer that the person was not
    given, and while an earlier correction stands.
    """
    text = text.strip()
    if not text:
        raise FeedbackError("the better answer is empty: write what the answer should have been", 422)
    if len(text) > settings.max_message_length:
        limit = f"{len(text):,} characters, expected at most {settings.max_message_length:,}: shorten it"
        raise FeedbackError(f"the better answer has {limit}", 422)
    answer = _check_answer(session, person_id, answer_id)
    if text == answer.text.strip():
        raise FeedbackError("the better answer is the answer itself: change it", 422)
    if standing(session, Correction, person_id, answer_id=answer_id):
        raise FeedbackError("you have written a better answer here: take that back to write another", 409)
    return _added(session, Correction(answer_id=answer_id, person_id=person_id, text=text), now)


@beartype
def standing(session: Session, table: type[Judgment], person_id: str, **where: str) -> list[Judgment]:
    """Return the judgments of a person that are not withdrawn, the oldest first; `where` names columns and values."""
    query = select(table).where(table.person_id == person_id, not_withdrawn(table)).filter_by(**where)
    return list(session.scalars(query.order_by(table.created_at, table.id)))


@beartype
def given(session: Session, person_id: str, answers: list[str], comparisons: list[str]) -> dict[str, Any]:
    """Return what a person has given on answers and comparisons, by their ids, as JSON.

    Withdrawn judgments, and judgments of other people, are not among them.
    """
    found: dict[str, dict[str, Any]] = {}
    for reaction in _standing_on(session, Reaction, Reaction.answer_id.in_(answers), person_id):
        found.setdefault(reaction.answer_id, {})["reaction"] = {"id": reaction.id, "value": reaction.value}
    for correction in _standing_on(session, Correction, Correction.answer_id.in_(answers), person_id):
        found.setdefault(correction.answer_id, {})["correction"] = {"id": correction.id, "text": correction.text}
    for row in _standing_on(session, ComparisonVote, ComparisonVote.comparison_id.in_(comparisons), person_id):
        found.setdefault(row.comparison_id, {})["vote"] = {"id": row.id, "verdict": row.verdict}
    return found


def _standing_on(session: Session, table: Any, where: Any, person_id: str) -> Any:
    query = select(table).where(where, table.person_id == person_id, not_withdrawn(table))
    return session.scalars(query.order_by(table.created_at, table.id))


def _check_answer(session: Session, person_id: str, answer_id: str) -> Answer:
    answer = session.get(Answer, answer_id)
    if answer is None or is_withdrawn(session, answer):
        raise FeedbackError("there is no such answer, or it has not ended", 404)
    if answer.person_id != person_id:
        raise FeedbackError("this answer was given to somebody else, who judges it", 403)
    return answer


def _added(session: Session, row: Judgment, now: datetime) -> Judgment:
    row.created_at = now
    session.add(row)
    session.flush()
    return row
