"""Invitations: links that make one person each, of which the database keeps only hashes."""

import hashlib
import secrets
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.people.accounts import add_person, has_accounts
from palm_rlhf.feedback.people.roles import check_role
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import Invitation, Participant

LASTS = timedelta(days=7)
FIRST_LASTS = timedelta(days=1)  # of the link that is printed when a site has nobody


def invite(
    session: Session, role: str, now: datetime, *, created_by: Participant | None, lasts: timedelta = LASTS
) -> str:
    """Make an invitation, and return its secret, which nobody can read again later.

    Raises FeedbackError for a role that there is not.
    """
    check_role(role)
    secret = secrets.token_urlsafe(24)
    creator = None if created_by is None else created_by.id
    row = Invitation(secret_hash=hash_of(secret), role=role, created_by=creator, created_at=now, expires_at=now + lasts)
    session.add(row)
    return secret


def invite_first_admin(session: Session, now: datetime) -> str | None:
    """Make the invitation of a site's first admin, and return its secret; None where somebody has an account."""
    if has_accounts(session):
        return None
    return invite(session, "admin", now, created_by=None, lasts=FIRST_LASTS)


def open_invitation(session: Session, secret: str, now: datetime) -> Invitation:
    """Return the invitation of a secret; FeedbackError where there is none, or where it is used or has expired."""
    found = session.scalars(select(Invitation).where(Invitation.secret_hash == hash_of(secret))).first()
    is_open = found is not None and found.used_at is None and found.expires_at > now
    if found is None or not is_open or (found.created_by is None and has_accounts(session)):
        raise FeedbackError("this invitation is used, has expired, or never was: ask for a new one", 410)
    return found


def accept(session: Session, secret: str, name: str, password_hash: str, now: datetime) -> Participant:
    """Make the person of an invitation, which nobody can use again.

    Raises FeedbackError for an invitation that is not open, and for a name that cannot be had.
    """
    invitation = open_invitation(session, secret, now)
    person = add_person(session, name, invitation.role, now)
    person.password_hash = password_hash
    invitation.used_by, invitation.used_at = person.id, now
    return person


def end_invitation(session: Session, invitation_id: str, now: datetime) -> None:
    """Take an invitation back; FeedbackError where there is none that could still be used."""
    found = session.get(Invitation, invitation_id)
    if found is None or found.used_at is not None or found.expires_at <= now:
        raise FeedbackError("this invitation is used or has expired already", 404)
    found.expires_at = now


def open_invitations(session: Session, now: datetime) -> list[Invitation]:
    """Return the invitations that can still be used, newest first."""
    query = select(Invitation).where(Invitation.used_at.is_(None), Invitation.expires_at > now)
    return list(session.scalars(query.order_by(Invitation.created_at.desc(), Invitation.id)))


def hash_of(secret: str) -> str:
    """Return the hash of an invitation's secret; of 192 random bits, a plain SHA-256 tells nothing."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
