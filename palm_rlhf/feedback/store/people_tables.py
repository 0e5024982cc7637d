"""The tables of people, invitations and logins."""

from datetime import datetime

from sqlalchemy.orm import Mapped, mapped_column

from palm_rlhf.feedback.store.table_base import Base, id_column, reference, utc_now


class Participant(Base):
    """Somebody who contributes; `role` is contributor, moderator or admin.

    `name_key` is the name as logins compare it. A deleted person has an empty name, and None as its key.
    """

    __tablename__ = "people"
    id: Mapped[str] = id_column()
    name: Mapped[str]
    name_key: Mapped[str | None] = mapped_column(unique=True)
    role: Mapped[str]
    password_hash: Mapped[str | None]
    language: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    deleted_at: Mapped[datetime | None]


class Invitation(Base):
    """A link that makes one person; the link's secret is kept as its hash."""

    __tablename__ = "invitations"
    id: Mapped[str] = id_column()
    secret_hash: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str]
    created_by: Mapped[str | None] = reference("people.id", nullable=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime]
    used_by: Mapped[str | None] = reference("people.id", nullable=True)
    used_at: Mapped[datetime | None]


class LoginSession(Base):
    """A browser in which somebody has logged in, until it expires or is ended."""

    __tablename__ = "sessions"
    id: Mapped[str] = id_column()
    person_id: Mapped[str] = reference("people.id")
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
