"""The page of all people, for admins: invitations, roles and deletion."""

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import select

from palm_rlhf.feedback.people.accounts import set_role
from palm_rlhf.feedback.people.deletion import delete_person
from palm_rlhf.feedback.people.invitations import end_invitation, invite, open_invitations
from palm_rlhf.feedback.people.roles import ROLES
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.account_pages import keeps
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Administering, AdminSending

router = APIRouter()
Text = Annotated[str, Form()]


@router.get("/people", name="people")
def people_page(request: Request, visitor: Administering) -> Response:
    """Show all people, and the invitations that can still be used."""
    return _page(request)


@router.post("/people/invite", name="invite")
def send_invitation(request: Request, visitor: AdminSending, role: Text = "contributor") -> Response:
    """Make an invitation, and show its link, which nobody can see again."""
    if visitor.person.password_hash is None:
        raise FeedbackError("choose a name and a password for yourself first, on your account's page", 409)
    with site_of(request).store.writing() as session:
        secret = invite(session, role, utc_now(), created_by=visitor.person)
    return _page(request, link=str(request.url_for("join", secret=secret)))


@router.post("/people/invitations/{invitation_id}/end", name="end_invitation")
def take_back(request: Request, visitor: AdminSending, invitation_id: str) -> Response:
    """Take back an invitation that nobody has used."""
    with site_of(request).store.writing() as session:
        end_invitation(session, invitation_id, utc_now())
    return RedirectResponse(request.url_for("people").path, status_code=303)


@router.post("/people/{person_id}/role", name="set_role")
def change_role(request: Request, visitor: AdminSending, person_id: str, role: Text = "") -> Response:
    """Give a person another role."""
    with site_of(request).store.writing() as session:
        person = session.get(Participant, person_id)
        if person is None or person.deleted_at is not None:
            raise FeedbackError("there is no such person", 404)
        set_role(session, person, role)
    return RedirectResponse(request.url_for("people").path, status_code=303)


@router.get("/people/{person_id}/delete", name="ask_to_delete")
def deletion_page(request: Request, visitor: Administering, person_id: str) -> Response:
    """Ask whether the contributions of a person are kept."""
    with site_of(request).store.reading() as session:
        person = session.get(Participant, person_id)
    if person is None or person.deleted_at is not None:
        raise FeedbackError("there is no such person", 404)
    return site_of(request).render(request, "delete_person.html", person=person)


@router.post("/people/{person_id}/delete", name="delete_person")
def delete(request: Request, visitor: AdminSending, person_id: str, contributions: Text = "") -> Response:
    """Delete a person; `contributions` is keep or remove."""
    site, keep = site_of(request), keeps(contributions)
    with site.store.writing() as session:
        delete_person(session, person_id, utc_now(), site.settings, keeps_contributions=keep, by=visitor.person)
    return RedirectResponse(request.url_for("people").path, status_code=303)


def _page(request: Request, *, link: str | None = None) -> Response:
    site, now = site_of(request), utc_now()
    with site.store.reading() as session:
        query = select(Participant).where(Participant.deleted_at.is_(None))
        people = list(session.scalars(query.order_by(Participant.created_at, Participant.id)))
        invitations = open_invitations(session, now)
    return site.render(request, "people.html", people=people, invitations=invitations, link=link, roles=ROLES)
