"""The work of moderators: messages that people flagged, and trees that are opened again."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import MessageReview, Tree, TreeEvent, TreeMessage
from palm_rlhf.feedback.store.withdrawals import is_withdrawn, not_withdrawn
from palm_rlhf.feedback.trees.completion import advance
from palm_rlhf.feedback.trees.labels import FLAGS, acceptance
from palm_rlhf.feedback.trees.states import HALTED, MODERATORS, PROMPT_REVIEW, SCORED, enter


@dataclass(frozen=True)
class FlaggedMessage:
    """A message that was refused, or that somebody flagged; `flags` has how many people set each flag."""

    message: TreeMessage
    state: str
    """Of its tree."""
    author: str | None
    """The name of the person who wrote it; None for a model's, an imported one, and one of a deleted person."""
    flags: dict[str, int]
    num_reviews: int
    acceptance: float
    """1 - (mean spam + mean wrong language); messages at or below the settings' `min_acceptance` are refused."""


def flagged_messages(session: Session, settings: CollectionSettings) -> list[FlaggedMessage]:
    """Return the messages that were refused, or that have a flag, the least accepted first; not withdrawn ones."""
    query = (
        select(TreeMessage, Tree.state, Participant.name, MessageReview.labels)
        .join(Tree, Tree.id == TreeMessage.tree_id)
        .join(MessageReview, MessageReview.message_id == TreeMessage.id)
        .outerjoin(Participant, Participant.id == TreeMessage.person_id)
        .where(not_withdrawn(TreeMessage), not_withdrawn(MessageReview))
        .order_by(TreeMessage.created_at.desc(), TreeMessage.id)
    )
    reviews: dict[str, list[dict[str, float]]] = {}
    heads = {}
    for message, state, author, labels in session.execute(query):
        heads[message.id] = message, state, author
        reviews.setdefault(message.id, []).append(labels)
    found = []
    for key, (message, state, author) in heads.items():
        flags = Counter(name for labels in reviews[key] for name in FLAGS if labels.get(name))
        accepted = acceptance(reviews[key])
        if flags or accepted <= settings.min_acceptance:
            found.append(FlaggedMessage(message, state, author, dict(flags), len(reviews[key]), accepted))
    return sorted(found, key=lambda each: each.acceptance)


def reopen(
    session: Session, tree_id: str, person: Participant, reason: str, settings: CollectionSettings, now: datetime
) -> Tree:
    """Bring a halted tree back into the state that it had, on a moderator's word; its event says who, when and why.

    Raises FeedbackError for anyone else, an unknown tree, one that is not halted, one whose prompt was withdrawn, or a
    blank reason.
    """
    if person.role not in MODERATORS:
        raise FeedbackError(f"got the role {person.role}, expected a moderator or an admin, to reopen a tree", 403)
    tree = session.get(Tree, tree_id)
    if tree is None:
        raise FeedbackError(f"got {tree_id!r}, expected the id of a tree", 404)
    if tree.state != HALTED:
        raise FeedbackError(f"the tree is not halted, it is {tree.state}", 409)
    if not reason.strip():
        raise FeedbackError("got no reason, expected one: it is kept with the tree")
    prompt = select(TreeMessage).where(TreeMessage.tree_id == tree.id, TreeMessage.parent_id.is_(None))
    if is_withdrawn(session, session.scalars(prompt).one()):
        raise FeedbackError("the prompt of this tree was withdrawn: it cannot grow without it", 409)
    before = select(TreeEvent.state).where(TreeEvent.tree_id == tree.id, TreeEvent.state != HALTED)
    first = PROMPT_REVIEW if tree.source == "people" else SCORED  # trees of files come with their ranks
    state = session.scalar(before.order_by(TreeEvent.at.desc()).limit(1)) or first
    enter(session, tree, state, now, reason=reason.strip(), person_id=person.id)
    advance(session, tree, settings, now)
    return tree
