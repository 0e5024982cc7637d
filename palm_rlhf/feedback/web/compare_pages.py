"""The page of blind comparisons: two answers to one prompt side by side, and which of them is better."""

import random
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.judgments.contributions import take_back
from palm_rlhf.feedback.judgments.judging import standing, vote
from palm_rlhf.feedback.pairs.next_pair import next_comparison
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, ShownComparison
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Sending, Visiting

router = APIRouter()


@router.get("/compare", name="compare")
def show_next(request: Request, visitor: Visiting, last: str = "") -> Response:
    """Show the next pair of the visitor; `last` is the vote before, which can be taken back here."""
    site = site_of(request)
    with site.store.writing() as session:
        rng, method = random.SystemRandom(), site.settings.pairs
        chosen = next_comparison(session, visitor.person, site.settings, rng=rng, now=utc_now(), pairs=method)
    return _page(request, visitor, chosen, last)


@router.get("/compare/{comparison_id}", name="comparison")
def show_again(request: Request, visitor: Visiting, comparison_id: str) -> Response:
    """Show a comparison of the visitor again, as after its vote was taken back."""
    with site_of(request).store.reading() as session:
        comparison = session.get(ShownComparison, comparison_id)
    if comparison is None or comparison.person_id != visitor.person.id:
        raise FeedbackError("there is no such comparison of yours", 404)
    return _page(request, visitor, comparison, "")


@router.post("/compare/{comparison_id}", name="give_vote")
def give_vote(request: Request, visitor: Sending, comparison_id: str, verdict: Annotated[str, Form()] = "") -> Response:
    """Keep the visitor's verdict, and show the next pair."""
    with site_of(request).store.writing() as session:
        row = vote(session, visitor.person.id, comparison_id, verdict, now=utc_now())
    url = request.url_for("compare").include_query_params(last=row.id)
    return RedirectResponse(f"{url.path}?{url.query}", status_code=303)


@router.post("/votes/{vote_id}/undo", name="undo_vote")
def undo_vote(request: Request, visitor: Sending, vote_id: str) -> Response:
    """Take the visitor's vote back, and show its comparison again."""
    site = site_of(request)
    with site.store.writing() as session:
        take_back(session, visitor.person.id, ComparisonVote.__tablename__, vote_id, site.settings, now=utc_now())
        comparison_id = session.get_one(ComparisonVote, vote_id).comparison_id
    return RedirectResponse(request.url_for("comparison", comparison_id=comparison_id).path, status_code=303)


def _page(request: Request, visitor: Visiting, comparison: ShownComparison | None, last: str) -> Response:
    site, person_id = site_of(request), visitor.person.id
    with site.store.reading() as session:
        left = right = given = None
        if comparison is not None:
            left, right = session.get_one(Answer, comparison.left_id), session.get_one(Answer, comparison.right_id)
            given = next(iter(standing(session, ComparisonVote, person_id, comparison_id=comparison.id)), None)
        newest = session.get(ComparisonVote, last)
        undoable = newest is not None and newest in standing(session, ComparisonVote, person_id)
        return site.render(
            request,
            "compare.html",
            comparison=comparison,
            left=left,
            right=right,
            given=given,
            undoable=newest.id if undoable and newest is not None else None,
            number=_count(session, person_id),
            everybodys=_count(session, None),
        )


def _count(session: Session, person_id: str | None) -> int:
    """Return the number of votes on pairs of the pool, of one person or of everybody."""
    query = select(func.count()).select_from(ComparisonVote).join(ShownComparison).where(not_withdrawn(ComparisonVote))
    query = query.where(ShownComparison.chosen_by != "chat")
    return session.scalar(query if person_id is None else query.where(ComparisonVote.person_id == person_id)) or 0
