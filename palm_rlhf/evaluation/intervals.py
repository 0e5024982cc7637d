"""Confidence intervals: the exact interval of a share, and bootstrap intervals of a mean."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from beartype import beartype

LEVEL = 0.95
Interval = tuple[float, float]


@beartype
def exact_interval(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """Return the exact interval of a share, for samples of any size (Clopper and Pearson 1934).

    At its lower end, at least so many successes have probability ``(1 - level) / 2``; at its upper end, at most so many
    have. Without trials it is 0 to 1.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"got {successes} successes in {trials} trials, expected 0 to {trials}")
    if not 0 < level < 1:
        raise ValueError(f"got level {level}, expected more than 0 and less than 1, such as 0.95")
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _solve(lambda share: _at_least(successes, trials, share) - tail)
    high = 1.0 if successes == trials else _solve(lambda share: tail - (1 - _at_least(successes + 1, trials, share)))
    return low, high


def _at_least(successes: int, trials: int, share: float) -> float:
    """Return the probability of at least so many successes, from logarithms, which large samples do not overflow."""
    if not 0 < share < 1:
        return float(share >= 1)
    counts = np.arange(successes, trials + 1)
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, trials + 1)))))
    logs = log_factorials[trials] - log_factorials[counts] - log_factorials[trials - counts]
    return float(np.exp(logs + counts * math.log(share) + (trials - counts) * math.log1p(-share)).sum())


def _solve(increasing: Callable[[float], float]) -> float:
    """Return the zero of an increasing function of a share by bisection, exact to the last bits of a float."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return (low + high) / 2


@beartype
def bootstrap_interval(
    values: Sequence[float | int],
    *,
    clusters: Sequence[object] | None = None,
    level: float = LEVEL,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Return the percentile bootstrap interval of the mean (Efron 1979), or None for fewer than two clusters.

    Args:
        values: The values.
        clusters: The cluster of each value, such as its question; the values of a cluster are drawn together. By
            default each value is its own cluster.
        level: Probability inside the interval.
        num_resamples: Bootstrap samples.
        seed: Of the bootstrap samples.
    """
    sums, counts = _by_cluster(values, clusters)
    if len(sums) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(sums), size=(num_resamples, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _by_cluster(values: Sequence[float | int], clusters: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray]:
    if clusters is None:
        return np.asarray(values, dtype=np.float64), np.ones(len(values))
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    sums, counts = np.zeros(len(places)), np.zeros(len(places))
    for value, cluster in zip(values, clusters, strict=True):
        sums[places[cluster]] += value
        counts[places[cluster]] += 1
    return sums, counts


@beartype
def standard_error(values: Sequence[float | int]) -> float | None:
    """Return the standard error of the mean, from the variance with n - 1, or None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
