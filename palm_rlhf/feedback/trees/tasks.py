"""The tasks by which people grow trees: which there are for a person, and handing them out where they are needed."""

import random
from datetime import datetime, timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import Task, TreeMessage
from palm_rlhf.feedback.trees.offers import KINDS, Candidate, candidates, ranked_replies
from palm_rlhf.feedback.trees.task_queries import holds_a_slot

# The weights by which Open-Assistant's tree manager draws a task among the kinds that there are
WEIGHTS: dict[tuple[str, ...], float] = {
    ("rank_replies",): 10,
    ("label_reply",): 5,
    ("label_prompt",): 5,
    ("reply_as_user", "reply_as_assistant"): 2,
    ("write_prompt",): 0.01,
}
LONELY_SHARE = 0.75  # of the assistant's replies go to messages with one reply, which alone cannot be ranked


def available(
    session: Session, person: Participant, settings: CollectionSettings, *, language: str, now: datetime
) -> dict[str, int]:
    """Return how many tasks of each kind there are for a person, in a language; tasks already taken count too."""
    return {
        kind: len(candidates(session, kind, settings, person=person, language=language, now=now))
        + len(open_tasks(session, person, kind=kind, language=language, now=now))
        for kind in KINDS
    }


def waiting_for_others(
    session: Session, person: Participant, settings: CollectionSettings, *, language: str, now: datetime
) -> dict[str, int]:
    """Return how many tasks of each kind nobody has taken, and are not for this person but for others."""
    return {
        kind: len(candidates(session, kind, settings, person=None, language=language, now=now))
        - len(candidates(session, kind, settings, person=person, language=language, now=now))
        for kind in KINDS
    }


def hand_out(
    session: Session,
    person: Participant,
    settings: CollectionSettings,
    *,
    kind: str | None = None,
    language: str,
    now: datetime,
    rng: random.Random,
) -> Task | None:
    """Hand a task to a person, of a kind, or of one drawn by weight; None if there is none for them.

    A person who holds an open task that fits gets the same task again, so that nobody holds more than one of a kind.

    Raises FeedbackError for an unknown kind or language, and with status 429 above `max_tasks_per_hour`.
    """
    if kind is not None and kind not in KINDS:
        raise FeedbackError(f"got the kind {kind!r}, expected one of {', '.join(KINDS)}", 404)
    if language not in settings.languages:
        raise FeedbackError(f"got the language {language!r}, expected one of {', '.join(settings.languages)}")
    expire(session, now)
    if held := open_tasks(session, person, kind=kind, language=language, now=now):
        return held[0]
    handed = select(func.count()).where(Task.person_id == person.id, Task.handed_at > now - timedelta(hours=1))
    if session.execute(handed).scalar_one() >= settings.max_tasks_per_hour:
        most = settings.max_tasks_per_hour
        raise FeedbackError("you were handed {most} tasks in an hour: take a rest", 429, most=most)
    chosen = _choose(session, person, settings, kind, language, now, rng)
    if chosen is None:
        return None
    task = Task(kind=chosen.kind, person_id=person.id, message_id=chosen.message_id, language=language)
    task.handed_at, task.expires_at = now, now + settings.task_timeout
    if chosen.message_id is not None:
        task.tree_id = session.get_one(TreeMessage, chosen.message_id).tree_id
        if chosen.kind == "rank_replies":
            task.shown = ranked_replies(session, chosen.message_id)
            rng.shuffle(task.shown)
    session.add(task)
    session.flush()
    return task


def _choose(
    session: Session,
    person: Participant,
    settings: CollectionSettings,
    kind: str | None,
    language: str,
    now: datetime,
    rng: random.Random,
) -> Candidate | None:
    weights: dict[tuple[str, ...], float] = dict(WEIGHTS) if kind is None else {(kind,): 1.0}
    while weights:  # without the kinds that were drawn and have nothing, which is a draw among the others
        kinds = rng.choices(list(weights), list(weights.values()))[0]
        choices = [
            choice
            for each in kinds
            for choice in candidates(session, each, settings, person=person, language=language, now=now)
        ]
        if choices:
            lonely = [choice for choice in choices if choice.lonely]
            return rng.choice(lonely if lonely and rng.random() < LONELY_SHARE else choices)
        del weights[kinds]
    return None


def open_tasks(
    session: Session, person: Participant, *, kind: str | None = None, language: str | None = None, now: datetime
) -> list[Task]:
    """Return the open tasks of a person, the oldest first."""
    query = select(Task).where(Task.person_id == person.id, holds_a_slot(now))
    if kind is not None:
        query = query.where(Task.kind == kind)
    if language is not None:
        query = query.where(Task.language == language)
    return list(session.scalars(query.order_by(Task.handed_at, Task.id)))


def skip(session: Session, task_id: str, person: Participant, now: datetime) -> Task:
    """Give a task back; it is not offered to the person again before the time of a task has passed."""
    task = session.get(Task, task_id)
    if task is None:
        raise FeedbackError(f"got {task_id!r}, expected the id of a task", 404)
    if task.person_id != person.id:
        raise FeedbackError("this task was handed to somebody else", 403)
    if task.outcome is not None:
        raise FeedbackError(f"this task is closed already: {task.outcome}", 409)
    task.outcome, task.closed_at = "skipped", now
    session.flush()
    return task


def expire(session: Session, now: datetime) -> None:
    """Close the tasks that were not finished in time."""
    late = update(Task).where(Task.outcome.is_(None), Task.expires_at <= now)
    session.execute(late.values(outcome="expired", closed_at=Task.expires_at))
