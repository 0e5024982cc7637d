"""The first page of the site."""

from fastapi import APIRouter, Request, Response

from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Visiting

router = APIRouter()


@router.get("/", name="home")
def home(request: Request, visitor: Visiting) -> Response:
    """Show what there is to do."""
    return site_of(request).render(request, "home.html")
