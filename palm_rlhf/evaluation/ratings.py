"""Ratings of many models from pairwise battles: Elo in sequence, and Bradley-Terry by maximum likelihood."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import read_records
from palm_rlhf.evaluation.alpaca import GENERATORS, preference_of
from palm_rlhf.evaluation.intervals import LEVEL, Interval
from palm_rlhf.evaluation.message_text import name_of

START = 1000.0
SCALE = 400 / math.log(10)  # Elo points for a log-strength of 1: odds of ten to one are 400 points
WINNERS = {"model_a": 1.0, "model_1": 1.0, "model_b": 0.0, "model_2": 0.0}
TIE = re.compile(r"tie\b.*|tied|draw|equal|both[ _-]?(?:bad|good)|neither", re.DOTALL)


class Battle(NamedTuple):
    """Two models that answered the same question, and the first's share of the win: 1, 0, or 0.5 for a draw."""

    first: str
    second: str
    score: float


@beartype
def read_battles(path: str | os.PathLike[str]) -> list[Battle]:
    """Read the battles of a file: {"model_a", "model_b", "winner"} as in Chatbot Arena, or AlpacaEval's annotations.

    The winner is "model_a", "model_b" or a tie: "tie", "tie (bothbad)", "both_bad" and the like. In annotations
    ({"generator_1", "generator_2", "preference"}), the preference goes from 1 (the first) to 2 (the second), and 0 is a
    draw; annotations without a preference are left out. Raises ValueError, with the line, for any other record and
    for a model against itself.
    """
    battles = []
    for line, record in read_records(path):
        try:
            battle = _battle(record)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {line}: {error}; expected a battle: model_a, model_b and winner, or "
                "generator_1, generator_2 and preference"
            ) from error
        battles += [] if battle is None else [battle]
    if not battles:
        raise ValueError(f"{path}: got no battles, expected at least one with a winner or a preference")
    return battles


def _battle(record: Record) -> Battle | None:
    keys = next((pair for pair in (GENERATORS, ("model_1", "model_2")) if pair[0] in record), ("model_a", "model_b"))
    first, second = (name_of(record.get(key), key) for key in keys)
    if first == second:
        raise ValueError(f"got {first!r} against itself")
    if keys == GENERATORS:
        preference = preference_of(record)
        return None if preference is None else Battle(first, second, 2.0 - preference)
    winner = record.get("winner")
    name = winner.strip().lower() if isinstance(winner, str) else ""
    if name not in WINNERS and not TIE.fullmatch(name):
        raise ValueError(f"got the winner {repr(winner)[:40]}, expected {keys[0]}, {keys[1]} or a tie")
    return Battle(first, second, WINNERS.get(name, 0.5))


@beartype
def elo(
    battles: Sequence[Battle], *, k: float | int = 4, start: float | int = START, num_shuffles: int = 0, seed: int = 0
) -> dict[str, float]:
    """Return Elo ratings, updated battle by battle: `R += k (S - E)` with `E = 1 / (1 + 10^((R' - R) / 400))`.

    The last battles count most. With `num_shuffles` the ratings are means over so many random orders instead. The sum
    of all ratings is constant.
    """
    models = models_of(battles)
    places = {model: place for place, model in enumerate(models)}
    pairs = [(places[first], places[second], score) for first, second, score in battles]
    orders: Iterable[Iterable[int]] = [range(len(pairs))]
    if num_shuffles:
        generator = np.random.default_rng(seed)
        orders = (generator.permutation(len(pairs)) for _ in range(num_shuffles))
    total = np.zeros(len(models))
    for order in orders:
        ratings = [float(start)] * len(models)
        for index in order:
            first, second, score = pairs[index]
            change = k * (score - 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400)))
            ratings[first] += change
            ratings[second] -= change
        total += ratings
    return dict(zip(models, (total / max(num_shuffles, 1)).tolist()))


@beartype
def bradley_terry(battles: Sequence[Battle], *, prior_draws: float | int = 0) -> dict[str, float]:
    """Return the maximum-likelihood ratings in Elo points, with mean 1000 (Bradley and Terry 1952).

    A draw is half a win for each model. `prior_draws` gives each model draws against an average model, which pull all
    ratings to the mean. Raises ValueError if no finite ratings have the maximum likelihood: without prior draws, wins
    and draws must lead from every model to every other (Ford 1957).
    """
    if prior_draws < 0:
        raise ValueError(f"got prior_draws {prior_draws}, expected 0 or more")
    models = models_of(battles)
    wins = _win_matrix(battles, models)
    if not prior_draws and (stuck := _never_beaten(wins)):
        names = [model for place, model in enumerate(models) if place in stuck]
        raise ValueError(
            f"{', '.join(names)} never lost or drew against any of the other models (or never met them), so no finite "
            "rating has the maximum likelihood: add battles, or set prior_draws, for example to 0.5"
        )
    return dict(zip(models, (START + SCALE * _fit(wins, prior_draws)).tolist()))


def models_of(battles: Sequence[Battle]) -> list[str]:
    """Return the names of the models in order of appearance. Raises ValueError if a model meets itself."""
    if not battles:
        raise ValueError("got no battles, expected at least one")
    for battle in battles:
        if battle.first == battle.second:
            raise ValueError(f"got a battle of {battle.first!r} against itself, expected two models")
        if not 0 <= battle.score <= 1:
            raise ValueError(f"got the score {battle.score} in a battle, expected 0 to 1")
    return list(dict.fromkeys(name for battle in battles for name in (battle.first, battle.second)))


def _win_matrix(battles: Sequence[Battle], models: Sequence[str]) -> np.ndarray:
    """Return how often the model of the row beat the model of the column; a draw is half a win for each."""
    places = {model: place for place, model in enumerate(models)}
    wins = np.zeros((len(models), len(models)))
    for first, second, score in battles:
        wins[places[first], places[second]] += score
        wins[places[second], places[first]] += 1 - score
    return wins


def _never_beaten(wins: np.ndarray) -> set[int]:
    """Return a proper subset of the models that no other model beat or drew with; empty if there is none."""
    better, worse = _reached(wins.T), _reached(wins)
    everyone = set(range(len(wins)))
    return better if better < everyone else everyone - worse


def _reached(edges: np.ndarray) -> set[int]:
    """Return the models that edges connect, directly or not, with the first model."""
    reached, new = {0}, [0]
    while new:
        fresh = [place for place in np.flatnonzero(edges[new.pop()]).tolist() if place not in reached]
        reached.update(fresh)
        new += fresh
    return reached


def _fit(wins: np.ndarray, prior_draws: float) -> np.ndarray:
    """Return log-strengths of mean 0, by Newton's method with step halving on the concave log-likelihood."""
    games, num_models = wins + wins.T, len(wins)

    def likelihood(strengths: np.ndarray) -> float:
        differences = strengths[:, None] - strengths[None, :]
        prior = prior_draws / 2 * (np.logaddexp(0, -strengths) + np.logaddexp(0, strengths)).sum()
        return -float((wins * np.logaddexp(0, -differences)).sum() + prior)

    strengths, best = np.zeros(num_models), likelihood(np.zeros(num_models))
    for _ in range(200):
        chances = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        own = 1 / (1 + np.exp(-strengths))
        gradient = (wins - games * chances).sum(axis=1) + prior_draws * (0.5 - own)
        weights = games * chances * (1 - chances)
        hessian = np.diag(weights.sum(axis=1) + prior_draws * own * (1 - own)) - weights
        if not prior_draws:  # the likelihood depends on differences only: fix the mean
            hessian += max(hessian.max(), 1e-12) / num_models
        step = np.linalg.solve(hessian, gradient)
        if np.abs(step).max() < 1e-10:
            break
        while likelihood(strengths + step) < best and np.abs(step).max() > 1e-12:
            step = step / 2
        strengths = strengths + step
        best = likelihood(strengths)
    return strengths - strengths.mean()


@dataclass(frozen=True)
class RatingRow:
    """A row of the rating table."""

    model: str
    rating: float
    """Bradley-Terry rating, in Elo points."""
    interval: Interval | None
    elo: float
    """Elo rating, the mean over random orders of the battles."""
    battles: int
    win_rate: float

    def numbers(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@beartype
def rating_table(
    battles: Sequence[Battle],
    *,
    prior_draws: float | int = 0,
    num_resamples: int = 200,
    num_shuffles: int = 20,
    level: float = LEVEL,
    seed: int = 0,
) -> list[RatingRow]:
    """Rate all models, the best first, with percentile bootstrap intervals over the battles.

    In some bootstrap samples a model has no defeat. Ratings there get a thousandth of a prior draw, which keeps them
    finite.
    """
    models = models_of(battles)
    ratings = bradley_terry(battles, prior_draws=prior_draws)
    averages = elo(battles, num_shuffles=num_shuffles, seed=seed)
    wins = _win_matrix(battles, models)
    num_battles = (wins + wins.T).sum(axis=1)
    intervals = _bootstrap(battles, models, prior_draws, num_resamples, level, seed)
    rows = [
        RatingRow(model, ratings[model], intervals.get(model), averages[model], round(played), won / played)
        for model, played, won in zip(models, num_battles.tolist(), wins.sum(axis=1).tolist())
    ]
    return sorted(rows, key=lambda row: -row.rating)


def _bootstrap(
    battles: Sequence[Battle], models: Sequence[str], prior_draws: float, num_resamples: int, level: float, seed: int
) -> Mapping[str, Interval]:
    if num_resamples < 2:
        return {}
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_resamples):
        drawn = [battles[index] for index in generator.integers(len(battles), size=len(battles))]
        wins = _win_matrix(drawn, models)
        rows.append(START + SCALE * _fit(wins, prior_draws or (1e-3 if _never_beaten(wins) else 0.0)))
    low, high = np.quantile(np.stack(rows), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return dict(zip(models, zip(low.tolist(), high.tolist())))
