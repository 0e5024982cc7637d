"""The choice of one pair among those that a person has not seen: at random, or where the reward model is least sure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from beartype import beartype

PairMethod = Literal["uncertainty", "random"]


@dataclass(frozen=True)
class CandidatePair:
    """Two answers to one prompt, and how many people have compared them or are about to."""

    prompt_key: str
    first_id: str
    second_id: str
    num_people: int
    score_difference: float | None
    """The reward model's score of the first minus the second; None where it has not scored both."""


@beartype
def most_uncertain(pairs: Sequence[CandidatePair], rng: random.Random) -> CandidatePair | None:
    """Return the pair whose comparison the reward model is least sure of, or None if it has scored no pair.

    By the Bradley-Terry model, the first answer is preferred with the probability ``sigmoid(score_difference)``. It is
    nearest 1/2, and the entropy of the vote largest, where the difference is smallest (uncertainty sampling, Lewis and
    Gale 1994). Pairs that fewer people have compared go first; equals are drawn at random.
    """
    scored = [
        (pair.num_people, abs(pair.score_difference), pair) for pair in pairs if pair.score_difference is not None
    ]
    if not scored:
        return None
    first = min(key for *key, _ in scored)
    return rng.choice([pair for *key, pair in scored if key == first])


@beartype
def training_pair(
    pairs: Sequence[CandidatePair], method: PairMethod, random_share: float | int, rng: random.Random
) -> tuple[CandidatePair, PairMethod] | None:
    """Return a pair for the reward model to learn from, and the method by which it was chosen; None without pairs.

    A share of the pairs, and all of them before the reward model has scored any, is random: each pair is as likely.
    """
    if not pairs:
        return None
    if method == "uncertainty" and rng.random() >= random_share and (pair := most_uncertain(pairs, rng)):
        return pair, "uncertainty"
    return rng.choice(pairs), "random"


@beartype
def held_out_pair(pairs: Sequence[CandidatePair], num_votes: int, rng: random.Random) -> CandidatePair | None:
    """Return a random pair that fewer than `num_votes` people have compared, one that somebody has compared first.

    So people meet on the same pairs, which shows how far they agree. Which pair is begun is random, so the accuracy of
    the reward model on these votes has no bias.
    """
    wanted = [pair for pair in pairs if pair.num_people < num_votes]
    begun = [pair for pair in wanted if pair.num_people]
    return rng.choice(begun or wanted) if wanted else None


@beartype
def evaluation_pair(pairs: Sequence[CandidatePair], num_votes: int, rng: random.Random) -> CandidatePair | None:
    """Return a random pair among those that the fewest people have compared, and fewer than `num_votes`.

    More prompts narrow the interval of a win rate more than further votes on the same prompt do.
    """
    fewest = min((pair.num_people for pair in pairs), default=num_votes)
    return rng.choice([pair for pair in pairs if pair.num_people == fewest]) if fewest < num_votes else None
