"""The pages of the tasks: a prompt or a reply to write, a message to label, replies to rank."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy.orm import Session

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.database import StoreError
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.store.tree_tables import Task
from palm_rlhf.feedback.trees.labels import FLAGS, REQUIRED
from palm_rlhf.feedback.trees.offers import LABEL_KINDS, TEXT_KINDS
from palm_rlhf.feedback.trees.submissions import submit_labels, submit_ranking, submit_text
from palm_rlhf.feedback.trees.task_view import TaskView, task_view
from palm_rlhf.feedback.trees.tasks import hand_out, skip
from palm_rlhf.feedback.web.site import Site, site_of
from palm_rlhf.feedback.web.task_thanks import thanks_for
from palm_rlhf.feedback.web.visitors import Sending, Visiting, Visitor

router = APIRouter()
TEMPLATES = {
    **dict.fromkeys(TEXT_KINDS, "task_text.html"),
    **dict.fromkeys(LABEL_KINDS, "task_labels.html"),
    "rank_replies": "task_ranking.html",
}


@dataclass(frozen=True)
class Entries:
    """The entries of a task's form, as they were sent: fields by name, and the ids of replies in order."""

    fields: dict[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()


async def entries_of(request: Request) -> Entries:
    """Return the entries of a request's form; files are left out."""
    form = await request.form()
    texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    return Entries(dict(texts), tuple(value for name, value in texts if name == "order"))


Sent = Annotated[Entries, Depends(entries_of)]


@router.post("/tasks", name="next_task")
def next_task(request: Request, visitor: Sending, kind: Annotated[str, Form()] = "") -> Response:
    """Hand a task to the visitor, of a kind or of any, and show it."""
    return _go_on(request, visitor, only=kind)


@router.get("/tasks/{task_id}", name="task")
def show_task(request: Request, visitor: Visiting, task_id: str, after: str = "", only: str = "") -> Response:
    """Show a task of the visitor; `after` is a task to thank for, `only` the kind of the tasks that follow."""
    site = site_of(request)
    with site.store.reading() as session:
        task = _own_task(session, visitor, task_id)
        view, thanks = task_view(session, task), thanks_for(session, visitor.person, after, site.settings)
    if task.outcome is not None:
        return site.render(request, "task_closed.html", task=task, thanks=thanks, only=only)
    return _page(request, view, Entries({"only": only}), thanks=thanks)


@router.post("/tasks/{task_id}", name="hand_in")
def hand_in(request: Request, visitor: Sending, task_id: str, sent: Sent) -> Response:
    """Keep what the visitor did, and show the next task; or show the form again, with the error beside its field.

    A form that is sent twice is kept once, and shows the next task both times.
    """
    site = site_of(request)
    with site.store.reading() as session:
        task = _own_task(session, visitor, task_id)
        view = task_view(session, task)
    if "move" in sent.fields and task.kind == "rank_replies":
        order = moved(order_of(view, sent), sent.fields["move"])
        return _page(request, view, Entries(sent.fields, order))
    if task.outcome != "done":
        if missing := [name for name in view.required_labels if not sent.fields.get(name)]:
            return _page(request, view, sent, missing=missing, status=422)
        try:
            with site.store.writing() as session:
                _keep(session, site, visitor, view, sent, utc_now())
        except (FeedbackError, StoreError) as error:
            return _page(request, view, sent, error=site.translate(request, error), status=error.status)
    return _go_on(request, visitor, only=sent.fields.get("only", ""), after=task_id)


@router.post("/tasks/{task_id}/skip", name="skip_task")
def skip_task(request: Request, visitor: Sending, task_id: str, sent: Sent) -> Response:
    """Give a task back, and show the next one."""
    with site_of(request).store.writing() as session:
        task = _own_task(session, visitor, task_id)
        if task.outcome is None:
            skip(session, task_id, visitor.person, utc_now())
    return _go_on(request, visitor, only=sent.fields.get("only", ""))


def labels_from(view: TaskView, fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the labels that a form holds: a flag without a mark is a no, a scale without a mark is left out."""
    labels: dict[str, Any] = {}
    for name in view.labels:
        value = fields.get(name)
        if value is not None:
            labels[name] = float(value) if value in ("0", "0.25", "0.5", "0.75", "1") else value
        elif name in FLAGS and name not in REQUIRED:
            labels[name] = 0.0
    return labels


def order_of(view: TaskView, sent: Entries) -> tuple[str, ...]:
    """Return the order of the replies on the page: the one that was sent, or the one in which they are shown first."""
    shown = tuple(reply.id for reply in view.replies)
    return sent.order if sorted(sent.order) == sorted(shown) else shown


def moved(order: Sequence[str], move: str) -> tuple[str, ...]:
    """Return an order after a move, `up ID` or `down ID`; another one changes nothing."""
    direction, _, reply_id = move.partition(" ")
    after = list(order)
    if reply_id in after and direction in ("up", "down"):
        place = after.index(reply_id)
        to = max(0, place - 1) if direction == "up" else place + 1
        after.insert(to, after.pop(place))
    return tuple(after)


def _own_task(session: Session, visitor: Visitor, task_id: str) -> Task:
    task = session.get(Task, task_id)
    if task is None or task.person_id != visitor.person.id:
        raise FeedbackError("there is no such task of yours", 404)
    return task


def _keep(session: Session, site: Site, visitor: Visitor, view: TaskView, sent: Entries, now: datetime) -> None:
    arguments = (site.settings, now)
    if view.kind in TEXT_KINDS:
        submit_text(session, view.task_id, visitor.person, sent.fields.get("text", ""), *arguments)
    elif view.kind in LABEL_KINDS:
        submit_labels(session, view.task_id, visitor.person, labels_from(view, sent.fields), *arguments)
    else:
        submit_ranking(session, view.task_id, visitor.person, sent.order, *arguments)


def _page(
    request: Request,
    view: TaskView,
    sent: Entries,
    *,
    thanks: Any = None,
    error: str | None = None,
    missing: Sequence[str] = (),
    status: int = 200,
) -> Response:
    replies = {reply.id: reply for reply in view.replies}
    names = {reply.id: chr(ord("A") + place) for place, reply in enumerate(view.replies)}
    site = site_of(request)
    return site.render(
        request,
        TEMPLATES[view.kind],
        status=status,
        view=view,
        replies=[replies[reply] for reply in order_of(view, sent)],
        names=names,
        task_language=site.catalogues.name_of(view.language, site.language_of(request)),
        sent=sent.fields,
        only=sent.fields.get("only", ""),
        thanks=thanks,
        error=error,
        missing=missing,
    )


def _go_on(request: Request, visitor: Visitor, *, only: str, after: str = "") -> Response:
    """Show the visitor's next task, or the first page where there is none."""
    site = site_of(request)
    try:
        with site.store.writing() as session:
            task = hand_out(
                session,
                visitor.person,
                site.settings,
                kind=only or None,
                language=site.task_language(request),
                now=utc_now(),
                rng=random.SystemRandom(),
            )
    except FeedbackError:
        if not after:
            raise
        task = None  # the work is kept: the first page thanks for it
    query = {name: value for name, value in (("after", after), ("only", only)) if value}
    if task is None:
        url = request.url_for("home").include_query_params(**query, **({} if after else {"none": "1"}))
    else:
        url = request.url_for("task", task_id=task.id).include_query_params(**query)
    return RedirectResponse(url.path + (f"?{url.query}" if url.query else ""), status_code=303)
