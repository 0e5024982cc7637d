"""Expected gradients of GSPO, CISPO and truncated importance sampling, summed over all that a tiny policy can say.

A policy over three tokens, one of which ends a response of up to two, has seven responses and 49 groups of two. By
hand, in plain numbers, each group's gradient is weighed by its probability under the policy that drew it; the policy
that learns has moved since. The options are those that PPOConfig has for each variant.
"""

import math
from itertools import product

import pytest
import torch

from palm_rlhf import PPOConfig
from palm_rlhf.algorithms.advantages import group_advantages
from palm_rlhf.algorithms.losses import cispo_loss, policy_loss, step_denominator
from palm_rlhf.algorithms.ratios import importance_weights, log_ratio

V, EOS, T = 3, 2, 2
RESPONSES = [(EOS,), *((first, second) for first in (0, 1) for second in range(V))]
PREFIXES = [(), (0,), (1,)]
MOVES = {"gspo": 1.5e-3, "cispo": 2.0}  # of the logits since the responses were drawn: some ratios pass the bounds
BOUNDS = {"gspo": (1 - 3e-4, 1 + 4e-4), "cispo": (0.0, 5.0)}


class World:
    """Logits of each prefix, now and when the responses were drawn; a score for each response."""

    def __init__(self, move):
        self.old = torch.randn(len(PREFIXES), V, dtype=torch.float64)
        self.logits = (self.old + move * torch.randn_like(self.old)).requires_grad_()
        self.scores = dict(zip(RESPONSES, torch.randn(len(RESPONSES)).tolist(), strict=True))

    def probs(self, logits):
        """`probs[prefix][token]`, in plain numbers."""
        weights = [[math.exp(x) for x in row] for row in logits.tolist()]
        return {prefix: [w / sum(row) for w in row] for prefix, row in zip(PREFIXES, weights, strict=True)}

    def logprobs(self, logits, response):
        """`t`, NaN where there is no action."""
        said = [
            logits[PREFIXES.index(response[:t])].log_softmax(-1)[response[t]]
            if t < len(response)
            else logits.new_tensor(torch.nan)
            for t in range(T)
        ]
        return torch.stack(said)


def probability(probs, response):
    return math.prod(probs[response[:t]][token] for t, token in enumerate(response))


def by_hand(world, variant):
    """The sum over groups of probability times gradient; d log p(token) / d logit is 1 for that token, less p."""
    low, high = BOUNDS[variant]
    now, old = world.probs(world.logits.detach()), world.probs(world.old)
    gradient = torch.zeros(len(PREFIXES), V, dtype=torch.float64)
    num_clipped = num_free = 0
    for group in product(RESPONSES, repeat=2):
        drawn = math.prod(probability(old, response) for response in group)
        scores = [world.scores[response] for response in group]
        deviation = abs(scores[0] - scores[1]) / math.sqrt(2)
        for response, score in zip(group, scores, strict=True):
            if not deviation:
                continue
            advantage = (score - sum(scores) / 2) / deviation
            ratios = [now[response[:t]][token] / old[response[:t]][token] for t, token in enumerate(response)]
            for t, token in enumerate(response):
                if variant == "gspo":
                    ratio = math.prod(ratios) ** (1 / len(response))
                    clipped = ratio > high if advantage > 0 else ratio < low
                    slope = 0.0 if clipped else -advantage * ratio / len(response) / 2
                else:
                    clipped = ratios[t] > high
                    slope = -advantage * min(ratios[t], high) / sum(map(len, group))
                num_clipped, num_free = num_clipped + clipped, num_free + (not clipped)
                for other in range(V):
                    dlog = (token == other) - now[response[:t]][other]
                    gradient[PREFIXES.index(response[:t]), other] += drawn * slope * dlog
    return gradient, num_clipped, num_free


def by_the_functions(world, variant, *, loss=None, **changed):
    """The same sum, of the losses of training with the options of the config."""
    c = PPOConfig(algorithm="grpo", num_samples=2, grpo_variant=variant, **changed).variant
    loss = loss or (cispo_loss if variant == "cispo" else policy_loss)
    old, total = world.probs(world.old), 0.0
    for group in product(RESPONSES, repeat=2):
        drawn = math.prod(probability(old, response) for response in group)
        scores = torch.tensor([world.scores[response] for response in group], dtype=torch.float64)
        advantages = group_advantages(scores, 2, scale=c.advantage_scale).unsqueeze(-1).expand(-1, T)
        mask = torch.arange(T) < torch.tensor([[len(response)] for response in group])
        logprobs, old_logprobs = (
            torch.stack([world.logprobs(logits, response) for response in group])
            for logits in (world.logits, world.old)
        )
        options = {"num_tokens": mask.sum(), "num_sequences": 2, "max_length": T}
        denominator = step_denominator(mask, aggregation=c.loss_aggregation, **options)
        clip = {"clip_eps": c.clip_eps, "clip_eps_high": c.clip_eps_high, "ratio_level": c.ratio_level}
        total = total + drawn * loss(logprobs, old_logprobs, advantages, mask, denominator=denominator, **clip).loss
    return torch.autograd.grad(total, world.logits)[0]


def check(variant, **changed):
    world = World(MOVES[variant])
    (expected, *counts), got = by_hand(world, variant), by_the_functions(world, variant, **changed)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-8)  # group_advantages adds 1e-8 to the variance
    return expected, counts


@pytest.mark.parametrize("variant", MOVES)
def test_the_expected_gradient_is_that_by_hand(variant):
    gradient, (num_clipped, num_free) = check(variant)
    assert gradient.abs().max() > 1e-2 and num_clipped > 9 and num_free > 9


def weight_with_a_gradient(logprobs, old_logprobs, advantages, mask, *, clip_eps_high, denominator, **_):
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp().clamp(max=1 + clip_eps_high)
    losses = -ratio * advantages * torch.where(mask, logprobs, 0.0)
    return policy_loss(*[losses] * 3, mask, clip_eps=1)._replace(loss=(losses / denominator).sum())


def clipped_as_in_ppo(*tensors, **options):
    return policy_loss(*tensors, **options)


def pads_count_as_actions(logprobs, old_logprobs, advantages, mask, **options):
    everywhere = torch.ones_like(mask)
    return policy_loss(logprobs.nan_to_num(), old_logprobs.nan_to_num(), advantages, everywhere, **options)


@pytest.mark.parametrize(
    "variant, changed",
    [
        ("gspo", {"ratio_level": "sequence"}),
        ("gspo", {"ratio_level": "token"}),
        ("gspo", {"clip_eps": 4e-4}),
        ("gspo", {"clip_eps_high": 3e-4}),
        ("gspo", {"loss_aggregation": "token"}),
        ("gspo", {"advantage_scale": "none"}),
        ("gspo", {"loss": pads_count_as_actions}),
        ("gspo", {"loss": cispo_loss}),
        ("cispo", {"loss": weight_with_a_gradient}),
        ("cispo", {"loss": clipped_as_in_ppo}),
        ("cispo", {"clip_eps": 0.2}),
        ("cispo", {"clip_eps_high": 5.0}),
        ("cispo", {"ratio_level": "geometric"}),
        ("cispo", {"loss_aggregation": "sequence"}),
    ],
    ids=lambda x: x if isinstance(x, str) else str({key: getattr(v, "__name__", v) for key, v in x.items()}),
)
def test_the_expected_gradient_sees_the_mutant(variant, changed):
    with pytest.raises(AssertionError):
        check(variant, **changed)


def test_cispo_at_ratio_1_descends_the_expected_score():
    """Where nothing has moved, sums over actions have the gradient of the expected score itself."""
    world = World(0.0)
    probs, total = world.probs(world.old), 0.0
    for response in RESPONSES:
        logprobs = world.logprobs(world.logits, response).unsqueeze(0)
        mask = torch.arange(T).unsqueeze(0) < len(response)
        weighed = torch.full_like(logprobs.detach(), probability(probs, response) * world.scores[response])
        total = total + cispo_loss(logprobs, logprobs.detach(), weighed, mask, clip_eps=1, denominator=1).loss
    chances = [
        torch.where(torch.arange(T) < len(response), world.logprobs(world.logits, response), 0.0).sum().exp()
        for response in RESPONSES
    ]
    expected = sum(chance * world.scores[response] for chance, response in zip(chances, RESPONSES, strict=True))
    got, wanted = (torch.autograd.grad(x, world.logits)[0] for x in (-total, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def of_the_sampler(cap, *, weights_of=importance_weights):
    """Of single tokens that another distribution drew: the descent of their weighed losses; policy, sampler, scores."""
    policy = torch.randn(V, dtype=torch.float64).requires_grad_()
    sampler, scores = (policy.detach() + torch.randn(V)).log_softmax(-1), torch.randn(V, dtype=torch.float64)
    logprobs = policy.log_softmax(-1).unsqueeze(-1)
    mask = torch.ones(V, 1, dtype=torch.bool)
    weights = weights_of(logprobs.detach(), sampler.unsqueeze(-1), mask, cap=cap)
    advantages = sampler.exp().unsqueeze(-1) * scores.unsqueeze(-1) * weights
    loss = policy_loss(logprobs, logprobs.detach(), advantages, mask, clip_eps=0.2, denominator=1).loss
    return -torch.autograd.grad(loss, policy)[0], policy, sampler, scores


def test_with_importance_weights_another_sampler_has_the_policys_own_gradient():
    got, policy, _, scores = of_the_sampler(cap=1e9)
    expected = torch.autograd.grad((policy.softmax(-1) * scores).sum(), policy)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def check_truncation(**mutant):
    got, policy, sampler, scores = of_the_sampler(cap=1.25, **mutant)
    p, q = policy.detach().softmax(-1).tolist(), sampler.exp().tolist()
    assert 0 < sum(a / b > 1.25 for a, b in zip(p, q, strict=True)) < V
    expected = [
        sum(q[y] * min(p[y] / q[y], 1.25) * scores[y].item() * ((y == z) - p[z]) for y in range(V)) for z in range(V)
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def upside_down(logprobs, sampler_logprobs, mask, *, cap):
    return importance_weights(sampler_logprobs, logprobs, mask, cap=cap)


def not_truncated(logprobs, sampler_logprobs, mask, *, cap):
    return importance_weights(logprobs, sampler_logprobs, mask, cap=1e9)


def masked_beyond_the_cap(logprobs, sampler_logprobs, mask, *, cap):
    weights = importance_weights(logprobs, sampler_logprobs, mask, cap=1e9)
    return weights * (weights <= cap)


def test_importance_weights_are_truncated():
    check_truncation()


@pytest.mark.parametrize("mutant", [upside_down, not_truncated, masked_beyond_the_cap], ids=lambda f: f.__name__)
def test_truncation_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_truncation(weights_of=mutant)


def test_a_weighed_advantage_is_a_weighed_loss():
    """Of either sign of the advantage, within the clip and beyond it; pads hold NaN."""
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    logprobs, old, advantages, sampler = torch.randn(4, 4, 5, dtype=torch.float64).masked_fill(~mask, torch.nan)
    weights = importance_weights(old, sampler, mask, cap=2.0)
    assert torch.equal(weights[~mask], torch.ones(7, dtype=torch.float64)) and (weights == 2).any()
    got = policy_loss(logprobs, old, advantages * weights, mask, clip_eps=0.2).loss.item()
    total = 0.0
    for row, column in mask.nonzero().tolist():
        new, then, advantage, drawn = (x[row, column].item() for x in (logprobs, old, advantages, sampler))
        ratio = math.exp(new - then)
        loss = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
        total += min(math.exp(then - drawn), 2.0) * loss
    assert got == pytest.approx(total / 13, rel=1e-12)


def test_importance_weights_are_finite_and_their_cap_above_0():
    mask = torch.ones(1, 2, dtype=torch.bool)
    far = importance_weights(torch.tensor([[0.0, -400.0]]), torch.tensor([[-400.0, 0.0]]), mask, cap=1e30)
    torch.testing.assert_close(far, torch.tensor([[20.0, -20.0]]).exp())
    assert importance_weights(torch.zeros(1, 2), torch.zeros(1, 2), mask, cap=0.5).tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match=r"got cap=0\.0; expected a number above 0"):
        importance_weights(torch.zeros(1, 2), torch.zeros(1, 2), mask, cap=0.0)


LEVELS = ("token", "sequence", "geometric")


def check_levels(log_ratio):
    """Beside two loops over plain numbers; masks have gaps, pads hold NaN, and one row has no action."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    new, old = torch.randn(2, 4, 4, dtype=torch.float64).masked_fill(~mask, torch.nan)
    for level in LEVELS:
        expected = torch.zeros(4, 4, dtype=torch.float64)
        for row in range(4):
            moves = {t: new[row, t].item() - old[row, t].item() for t in range(4) if mask[row, t]}
            for t in range(4):
                expected[row, t] = {
                    "token": moves.get(t, 0.0),
                    "sequence": sum(moves.values()),
                    "geometric": sum(moves.values()) / max(len(moves), 1),
                }[level]
        torch.testing.assert_close(log_ratio(new, old, mask, level=level), expected, rtol=0, atol=1e-12)


def test_the_levels_of_a_ratio_by_definition():
    check_levels(log_ratio)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda new, old, mask, level: log_ratio(old, new, mask, level=level),
        lambda new, old, mask, level: log_ratio(new, old, mask, level="sequence" if level == "geometric" else level),
        lambda new, old, mask, level: log_ratio(new.nan_to_num(), old.nan_to_num(), mask | True, level=level),
    ],
    ids=["upside down", "not divided by the length", "pads are actions"],
)
def test_the_levels_see_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_levels(mutant)
