"""The page of the rounds of learning."""

from fastapi import APIRouter, Request, Response

from palm_rlhf.feedback.measures.round_reports import round_reports
from palm_rlhf.feedback.web.charts import curve_chart
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Visiting

router = APIRouter()


@router.get("/rounds", name="rounds")
def show_rounds(request: Request, visitor: Visiting) -> Response:
    """Show what was measured in each round, and whether the model got better."""
    site = site_of(request)
    with site.store.reading() as session:
        reports = round_reports(session)
    return site.render(request, "rounds.html", reports=reports, curve_chart=curve_chart)
