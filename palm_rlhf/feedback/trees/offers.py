"""The tasks that there are: messages that want a reply, a review or a ranking, and who may give it."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, exists, func, or_, select
from sqlalchemy.orm import Session, aliased

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.trees.growth import REPLY_KINDS, growing_trees
from palm_rlhf.feedback.trees.states import GROWING, PROMPT_REVIEW, RANKING
from palm_rlhf.feedback.trees.task_queries import holds_a_slot, num_open_tasks_of, num_rankings_of, num_reviews_of

KINDS = ("write_prompt", "label_prompt", "reply_as_user", "reply_as_assistant", "label_reply", "rank_replies")
TEXT_KINDS = ("write_prompt", "reply_as_user", "reply_as_assistant")
LABEL_KINDS = ("label_prompt", "label_reply")
STATE_OF_KIND = {  # of the trees that have such tasks
    "label_prompt": PROMPT_REVIEW,
    "reply_as_user": GROWING,
    "reply_as_assistant": GROWING,
    "label_reply": GROWING,
    "rank_replies": RANKING,
}
REPLY = aliased(TreeMessage)  # to the message of a query


@dataclass(frozen=True)
class Candidate:
    """A task that a person could be handed."""

    kind: str
    message_id: str | None = None  # None for a new prompt
    lonely: bool = False


def candidates(
    session: Session,
    kind: str,
    settings: CollectionSettings,
    *,
    person: Participant | None,
    language: str,
    now: datetime,
) -> list[Candidate]:
    """Return the tasks of a kind with a free slot, for a person, or for anyone at all."""
    if kind == "write_prompt":
        opened = select(func.count()).where(Tree.state.in_((PROMPT_REVIEW, GROWING)), Tree.language == language)
        held = select(func.count()).where(Task.kind == kind, Task.language == language, holds_a_slot(now))
        free = settings.max_open_trees - session.execute(opened).scalar_one() - session.execute(held).scalar_one()
        return [Candidate(kind)] * free
    if kind in REPLY_KINDS.values():
        return _replies_wanted(session, kind, settings, person, language, now)
    query = select(TreeMessage.id).join(Tree, TreeMessage.tree_id == Tree.id)
    query = query.where(Tree.language == language, Tree.state == STATE_OF_KIND[kind], not_withdrawn(TreeMessage))
    taken = num_open_tasks_of(kind, now)
    if kind == "rank_replies":
        enough = _num_replies() >= settings.min_replies_to_rank
        query = query.where(enough, num_rankings_of() + taken < settings.num_rankings)
    else:
        query = query.where(TreeMessage.parent_id.is_(None) == (kind == "label_prompt"))
        query = query.where(TreeMessage.accepted.is_(None), num_reviews_of() + taken < settings.num_reviews)
    if person is not None:
        query = query.where(*_is_for(person, kind, settings, now))
    return [Candidate(kind, message_id) for message_id in session.scalars(query.order_by(TreeMessage.id))]


def ranked_replies(session: Session, parent_id: str) -> list[str]:
    """Return the ids of the replies to a message that are ranked, sorted."""
    return sorted(session.scalars(select(TreeMessage.id).where(*_is_ranked(TreeMessage, parent_id))))


def _replies_wanted(
    session: Session,
    kind: str,
    settings: CollectionSettings,
    person: Participant | None,
    language: str,
    now: datetime,
) -> list[Candidate]:
    growth = growing_trees(session, now, language=language)
    slots = [slot for shape in growth for slot in shape.reply_slots(settings) if slot.kind == kind]
    if person is not None and slots:
        parents = select(TreeMessage.id).where(TreeMessage.id.in_([slot.message_id for slot in slots]))
        mine = set(session.scalars(parents.where(*_is_for(person, kind, settings, now))))
        slots = [slot for slot in slots if slot.message_id in mine]
    answers = kind == "reply_as_assistant"
    return [Candidate(kind, slot.message_id, answers and slot.num_replies == 1) for slot in slots]


def _is_ranked(reply: Any, parent_id: Any) -> tuple[ColumnElement[bool], ...]:
    return reply.parent_id == parent_id, reply.role == "assistant", reply.accepted.is_(True), not_withdrawn(reply)


def _num_replies() -> Any:
    number = select(func.count()).select_from(REPLY).where(*_is_ranked(REPLY, TreeMessage.id))
    return number.correlate(TreeMessage).scalar_subquery()


def _is_for(person: Participant, kind: str, settings: CollectionSettings, now: datetime) -> list[ColumnElement[bool]]:
    """Return the conditions that a task on a `TreeMessage` may be this person's."""
    own_reply = exists().where(REPLY.parent_id == TreeMessage.id, REPLY.person_id == person.id)
    is_own = own_reply if kind == "rank_replies" else func.coalesce(TreeMessage.person_id, "") == person.id
    # Skipped and expired tasks go to others first
    lately = or_(Task.outcome == "done", func.coalesce(Task.closed_at, Task.expires_at) > now - settings.task_timeout)
    did = [exists().where(Task.person_id == person.id, Task.kind == kind, Task.message_id == TreeMessage.id, lately)]
    if kind in REPLY_KINDS.values():
        did.append(own_reply)
    elif kind == "rank_replies":
        did.append(exists().where(ReplyRanking.parent_id == TreeMessage.id, ReplyRanking.person_id == person.id))
    else:
        did.append(exists().where(MessageReview.message_id == TreeMessage.id, MessageReview.person_id == person.id))
    own = [] if settings.allow_own else [~is_own]
    return [*own, *(~condition for condition in did)]
