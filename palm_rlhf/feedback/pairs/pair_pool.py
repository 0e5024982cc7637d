"""The pairs of answers that are open for comparison, and the comparisons that were made of them."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from beartype import beartype
from sqlalchemy import func, select
from sqlalchemy.orm import Session, aliased

from palm_rlhf.feedback.pairs.pair_choice import CandidatePair
from palm_rlhf.feedback.store.answer_tables import Answer, AnswerScore, ComparisonVote, ShownComparison
from palm_rlhf.feedback.store.learning_tables import Round
from palm_rlhf.feedback.store.withdrawals import not_withdrawn

Purpose = Literal["training", "evaluation"]
SPACES = " \t\r\n"


@dataclass(frozen=True)
class PairPool:
    """The pairs of the newest round that has answers of a purpose, as one person may compare them."""

    round_id: str
    purpose: Purpose
    unseen: list[CandidatePair]
    """Pairs that the person was never shown, in either order."""
    unanswered: ShownComparison | None
    """The first comparison that the person was shown and did not answer."""
    num_people: Counter[frozenset[str]]
    """How many other people have compared a pair, or were shown it a short time ago."""


@beartype
def open_pool(
    session: Session, purpose: Purpose, person_id: str, *, now: datetime, timeout: timedelta
) -> PairPool | None:
    """Return the pool of a purpose, or None before a round has written answers.

    Args:
        session: Of the database.
        purpose: Training compares any two answers to a prompt, evaluation the answers of two models.
        person_id: Of the person who is about to compare.
        now: The time.
        timeout: How long a comparison that was shown counts for its pair without an answer.
    """
    newest = select(Round.id).join(Answer, Answer.round_id == Round.id).where(Answer.purpose == purpose)
    round_id = session.scalar(newest.order_by(Round.number.desc()).limit(1))
    if round_id is None:
        return None
    query = select(ShownComparison).where(ShownComparison.purpose == purpose, ShownComparison.round_id == round_id)
    shown = session.scalars(query.order_by(ShownComparison.created_at, ShownComparison.id)).all()
    answered, counted = _votes(session, purpose, round_id)
    seen: set[frozenset[str]] = set()
    unanswered = None
    num_people: Counter[frozenset[str]] = Counter()
    for comparison in shown:
        pair = frozenset((comparison.left_id, comparison.right_id))
        if comparison.person_id == person_id:
            seen.add(pair)
            if comparison.id not in answered:
                unanswered = unanswered or comparison
        elif comparison.id in counted or (comparison.id not in answered and comparison.created_at > now - timeout):
            num_people[pair] += 1
    unseen = [pair for pair in _pairs(session, purpose, round_id, num_people) if _ids(pair) not in seen]
    return PairPool(round_id, purpose, unseen, unanswered, num_people)


def _votes(session: Session, purpose: str, round_id: str) -> tuple[set[str], set[str]]:
    """Return the comparisons of a pool that have a vote, and the ones with a vote that is not withdrawn."""
    query = (
        select(ComparisonVote.comparison_id, not_withdrawn(ComparisonVote))
        .join(ShownComparison, ShownComparison.id == ComparisonVote.comparison_id)
        .where(ShownComparison.purpose == purpose, ShownComparison.round_id == round_id)
    )
    rows = session.execute(query).all()
    return {comparison for comparison, _ in rows}, {comparison for comparison, counts in rows if counts}


def _pairs(session: Session, purpose: str, round_id: str, num_people: Counter[frozenset[str]]) -> list[CandidatePair]:
    """Return all pairs of different answers to one prompt."""
    first, second = aliased(Answer), aliased(Answer)
    query = (
        select(first.prompt_key, first.id, second.id)
        .join(second, second.prompt_key == first.prompt_key)
        .where(first.purpose == purpose, second.purpose == purpose)
        .where(first.round_id == round_id, second.round_id == round_id)
        .where(not_withdrawn(first), not_withdrawn(second))
        .where(first.id < second.id, func.trim(first.text, SPACES) != func.trim(second.text, SPACES))
        .order_by(first.prompt_key, first.id, second.id)
    )
    if purpose == "evaluation":
        query = query.where(first.model_id != second.model_id)
    scores = _scores(session, purpose, round_id)

    def difference(one: str, other: str) -> float | None:
        return scores[one] - scores[other] if one in scores and other in scores else None

    return [
        CandidatePair(key, one, other, num_people[frozenset((one, other))], difference(one, other))
        for key, one, other in session.execute(query)
    ]


def _scores(session: Session, purpose: str, round_id: str) -> dict[str, float]:
    """Return the scores of a pool's answers by the newest reward model that has scored them."""
    query = (
        select(AnswerScore.answer_id, AnswerScore.score)
        .join(Answer, Answer.id == AnswerScore.answer_id)
        .join(Round, Round.id == AnswerScore.round_id)
        .where(Answer.purpose == purpose, Answer.round_id == round_id)
    )
    newest = session.scalar(query.with_only_columns(func.max(Round.number)))
    return {row.answer_id: row.score for row in session.execute(query.where(Round.number == newest))}


def _ids(pair: CandidatePair) -> frozenset[str]:
    return frozenset((pair.first_id, pair.second_id))
