"""Who has contributed how much, within a day, a week or ever."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from beartype import beartype
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.store.answer_tables import ComparisonVote, Correction
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.trees.progress import WINDOWS, contributions


@dataclass(frozen=True)
class LeaderboardRow:
    """The contributions of one person; people with equally many have the same place."""

    place: int
    person_id: str
    name: str
    prompts: int
    replies: int
    reviews: int
    rankings: int
    comparisons: int
    corrections: int

    @property
    def total(self) -> int:
        """All contributions."""
        return sum((self.prompts, self.replies, self.reviews, self.rankings, self.comparisons, self.corrections))


@beartype
def leaderboard(session: Session, window: str, now: datetime) -> list[LeaderboardRow]:
    """Return the contributions of each person within a window of `WINDOWS`, the most first.

    Nothing that was withdrawn counts, a comparison counts once however often its verdict was changed, and people
    without contributions, or that were deleted, are left out.
    """
    in_trees = {each.person_id: each for each in contributions(session, window, now)}
    comparisons = _counted(session, ComparisonVote, ComparisonVote.comparison_id.distinct(), window, now)
    corrections = _counted(session, Correction, Correction.id, window, now)
    rows = []
    people = select(Participant.id, Participant.name).where(Participant.deleted_at.is_(None))
    for person, name in session.execute(people):
        tree = in_trees.get(person)
        numbers = (0, 0, 0, 0) if tree is None else (tree.prompts, tree.replies, tree.reviews, tree.rankings)
        row = LeaderboardRow(0, person, name, *numbers, comparisons.get(person, 0), corrections.get(person, 0))
        rows += [row] if row.total else []
    rows.sort(key=lambda row: (-row.total, row.name, row.person_id))
    totals = [row.total for row in rows]
    return [LeaderboardRow(**{**vars(row), "place": 1 + totals.index(row.total)}) for row in rows]


def _counted(session: Session, table: Any, column: Any, window: str, now: datetime) -> dict[str, int]:
    query = select(table.person_id, func.count(column)).where(table.person_id.is_not(None), not_withdrawn(table))
    length = WINDOWS[window]
    if length is not None:
        query = query.where(table.created_at > now - length)
    return {person: number for person, number in session.execute(query.group_by(table.person_id))}  # noqa: C416
