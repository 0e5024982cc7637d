"""GRPO's gradient from scores to log-probabilities, beside the papers' formulas in two loops over plain numbers.

The options are those that PPOConfig has for each variant; every other variant, estimate and place of the KL is refused.
"""

import math
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch

from palm_rlhf import PPOConfig
from palm_rlhf.algorithms.advantages import group_advantages, token_rewards, varied_groups
from palm_rlhf.algorithms.kl import kl_estimate
from palm_rlhf.algorithms.losses import policy_loss, step_denominator
from palm_rlhf.ops.masked import masked_mean

VARIANTS, PLACES = ("grpo", "dr_grpo", "dapo"), ("k3", "k2", "reward")
SAMPLES, LONGEST, KL_COEF = 3, 8, 0.3
LENGTHS = (2, 4, 7, 1, 3, 6, 5, 2, 8)
SCORES = (1.0, -0.5, 3.0, 2.0, 2.0, 2.0, -1.0, 0.0, 4.0)  # the second prompt's are equal


@pytest.fixture
def batch():
    """Nine responses to three prompts: what the policy, the old one and the reference say of each token."""
    old, moved, reference = torch.randn(3, len(LENGTHS), max(LENGTHS), dtype=torch.float64)
    rows = {"logprobs": old - 2 + 0.4 * moved, "old_logprobs": old - 2, "ref_logprobs": old - 2 + 0.3 * reference}
    return SimpleNamespace(**rows)


def by_definition(batch, variant, place):
    """d loss / d log-probability of every token: Shao et al. 2024, equation 3; Liu et al. 2025; Yu et al. 2025."""
    low, high = 0.8, 1.28 if variant == "dapo" else 1.2
    totals = list(SCORES)
    if place == "reward":
        for row, length in enumerate(LENGTHS):
            totals[row] -= KL_COEF * sum(
                batch.old_logprobs[row, t].item() - batch.ref_logprobs[row, t].item() for t in range(length)
            )
    groups = [range(first, first + SAMPLES) for first in range(0, len(SCORES), SAMPLES)]
    counted = [row for group in groups for row in group if variant != "dapo" or len({SCORES[r] for r in group}) > 1]
    gradient = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.float64)
    for group in groups:
        for row in set(group) & set(counted):
            advantage = totals[row] - mean(totals[other] for other in group)
            if variant != "dr_grpo" and advantage:
                advantage /= stdev(totals[other] for other in group)
            divisor = {
                "grpo": LENGTHS[row] * len(SCORES),
                "dr_grpo": LONGEST * len(SCORES),
                "dapo": sum(LENGTHS[other] for other in counted),
            }[variant]
            for t in range(LENGTHS[row]):
                new, old, ref = (x[row, t].item() for x in (batch.logprobs, batch.old_logprobs, batch.ref_logprobs))
                ratio = math.exp(new - old)
                clipped = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
                slope = 0.0 if clipped else -advantage * ratio
                slope += KL_COEF * {"k3": 1 - math.exp(ref - new), "k2": new - ref, "reward": 0.0}[place]
                gradient[row, t] = slope / divisor
    return gradient


def by_the_functions(batch, variant, place, *, num_parts=1, **changed):
    """The same, as a trainer calls them, the step in so many parts."""
    given = {"grpo_variant": variant, "kl_penalty": "reward" if place == "reward" else "loss"}
    estimator = {} if place == "reward" else {"kl_estimator": place}
    c = PPOConfig(
        algorithm="grpo",
        num_samples=SAMPLES,
        rollouts_per_step=len(SCORES),
        **{"kl_coef": KL_COEF, **given, **estimator, **changed},
    )
    scores, lengths = torch.tensor(SCORES, dtype=torch.float64), torch.tensor(LENGTHS).unsqueeze(-1)
    mask = torch.arange(max(LENGTHS)) < lengths
    rewards = token_rewards(
        scores, batch.old_logprobs, batch.ref_logprobs, mask, kl_coef=0.0 if c.kl_in_loss else c.kl_coef
    )
    advantages = group_advantages(rewards.sum(dim=-1), SAMPLES, scale=c.variant.advantage_scale)
    if c.variant.drops_equal_groups:
        mask = mask & varied_groups(scores, SAMPLES).unsqueeze(-1)
    advantages = advantages.unsqueeze(-1).expand(mask.shape)
    logprobs = batch.logprobs.clone().requires_grad_()
    for rows in torch.arange(len(SCORES)).chunk(num_parts):
        part = mask[rows]
        denominator = step_denominator(
            part,
            aggregation=c.variant.loss_aggregation,
            num_tokens=mask.sum(),
            num_sequences=mask.any(dim=-1).sum(),
            max_length=LONGEST,
        )
        loss = policy_loss(
            logprobs[rows],
            batch.old_logprobs[rows],
            advantages[rows],
            part,
            clip_eps=c.variant.clip_eps,
            clip_eps_high=c.variant.clip_eps_high,
            denominator=denominator,
        ).loss
        if c.kl_in_loss:
            kl = kl_estimate(logprobs[rows], batch.ref_logprobs[rows], kind=c.kl_estimator, action_mask=part)
            loss = loss + c.kl_coef * masked_mean(kl, part, denominator=denominator)
        loss.backward()
    return logprobs.grad


def check(batch, variant, place, **changed):
    expected, got = by_definition(batch, variant, place), by_the_functions(batch, variant, place, **changed)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)  # group_advantages adds 1e-8 to the variance


@pytest.mark.parametrize("num_parts", [1, 2, 9])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_the_definition(batch, variant, place, num_parts):
    check(batch, variant, place, num_parts=num_parts)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("variant", "other"), [(variant, other) for variant in VARIANTS for other in VARIANTS if variant != other]
)
def test_the_definition_sees_another_variant(batch, variant, other, place):
    with pytest.raises(AssertionError):
        check(batch, variant, place, grpo_variant=other)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "changed",
    [
        {"kl_penalty": "reward"},
        {"kl_estimator": "k2"},
        {"kl_coef": 0.2},
        {"clip_eps": 0.1},
        {"clip_eps_high": 0.1},
    ],
    ids=str,
)
def test_the_definition_sees_another_option(batch, variant, changed):
    with pytest.raises(AssertionError):
        check(batch, variant, "k3", **changed)
