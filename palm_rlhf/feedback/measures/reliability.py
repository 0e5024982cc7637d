"""How reliable each person's comparisons are, estimated from the ones that several people made.

This is the model of Dawid and Skene (1979, Applied Statistics 28, pages 20 to 28) with one number for a person: each
pair has a better answer, which nobody knows, and a person names it with the same probability in every comparison.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.measures.vote_records import vote_records
from palm_rlhf.feedback.store.tree_tables import ReplyRanking
from palm_rlhf.feedback.store.withdrawals import not_withdrawn

PRIOR_RIGHT, PRIOR_WRONG = 2.0, 1.0  # comparisons that everybody is given: few of them prove nobody perfect
MAX_STEPS, TOLERANCE = 1000, 1e-8
GRID = np.linspace(0.001, 0.999, 500)


class Judgement(NamedTuple):
    """A person's word on which of two answers is better; `first_is_better` speaks of the smaller id."""

    person_id: str
    pair: tuple[str, str]
    first_is_better: bool


@dataclass(frozen=True)
class PersonReliability:
    """The estimated probability that a person names the better of two answers, with its 95% credible interval.

    The interval takes the other people's reliabilities as known. `agreement` is the share of other people's judgements
    of the same pairs that are the same. Only pairs that other people judged too are counted, in `num_shared`.
    """

    person_id: str
    reliability: float
    low: float
    high: float
    agreement: float
    num_shared: int


@beartype
def estimate_reliability(judgements: Sequence[Judgement]) -> list[PersonReliability]:
    """Return the reliability of each person that judged a pair which another person judged too, the highest first.

    It is the mode of the posterior by expectation maximisation, from the votes of the majority. Every person is given
    three comparisons before, of which two are right. Two people alone have the same reliability, since nothing says
    which of them is wrong where they differ.
    """
    given: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for judgement in judgements:
        given[judgement.pair][judgement.person_id] = judgement.first_is_better
    shared = [words for words in given.values() if len(words) > 1]
    names = sorted({name for words in shared for name in words})
    place = {name: index for index, name in enumerate(names)}
    words = np.array([(pair, place[name], word) for pair, each in enumerate(shared) for name, word in each.items()])
    if not len(words):
        return []
    pair, person, sign = words[:, 0], words[:, 1], 2.0 * words[:, 2] - 1  # 1: the first is better, -1: the second
    right = _maximise(pair, person, sign)
    support = sign * np.log(right / (1 - right))[person]  # log-odds for the first answer
    # How likely each word is right by the other people's words on the pair, and the share of these that are the same.
    by_others = _sigmoid(sign * (np.bincount(pair, support)[pair] - support))
    num_others = np.bincount(pair)[pair] - 1.0
    num_same = (num_others + sign * (np.bincount(pair, sign)[pair] - sign)) / 2
    found = []
    for index, name in enumerate(names):
        own = person == index
        low, high = _credible_interval(by_others[own])
        agreement = float(num_same[own].sum() / num_others[own].sum())
        found.append(PersonReliability(name, float(right[index]), low, high, agreement, int(own.sum())))
    return sorted(found, key=lambda each: (-each.reliability, each.person_id))


def _maximise(pair: np.ndarray, person: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Return the probability that each person is right, by expectation maximisation.

    pair, person and sign: `w`, those of each word
    """
    numbers = np.bincount(person)
    support = np.bincount(pair, sign)  # the log-odds that the first answer of a pair is better
    right = np.full(len(numbers), 0.5)
    for _ in range(MAX_STEPS):
        before = right
        num_right = np.bincount(person, _sigmoid(sign * support[pair]))
        right = (num_right + PRIOR_RIGHT) / (numbers + PRIOR_RIGHT + PRIOR_WRONG)
        support = np.bincount(pair, sign * np.log(right / (1 - right))[person])
        if np.abs(right - before).max() < TOLERANCE:
            break
    return right


def _sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))


def _credible_interval(by_others: np.ndarray) -> tuple[float, float]:
    """Return the interval of a person's reliability, given how likely each of their words is right by the others'."""
    logs = PRIOR_RIGHT * np.log(GRID) + PRIOR_WRONG * np.log(1 - GRID)
    logs += np.log(GRID[:, None] * by_others + (1 - GRID[:, None]) * (1 - by_others)).sum(axis=1)
    density = np.exp(logs - logs.max())
    below = np.cumsum(density) / density.sum()
    return float(GRID[np.searchsorted(below, 0.025)]), float(GRID[np.searchsorted(below, 0.975)])


@beartype
def judgements_of(session: Session) -> list[Judgement]:
    """Return what people said of two answers, in comparisons and in rankings; ties say nothing."""
    found = []
    for vote in vote_records(session):
        if vote.verdict in ("left", "right"):
            better, worse = (vote.left_id, vote.right_id) if vote.verdict == "left" else (vote.right_id, vote.left_id)
            found.append(_judgement(vote.person_id, better, worse))
    rankings = select(ReplyRanking.person_id, ReplyRanking.best_first).where(not_withdrawn(ReplyRanking))
    for person, best_first in session.execute(rankings.where(ReplyRanking.person_id.is_not(None))):
        found += [_judgement(person, better, worse) for better, worse in combinations(best_first, 2)]
    return found


def _judgement(person_id: str, better: str, worse: str) -> Judgement:
    return Judgement(person_id, (min(better, worse), max(better, worse)), better < worse)
