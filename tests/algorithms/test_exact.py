"""Expected gradients, summed over every sequence of a tiny vocabulary, are those of what is maximised.

A tabular policy has logits for each prefix; its rewards, advantages and loss come from the formulas of training, with
NaN at the pads. Each mutant is a mistake that a rising reward does not show.
"""

from itertools import product

import pytest
import torch

from palm_rlhf.algorithms.advantages import gae, token_rewards
from palm_rlhf.algorithms.losses import policy_loss

V, T, TEMPERATURE = 4, 3, 0.7
NUM_PREFIXES = sum(V**t for t in range(T))


class World:
    """Every sequence of T tokens, or up to an end-of-sequence token; a policy, a reference and scores."""

    def __init__(self, eos):
        cut = {row[: row.index(eos) + 1] if eos in row else row for row in product(range(V), repeat=T)}
        rows = sorted(cut, key=lambda row: (len(row), row))
        self.actions = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows])
        self.mask = torch.arange(T) < torch.tensor([[len(row)] for row in rows])
        number_of_prefix = {
            row: i for i, row in enumerate(row for t in range(T) for row in product(range(V), repeat=t))
        }
        self.prefixes = torch.tensor(
            [[number_of_prefix[tuple(row[:t])] for t in range(T)] for row in self.actions.tolist()]
        )
        self.policy, self.reference = torch.randn(2, NUM_PREFIXES, V, dtype=torch.float64)
        self.policy.requires_grad_()
        self.scores = torch.randn(len(rows), dtype=torch.float64)

    def logprobs(self, table, temperature=TEMPERATURE):
        logprobs = (table / temperature).log_softmax(dim=-1)[self.prefixes, self.actions]
        return logprobs.masked_fill(~self.mask, torch.nan)

    def sequence_logprobs(self, table):
        return self.logprobs(table).nan_to_num().sum(dim=-1)

    @property
    def objective(self):
        """The expected score, to be maximised."""
        return (self.sequence_logprobs(self.policy).exp() * self.scores).sum()

    @property
    def divergence(self):
        logprobs, ref_logprobs = map(self.sequence_logprobs, (self.policy, self.reference))
        return (logprobs.exp() * (logprobs - ref_logprobs)).sum()

    def gradient(self, x):
        return torch.autograd.grad(x, self.policy)[0]


@pytest.fixture(params=[None, 3], ids=["fixed length", "eos"])
def world(request):
    world = World(eos=request.param)
    total = world.sequence_logprobs(world.policy).exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    return world


def ppo_gradient(
    world, *, scores, kl_coef, rewards_of=token_rewards, logprobs_of=World.logprobs, values=None, gae_lambda=1
):
    """The descent of the expected loss at ratio 1; the probability of each sequence weighs its advantages."""
    logprobs = logprobs_of(world, world.policy)
    old_logprobs, ref_logprobs = logprobs.detach(), logprobs_of(world, world.reference)
    rewards = rewards_of(scores, old_logprobs, ref_logprobs, world.mask, kl_coef=kl_coef)
    values = torch.zeros_like(rewards) if values is None else values
    advantages = gae(rewards, values, world.mask, gamma=1, gae_lambda=gae_lambda).advantages
    weights = world.sequence_logprobs(world.policy).detach().exp().unsqueeze(-1)
    loss = policy_loss(logprobs, old_logprobs, weights * advantages, world.mask, clip_eps=0.2, denominator=1).loss
    return -world.gradient(loss)


def check_score(world, **mutation):
    got = ppo_gradient(world, scores=world.scores, kl_coef=0, **mutation)
    torch.testing.assert_close(got, world.gradient(world.objective), rtol=0, atol=1e-12)


def check_kl(world, **mutation):
    got = ppo_gradient(world, scores=torch.zeros_like(world.scores), kl_coef=1, **mutation)
    torch.testing.assert_close(got, -world.gradient(world.divergence), rtol=0, atol=1e-12)


def kl_sign_flipped(scores, logprobs, ref_logprobs, action_mask, *, kl_coef):
    return token_rewards(scores, ref_logprobs, logprobs, action_mask, kl_coef=kl_coef)


def reference_aliased_to_policy(scores, logprobs, ref_logprobs, action_mask, *, kl_coef):
    return token_rewards(scores, logprobs, logprobs, action_mask, kl_coef=kl_coef)


def reference_one_place_off(scores, logprobs, ref_logprobs, action_mask, *, kl_coef):
    return token_rewards(scores, logprobs, ref_logprobs.roll(1, dims=-1), action_mask, kl_coef=kl_coef)


def reward_one_place_late(*tensors, kl_coef):
    rewards = token_rewards(*tensors, kl_coef=kl_coef)
    return torch.cat((torch.zeros_like(rewards[:, :1]), rewards[:, :-1]), dim=-1)


def reward_without_its_last_action(*tensors, kl_coef):
    rewards, mask = token_rewards(*tensors, kl_coef=kl_coef), tensors[-1]
    return rewards * torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), dim=-1)


def off_by_one(world, table):
    logprobs = (table / TEMPERATURE).log_softmax(dim=-1)[world.prefixes.roll(-1, dims=-1), world.actions]
    return logprobs.masked_fill(~world.mask, torch.nan)


def temperature_forgotten(world, table):
    return world.logprobs(table, temperature=1.0)


MUTATIONS = {
    "kl": [
        {"rewards_of": kl_sign_flipped},
        {"rewards_of": reference_aliased_to_policy},
        {"rewards_of": reference_one_place_off},
    ],
    "score": [{"rewards_of": reward_one_place_late}, {"rewards_of": reward_without_its_last_action}],
    "either": [{"logprobs_of": off_by_one}, {"logprobs_of": temperature_forgotten}],
}


def name_of(mutation):
    return next(iter(mutation.values())).__name__


def test_expected_gradient_is_that_of_the_expected_score(world):
    check_score(world)


def test_expected_penalty_is_the_gradient_of_the_kl(world):
    check_kl(world)


@pytest.mark.parametrize("mutation", MUTATIONS["score"] + MUTATIONS["either"], ids=name_of)
def test_expected_gradient_sees_the_mutant(world, mutation):
    with pytest.raises(AssertionError):
        check_score(world, **mutation)


@pytest.mark.parametrize("mutation", MUTATIONS["kl"] + MUTATIONS["score"] + MUTATIONS["either"], ids=name_of)
def test_expected_penalty_sees_the_mutant(world, mutation):
    with pytest.raises(AssertionError):
        check_kl(world, **mutation)


def test_score_and_penalty_add_up(world):
    got = ppo_gradient(world, scores=world.scores, kl_coef=0.3)
    expected = world.gradient(world.objective - 0.3 * world.divergence)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_any_value_of_a_prefix_leaves_the_expected_gradient(world):
    check_score(world, values=torch.randn(NUM_PREFIXES, dtype=torch.float64)[world.prefixes])


@pytest.mark.parametrize("gae_lambda", [0, 0.6])
def test_true_values_make_every_lambda_exact(world, gae_lambda):
    """The value of a prefix is the mean score of the sequences that go on from it."""
    probs = world.sequence_logprobs(world.policy).detach().exp().unsqueeze(-1).expand_as(world.mask) * world.mask
    mass, total = torch.zeros(2, NUM_PREFIXES, dtype=torch.float64)
    mass.index_put_((world.prefixes,), probs, accumulate=True)
    total.index_put_((world.prefixes,), probs * world.scores.unsqueeze(-1), accumulate=True)
    values = (total / mass)[world.prefixes]
    check_score(world, values=values, gae_lambda=gae_lambda)
    with pytest.raises(AssertionError):
        check_score(world, values=values + world.prefixes, gae_lambda=gae_lambda)
