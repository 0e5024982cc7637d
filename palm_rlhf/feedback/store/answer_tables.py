"""The tables of models, their answers, and what people said of them.

A contribution is written once and never changed; a withdrawal is a row of its own. `prompt` columns hold conversations
as `[{"role", "content"}, ...]` that end with a message of the user.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from palm_rlhf.feedback.store.table_base import Base, id_column, reference, utc_now


class KnownModel(Base):
    """A model that has answered; `id` is the SHA-256 of its weights, in hexadecimal."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str]
    folder: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Answer(Base):
    """A reply of a model outside the trees, as it was generated.

    `purpose` is chat (a reply in the chat page), training (a candidate for comparisons that the reward model learns
    from) or evaluation (of the blind comparison of two models).
    """

    __tablename__ = "answers"
    id: Mapped[str] = id_column()
    prompt_key: Mapped[str] = mapped_column(String(64), index=True)  # `prompt_key_of` the prompt
    prompt: Mapped[list[Any]]
    text: Mapped[str]
    finish: Mapped[str | None]
    model_id: Mapped[str] = reference("models.id")
    sampling: Mapped[dict[str, Any]]
    purpose: Mapped[str] = mapped_column(index=True)
    person_id: Mapped[str | None] = reference("people.id", nullable=True)  # who asked, in the chat page
    round_id: Mapped[str | None] = reference("rounds.id", nullable=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class AnswerScore(Base):
    """The score of an answer by the reward model of a round, by which pairs are chosen."""

    __tablename__ = "answer_scores"
    __table_args__ = (UniqueConstraint("answer_id", "round_id"),)
    id: Mapped[str] = id_column()
    answer_id: Mapped[str] = reference("answers.id")
    round_id: Mapped[str] = reference("rounds.id")
    score: Mapped[float]


class ShownComparison(Base):
    """Two answers to one prompt that were shown to a person side by side.

    `chosen_by` is how the pair was chosen: chat (the person's own prompt), random or uncertainty. `purpose` is training
    or evaluation.
    """

    __tablename__ = "comparisons"
    id: Mapped[str] = id_column()
    prompt_key: Mapped[str] = mapped_column(String(64), index=True)
    left_id: Mapped[str] = reference("answers.id")
    right_id: Mapped[str] = reference("answers.id")
    person_id: Mapped[str] = reference("people.id")
    chosen_by: Mapped[str]
    purpose: Mapped[str] = mapped_column(index=True)
    round_id: Mapped[str | None] = reference("rounds.id", nullable=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class ComparisonVote(Base):
    """A verdict on a comparison: left, right, tie or both_bad. The newest one that is not withdrawn counts."""

    __tablename__ = "votes"
    id: Mapped[str] = id_column()
    comparison_id: Mapped[str] = reference("comparisons.id")
    person_id: Mapped[str | None] = reference("people.id", nullable=True)
    verdict: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Reaction(Base):
    """Thumbs under an answer in the chat page: `value` is 1 or -1. The newest one that is not withdrawn counts."""

    __tablename__ = "reactions"
    id: Mapped[str] = id_column()
    answer_id: Mapped[str] = reference("answers.id")
    person_id: Mapped[str | None] = reference("people.id", nullable=True)
    value: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Correction(Base):
    """A better answer that a person wrote in place of an answer in the chat page."""

    __tablename__ = "corrections"
    id: Mapped[str] = id_column()
    answer_id: Mapped[str] = reference("answers.id")
    person_id: Mapped[str | None] = reference("people.id", nullable=True)
    text: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
