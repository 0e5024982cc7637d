"""The pages before a login: log in, log out, and accept an invitation."""

import time
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from palm_rlhf.feedback.people.accounts import end_session, live_session, name_key, open_session, person_of_name
from palm_rlhf.feedback.people.invitations import accept, open_invitation
from palm_rlhf.feedback.people.passwords import check_password
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.session_cookies import read_cookie
from palm_rlhf.feedback.web.site import Site, site_of
from palm_rlhf.feedback.web.visitors import AnyGuest, Guest, GuestSending, Sending

router = APIRouter()
Text = Annotated[str, Form()]


@router.get("/login", name="login")
def login_page(request: Request, guest: AnyGuest, next: str = "") -> Response:
    """Show the form for a name and a password; `next` is the page to show after it."""
    return _login_form(request, guest, next)


@router.post("/login")
def log_in(request: Request, guest: GuestSending, name: Text = "", password: Text = "", next: Text = "") -> Response:
    """Begin a session of the person with this name and password, in place of any that the browser had."""
    site, address, key = site_of(request), address_of(request), name_key(name)
    site.throttle.count_guess(key, address, time.monotonic())
    with site.store.reading() as session:
        person = person_of_name(session, name)
    hashed = None if person is None else person.password_hash
    if not site.passwords.verify(password, hashed) or person is None:
        error = FeedbackError("there is nobody with this name and this password", 401)
        return _login_form(request, guest, next, name=name, error=error)
    site.throttle.forgive_guess(key, address)
    _begin(site, request, person, outdated=site.passwords.is_outdated(hashed or ""), password=password)
    return RedirectResponse(own_path(next) or request.url_for("home").path, status_code=303)


@router.post("/logout", name="logout")
def log_out(request: Request, visitor: Sending) -> Response:
    """End the session of this browser."""
    with site_of(request).store.writing() as session:
        end_session(session, visitor.session_id, utc_now())
    request.state.new_session = ""
    return RedirectResponse(request.url_for("login").path, status_code=303)


@router.get("/join/{secret}", name="join")
def join_page(request: Request, guest: AnyGuest, secret: str) -> Response:
    """Show the form by which an invited person chooses a name and a password."""
    site = site_of(request)
    site.throttle.count_guess(None, address_of(request), time.monotonic())
    with site.store.reading() as session:
        open_invitation(session, secret, utc_now())
    site.throttle.forgive_guess(None, address_of(request))
    return site.render(request, "join.html", form_token=guest.form_token, secret=secret, name="", error=None)


@router.post("/join", name="accept")
def accept_invitation(
    request: Request, guest: GuestSending, secret: Text = "", name: Text = "", password: Text = "", again: Text = ""
) -> Response:
    """Make the person of an invitation, and log in."""
    site, now = site_of(request), utc_now()
    site.throttle.count_guess(None, address_of(request), time.monotonic())
    with site.store.reading() as session:
        open_invitation(session, secret, now)  # before the password is hashed, which takes time
    try:
        check_password(password, again, name)
        hashed = site.passwords.hash(password)
        with site.store.writing() as session:
            person = accept(session, secret, name, hashed, now)
    except FeedbackError as error:
        if error.status == 410:
            raise
        words = site.translate(request, error)
        values = {"form_token": guest.form_token, "secret": secret, "name": name, "error": words}
        return site.render(request, "join.html", status=error.status, **values)
    site.throttle.forgive_guess(None, address_of(request))
    _begin(site, request, person)
    return RedirectResponse(request.url_for("home").path, status_code=303)


def own_path(address: str) -> str:
    r"""Return an address that is a path of this host, or an empty text for any other.

    Browsers read `//host`, `/\host` and `https:/host` as other hosts, and leave out control characters.
    """
    is_path = address.startswith("/") and not address.startswith(("//", "/\\"))
    return address if is_path and address.isprintable() and "\\" not in address and address.isascii() else ""


def address_of(request: Request) -> str:
    """Return the address of the client, by which wrong passwords are counted."""
    return request.client.host if request.client else "unknown"


def _login_form(
    request: Request, guest: Guest, next: str, *, name: str = "", error: FeedbackError | None = None
) -> Response:
    values = {"form_token": guest.form_token, "next": own_path(next), "name": name}
    status = 200 if error is None else error.status
    site = site_of(request)
    words = error and site.translate(request, error)
    return site.render(request, "login.html", status=status, error=words, **values)


def _begin(site: Site, request: Request, person: Participant, *, outdated: bool = False, password: str = "") -> None:
    """Begin a session with a new id, so that one that somebody else knew before the login is worth nothing after it."""
    now, hashed = utc_now(), site.passwords.hash(password) if outdated else None
    with site.store.writing() as session:
        if (former := read_cookie(site, request, "session")) and live_session(session, former, now):
            end_session(session, former, now)
        kept = session.get_one(Participant, person.id)
        if kept.deleted_at is not None or kept.password_hash != person.password_hash:
            raise FeedbackError("the account has just changed: log in again", 409)
        kept.password_hash = hashed or kept.password_hash
        request.state.new_session = open_session(session, kept, now).id
    request.state.new_guest = ""
