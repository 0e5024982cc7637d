"""Generalised advantage estimation: by hand, against its definition, and with pads anywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.algorithms.advantages import GAE, gae, whiten


def reward_one_place_late(rewards, values, action_mask, **discounts):
    late = torch.cat((torch.zeros_like(rewards[:, :1]), rewards[:, :-1]), dim=-1)
    return gae(late, values, action_mask, **discounts)


def bootstrap_at_the_end(rewards, values, action_mask, *, gamma, gae_lambda):
    last = action_mask & (action_mask.flip(-1).cumsum(dim=-1).flip(-1) == 1)
    return gae(rewards + gamma * values * last, values, action_mask, gamma=gamma, gae_lambda=gae_lambda)


def returns_from_whitened_advantages(rewards, values, action_mask, **discounts):
    advantages = gae(rewards, values, action_mask, **discounts).advantages
    return GAE(advantages, whiten(advantages, action_mask) + values)


def gamma_forgotten_beside_lambda(rewards, values, action_mask, *, gamma, gae_lambda):
    return gae(rewards, values, action_mask, gamma=gamma, gae_lambda=gae_lambda / gamma)


def pads_stand_in_the_way(rewards, values, action_mask, **discounts):
    rewards, values = rewards.nan_to_num() * action_mask, values.nan_to_num() * action_mask
    result = gae(rewards, values, torch.ones_like(action_mask), **discounts)
    return GAE(result.advantages * action_mask, result.returns * action_mask)


def check_table(gae):
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.2]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    for gae_lambda, expected in ((0.95, (0.432, 0.56, 0.8)), (1, (0.5, 0.6, 0.8)), (0, (-0.1, -0.2, 0.8))):
        got = gae(rewards, values, mask, gamma=1, gae_lambda=gae_lambda)
        torch.testing.assert_close(got.advantages, torch.tensor([expected]), rtol=0, atol=1e-6)
        torch.testing.assert_close(got.returns, torch.tensor([expected]) + values, rtol=0, atol=1e-6)


def check_ragged_rows(gae):
    """gamma and lambda 1/2; the errors are (.5, 1.5, 2) and (-1.5, 3)."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 9.0]])
    values = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    got = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    torch.testing.assert_close(got.advantages, torch.tensor([[1.0, 2.0, 2.0], [-0.75, 3.0, 0.0]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.returns, torch.tensor([[2.0, 3.0, 3.0], [1.25, 4.0, 0.0]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("check", [check_table, check_ragged_rows])
def test_by_hand(check):
    check(gae)


@pytest.mark.parametrize("check", [check_table, check_ragged_rows])
@pytest.mark.parametrize(
    "mutant", [reward_one_place_late, bootstrap_at_the_end, returns_from_whitened_advantages], ids=lambda f: f.__name__
)
def test_by_hand_sees_the_mutant(check, mutant):
    with pytest.raises(AssertionError):
        check(mutant)


def test_the_row_with_a_discount_sees_it_forgotten():
    with pytest.raises(AssertionError):
        check_ragged_rows(gamma_forgotten_beside_lambda)


def definition(rewards, values, *, gamma, gae_lambda):
    """Each advantage as its own sum over all later errors; a value of 0 after the last."""
    after = [*values, 0.0][1:]
    deltas = [reward + gamma * later - value for reward, later, value in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * gae_lambda) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def check_definition(gae, mask, discounts):
    """Pads hold NaN; the actions between them are one row of the definition."""
    mask = torch.tensor(mask)
    rewards, values = torch.randn(2, *mask.shape, dtype=torch.float64).masked_fill(~mask, torch.nan)
    advantages, returns = gae(rewards, values, mask, **discounts)
    assert not advantages[~mask].any() and not returns[~mask].any()
    for row, is_action in enumerate(mask):
        kept_values = values[row, is_action]
        expected = definition(rewards[row, is_action].tolist(), kept_values.tolist(), **discounts)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(advantages[row, is_action], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(returns[row, is_action], expected + kept_values, rtol=0, atol=1e-12)


SHARES = st.sampled_from([0.0, 0.3, 0.95, 1.0])
MASKS = st.integers(1, 9).flatmap(lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=1))


@settings(max_examples=60)
@given(MASKS, st.fixed_dictionaries({"gamma": SHARES, "gae_lambda": SHARES}))
def test_it_is_its_definition_with_pads_anywhere(mask, discounts):
    check_definition(gae, mask, discounts)


@pytest.mark.parametrize("mutant", [pads_stand_in_the_way, reward_one_place_late], ids=lambda f: f.__name__)
def test_the_definition_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_definition(mutant, [[True, False, True, True]], {"gamma": 0.9, "gae_lambda": 0.9})


def test_true_values_leave_no_advantage():
    """Where every value is the discounted sum to come, nothing is better or worse than expected."""
    rewards = torch.randn(2, 6, dtype=torch.float64)
    values = rewards.clone()
    for t in reversed(range(5)):
        values[:, t] += 0.9 * values[:, t + 1]
    advantages, returns = gae(rewards, values, torch.ones(2, 6, dtype=torch.bool), gamma=0.9, gae_lambda=0.7)
    torch.testing.assert_close(advantages, torch.zeros_like(rewards), rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, values, rtol=0, atol=1e-12)


def test_targets_have_no_gradient_and_low_precision_is_widened():
    values = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    result = gae(torch.zeros(2, 3), values, torch.ones(2, 3, dtype=torch.bool), gamma=1, gae_lambda=0.95)
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in result)


def test_shapes_that_would_be_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"'values': \(2, 1\).*expected one shape"):
        gae(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool), gamma=1.0, gae_lambda=1.0)
