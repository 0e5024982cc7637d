"""How far a collection is: trees by state, messages, and the contributions of people."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.trees.growth import growing_trees
from palm_rlhf.feedback.trees.states import STATES

WINDOWS = {"day": timedelta(days=1), "week": timedelta(days=7), "all": None}


@dataclass(frozen=True)
class Progress:
    """Counts of one language, or of all.

    `trees` has every state. `waiting_for_model` counts replies that the model has still to give: where no model runs, a
    growing tree waits for them.
    """

    trees: dict[str, int]
    messages_of_people: int
    messages_of_models: int
    reviews: int
    rankings: int
    waiting_for_model: int


@dataclass(frozen=True)
class Contributions:
    """What one person has contributed; what they withdrew does not count."""

    person_id: str
    name: str
    prompts: int
    replies: int
    reviews: int
    rankings: int

    @property
    def total(self) -> int:
        """All contributions."""
        return self.prompts + self.replies + self.reviews + self.rankings


def progress(session: Session, settings: CollectionSettings, *, language: str | None = None, now: datetime) -> Progress:
    """Return how far a collection is, in a language or in all."""
    of_language = [] if language is None else [Tree.language == language]
    by_state = select(Tree.state, func.count()).where(*of_language).group_by(Tree.state)
    trees = {row[0]: row[1] for row in session.execute(by_state)}
    messages = select(TreeMessage.model_id.is_(None), func.count()).join(Tree, TreeMessage.tree_id == Tree.id)
    messages = messages.where(not_withdrawn(TreeMessage), *of_language).group_by(TreeMessage.model_id.is_(None))
    of_people = {bool(people): number for people, number in session.execute(messages)}
    reviews = select(func.count()).select_from(MessageReview).join(TreeMessage)
    reviews = reviews.join(Tree, TreeMessage.tree_id == Tree.id).where(not_withdrawn(MessageReview), *of_language)
    rankings = select(func.count()).select_from(ReplyRanking).join(TreeMessage)
    rankings = rankings.join(Tree, TreeMessage.tree_id == Tree.id).where(not_withdrawn(ReplyRanking), *of_language)
    growth = growing_trees(session, now, language=language)
    return Progress(
        trees={state: trees.get(state, 0) for state in STATES},
        messages_of_people=of_people.get(True, 0),
        messages_of_models=of_people.get(False, 0),
        reviews=session.execute(reviews).scalar_one(),
        rankings=session.execute(rankings).scalar_one(),
        waiting_for_model=sum(number for tree in growth for _, number in tree.model_replies_wanted(settings)),
    )


def contributions(session: Session, window: str, now: datetime) -> list[Contributions]:
    """Return what each person has contributed within a window of `WINDOWS`, the most first; nobody without any.

    Messages of imported files count for nobody, and neither do people that were deleted.
    """
    length = WINDOWS[window]

    def counted(table: Any, *conditions: ColumnElement[bool]) -> dict[str, int]:
        query = select(table.person_id, func.count()).where(
            table.person_id.is_not(None), not_withdrawn(table), *conditions
        )
        if length is not None:
            query = query.where(table.created_at > now - length)
        return {row[0]: row[1] for row in session.execute(query.group_by(table.person_id))}

    prompts = counted(TreeMessage, TreeMessage.parent_id.is_(None))
    replies = counted(TreeMessage, TreeMessage.parent_id.is_not(None))
    reviews, rankings = counted(MessageReview), counted(ReplyRanking)
    people = session.execute(select(Participant.id, Participant.name).where(Participant.deleted_at.is_(None)))
    found = [
        Contributions(key, name, *(numbers.get(key, 0) for numbers in (prompts, replies, reviews, rankings)))
        for key, name in people
    ]
    return sorted((each for each in found if each.total), key=lambda each: (-each.total, each.name, each.person_id))
