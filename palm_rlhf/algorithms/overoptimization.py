"""Whether a policy has learnt to please its reward, the proxy, at the cost of the reward that is meant."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from beartype import beartype
from torch import Tensor

LEVEL = 0.05  # of a run, the probability of a false alarm
MIN_PROMPTS = 8  # fewer tell too little of how their differences vary


class Overoptimization(NamedTuple):
    """What has changed since the evaluation of the highest gold reward, in means over the prompts."""

    best: int  # that evaluation, counted from 0
    proxy_rise: float
    gold_fall: float
    proxy_z: float  # standard scores of the two
    gold_z: float
    bound: float  # that both of them pass


@torch.no_grad()
@beartype
def overoptimization(proxy: Tensor, gold: Tensor, *, level: float = LEVEL) -> Overoptimization | None:
    """The rise of the proxy and the fall of the gold reward in the last of several evaluations, if both are no chance.

    This is what optimising an imperfect reward comes to in the end (Gao et al. 2022, arXiv:2210.10760). The last
    evaluation is compared, prompt by prompt, with the one before it that has the highest mean gold reward, by two
    one-sided t tests, which must both reject. In a run that asks after each evaluation, where the gold reward never
    falls or the proxy never rises, an alarm is ever raised with a probability of at most `level`: its k-th comparison
    has level / (k (k + 1)) of that, shared by the k earlier evaluations that one is chosen from (Bonferroni).

    proxy and gold: `k n`, evaluations of the same n prompts in their order; NaN where there is no score
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
    """The mean's t statistic, as the normal variable of about the same tail (Wallace 1959, Ann. Math. Stat. 30)."""
    mean, freedom = float(differences.mean()), len(differences) - 1
    error = float(differences.std()) / math.sqrt(len(differences))
    if not error:
        return math.copysign(math.inf, mean) if mean else 0.0
    statistic = mean / error
    z = math.sqrt(freedom * math.log1p(statistic**2 / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return math.copysign(z, statistic)
