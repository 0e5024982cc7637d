"""Who sends a request, and whether the form came from a page of ours.

A route declares who may use it by the type of an argument: `Visiting` and `Sending` are everybody's who has logged in,
`Moderating` and `ModeratorSending` need a moderator, `Administering` and `AdminSending` an admin; `AnyGuest` and
`GuestSending` are of the pages before a login. The types with Sending are for requests that change something.
"""

import hmac
import secrets
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from palm_rlhf.feedback.people.accounts import has_accounts, live_session, local_person, open_session
from palm_rlhf.feedback.people.roles import has_role
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.catalogues import N_
from palm_rlhf.feedback.web.session_cookies import form_token, read_cookie
from palm_rlhf.feedback.web.site import Site, site_of


@dataclass(frozen=True)
class Visitor:
    """The person that a request comes from, its session, and the token that its forms have to send."""

    person: Participant
    session_id: str
    form_token: str

    def has_role(self, role: str) -> bool:
        """Return whether the person may do what `role` may do."""
        return has_role(self.person, role)


@dataclass(frozen=True)
class Guest:
    """A browser before a login, with the token that its forms have to send."""

    form_token: str


class LoginNeeded(FeedbackError):
    """A request of nobody: a page sends it to the login."""

    def __init__(self) -> None:
        super().__init__(N_("log in first"), 401)


def visitor_of(request: Request) -> Visitor:
    """Return who sends a request; LoginNeeded for nobody.

    A request that changes something needs the session's token, in the form's field `token` or in the header
    `X-Form-Token`; `checked_form` checks it.
    """
    site = site_of(request)
    found = known_visitor(site, request) or _local_visitor(site, request)
    site.throttle.count_request(found.person.id, time.monotonic())
    request.state.visitor = found
    return found


def known_visitor(site: Site, request: Request) -> Visitor | None:
    """Return the visitor of the request's cookie, or None where there is none or its session has ended."""
    session_id = read_cookie(site, request, "session")
    if session_id is None:
        return None
    with site.store.reading() as session:
        found = live_session(session, session_id, utc_now())
    return None if found is None else Visitor(found[1], session_id, form_token(site, "session", session_id))


def _local_visitor(site: Site, request: Request) -> Visitor:
    """Return the one local person of a site that nobody else reaches, in a new session."""
    if not site.is_local:
        raise LoginNeeded
    with site.store.writing() as session:
        if has_accounts(session):
            raise LoginNeeded
        now = utc_now()
        person = local_person(session, now)
        login = open_session(session, person, now)
    request.state.new_session = login.id
    return Visitor(person, login.id, form_token(site, "session", login.id))


async def checked_form(request: Request, visitor: Annotated[Visitor, Depends(visitor_of)]) -> Visitor:
    """Return who sends a form; FeedbackError without the token of the session's own pages."""
    await _check_token(request, visitor.form_token)
    return visitor


def guest_of(request: Request) -> Guest:
    """Return the browser that opens a page before a login; it gets a cookie, to which the page's form is bound."""
    site = site_of(request)
    guest_id = read_cookie(site, request, "guest")
    if guest_id is None:
        guest_id = request.state.new_guest = secrets.token_urlsafe(16)
    return Guest(form_token(site, "guest", guest_id))


async def checked_guest_form(request: Request, guest: Annotated[Guest, Depends(guest_of)]) -> Guest:
    """Return the browser that sends a form before a login; FeedbackError without the token of its own page."""
    await _check_token(request, guest.form_token)
    return guest


async def _check_token(request: Request, expected: str) -> None:
    token = request.headers.get("x-form-token")
    if token is None and not request.headers.get("content-type", "").startswith("application/json"):
        value = (await request.form()).get("token")
        token = value if isinstance(value, str) else None
    if token is None or not hmac.compare_digest(token.encode(), expected.encode()):
        raise FeedbackError("this form is not of this session: load the page again", 403)


class NeedsRole:
    """A dependency that lets visitors of a role pass."""

    def __init__(self, role: str):
        self.role = role

    def check(self, visitor: Visitor) -> Visitor:
        """Return the visitor; FeedbackError for one without the role."""
        if not visitor.has_role(self.role):
            raise FeedbackError("only a person with the role {role} may do this", 403, role=self.role)
        return visitor


class PageOfRole(NeedsRole):
    """A dependency of pages that need a role."""

    def __call__(self, visitor: Annotated[Visitor, Depends(visitor_of)]) -> Visitor:
        """Return the visitor; FeedbackError for one without the role."""
        return self.check(visitor)


class FormOfRole(NeedsRole):
    """A dependency of forms that need a role."""

    def __call__(self, visitor: Annotated[Visitor, Depends(checked_form)]) -> Visitor:
        """Return the visitor; FeedbackError for one without the role."""
        return self.check(visitor)


Visiting = Annotated[Visitor, Depends(visitor_of)]  # of pages
Sending = Annotated[Visitor, Depends(checked_form)]  # of forms
Moderating = Annotated[Visitor, Depends(PageOfRole("moderator"))]
ModeratorSending = Annotated[Visitor, Depends(FormOfRole("moderator"))]
Administering = Annotated[Visitor, Depends(PageOfRole("admin"))]
AdminSending = Annotated[Visitor, Depends(FormOfRole("admin"))]
AnyGuest = Annotated[Guest, Depends(guest_of)]
GuestSending = Annotated[Guest, Depends(checked_guest_form)]
