"""The page of what the visitor has given, newest first, from which it can be taken back."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from palm_rlhf.feedback.judgments.contributions import contributions, take_back
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Sending, Visiting

ON_A_PAGE = 20
router = APIRouter()


@router.get("/mine", name="mine")
def show_mine(request: Request, visitor: Visiting, page: int = 1) -> Response:
    """Show a page of the visitor's contributions."""
    site, page = site_of(request), min(max(page, 1), 10**6)
    with site.store.reading() as session:
        offset = (page - 1) * ON_A_PAGE
        found = contributions(session, visitor.person.id, offset=offset, limit=ON_A_PAGE + 1)
    return site.render(
        request, "mine.html", contributions=found[:ON_A_PAGE], page=page, has_more=len(found) > ON_A_PAGE
    )


@router.post("/mine/{table}/{row_id}/withdraw", name="take_back")
def take_one_back(request: Request, visitor: Sending, table: str, row_id: str, page: int = 1) -> Response:
    """Take a contribution of the visitor back, and show the page again."""
    site = site_of(request)
    with site.store.writing() as session:
        take_back(session, visitor.person.id, table, row_id, site.settings, now=utc_now())
    url = request.url_for("mine").include_query_params(page=page)
    return RedirectResponse(f"{url.path}?{url.query}", status_code=303)
