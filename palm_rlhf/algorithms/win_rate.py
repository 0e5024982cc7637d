"""How often one policy's responses score above another's, with the interval of that share."""

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
    """The share of wins over others' responses to the same prompts, a tie as half a win; None where nothing compares.

    Each score is compared with each of the other's for the prompt, and the rate is the mean of the prompts' shares. The
    interval is Wilson's with the prompts as trials: shares of a prompt vary no more than wins alone of that mean would.

    scores: `n s`, others: `n t`, for n prompts; NaN where there is no score
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
def wilson_interval(share: float, trials: int, *, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a share of so many trials (Wilson 1927, JASA 22, page 209)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    weight = 1 / (1 + z * z / trials)
    centre = weight * (share + z * z / (2 * trials))
    half = weight * z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return max(centre - half, 0.0), min(centre + half, 1.0)
