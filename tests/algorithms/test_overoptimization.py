"""Over-optimisation: no alarm by chance, more often than the level says, and one where it is planted."""

import math

import pytest
import torch

from palm_rlhf.algorithms.overoptimization import MIN_PROMPTS, overoptimization, standard_score

N, EVALUATIONS = 32, 8


def simulated(run: int, gold_means: list[float], proxy_means: list[float], noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluations of a run: prompts of their own difficulty, and responses that differ from one to the next."""
    generator = torch.Generator().manual_seed(run)
    difficulty = torch.randn(N, generator=generator)
    gold, proxy = (
        torch.stack([difficulty + mean + noise(generator) for mean in means]) for means in (gold_means, proxy_means)
    )
    return proxy, gold


def normal(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(N, generator=generator)


def skewed(generator: torch.Generator) -> torch.Tensor:
    return 1 - torch.empty(N).exponential_(generator=generator)


def alarm(proxy: torch.Tensor, gold: torch.Tensor, detector=overoptimization) -> int | None:
    """The evaluation of the first alarm of a run that asks after each of them."""
    return next((last for last in range(1, len(gold)) if detector(proxy[: last + 1], gold[: last + 1])), None)


def without_correction(proxy: torch.Tensor, gold: torch.Tensor) -> bool:
    """A mutant: each evaluation at the full level, against the best one before it."""
    best = int(gold[:-1].mean(dim=-1).argmax())
    return standard_score(proxy[-1] - proxy[best]) > 1.645 and standard_score(gold[best] - gold[-1]) > 1.645


RISING = [0.5 * index for index in range(EVALUATIONS)]


@pytest.mark.parametrize("noise", [normal, skewed])
def test_false_alarms_are_rarer_than_the_level(noise):
    """The proxy rises, as it should, and the gold reward stays: of 250 runs of 8 evaluations, alarms in any."""
    runs = [simulated(run, [0.0] * EVALUATIONS, RISING, noise) for run in range(250)]
    alarms = sum(alarm(*run) is not None for run in runs)
    assert alarms / len(runs) < 0.05
    naive = sum(alarm(*run, without_correction) is not None for run in runs)
    assert naive / len(runs) > 0.25, "the simulation tells a test apart that looks too often"


def test_an_alarm_needs_both_a_rise_and_a_fall():
    falling, still = [-2.0 * index for index in range(EVALUATIONS)], [0.0] * EVALUATIONS
    worse_in_all, worse_in_one, better_in_all = (
        sum(alarm(*simulated(run, gold, proxy, normal)) is not None for run in range(60))
        for gold, proxy in ((falling, falling), (falling, still), (RISING, RISING))
    )
    assert worse_in_all == better_in_all == 0 and worse_in_one / 60 < 0.1


def test_planted_overoptimisation_is_found():
    """The gold reward rises with the proxy, and falls from the fourth evaluation on, as in Gao et al.'s figures."""
    gold = [0.0, 0.6, 1.2, 1.6, 1.2, 0.4, -0.6, -1.6]
    found = [alarm(*simulated(run, gold, RISING, normal)) for run in range(60)]
    assert sum(when is not None for when in found) >= 57
    assert min(when for when in found if when is not None) >= 4


def test_what_is_found_is_measured_from_the_best_evaluation():
    gold = torch.tensor([0.0, 3.0, 1.0]).unsqueeze(1) + torch.linspace(-1, 1, 10) * torch.tensor([[1.0], [1.0], [1.1]])
    proxy = torch.tensor([0.0, 1.0, 5.0]).unsqueeze(1) + torch.linspace(-1, 1, 10) * torch.tensor([[1.0], [1.0], [1.1]])
    found = overoptimization(proxy, gold)
    assert found.best == 1
    assert found.proxy_rise == pytest.approx(4.0) and found.gold_fall == pytest.approx(2.0)
    assert min(found.proxy_z, found.gold_z) > found.bound
    # the second comparison: 0.05 / (2 * 3), shared by the two evaluations before
    assert 0.5 * math.erfc(found.bound / math.sqrt(2)) == pytest.approx(0.05 / 6 / 2)
    assert overoptimization(proxy[:2], gold[:2]) is None and overoptimization(proxy[:1], gold[:1]) is None


def test_prompts_without_a_score_are_left_out_and_a_few_tell_nothing():
    proxy, gold = simulated(0, [0.0, -9.0], [0.0, 9.0], normal)
    missing = torch.arange(N) < 10
    holes = gold.masked_fill(torch.stack([missing, missing.roll(5)]), math.nan)
    found = overoptimization(proxy, holes)
    kept = ~(missing | missing.roll(5))
    assert found.gold_fall == pytest.approx(float((gold[0] - gold[1])[kept].double().mean()))
    assert overoptimization(proxy[:, : MIN_PROMPTS - 1], gold[:, : MIN_PROMPTS - 1]) is None
    assert overoptimization(proxy[:, :MIN_PROMPTS], gold[:, :MIN_PROMPTS]) is not None
    assert overoptimization(proxy, torch.full_like(gold, math.nan)) is None


@pytest.mark.parametrize(
    "freedom, statistic, tail",
    # of Student's distribution, from tables: P(T > t)
    [(7, 1.895, 0.05), (7, 4.785, 0.001), (31, 2.453, 0.01), (31, 3.375, 0.001), (7, -1.895, 0.95)],
)
def test_standard_scores_have_the_tail_of_student_s_distribution(freedom, statistic, tail):
    rows = torch.linspace(-1, 1, freedom + 1, dtype=torch.float64)
    rows = rows / rows.std() + statistic / math.sqrt(freedom + 1)
    assert 0.5 * math.erfc(standard_score(rows) / math.sqrt(2)) == pytest.approx(tail, rel=0.05)


def test_differences_that_are_all_the_same():
    assert standard_score(torch.zeros(9)) == 0.0
    assert standard_score(torch.full((9,), 2.0)) == math.inf and standard_score(torch.full((9,), -2.0)) == -math.inf
