"""The page of who has contributed most."""

from typing import Literal

from fastapi import APIRouter, Request, Response

from palm_rlhf.feedback.measures.leaderboard import leaderboard
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Visiting

router = APIRouter()


@router.get("/leaderboard", name="leaderboard")
def show_leaderboard(request: Request, visitor: Visiting, window: Literal["day", "week", "all"] = "week") -> Response:
    """Show what each person has contributed within a day, a week or ever."""
    site = site_of(request)
    with site.store.reading() as session:
        rows = leaderboard(session, window, utc_now())
    return site.render(request, "leaderboard.html", rows=rows, window=window)
