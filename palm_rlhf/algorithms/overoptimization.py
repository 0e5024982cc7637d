"""Whether a policy has learnt to please its reward, the proxy, at the cost of the gold reward."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from beartype import beartype
from torch import Tensor

LEVEL = 0.05  # probability of a false alarm in a run
MIN_PROMPTS = 8  # the variance of the differences of fewer prompts is too uncertain


class Overoptimization(NamedTuple):
    """The change since the evaluation with the highest gold reward, as means over the prompts."""

    best: int  # the evaluation with the highest gold reward, counted from 0
    proxy_rise: float
    gold_fall: float
    proxy_z: float  # standard scores of the rise and of the fall
    gold_z: float
    bound: float  # both standard scores are above it


@torch.no_grad()
@beartype
def overoptimization(proxy: Tensor, gold: Tensor, *, level: float = LEVEL) -> Overoptimization | None:
    """Return the proxy's rise and the gold reward's fall at the last evaluation, or None if either may be chance.

    Optimising an imperfect reward comes to this in the end (Gao et al. 2022, arXiv:2210.10760). The last evaluation is
    compared, prompt by prompt, with the earlier one that has the highest mean gold reward. Two one-sided t tests must
    both reject. Suppose that a run asks after each evaluation, and that in truth the gold reward never falls or the
    proxy never rises: the probability of any false alarm is then at most `level`. For this the k-th comparison gets
    level / (k (k + 1)), shared by the k earlier evaluations that one is chosen from (Bonferroni).

    Shapes: proxy and gold `k n`, k evaluations of the same n prompts in the same order; NaN where there is no score.
    """
    num_earlier = len(gold) - 1
    if num_earlier < 1 or gold[:-1].isnan().all():
        return None
    means = gold[:-1].double().nanmean(dim=-1)
    best = int(means.nan_to_num(-torch.inf).argmax())
    rises, falls = (proxy[-1] - proxy[best]).double(), (gold[best] - gold[-1]).double()
    scored = ~(rises.isnan() | falls.isnan())
    if int(scored.sum()) < MIN_PROMPTS:
        return None
    bound = NormalDist().inv_cdf(1 - level / (num_earlier**2 * (num_earlier + 1)))
    scores = standard_score(rises[scored]), standard_score(falls[scored])
    if min(scores) <= bound:
        return None
    return Overoptimization(best, float(rises[scored].mean()), float(falls[scored].mean()), *scores, bound)


@beartype
def standard_score(differences: Tensor) -> float:
    """Return the mean's t statistic as a normal variable of the same tail (Wallace 1959, Ann. Math. Stat. 30)."""
    mean, freedom = float(differences.mean()), len(differences) - 1
    error = float(differences.std()) / math.sqrt(len(differences))
    if not error:
        return math.copysign(math.inf, mean) if mean else 0.0
    statistic = mean / error
    z = math.sqrt(freedom * math.log1p(statistic**2 / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return math.copysign(z, statistic)
