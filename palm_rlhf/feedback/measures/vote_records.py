"""The votes that count, each with what it was about."""

from typing import NamedTuple

from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, ShownComparison
from palm_rlhf.feedback.store.withdrawals import not_withdrawn


class VoteRecord(NamedTuple):
    """A verdict on two answers: left, right, tie or both_bad."""

    person_id: str
    prompt_key: str
    left_id: str
    right_id: str
    left_model: str
    right_model: str
    verdict: str
    purpose: str
    round_id: str | None

    @property
    def left_share(self) -> float:
        """The left answer's share of the win: a tie, and two bad answers, are half a win for each."""
        return {"left": 1.0, "right": 0.0}.get(self.verdict, 0.5)


@beartype
def vote_records(session: Session, *, purpose: str | None = None, round_id: str | None = None) -> list[VoteRecord]:
    """Return the newest vote on each comparison, of a purpose and a round or of all, by time.

    Withdrawn votes, comparisons and answers are left out. Votes count for the person whom the comparison was shown.
    """
    left, right = aliased(Answer), aliased(Answer)
    query = (
        select(ShownComparison, ComparisonVote.verdict, left.model_id, right.model_id)
        .join(ComparisonVote, ComparisonVote.comparison_id == ShownComparison.id)
        .join(left, left.id == ShownComparison.left_id)
        .join(right, right.id == ShownComparison.right_id)
        .where(*map(not_withdrawn, (ComparisonVote, ShownComparison, left, right)))
        .order_by(ComparisonVote.created_at, ComparisonVote.id)
    )
    if purpose is not None:
        query = query.where(ShownComparison.purpose == purpose)
    if round_id is not None:
        query = query.where(ShownComparison.round_id == round_id)
    newest = {}
    for shown, verdict, left_model, right_model in session.execute(query):
        ids = shown.person_id, shown.prompt_key, shown.left_id, shown.right_id
        newest[shown.id] = VoteRecord(*ids, left_model, right_model, verdict, shown.purpose, shown.round_id)
    return list(newest.values())
