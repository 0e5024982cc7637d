"""The tables of the learning loop: its rounds, preferences from files, and withdrawals."""

from datetime import datetime
from typing import Any

from sqlalchemy import String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from palm_rlhf.feedback.store.table_base import Base, id_column, reference, utc_now


class Withdrawal(Base):
    """A contribution that was taken back: the name of its table, and its id."""

    __tablename__ = "withdrawals"
    __table_args__ = (UniqueConstraint("table", "row_id"),)
    id: Mapped[str] = id_column()
    table: Mapped[str]
    row_id: Mapped[str] = mapped_column(String(36))
    person_id: Mapped[str | None] = reference("people.id", nullable=True)
    reason: Mapped[str | None]
    at: Mapped[datetime] = mapped_column(default=utc_now)


class ImportedRanking(Base):
    """A preference from a file; `kind` is people or ai, `responses` come best first, `source` names the file."""

    __tablename__ = "imported_rankings"
    id: Mapped[str] = id_column()
    digest: Mapped[str] = mapped_column(String(64), unique=True)  # of the content, so that a file is imported once
    source: Mapped[str]
    kind: Mapped[str]
    prompt: Mapped[list[Any]]
    responses: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Round(Base):
    """One pass of the learning loop, from a model to the next."""

    __tablename__ = "rounds"
    id: Mapped[str] = id_column()
    number: Mapped[int] = mapped_column(unique=True)
    base_model_id: Mapped[str] = reference("models.id")
    settings: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class RoundEvent(Base):
    """A stage that a round has completed, with the figures measured in it."""

    __tablename__ = "round_events"
    __table_args__ = (UniqueConstraint("round_id", "stage"),)
    id: Mapped[str] = id_column()
    round_id: Mapped[str] = reference("rounds.id")
    stage: Mapped[str]
    figures: Mapped[dict[str, Any]]
    at: Mapped[datetime] = mapped_column(default=utc_now)
