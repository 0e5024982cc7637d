"""The page of numbers about the collection: coverage, agreement, reliability, languages and days."""

from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import select

from palm_rlhf.feedback.measures.agreement import label_agreement, ranking_agreement, vote_agreement
from palm_rlhf.feedback.measures.coverage import contributions_by_day, coverage, messages_by_language
from palm_rlhf.feedback.measures.reliability import estimate_reliability, judgements_of
from palm_rlhf.feedback.measures.vote_records import vote_records
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.charts import bar_chart
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Visiting

router = APIRouter()
NUM_DAYS = 30


@router.get("/statistics", name="statistics")
def show_statistics(request: Request, visitor: Visiting) -> Response:
    """Show how far the collection is and how far people agree; a person sees their own reliability only."""
    site, now = site_of(request), utc_now()
    with site.store.reading() as session:
        people = estimate_reliability(judgements_of(session))
        if not visitor.has_role("moderator"):
            people = [each for each in people if each.person_id == visitor.person.id]
        names = {row.id: row.name for row in session.execute(select(Participant.id, Participant.name))}
        days = contributions_by_day(session, NUM_DAYS, now)
        languages = messages_by_language(session)
        values: dict[str, Any] = {
            "coverage": coverage(session, site.settings, now),
            "labels": label_agreement(session),
            "rankings": ranking_agreement(session),
            "votes": vote_agreement(vote_records(session)),
        }
    reader = site.language_of(request)
    values["messages"] = [(site.catalogues.name_of(code, reader), number) for code, number in languages.items()]
    bars = bar_chart([(day.isoformat(), number) for day, number in days.items()])
    return site.render(request, "statistics.html", people=people, names=names, days=days, bars=bars, **values)
