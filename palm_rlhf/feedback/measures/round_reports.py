"""The rounds of learning as people read them: what was measured, and whether the model got better."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from beartype import beartype
from sqlalchemy.orm import Session

from palm_rlhf.feedback.learning.round_rows import STAGES, all_rounds, events_of
from palm_rlhf.feedback.measures.agreement import VoteAgreement, vote_agreement
from palm_rlhf.feedback.measures.blind_win_rate import BlindWinRate, round_win_rate
from palm_rlhf.feedback.measures.vote_records import vote_records
from palm_rlhf.feedback.store.answer_tables import KnownModel


@dataclass(frozen=True)
class RoundReport:
    """A round: the figures of its completed stages, as `round_rows` lists them, and what people said in it."""

    number: int
    begun_at: datetime
    base_name: str
    """The name of the model that the round began with."""
    figures: dict[str, dict[str, Any]]
    """By stage."""
    agreement: VoteAgreement
    """Of the votes on the round's answers."""
    win_rate: BlindWinRate | None
    """Of the new model against the old one; None before both have answered."""

    @property
    def next_stage(self) -> str | None:
        """The stage that the round is at; None when it has completed all."""
        return next((stage for stage in STAGES if stage not in self.figures), None)


@beartype
def round_reports(session: Session) -> list[RoundReport]:
    """Return the reports of all rounds, the newest first."""
    reports = []
    for row in reversed(all_rounds(session)):
        base = session.get_one(KnownModel, row.base_model_id)
        reports.append(
            RoundReport(
                number=row.number,
                begun_at=row.created_at,
                base_name=base.name,
                figures=events_of(session, row.id),
                agreement=vote_agreement(vote_records(session, round_id=row.id)),
                win_rate=round_win_rate(session, row.id),
            )
        )
    return reports
