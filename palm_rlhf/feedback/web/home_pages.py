"""The first page of the site, and the choice of a language for the tasks."""

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.trees.progress import contributions, progress
from palm_rlhf.feedback.trees.tasks import available, waiting_for_others
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.task_thanks import thanks_for
from palm_rlhf.feedback.web.visitors import Sending, Visiting

router = APIRouter()


@router.get("/", name="home")
def home(request: Request, visitor: Visiting, after: str = "", none: bool = False) -> Response:
    """Show what there is to do, how far the collection is, and what the visitor has done.

    Args:
        after: The task to thank for.
        none: Whether the visitor has just asked for a task and there was none.
    """
    site, now = site_of(request), utc_now()
    settings, person = site.settings, visitor.person
    language = site.task_language(request)
    with site.store.reading() as session:
        counts = available(session, person, settings, language=language, now=now)
        others = waiting_for_others(session, person, settings, language=language, now=now)
        so_far = progress(session, settings, language=language, now=now)
        mine = [each for each in contributions(session, "all", now) if each.person_id == person.id]
        thanks = thanks_for(session, person, after, settings)
    return site.render(
        request,
        "home.html",
        counts=counts,
        others=others,
        progress=so_far,
        mine=mine[0] if mine else None,
        thanks=thanks,
        none=none,
        task_language=language,
        task_languages={code: site.catalogues.name_of(code) for code in settings.languages},
    )


@router.post("/language", name="task_language")
def choose_language(request: Request, visitor: Sending, language: Annotated[str, Form()]) -> Response:
    """Keep the language in which the visitor does tasks."""
    site = site_of(request)
    if language not in site.settings.languages:
        raise FeedbackError("no messages are collected in this language", 404)
    with site.store.writing() as session:
        session.get_one(Participant, visitor.person.id).language = language
    response = RedirectResponse(request.url_for("home").path, status_code=303)
    site.keep_language(response, site.language_of(request))  # the pages stay in the language that they have
    return response
