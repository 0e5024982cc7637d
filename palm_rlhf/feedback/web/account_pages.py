"""The page of one's own account, and of all people for an admin."""

import time
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from palm_rlhf.feedback.people.accounts import end_sessions, live_sessions, open_session, set_name, set_password
from palm_rlhf.feedback.people.deletion import delete_person
from palm_rlhf.feedback.people.passwords import check_password
from palm_rlhf.feedback.people.personal_data import personal_data
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.login_pages import address_of
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Sending, Visiting, Visitor

router = APIRouter()
Text = Annotated[str, Form()]


@router.get("/account", name="account")
def account_page(request: Request, visitor: Visiting) -> Response:
    """Show the account: name, language, password, sessions, and how to leave."""
    return _page(request, visitor)


@router.post("/account/name", name="set_name")
def rename(request: Request, visitor: Sending, name: Text = "") -> Response:
    """Give the visitor another name."""

    def change() -> None:
        with site_of(request).store.writing() as session:
            set_name(session, session.get_one(Participant, visitor.person.id), name)

    return _changed(request, visitor, change)


@router.post("/account/language", name="set_language")
def speak(request: Request, visitor: Sending, language: Text = "") -> Response:
    """Show the pages in another language from now on, wherever the visitor logs in."""
    site = site_of(request)
    if language not in site.catalogues.names:
        message = "got the language {language!a:.40}, expected one of {languages}"
        raise FeedbackError(message, language=language, languages=", ".join(site.catalogues.names))
    with site.store.writing() as session:
        session.get_one(Participant, visitor.person.id).language = language
    response = RedirectResponse(request.url_for("account").path, status_code=303)
    response.delete_cookie("lang", httponly=True, samesite="lax")  # the choice of a moment gives way
    return response


@router.post("/account/password", name="set_password")
def change_password(
    request: Request, visitor: Sending, former: Text = "", password: Text = "", again: Text = "", name: Text = ""
) -> Response:
    """Give the visitor a new password; all sessions end, and this browser gets a new one.

    The local person gets a name with the first password, since others may be invited from then on.
    """
    site = site_of(request)

    def change() -> None:
        chosen = visitor.person.name if visitor.person.password_hash else name
        check_password(password, again, chosen)
        _check_former(request, visitor, former)
        hashed = site.passwords.hash(password)
        with site.store.writing() as session:
            person = _unchanged(session.get_one(Participant, visitor.person.id), visitor)
            set_name(session, person, chosen)
            now = utc_now()
            set_password(session, person, hashed, now)
            request.state.new_session = open_session(session, person, now).id

    return _changed(request, visitor, change)


@router.post("/account/sessions/end", name="end_sessions")
def log_out_everywhere(request: Request, visitor: Sending) -> Response:
    """End all sessions of the visitor, this one too."""
    with site_of(request).store.writing() as session:
        end_sessions(session, visitor.person, utc_now())
    request.state.new_session = ""
    return RedirectResponse(request.url_for("login").path, status_code=303)


@router.get("/account/data", name="personal_data")
def own_data(request: Request, visitor: Visiting) -> Response:
    """Send everything that the database holds about the visitor."""
    with site_of(request).store.reading() as session:
        found = personal_data(session, session.get_one(Participant, visitor.person.id))
    return JSONResponse(found, headers={"Content-Disposition": 'attachment; filename="my-feedback.json"'})


@router.post("/account/delete", name="delete_account")
def leave(request: Request, visitor: Sending, password: Text = "", contributions: Text = "") -> Response:
    """Delete the visitor, after the password; `contributions` is keep or remove."""
    site = site_of(request)

    def change() -> None:
        _check_former(request, visitor, password)
        with site.store.writing() as session:
            _unchanged(session.get_one(Participant, visitor.person.id), visitor)
            person, keep = visitor.person, keeps(contributions)
            delete_person(session, person.id, utc_now(), site.settings, keeps_contributions=keep, by=person)
        request.state.new_session = ""

    return _changed(request, visitor, change, "login")


def keeps(contributions: str) -> bool:
    """Return whether a form says that a deleted person's contributions stay; FeedbackError where it says neither."""
    if contributions not in ("keep", "remove"):
        raise FeedbackError("say whether the contributions are kept without the name, or removed", 422)
    return contributions == "keep"


def _check_former(request: Request, visitor: Visitor, password: str) -> None:
    """Check the visitor's password once more, as for a change that an unlocked screen must not suffice for."""
    site, address, key = site_of(request), address_of(request), visitor.person.name_key
    if visitor.person.password_hash is None:
        return
    site.throttle.count_guess(key, address, time.monotonic())
    if not site.passwords.verify(password, visitor.person.password_hash):
        raise FeedbackError("this is not your password", 422)
    site.throttle.forgive_guess(key, address)


def _unchanged(person: Participant, visitor: Visitor) -> Participant:
    """Return the person's row, read in the transaction; FeedbackError where its password changed since the check."""
    if person.password_hash != visitor.person.password_hash or person.deleted_at is not None:
        raise FeedbackError("the account has just changed: load the page again", 409)
    return person


def _changed(request: Request, visitor: Visitor, change: Callable[[], None], then: str = "account") -> Response:
    """Make a change and go to the page `then`; where the change is refused, show the account with the words why."""
    try:
        change()
    except FeedbackError as error:
        if error.retry_after is not None:
            raise
        return _page(request, visitor, error)
    return RedirectResponse(request.url_for(then).path, status_code=303)


def _page(request: Request, visitor: Visitor, error: FeedbackError | None = None) -> Response:
    site, now = site_of(request), utc_now()
    with site.store.reading() as session:
        sessions = live_sessions(session, visitor.person, now)
    status = 200 if error is None else error.status
    words = None if error is None else site.translate(request, error)
    return site.render(request, "account.html", status=status, sessions=sessions, here=visitor.session_id, error=words)
