"""How good a reward model is: its accuracy on pairs, the interval of that accuracy, and its calibration."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms.win_rate import wilson_interval


class MarginBin(NamedTuple):
    """The accuracy on the pairs whose scores differ by `low` to `high`."""

    low: float
    high: float
    accuracy: float
    num_pairs: int


@dataclass(frozen=True)
class RewardMetrics:
    """Measures of rankings: over all pairs, which count the same, and over the scores of all responses."""

    num_pairs: int
    num_prompts: int
    accuracy: float
    """Share of the pairs whose better response has the higher score; equal scores count a half."""
    accuracy_low: float
    """Lower end of the accuracy's 95 % interval (Wilson), with the prompts as clusters."""
    accuracy_high: float
    """Upper end of that interval."""
    longer_accuracy: float
    """The accuracy of preferring the longer response, which a model that reads has to beat."""
    log_loss: float
    """Mean of -log sigmoid(better - worse), in nats; ln 2 for a model that knows nothing."""
    calibration_error: float
    """Expected difference between sigmoid(score difference) and the accuracy, over ten bins (Guo et al. 2017)."""
    length_correlation: float
    """Pearson's correlation between scores and response lengths, 0 where one of them is constant."""
    score_mean: float
    score_std: float
    """Mean and deviation of the scores, normalised where the model is; the differences above are not."""
    accuracy_by_margin: tuple[MarginBin, ...]
    """The pairs in four groups by the difference of their scores, the smallest first."""

    def __str__(self) -> str:
        return (
            f"pair accuracy {self.accuracy:.1%} (95% interval {self.accuracy_low:.1%} to {self.accuracy_high:.1%}) on "
            f"{self.num_pairs} pairs of {self.num_prompts} prompts; the longer one is better in "
            f"{self.longer_accuracy:.1%}"
        )

    def numbers(self) -> dict[str, float]:
        """Return the measures by name, with a name for each group of margins."""
        numbers = dataclasses.asdict(self)
        groups = numbers.pop("accuracy_by_margin")
        return numbers | {f"accuracy_margin_{i}": group[2] for i, group in enumerate(groups, start=1)}


@dataclass(frozen=True)
class RatingMetrics:
    """Measures of ratings: how far the scores are from the labels."""

    num_ratings: int
    loss: float
    """Mean squared error, or cross-entropy of the bins in nats."""
    label_correlation: float
    """Pearson's correlation between scores and labels, 0 where one of them is constant."""
    length_correlation: float
    score_mean: float
    score_std: float

    def numbers(self) -> dict[str, float]:
        """Return the measures by name."""
        return dataclasses.asdict(self)


@beartype
def ranking_metrics(
    raw_scores: Sequence[Tensor], lengths: Sequence[Tensor], *, score_mean: float = 0.0, score_std: float = 1.0
) -> RewardMetrics:
    """Measure rankings by the scores before their normalisation, whose mean and deviation are given.

    raw_scores and lengths: for each prompt `k`, best response first
    """
    pairs = [torch.combinations(torch.arange(len(scores))) for scores in raw_scores]
    prompts = torch.repeat_interleave(torch.tensor([len(pair) for pair in pairs]))
    differences, longer = (
        torch.cat([x.double()[pair[:, 0]] - x.double()[pair[:, 1]] for x, pair in zip(parts, pairs, strict=True)])
        for parts in (raw_scores, lengths)
    )
    correct = correctness(differences)
    accuracy = float(correct.mean())
    low, high = wilson_interval(accuracy, effective_count(correct, prompts))
    scores = (torch.cat([*raw_scores]).double() - score_mean) / score_std
    return RewardMetrics(
        num_pairs=len(differences),
        num_prompts=len(raw_scores),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        longer_accuracy=float(correctness(longer).mean()),
        log_loss=float(-F.logsigmoid(differences).mean()),
        calibration_error=calibration_error(differences),
        length_correlation=correlation(scores, torch.cat([*lengths])),
        score_mean=float(scores.mean()),
        score_std=float(scores.std(correction=0)),
        accuracy_by_margin=accuracy_by_margin(differences),
    )


@beartype
def correctness(differences: Tensor) -> Tensor:
    """Return 1 where the better response has the higher score, 0 where it has the lower, else a half: `p -> p`."""
    return (differences.sign().double() + 1) / 2


@beartype
def effective_count(correct: Tensor, clusters: Tensor) -> float:
    """Return the number of independent pairs that would give the accuracy with the same precision.

    It is the number of pairs over the design effect (Kish 1965): the variance of the mean with prompts as clusters over
    the variance of independent pairs, at least 1. Where all pairs are right, or all wrong, the similarity of the pairs
    of a prompt cannot be estimated, and the number of prompts is returned.

    correct, and its prompt's index from 0: `p`
    """
    correct, num_pairs, num_clusters = correct.double(), len(correct), int(clusters.max()) + 1
    mean = correct.mean()
    independent = mean * (1 - mean) / num_pairs
    if independent == 0 or num_clusters == 1:
        return float(num_clusters)
    residuals = torch.zeros(num_clusters, dtype=torch.float64).index_add(0, clusters, correct - mean)
    variance = (residuals / num_pairs).square().sum()
    return num_pairs / max(float(variance / independent), 1.0)


@beartype
def calibration_error(differences: Tensor, num_bins: int = 10) -> float:
    """Return the mean distance of confidence and accuracy over bins of equal width (Guo et al. 2017, equation 5).

    The confidence in the response with the higher score is sigmoid(|difference|), from a half to 1.

    differences, better - worse: `p`
    """
    confidence = differences.double().abs().sigmoid()
    bins = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, confidence - correctness(differences))
    return float(gaps.abs().sum() / len(differences))


@beartype
def accuracy_by_margin(differences: Tensor, num_bins: int = 4) -> tuple[MarginBin, ...]:
    """Return the accuracy in groups of equal size, ordered by the difference of scores; few pairs make fewer groups."""
    differences = differences[differences.abs().argsort(stable=True)]
    return tuple(
        MarginBin(float(part[0].abs()), float(part[-1].abs()), float(correctness(part).mean()), len(part))
        for part in differences.tensor_split(min(num_bins, len(differences)))
    )


@beartype
def correlation(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation, 0 where `x` or `y` is constant: `n, n -> scalar`."""
    x, y = (values.double() - values.double().mean() for values in (x, y))
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0
