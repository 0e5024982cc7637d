"""The length-controlled win rate of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475).

A logistic regression explains the preferences for a model over the baseline by three terms: the quality of the model,
the difference of the lengths in characters as tanh((len_1 - len_2) / std(len_1 - len_2)), and the difficulty of each
instruction. The length-controlled win rate is the prediction of the regression at equal lengths, averaged over all
instructions; instructions without a preference are left out of the fit, but not of the average.

AlpacaEval fitted the difficulties of its 805 instructions once, over a whole leaderboard. They are in the file
`df_gamed.csv` of its data set (tatsu-lab/alpaca_eval on the hub), with the preferences of two baselines that were told
to write more or less, which anchor the length term. With this file the win rate is that of AlpacaEval. Without it, for
other instructions, the regression has the other two terms only.
"""

import csv
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from beartype import beartype

from palm_rlhf.model.files import read_text

STRENGTHS = np.logspace(-4, 4, 10)  # weights of the data against the penalty, for cross-validation to choose from
NUM_FOLDS = 5
GAMED_WEIGHT = 0.2 / 2  # of each row of the two gamed baselines
GAMED_COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty")
MISSING = {"", "na", "nan", "null", "none"}  # as pandas and R write them


class LengthEffect(NamedTuple):
    """The regression: the win rate at equal lengths in percent, and the coefficients of its terms."""

    win_rate: float
    length: float
    difficulty: float
    model: float


@dataclass(frozen=True)
class Regularizer:
    """The content of `df_gamed.csv`: the difficulty of each instruction, and rows of baselines that game the length."""

    difficulties: dict[int, float]
    features: np.ndarray
    """Rows as from `_features`: length, difficulty, and 0 for the model."""
    shares: np.ndarray


@beartype
def read_regularizer(path: str | os.PathLike[str]) -> Regularizer:
    """Read `df_gamed.csv`. Raises ValueError for another file."""
    rows = list(csv.DictReader(read_text(Path(path)).splitlines(keepends=True)))
    if not rows or not set(GAMED_COLUMNS) <= rows[0].keys():
        raise ValueError(
            f"{path}: got the columns {list(rows[0]) if rows else []}, expected {', '.join(GAMED_COLUMNS)}: "
            "take the file df_gamed.csv of the data set tatsu-lab/alpaca_eval"
        )
    numbers = [_gamed_numbers(row, f"{path}, record {place}") for place, row in enumerate(rows, start=1)]
    difficulties: dict[int, float] = {}
    for row in numbers:
        difficulties.setdefault(int(row.index), row.difficulty)
    known = [row for row in numbers if row.preference is not None]
    shares, delta, difficulty = np.array([(row.preference, row.delta, row.difficulty) for row in known], dtype=float).T
    return Regularizer(difficulties, np.stack([np.tanh(delta), difficulty, np.zeros(len(delta))], axis=1), shares)


class _GamedRow(NamedTuple):
    """A row of `df_gamed.csv`, in the order of GAMED_COLUMNS."""

    index: float  # type: ignore[assignment]  # the name of the column, which hides tuple.index
    preference: float | None
    delta: float
    difficulty: float


def _gamed_numbers(row: dict[str, str], place: str) -> _GamedRow:
    """Return the numbers of a row, with None for a preference that is missing."""
    try:
        index, delta, difficulty = (float(row[key]) for key in GAMED_COLUMNS if key != "preference")
        preference = None if row["preference"].strip().lower() in MISSING else float(row["preference"])
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place}: {error}; expected numbers as {', '.join(GAMED_COLUMNS)}: copy or download the file again"
        ) from error
    numbers = _GamedRow(index, preference, delta, difficulty)
    if not all(number is None or np.isfinite(number) for number in numbers):
        raise ValueError(f"{place}: got {tuple(numbers)}, expected finite numbers: copy or download the file again")
    return numbers


@beartype
def fit_length_effect(
    shares: Sequence[float | None],
    lengths: Sequence[tuple[int, int]],
    indices: Sequence[object],
    regularizer: Regularizer | None = None,
) -> LengthEffect | None:
    """Fit the regression; return None, as AlpacaEval does, for fewer than two rows or fewer preferences than folds.

    The fit has an L1 penalty. Cross-validation over five folds chooses its weight, as in AlpacaEval.
    Raises ValueError for an instruction that the regularizer does not know.

    Args:
        shares: The share of the win of each instruction, 0 to 1. An instruction without a preference (None) is in no
            fit, but in the average at equal lengths.
        lengths: The lengths of both outputs, in characters.
        indices: The indices of the instructions, for their difficulties.
        regularizer: The difficulties and the anchoring rows.
    """
    known = np.array([share is not None for share in shares])
    num_rows = known.sum() + (0 if regularizer is None else len(regularizer.shares))
    if len(known) < 2 or not known.any() or num_rows < NUM_FOLDS:
        return None
    features = _features(lengths, indices, regularizer)
    rows, targets = features[known], np.array([share for share in shares if share is not None], dtype=np.float64)
    weights = np.ones(len(targets))
    if regularizer is not None:
        rows, targets = np.concatenate([regularizer.features, rows]), np.concatenate([regularizer.shares, targets])
        weights = np.concatenate([np.full(len(regularizer.shares), GAMED_WEIGHT), weights])
    used = rows.any(axis=0)  # a column of zeros (no difficulties, equal lengths) has no coefficient to fit
    coefficients = np.zeros(rows.shape[1])
    coefficients[used] = _cross_validated(rows[:, used], targets, weights)
    at_equal_lengths = features.copy()
    at_equal_lengths[:, 0] = 0
    win_rate = 100 * float(_logistic(at_equal_lengths @ coefficients).mean())
    return LengthEffect(win_rate, *coefficients.tolist())


def _features(
    lengths: Sequence[tuple[int, int]], indices: Sequence[object], regularizer: Regularizer | None
) -> np.ndarray:
    """Return rows of length difference, difficulty, and 1 for the model: `n 3`."""
    delta = np.array([first - second for first, second in lengths], dtype=np.float64)
    deviation = delta.std(ddof=1) if len(delta) > 1 else 0.0
    scaled = np.tanh(delta / deviation) if deviation > 0 else np.zeros(len(delta))
    difficulties = np.zeros(len(delta))
    if regularizer is not None:
        known: dict[object, float] = dict(regularizer.difficulties.items())
        if unknown := sorted(set(indices) - known.keys(), key=str):
            raise ValueError(
                f"got the instructions {unknown[:5]}, which have no difficulty in the regularizer; expected indices of "
                f"AlpacaEval's {len(known)} instructions: leave the regularizer out for other instructions"
            )
        difficulties = np.array([known[index] for index in indices])
    return np.stack([scaled, difficulties, np.ones(len(delta))], axis=1)


def _cross_validated(rows: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Fit with the strength of the least mean held-out loss; of equal strengths with the smallest."""
    folds = np.arange(len(rows)) % NUM_FOLDS
    losses = np.zeros(len(STRENGTHS))
    for place, strength in enumerate(STRENGTHS):
        for fold in range(NUM_FOLDS):
            kept = folds != fold
            found = fit_l1_logistic(rows[kept], targets[kept], strength * weights[kept])
            losses[place] += _log_loss(rows[~kept] @ found, targets[~kept], weights[~kept]) / (~kept).sum()
    return fit_l1_logistic(rows, targets, float(STRENGTHS[losses.argmin()]) * weights)


def _logistic(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _log_loss(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    return float((weights * (np.logaddexp(0, logits) - targets * logits)).sum())


@beartype
def fit_l1_logistic(rows: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the coefficients b that minimise `sum |b| + sum of weights * log-loss(rows b, targets)`.

    `n f, n, n -> f`. Proximal Newton steps: each minimises the quadratic model with the penalty. For few features only.
    """
    found = np.zeros(rows.shape[1])
    value = _log_loss(rows @ found, targets, weights)
    for _ in range(200):
        chances = _logistic(rows @ found)
        gradient = rows.T @ (weights * (chances - targets))
        hessian = (rows.T * (weights * chances * (1 - chances))) @ rows
        hessian += np.eye(len(found)) * 1e-9 * max(np.trace(hessian), 1e-9)
        step = _quadratic_step(found, gradient, hessian)
        size = 1.0
        while size > 1e-12:
            new = found + size * step
            new_value = float(np.abs(new).sum()) + _log_loss(rows @ new, targets, weights)
            if new_value <= value:
                break
            size /= 2
        else:
            break
        done = np.abs(new - found).max() < 1e-9
        found, value = new, new_value
        if done:
            break
    return found


def _quadratic_step(found: np.ndarray, gradient: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Return the step d that minimises `gradient d + d hessian d / 2 + |found + d|`, exactly.

    For each choice of signs (-1, 0 or 1), the coefficients found + d solve a linear system. The solutions that have
    the chosen signs are compared.
    """
    slope = gradient - hessian @ found  # of the quadratic model, at coefficients of 0
    best, best_value = np.zeros_like(found), 0.0
    for signs in itertools.product((-1.0, 0.0, 1.0), repeat=len(found)):
        used = np.array(signs) != 0
        if not used.any():
            continue
        goal = np.zeros_like(found)
        goal[used] = np.linalg.solve(hessian[np.ix_(used, used)], -(slope + signs)[used])
        if np.array_equal(np.sign(goal), signs):
            value = float(slope @ goal + goal @ hessian @ goal / 2 + np.abs(goal).sum())
            if value < best_value:
                best, best_value = goal, value
    return best - found
