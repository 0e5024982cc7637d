"""How much of what is needed has been done, in which languages, and when."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from beartype import beartype
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.pairs.pair_pool import open_pool
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import ComparisonVote
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.trees.completion import reply_sets
from palm_rlhf.feedback.trees.states import EXPORTED, OPEN_STATES, RANKING, SCORED

FINISHED = (SCORED, EXPORTED)
NOBODY = ""  # the id of no person, who has seen no pair


@dataclass(frozen=True)
class Coverage:
    """Contributions of a kind that were needed so far, and how many of them are there."""

    done: int
    needed: int

    @property
    def share(self) -> float | None:
        """The share that is done; None where nothing is needed."""
        return self.done / self.needed if self.needed else None


@beartype
def coverage(session: Session, settings: CollectionSettings, now: datetime) -> dict[str, Coverage]:
    """Return the coverage of reviews, of rankings, and of votes in the newest blind evaluation, by these names.

    Reviews and rankings are needed by the trees of people that were not ended early. Contributions beyond the need
    count no more, and what was decided under other settings is complete.
    """
    return {
        "reviews": _reviews(session, settings.num_reviews),
        "rankings": _rankings(session, settings),
        "blind votes": _blind_votes(session, settings, now),
    }


def _reviews(session: Session, num_reviews: int) -> Coverage:
    given = select(func.count()).where(MessageReview.message_id == TreeMessage.id, not_withdrawn(MessageReview))
    query = (
        select(TreeMessage.accepted, given.correlate(TreeMessage).scalar_subquery())
        .join(Tree, Tree.id == TreeMessage.tree_id)
        .where(Tree.source == "people", Tree.state.in_((*OPEN_STATES, *FINISHED)), not_withdrawn(TreeMessage))
    )
    rows = session.execute(query).all()
    done = [num_reviews if accepted is not None else min(number, num_reviews) for accepted, number in rows]
    return Coverage(sum(done), len(rows) * num_reviews)


def _rankings(session: Session, settings: CollectionSettings) -> Coverage:
    query = select(ReplyRanking.parent_id, func.count()).where(not_withdrawn(ReplyRanking))
    given = {parent: number for parent, number in session.execute(query.group_by(ReplyRanking.parent_id))}  # noqa: C416
    trees = select(Tree).where(Tree.source == "people", Tree.state.in_((RANKING, *FINISHED)))
    done, num_sets = 0, 0
    for tree in session.scalars(trees).all():
        sets = reply_sets(session, tree, settings)
        num_sets += len(sets)
        if tree.state == RANKING:
            done += sum(min(given.get(parent, 0), settings.num_rankings) for parent in sets)
        else:
            done += len(sets) * settings.num_rankings
    return Coverage(done, num_sets * settings.num_rankings)


def _blind_votes(session: Session, settings: CollectionSettings, now: datetime) -> Coverage:
    pool = open_pool(session, "evaluation", NOBODY, now=now, timeout=timedelta(0))  # what is only shown is not done
    pairs = [] if pool is None else pool.unseen
    return Coverage(sum(min(pair.num_people, settings.num_votes) for pair in pairs), len(pairs) * settings.num_votes)


@beartype
def messages_by_language(session: Session) -> dict[str, int]:
    """Return how many messages people and models wrote in each language, the most first."""
    query = select(TreeMessage.language, func.count()).where(not_withdrawn(TreeMessage))
    rows = session.execute(query.group_by(TreeMessage.language))
    return dict(sorted(((language, number) for language, number in rows), key=lambda row: (-row[1], row[0])))


@beartype
def contributions_by_day(session: Session, num_days: int, now: datetime) -> dict[date, int]:
    """Return how many messages, reviews, rankings and votes people gave on each of the last days, in UTC, by date."""
    first = (now - timedelta(days=num_days - 1)).date()
    found = Counter(moment.date() for moment in _moments(session, now - timedelta(days=num_days)))
    days = (first + timedelta(days=number) for number in range(num_days))
    return {day: found[day] for day in days}


def _moments(session: Session, since: datetime) -> Iterator[datetime]:
    tables: tuple[Any, ...] = (TreeMessage, MessageReview, ReplyRanking, ComparisonVote)
    for table in tables:
        yield from session.scalars(
            select(table.created_at).where(table.person_id.is_not(None), table.created_at > since, not_withdrawn(table))
        )
