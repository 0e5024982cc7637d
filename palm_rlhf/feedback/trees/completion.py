"""The way of a tree through its states, as its messages are reviewed, answered and ranked."""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.data.preferences.ranked_pairs_voting import ranked_pairs
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.trees.growth import growing_trees
from palm_rlhf.feedback.trees.labels import acceptance
from palm_rlhf.feedback.trees.states import GROWING, LOW_GRADE, PROMPT_REVIEW, RANKING, SCORED, enter


def judge(session: Session, message: TreeMessage, settings: CollectionSettings) -> None:
    """Accept or refuse a message once it has all of its reviews."""
    query = select(MessageReview.labels).where(MessageReview.message_id == message.id, not_withdrawn(MessageReview))
    reviews = list(session.scalars(query))
    if message.accepted is None and len(reviews) >= settings.num_reviews:
        message.accepted = acceptance(reviews) > settings.min_acceptance
        session.flush()


def advance(session: Session, tree: Tree, settings: CollectionSettings, now: datetime) -> None:
    """Bring a tree into the state that its messages, reviews and rankings call for."""
    if tree.state == PROMPT_REVIEW:
        accepted = session.scalar(
            select(TreeMessage.accepted).where(TreeMessage.tree_id == tree.id, TreeMessage.parent_id.is_(None))
        )
        if accepted is False:
            enter(session, tree, LOW_GRADE, now)
        elif accepted:
            enter(session, tree, GROWING, now)
    if tree.state == GROWING:
        growth = growing_trees(session, now, tree_id=tree.id)
        if all(shape.is_grown(settings) for shape in growth):
            enter(session, tree, RANKING, now)
    if tree.state == RANKING and all(
        len(_ballots(session, parent_id)) >= settings.num_rankings for parent_id in reply_sets(session, tree, settings)
    ):
        merge_rankings(session, tree, settings)
        enter(session, tree, SCORED, now)


def merge_rankings(session: Session, tree: Tree, settings: CollectionSettings) -> None:
    """Give the replies of a tree their ranks, from the rankings of each set by ranked pairs.

    Replies that were withdrawn since a ranking are left out of it; a set without any ranking keeps its ranks.
    """
    for parent_id, replies in reply_sets(session, tree, settings).items():
        ids = [reply.id for reply in replies]
        ballots = [[reply for reply in order if reply in ids] for order in _ballots(session, parent_id)]
        if ballots:
            order = ranked_pairs(ballots)
            for reply in replies:
                reply.rank = order.index(reply.id)
    session.flush()


def reply_sets(session: Session, tree: Tree, settings: CollectionSettings) -> dict[str, list[TreeMessage]]:
    """Return the replies of a tree that are ranked, by the message that they answer."""
    query = select(TreeMessage).where(
        TreeMessage.tree_id == tree.id,
        TreeMessage.role == "assistant",
        TreeMessage.accepted.is_(True),
        not_withdrawn(TreeMessage),
    )
    sets: dict[str, list[TreeMessage]] = {}
    for reply in session.scalars(query.order_by(TreeMessage.created_at, TreeMessage.id)):
        assert reply.parent_id is not None  # a prompt is not the assistant's
        sets.setdefault(reply.parent_id, []).append(reply)
    return {parent_id: replies for parent_id, replies in sets.items() if len(replies) >= settings.min_replies_to_rank}


def _ballots(session: Session, parent_id: str) -> list[list[str]]:
    """Return the rankings of the replies to a message, best first."""
    query = select(ReplyRanking.best_first).where(ReplyRanking.parent_id == parent_id, not_withdrawn(ReplyRanking))
    return list(session.scalars(query))
