"""The work that people hand in: messages, labels and rankings, each checked and kept once."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.trees.completion import advance, judge
from palm_rlhf.feedback.trees.labels import check_labels
from palm_rlhf.feedback.trees.offers import LABEL_KINDS, STATE_OF_KIND, TEXT_KINDS, candidates
from palm_rlhf.feedback.trees.states import OPEN_STATES, PROMPT_REVIEW, enter


def submit_text(
    session: Session, task_id: str, person: Participant, text: str, settings: CollectionSettings, now: datetime
) -> TreeMessage:
    """Keep the message that a person wrote for a task; a prompt begins a tree.

    Raises FeedbackError for a task that is not open to the person (see `_open_task`), and for a text that is blank, too
    long, or there already.
    """
    task = _open_task(session, task_id, person, TEXT_KINDS, settings, now)
    text = check_text(text, settings)
    parent = None if task.message_id is None else session.get_one(TreeMessage, task.message_id)
    if is_repeated(session, text, parent, task.language):
        raise FeedbackError("the same text is there already: write one of your own", 409)
    if parent is None:
        tree = Tree(language=task.language, state=PROMPT_REVIEW, created_at=now)
        session.add(tree)
        session.flush()
        enter(session, tree, PROMPT_REVIEW, now, person_id=person.id)
    else:
        tree = session.get_one(Tree, parent.tree_id)
    message = TreeMessage(
        tree_id=tree.id,
        parent_id=None if parent is None else parent.id,
        role="assistant" if task.kind == "reply_as_assistant" else "prompter",
        text=text,
        language=task.language,
        depth=0 if parent is None else parent.depth + 1,
        person_id=person.id,
        task_id=task.id,
        created_at=now,
    )
    session.add(message)
    task.tree_id = tree.id
    _close(session, task, now)
    return message


def submit_labels(
    session: Session,
    task_id: str,
    person: Participant,
    labels: Mapping[str, Any],
    settings: CollectionSettings,
    now: datetime,
) -> MessageReview:
    """Keep a person's labels of a message, and let the tree go on if they were the last that it waited for.

    Raises FeedbackError for a task that is not open to the person (see `_open_task`), and for labels that are not those
    asked for (see `check_labels`).
    """
    task = _open_task(session, task_id, person, LABEL_KINDS, settings, now)
    message = session.get_one(TreeMessage, task.message_id)
    checked = check_labels(labels, message.role)
    review = MessageReview(message_id=message.id, person_id=person.id, task_id=task.id, labels=checked, created_at=now)
    session.add(review)
    _close(session, task, now)
    judge(session, message, settings)
    advance(session, session.get_one(Tree, message.tree_id), settings, now)
    return review


def submit_ranking(
    session: Session,
    task_id: str,
    person: Participant,
    best_first: Sequence[str],
    settings: CollectionSettings,
    now: datetime,
) -> ReplyRanking:
    """Keep a person's order of replies, best first, and merge the orders when the tree has all that it waits for.

    Raises FeedbackError for a task that is not open to the person (see `_open_task`), and for an order that is not one
    of the replies that were shown.
    """
    task = _open_task(session, task_id, person, ("rank_replies",), settings, now)
    shown = list(task.shown or ())
    if sorted(best_first) != sorted(shown):
        raise FeedbackError("the order does not have each of the replies that were shown once: rank all of them")
    assert task.message_id is not None and task.tree_id is not None  # of every task but a prompt's
    ranking = ReplyRanking(
        parent_id=task.message_id,
        person_id=person.id,
        task_id=task.id,
        shown=shown,
        best_first=list(best_first),
        created_at=now,
    )
    session.add(ranking)
    _close(session, task, now)
    advance(session, session.get_one(Tree, task.tree_id), settings, now)
    return ranking


def check_text(text: str, settings: CollectionSettings) -> str:
    """Return a text as it is kept: one kind of line ends, no white space around it.

    Raises FeedbackError for a text that is blank, too long, or that a database cannot keep.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise FeedbackError("the text is blank: write something")
    if len(text) > settings.max_message_length:
        most = settings.max_message_length
        raise FeedbackError("got {length} characters, expected at most {most}", 413, length=len(text), most=most)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise FeedbackError("the text holds characters that are none: a zero, or half of a surrogate pair")
    return text


def is_repeated(session: Session, text: str, parent: TreeMessage | None, language: str) -> bool:
    """Return whether a text is that of a sibling, or for a prompt, of another prompt of an open tree."""
    query = select(TreeMessage.id).where(TreeMessage.text == text, not_withdrawn(TreeMessage))
    if parent is None:
        query = query.join(Tree, TreeMessage.tree_id == Tree.id).where(TreeMessage.parent_id.is_(None))
        query = query.where(Tree.state.in_(OPEN_STATES), Tree.language == language)
    else:
        query = query.where(TreeMessage.parent_id == parent.id)
    return session.scalars(query.limit(1)).first() is not None


def _open_task(
    session: Session,
    task_id: str,
    person: Participant,
    kinds: Sequence[str],
    settings: CollectionSettings,
    now: datetime,
) -> Task:
    """Return a task that a person may hand in.

    A task that has expired is still taken if its slot is free: nobody else has taken it in the meantime.

    Raises FeedbackError for an unknown task (404), somebody else's (403), one of another kind (400), one that is closed
    (409), as when a form is sent twice, and one that has expired and whose slot is taken (409).
    """
    task = session.get(Task, task_id)
    if task is None:
        raise FeedbackError(f"got {task_id!r}, expected the id of a task", 404)
    if task.person_id != person.id:
        raise FeedbackError("this task was handed to somebody else", 403)
    if task.kind not in kinds:
        raise FeedbackError(f"got a form for {' or '.join(kinds)}, expected one for {task.kind}")
    if task.outcome in ("done", "skipped"):
        raise FeedbackError(f"this task is closed already: {task.outcome}", 409)
    if task.outcome == "cancelled":
        raise FeedbackError("the tree of this task was stopped, or went on without it: take another one", 409)
    if not _is_wanted(session, task):
        raise FeedbackError("the tree of this task went on without it: take another one", 409)
    if task.outcome == "expired" or task.expires_at <= now:
        _check_slot(session, task, person, settings, now)
    return task


def _is_wanted(session: Session, task: Task) -> bool:
    """Return whether the tree of a task is in the state for it, and the message of the task is there."""
    if task.message_id is None:
        return True
    query = select(Tree.state).join(TreeMessage, TreeMessage.tree_id == Tree.id)
    state = session.scalars(query.where(TreeMessage.id == task.message_id, not_withdrawn(TreeMessage))).first()
    return state == STATE_OF_KIND[task.kind]


def _check_slot(session: Session, task: Task, person: Participant, settings: CollectionSettings, now: datetime) -> None:
    free = candidates(session, task.kind, settings, person=None, language=task.language, now=now)
    open_to_all = any(candidate.message_id == task.message_id for candidate in free)
    if not open_to_all or _did_it_since(session, task, person):
        raise FeedbackError("the time for this task is over, and it is no longer needed: take another one", 409)


def _did_it_since(session: Session, task: Task, person: Participant) -> bool:
    """Return whether a person has another task, open or done, of the same kind on the same message."""
    query = select(Task.id).where(Task.kind == task.kind, Task.person_id == person.id, Task.id != task.id)
    if task.message_id is None:
        return False
    query = query.where(Task.message_id == task.message_id, Task.outcome.is_(None) | (Task.outcome == "done"))
    return session.scalars(query.limit(1)).first() is not None


def _close(session: Session, task: Task, now: datetime) -> None:
    task.outcome, task.closed_at = "done", now
    session.flush()
