"""People and their accounts: names, logins and sessions."""

import unicodedata
from datetime import datetime, timedelta

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.people.passwords import Passwords, check_password
from palm_rlhf.feedback.people.roles import check_role
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import LoginSession, Participant

LOCAL_NAME = "local"  # of the one person of a site on loopback, until the person takes another name
LONGEST_NAME = 40
SESSION_LASTS = timedelta(days=30)  # from the login, however often the session is used


def add_person(session: Session, name: str, role: str, now: datetime, *, language: str | None = None) -> Participant:
    """Add a person; FeedbackError for a name that is taken or that is none, and for a role that there is not."""
    check_role(role)
    person = Participant(role=role, language=language, created_at=now)
    set_name(session, person, name)
    session.add(person)
    session.flush()
    return person


def set_name(session: Session, person: Participant, name: str) -> None:
    """Give a person a name; FeedbackError for a name that somebody else has, or that `checked_name` refuses."""
    name = checked_name(name)
    key = name_key(name)
    with session.no_autoflush:
        other = session.scalars(select(Participant).where(Participant.name_key == key)).first()
    if other is not None and other is not person:
        raise FeedbackError("somebody has this name already: choose another one", 409)
    person.name, person.name_key = name, key


def checked_name(name: str) -> str:
    """Return a name in its one form: composed characters, single blanks.

    Raises FeedbackError for a name without letters or digits, for one longer than 40 characters, and for one with
    characters that are not seen: controls, line ends, and marks that turn the direction of text.
    """
    name = " ".join(unicodedata.normalize("NFC", name).split(" ")).strip()
    while "  " in name:
        name = name.replace("  ", " ")
    if not 1 <= len(name) <= LONGEST_NAME:
        length, most = len(name), LONGEST_NAME
        raise FeedbackError("got a name of {length} characters, expected 1 to {most}", 422, length=length, most=most)
    if not name.replace(" ", "_").isprintable() or not any(map(str.isalnum, name)):
        raise FeedbackError("a name has letters or digits, and no characters that are not seen: choose another", 422)
    return name


def name_key(name: str) -> str:
    """Return the form by which names are compared: Alice, alice and ALICE are one name."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name.strip()).casefold())


def person_of_name(session: Session, name: str) -> Participant | None:
    """Return the person of a name, or None; a deleted person has none."""
    return session.scalars(select(Participant).where(Participant.name_key == name_key(name))).first()


def has_accounts(session: Session) -> bool:
    """Return whether anybody can log in by a password: then a site is not the one local person's any more."""
    is_account = exists().where(Participant.password_hash.is_not(None), Participant.deleted_at.is_(None))
    return bool(session.scalar(select(is_account)))


def local_person(session: Session, now: datetime) -> Participant:
    """Return the one person of a site without accounts: an admin without a password, added where there is none."""
    query = select(Participant).where(
        Participant.role == "admin", Participant.password_hash.is_(None), Participant.deleted_at.is_(None)
    )
    found = session.scalars(query.order_by(Participant.created_at, Participant.id).limit(1)).first()
    return add_person(session, LOCAL_NAME, "admin", now) if found is None else found


def open_session(session: Session, person: Participant, now: datetime) -> LoginSession:
    """Begin a session of a person."""
    login = LoginSession(person_id=person.id, created_at=now, expires_at=now + SESSION_LASTS)
    session.add(login)
    session.flush()
    return login


def live_session(session: Session, session_id: str, now: datetime) -> tuple[LoginSession, Participant] | None:
    """Return a session and its person; None where it has ended or expired, or the person is deleted."""
    login = session.get(LoginSession, session_id)
    if login is None or login.ended_at is not None or login.expires_at <= now:
        return None
    person = session.get(Participant, login.person_id)
    return None if person is None or person.deleted_at is not None else (login, person)


def live_sessions(session: Session, person: Participant, now: datetime) -> list[LoginSession]:
    """Return the sessions of a person that have not ended, newest first."""
    query = select(LoginSession).where(
        LoginSession.person_id == person.id, LoginSession.ended_at.is_(None), LoginSession.expires_at > now
    )
    return list(session.scalars(query.order_by(LoginSession.created_at.desc(), LoginSession.id)))


def end_session(session: Session, session_id: str, now: datetime) -> None:
    """End a session, if it has not ended."""
    login = session.get(LoginSession, session_id)
    if login is not None and login.ended_at is None:
        login.ended_at = now


def end_sessions(session: Session, person: Participant, now: datetime) -> None:
    """End all sessions of a person."""
    query = select(LoginSession).where(LoginSession.person_id == person.id, LoginSession.ended_at.is_(None))
    for login in session.scalars(query).all():
        login.ended_at = now


def set_password(session: Session, person: Participant, password_hash: str, now: datetime) -> None:
    """Give a person a new password, and end the sessions that began before it."""
    person.password_hash = password_hash
    end_sessions(session, person, now)


def set_admin(session: Session, name: str, password: str, passwords: Passwords, now: datetime) -> Participant:
    """Return the admin of a name and a password, after adding the person or changing the password where needed."""
    person = person_of_name(session, name) or add_person(session, name, "admin", now)
    person.role = "admin"
    if not passwords.verify(password, person.password_hash):
        check_password(password, password, name)
        set_password(session, person, passwords.hash(password), now)
    return person


def set_role(session: Session, person: Participant, role: str) -> None:
    """Give a person a role; FeedbackError where the site would have no admin with a password any more."""
    check_role(role)
    if role != "admin":
        check_another_admin(session, person)
    person.role = role


def check_another_admin(session: Session, person: Participant) -> None:
    """Raise FeedbackError where a person is the only admin who can log in."""
    others = exists().where(
        Participant.role == "admin",
        Participant.password_hash.is_not(None),
        Participant.deleted_at.is_(None),
        Participant.id != person.id,
    )
    if person.role == "admin" and not session.scalar(select(others)):
        raise FeedbackError("this is the only admin: make somebody else an admin first", 409)
