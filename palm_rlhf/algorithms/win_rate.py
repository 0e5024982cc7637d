"""How often the responses of one policy score above those of another, with a confidence interval."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from beartype import beartype
from torch import Tensor

LEVEL = 0.95


class WinRate(NamedTuple):
    """A share of wins, and the ends of its interval."""

    rate: float
    low: float
    high: float


@torch.no_grad()
@beartype
def win_rate(scores: Tensor, others: Tensor, *, level: float = LEVEL) -> WinRate | None:
    """Return the share of wins over another's responses to the same prompts; None if no two scores can be compared.

    Each score is compared with each of the other's scores for the prompt; a tie is half a win. The rate is the mean of
    the prompts' shares. The interval is Wilson's with the prompts as trials, which is safe: the shares of prompts vary
    no more than single wins of the same mean.

    Shapes: scores `n s`, others `n t`, for n prompts; NaN where there is no score.
    """
    ours, theirs = scores.double().unsqueeze(2), others.double().unsqueeze(1)
    wins = (ours > theirs).double() + (ours == theirs).double() / 2
    comparable = ~(ours.isnan() | theirs.isnan())
    counts = comparable.sum(dim=(1, 2))
    if not counts.any():
        return None
    shares = torch.where(comparable, wins, 0.0).sum(dim=(1, 2))[counts > 0] / counts[counts > 0]
    rate = float(shares.mean())
    return WinRate(rate, *wilson_interval(rate, len(shares), level=level))


@beartype
def wilson_interval(share: float, trials: float | int, *, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of the true share after `trials` independent trials that showed `share`.

    This is the score interval (Wilson 1927, JASA 22, page 209). The effective number of dependent trials is no integer.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    weight = 1 / (1 + z * z / trials)
    centre = weight * (share + z * z / (2 * trials))
    half = weight * z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return max(centre - half, 0.0), min(centre + half, 1.0)
