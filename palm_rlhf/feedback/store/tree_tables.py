"""The tables of message trees, and of the tasks by which people grow them.

A contribution is written once and never changed; a withdrawal is a row of its own.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from palm_rlhf.feedback.store.table_base import Base, id_column, reference, utc_now


class Tree(Base):
    """A tree of messages; `state` is the newest of its events.

    `source` is people for a tree that grew here, and names the file of an imported one. `ranked_by` is people or ai.
    """

    __tablename__ = "trees"
    id: Mapped[str] = id_column()
    language: Mapped[str]
    state: Mapped[str] = mapped_column(index=True)
    source: Mapped[str] = mapped_column(default="people")
    ranked_by: Mapped[str] = mapped_column(default="people")
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class TreeEvent(Base):
    """A change of a tree's state, by a person or by the rules (`person_id` is None)."""

    __tablename__ = "tree_events"
    id: Mapped[str] = id_column()
    tree_id: Mapped[str] = reference("trees.id")
    state: Mapped[str]
    reason: Mapped[str | None]
    person_id: Mapped[str | None] = reference("people.id", nullable=True)
    at: Mapped[datetime] = mapped_column(default=utc_now)


class TreeMessage(Base):
    """A message of a tree, by a person or by a model; `role` is prompter or assistant."""

    __tablename__ = "messages"
    id: Mapped[str] = id_column()
    tree_id: Mapped[str] = reference("trees.id")
    parent_id: Mapped[str | None] = reference("messages.id", nullable=True)
    role: Mapped[str]
    text: Mapped[str]
    language: Mapped[str]
    depth: Mapped[int]  # 0 of the prompt
    person_id: Mapped[str | None] = reference("people.id", nullable=True)
    model_id: Mapped[str | None] = reference("models.id", nullable=True)
    sampling: Mapped[dict[str, Any] | None]
    task_id: Mapped[str | None] = mapped_column(String(36), unique=True)  # no foreign key: tasks refer to messages
    accepted: Mapped[bool | None]  # by the reviews; None before there are enough of them
    rank: Mapped[int | None]  # among its siblings, 0 is the best; None before they are ranked
    imported: Mapped[dict[str, Any] | None]  # the fields of its record in the imported file that have no column here
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class MessageReview(Base):
    """One person's labels of a message, by name, each from 0 to 1."""

    __tablename__ = "reviews"
    __table_args__ = (UniqueConstraint("message_id", "person_id"),)
    id: Mapped[str] = id_column()
    message_id: Mapped[str] = reference("messages.id")
    person_id: Mapped[str | None] = reference("people.id", nullable=True)
    task_id: Mapped[str | None] = mapped_column(ForeignKey("tasks.id"), unique=True)
    labels: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class ReplyRanking(Base):
    """One person's order of the replies to a message: ids as they were shown, and ids best first."""

    __tablename__ = "rankings"
    __table_args__ = (UniqueConstraint("parent_id", "person_id"),)
    id: Mapped[str] = id_column()
    parent_id: Mapped[str] = reference("messages.id")
    person_id: Mapped[str | None] = reference("people.id", nullable=True)
    task_id: Mapped[str | None] = mapped_column(ForeignKey("tasks.id"), unique=True)
    shown: Mapped[list[Any]]
    best_first: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Task(Base):
    """A task that somebody was handed; `outcome` is None while it is open, then done, skipped or expired."""

    __tablename__ = "tasks"
    __table_args__ = (Index("tasks_of_message", "message_id", "kind", "outcome"),)
    id: Mapped[str] = id_column()
    kind: Mapped[str]
    person_id: Mapped[str] = reference("people.id")
    tree_id: Mapped[str | None] = reference("trees.id", nullable=True)
    message_id: Mapped[str | None] = mapped_column(ForeignKey("messages.id"), nullable=True)
    language: Mapped[str]
    shown: Mapped[list[Any] | None]  # ids in the order in which they are shown
    handed_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime] = mapped_column(index=True)
    closed_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
