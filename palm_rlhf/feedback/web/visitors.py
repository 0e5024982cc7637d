"""Who sends a request: sessions in signed cookies, and tokens that show that a form came from a page of ours."""

import hmac
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, Request, Response
from itsdangerous import BadData
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import LoginSession, Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.site import Site, site_of

COOKIE = "palm_rlhf_session"
LASTS = timedelta(days=30)
LOCAL_NAME = "local"
ROLES = ("contributor", "moderator", "admin")


@dataclass(frozen=True)
class Visitor:
    """The person that a request comes from, its session, and the token that its forms have to send."""

    person: Participant
    session_id: str
    form_token: str

    def has_role(self, role: str) -> bool:
        """Return whether the person may do what `role` may do."""
        return ROLES.index(self.person.role) >= ROLES.index(role)


class LoginNeeded(FeedbackError):
    """A request of nobody: a page sends it to the login."""

    def __init__(self) -> None:
        super().__init__("log in first", 401)


def begin_session(site: Site, session: Session, person: Participant, response: Response) -> LoginSession:
    """Open a session of a person, and put its signed id into the response's cookie."""
    login = LoginSession(person_id=person.id, expires_at=utc_now() + LASTS)
    session.add(login)
    session.flush()
    set_cookie(site, response, login.id)
    return login


def set_cookie(site: Site, response: Response, session_id: str) -> None:
    """Put the signed id of a session into a response's cookie."""
    value = site.serializer("session").dumps(session_id)
    response.set_cookie(COOKIE, value, max_age=int(LASTS.total_seconds()), httponly=True, samesite="lax", path="/")


def form_token(site: Site, session_id: str) -> str:
    """Return the token of the forms of a session."""
    return hmac.new(site.secret.encode(), f"form:{session_id}".encode(), "sha256").hexdigest()


def visitor_of(request: Request, response: Response) -> Visitor:
    """Return who sends a request; LoginNeeded for nobody.

    A request that changes something needs the session's token, in the form's field `token` or in the header
    `X-Form-Token`; `checked_form` checks it.
    """
    site = site_of(request)
    found = _known_visitor(site, request)
    if found is None:
        if not site.is_local:
            raise LoginNeeded
        with site.store.writing() as session:
            person = session.scalars(select(Participant).where(Participant.name == LOCAL_NAME)).first()
            if person is None:
                person = Participant(name=LOCAL_NAME, role="admin")
                session.add(person)
                session.flush()
            login = begin_session(site, session, person, response)
            found = Visitor(person, login.id, form_token(site, login.id))
        request.state.new_session = found.session_id
    request.state.visitor = found
    return found


def _known_visitor(site: Site, request: Request) -> Visitor | None:
    """Return the visitor of the request's cookie, or None where there is none or it has ended."""
    cookie = request.cookies.get(COOKIE)
    if not cookie:
        return None
    try:
        session_id = site.serializer("session").loads(cookie, max_age=int(LASTS.total_seconds()))
    except BadData:
        return None
    with site.store.reading() as session:
        login = session.get(LoginSession, session_id)
        if login is None or login.ended_at is not None or login.expires_at <= utc_now():
            return None
        person = session.get(Participant, login.person_id)
        if person is None or person.deleted_at is not None:
            return None
        return Visitor(person, login.id, form_token(site, login.id))


async def checked_form(request: Request, visitor: Annotated[Visitor, Depends(visitor_of)]) -> Visitor:
    """Return who sends a form; FeedbackError without the token of the session's own pages."""
    token = request.headers.get("x-form-token")
    if token is None and not request.headers.get("content-type", "").startswith("application/json"):
        value = (await request.form()).get("token")
        token = value if isinstance(value, str) else None
    if token is None or not hmac.compare_digest(token.encode(), visitor.form_token.encode()):
        raise FeedbackError("this form is not of this session: load the page again", 403)
    return visitor


Visiting = Annotated[Visitor, Depends(visitor_of)]  # of pages
Sending = Annotated[Visitor, Depends(checked_form)]  # of forms
