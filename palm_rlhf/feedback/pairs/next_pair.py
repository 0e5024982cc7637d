"""The next comparison of a person: the pair, its order and its purpose."""

import random
from datetime import datetime

from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.pairs.held_out_prompts import is_held_out
from palm_rlhf.feedback.pairs.pair_choice import (
    CandidatePair,
    PairMethod,
    evaluation_pair,
    held_out_pair,
    training_pair,
)
from palm_rlhf.feedback.pairs.pair_pool import PairPool, Purpose, open_pool
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import ShownComparison
from palm_rlhf.feedback.store.people_tables import Participant


@beartype
def next_comparison(
    session: Session,
    person: Participant,
    settings: CollectionSettings,
    *,
    rng: random.Random,
    now: datetime,
    pairs: PairMethod = "uncertainty",
    purpose: Purpose | None = None,
) -> ShownComparison | None:
    """Return the comparison that a person is to answer next, a new row of the database, or None if there is none.

    A comparison that the person was shown and has not answered comes again. Otherwise the pair is one that the person
    has never been shown, and its order is random. Call it inside `Store.writing`, which keeps two people from the last
    place of a pair.

    Args:
        session: Of the transaction.
        person: Who compares.
        settings: `held_out` is the share of comparisons on held-out prompts, whose pairs are random; `random_share` is
            the share of random pairs on other prompts; `num_votes` people compare each pair of an evaluation, and each
            pair of a held-out prompt that is begun; `task_timeout` is how long a pair waits for an answer.
        rng: The source of randomness.
        now: The time, in UTC.
        pairs: How pairs are chosen where the reward model learns.
        purpose: Training or evaluation; by default people alternate between both while both are open.
    """
    purposes = _by_turns(session, person) if purpose is None else [purpose]
    found = [open_pool(session, each, person.id, now=now, timeout=settings.task_timeout) for each in purposes]
    pools = [pool for pool in found if pool is not None]
    for pool in pools:
        if pool.unanswered is not None and _is_still_wanted(pool, pool.unanswered, settings):
            return pool.unanswered
    for pool in pools:
        if (chosen := _choose(pool, settings, pairs, rng)) is not None:
            return _show(session, person, pool, *chosen, rng=rng, now=now)
    return None


def _by_turns(session: Session, person: Participant) -> list[Purpose]:
    """Return both purposes, the one first that the person's last comparison did not have."""
    newest = select(ShownComparison.purpose).where(ShownComparison.person_id == person.id)
    newest = newest.where(ShownComparison.chosen_by != "chat")
    last = session.scalar(newest.order_by(ShownComparison.created_at.desc()).limit(1))
    return ["training", "evaluation"] if last == "evaluation" else ["evaluation", "training"]


def _is_still_wanted(pool: PairPool, comparison: ShownComparison, settings: CollectionSettings) -> bool:
    """Return whether a comparison that took too long was not given to enough other people since."""
    num_others = pool.num_people[frozenset((comparison.left_id, comparison.right_id))]
    counts = pool.purpose == "evaluation" or is_held_out(comparison.prompt_key, settings)
    return not counts or num_others < settings.num_votes


def _choose(
    pool: PairPool, settings: CollectionSettings, method: PairMethod, rng: random.Random
) -> tuple[CandidatePair, PairMethod] | None:
    if pool.purpose == "evaluation":
        pair = evaluation_pair(pool.unseen, settings.num_votes, rng)
        return None if pair is None else (pair, "random")
    held_out: list[CandidatePair] = []
    trained: list[CandidatePair] = []
    for pair in pool.unseen:
        (held_out if is_held_out(pair.prompt_key, settings) else trained).append(pair)
    measured = held_out_pair(held_out, settings.num_votes, rng)
    learnt = training_pair(trained, method, settings.random_share, rng)
    if measured is not None and (learnt is None or rng.random() < settings.held_out):
        return measured, "random"
    return learnt


def _show(
    session: Session,
    person: Participant,
    pool: PairPool,
    pair: CandidatePair,
    method: PairMethod,
    *,
    rng: random.Random,
    now: datetime,
) -> ShownComparison:
    left, right = rng.sample([pair.first_id, pair.second_id], 2)
    comparison = ShownComparison(
        prompt_key=pair.prompt_key,
        left_id=left,
        right_id=right,
        person_id=person.id,
        chosen_by=method,
        purpose=pool.purpose,
        round_id=pool.round_id,
        created_at=now,
    )
    session.add(comparison)
    session.flush()
    return comparison
