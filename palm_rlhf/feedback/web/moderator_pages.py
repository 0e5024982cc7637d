"""The pages of moderators: flagged messages, trees, and what can be done about them."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import func, select

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.invariants import broken_laws
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.store.tree_tables import MessageReview, Tree, TreeEvent, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn, withdraw
from palm_rlhf.feedback.trees.moderation import flagged_messages, reopen
from palm_rlhf.feedback.trees.states import STATES, halt
from palm_rlhf.feedback.trees.taking_back import settle_withdrawal
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Moderating, ModeratorSending

router = APIRouter(prefix="/moderator")
PAGE = 50  # messages or trees on a page
Reason = Annotated[str, Form()]
PageNumber = Annotated[int, Query(ge=1, le=10**6)]


@router.get("", name="moderator")
def show_flagged(request: Request, visitor: Moderating, page: PageNumber = 1) -> Response:
    """Show the messages that were refused or flagged."""
    site = site_of(request)
    with site.store.reading() as session:
        found = flagged_messages(session, site.settings)
    part = found[(page - 1) * PAGE : page * PAGE]
    return site.render(request, "moderator.html", found=part, page=page, has_more=len(found) > page * PAGE)


@router.get("/trees", name="moderator_trees")
def show_trees(request: Request, visitor: Moderating, state: str = "", page: PageNumber = 1) -> Response:
    """Show the newest trees, of one state or of all."""
    if state and state not in STATES:
        raise FeedbackError("there is no such state of a tree", 404)
    site = site_of(request)
    prompt = TreeMessage.parent_id.is_(None)
    size = select(func.count()).where(TreeMessage.tree_id == Tree.id, not_withdrawn(TreeMessage))
    query = select(Tree, TreeMessage.text, size.correlate(Tree).scalar_subquery())
    query = query.join(TreeMessage, (TreeMessage.tree_id == Tree.id) & prompt)
    query = query.where(Tree.state == state) if state else query
    query = query.order_by(Tree.created_at.desc(), Tree.id).offset((page - 1) * PAGE).limit(PAGE + 1)
    with site.store.reading() as session:
        rows = session.execute(query).all()
    has_more = len(rows) > PAGE
    return site.render(request, "moderator_trees.html", rows=rows[:PAGE], state=state, page=page, has_more=has_more)


@router.get("/checks", name="moderator_checks")
def show_checks(request: Request, visitor: Moderating) -> Response:
    """Show whether the database keeps its laws."""
    site = site_of(request)
    with site.store.reading() as session:
        broken = broken_laws(session, site.settings, utc_now())
    return site.render(request, "moderator_checks.html", broken=broken)


@router.get("/trees/{tree_id}", name="moderator_tree")
def show_tree(request: Request, visitor: Moderating, tree_id: str) -> Response:
    """Show a tree with its reviews and its history."""
    site = site_of(request)
    with site.store.reading() as session:
        tree = session.get(Tree, tree_id)
        if tree is None:
            raise FeedbackError("there is no such tree", 404)
        rows = session.execute(
            select(TreeMessage, Participant.name, ~not_withdrawn(TreeMessage))
            .outerjoin(Participant, Participant.id == TreeMessage.person_id)
            .where(TreeMessage.tree_id == tree_id)
            .order_by(TreeMessage.created_at, TreeMessage.id)
        ).all()
        reviews: dict[str, list[dict[str, float]]] = {message.id: [] for message, *_ in rows}
        for message_id, labels in session.execute(
            select(MessageReview.message_id, MessageReview.labels).where(
                MessageReview.message_id.in_(reviews), not_withdrawn(MessageReview)
            )
        ):
            reviews[message_id].append(labels)
        history = session.execute(
            select(TreeEvent, Participant.name)
            .outerjoin(Participant, Participant.id == TreeEvent.person_id)
            .where(TreeEvent.tree_id == tree_id)
            .order_by(TreeEvent.at, TreeEvent.id)
        ).all()
    return site.render(request, "moderator_tree.html", tree=tree, rows=rows, reviews=reviews, history=history)


@router.post("/trees/{tree_id}/halt", name="halt_tree")
def halt_tree(request: Request, visitor: ModeratorSending, tree_id: str, reason: Reason = "") -> Response:
    """Halt a tree, for a reason that is kept with it."""
    with site_of(request).store.writing() as session:
        halt(session, tree_id, visitor.person, reason, utc_now())
    return _back_to(request, tree_id)


@router.post("/trees/{tree_id}/reopen", name="reopen_tree")
def reopen_tree(request: Request, visitor: ModeratorSending, tree_id: str, reason: Reason = "") -> Response:
    """Bring a halted tree back, for a reason that is kept with it."""
    site = site_of(request)
    with site.store.writing() as session:
        reopen(session, tree_id, visitor.person, reason, site.settings, utc_now())
    return _back_to(request, tree_id)


@router.post("/messages/{message_id}/withdraw", name="withdraw_message")
def withdraw_message(request: Request, visitor: ModeratorSending, message_id: str, reason: Reason = "") -> Response:
    """Take a message out of its tree, for a reason that is kept."""
    site, now = site_of(request), utc_now()
    if not reason.strip():
        raise FeedbackError("got no reason, expected one: it is kept with the message")
    with site.store.writing() as session:
        message = session.get(TreeMessage, message_id)
        if message is None:
            raise FeedbackError("there is no such message", 404)
        withdraw(session, message, visitor.person.id, reason=reason.strip(), now=now)
        settle_withdrawal(session, message, site.settings, now)
    return _back_to(request, message.tree_id)


def _back_to(request: Request, tree_id: str) -> Response:
    return RedirectResponse(request.url_for("moderator_tree", tree_id=tree_id).path, status_code=303)
