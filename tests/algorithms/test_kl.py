"""Estimates of the KL divergence, by summing over a vocabulary, and the controller of its coefficient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.algorithms.kl import adapt_kl_coef, kl_estimate


@pytest.fixture
def policy():
    return torch.randn(6, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def ref_logprobs():
    return torch.randn(6, dtype=torch.float64).log_softmax(dim=-1)


def divergence(logprobs, ref_logprobs):
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum()


def mean_estimate(kl_estimate, policy, ref_logprobs, kind):
    """The expectation under the policy, whose draws depend on it but have no gradient."""
    logprobs = policy.log_softmax(dim=-1)
    return (logprobs.detach().exp() * kl_estimate(logprobs[None], ref_logprobs[None], kind=kind)[0]).sum()


def check_unbiased(kl_estimate, policy, ref_logprobs, kind):
    expected = divergence(policy.log_softmax(dim=-1), ref_logprobs)
    got = mean_estimate(kl_estimate, policy, ref_logprobs, kind)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def check_gradient(kl_estimate, policy, ref_logprobs, kind):
    """Of k1 nothing, of k2 that of KL(policy, reference), of k3 that of KL(reference, policy)."""
    logprobs = policy.log_softmax(dim=-1)
    expected = {
        "k1": 0 * policy.sum(),
        "k2": divergence(logprobs, ref_logprobs),
        "k3": divergence(ref_logprobs, logprobs),
    }[kind]
    got = mean_estimate(kl_estimate, policy, ref_logprobs, kind)
    torch.testing.assert_close(*(torch.autograd.grad(x, policy)[0] for x in (got, expected)), rtol=0, atol=1e-12)


def swapped(logprobs, ref_logprobs, *, kind):
    return kl_estimate(ref_logprobs, logprobs, kind=kind)


def one_place_off(logprobs, ref_logprobs, *, kind):
    return kl_estimate(logprobs, ref_logprobs.roll(1, dims=-1), kind=kind)


def without_the_half(logprobs, ref_logprobs, *, kind):
    return kl_estimate(logprobs, ref_logprobs, kind=kind) * 2


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased(policy, ref_logprobs, kind):
    check_unbiased(kl_estimate, policy, ref_logprobs, kind)


@pytest.mark.parametrize("mutant", [swapped, one_place_off], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased_sees_the_mutant(policy, ref_logprobs, kind, mutant):
    with pytest.raises(AssertionError):
        check_unbiased(mutant, policy, ref_logprobs, kind)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_mean_gradient(policy, ref_logprobs, kind):
    check_gradient(kl_estimate, policy, ref_logprobs, kind)


@pytest.mark.parametrize("mutant", [one_place_off, without_the_half], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_mean_gradient_sees_the_mutant(policy, ref_logprobs, kind, mutant):
    with pytest.raises(AssertionError):
        check_gradient(mutant, policy, ref_logprobs, kind)


@given(st.lists(st.floats(-20, 0), min_size=1), st.floats(-5, 5))
def test_k2_and_k3_are_never_negative_and_0_at_the_reference(logprobs, shift):
    logprobs = torch.tensor([logprobs], dtype=torch.float64)
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(logprobs, logprobs, kind=kind).any()
    for kind in ("k2", "k3"):
        assert (kl_estimate(logprobs, logprobs + shift, kind=kind) >= -1e-15).all()


def test_small_differences_keep_their_digits():
    got = kl_estimate(torch.tensor([[0.001]]), torch.tensor([[0.0]]), kind="k3").item()
    assert got == pytest.approx(0.001**2 / 2 - 0.001**3 / 6, rel=1e-3)  # exp(-d) - 1 alone would lose it


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_pads_are_nothing(kind):
    logprobs, ref_logprobs = torch.randn(2, 2, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    clean = kl_estimate(logprobs, ref_logprobs, kind=kind)
    for garbage in (torch.nan, -torch.inf, 1e6):
        dirty = logprobs.masked_fill(~mask, garbage).requires_grad_()
        got = kl_estimate(dirty, ref_logprobs.masked_fill(~mask, -garbage), kind=kind, action_mask=mask)
        torch.testing.assert_close(got, clean * mask, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(got.sum(), dirty)
        assert gradient.isfinite().all() and not gradient[~mask].any()


def check_controller(adapt_kl_coef):
    for kl, error in ((6, 0.0), (6.6, 0.1), (5.4, -0.1), (600, 0.2), (0, -0.2), (-3, -0.2)):
        got = adapt_kl_coef(0.2, kl, target=6, horizon=10_000, num_samples=64)
        assert got == pytest.approx(0.2 * (1 + error * 64 / 10_000), abs=1e-15)


def without_the_clip(kl_coef, kl, *, target, horizon, num_samples):
    return kl_coef * (1 + (kl / target - 1) * num_samples / horizon)


def pushes_away(kl_coef, kl, *, target, **counts):
    return adapt_kl_coef(kl_coef, 2 * target - kl, target=target, **counts)


def counts_updates_not_samples(kl_coef, kl, *, num_samples, **settings):
    return adapt_kl_coef(kl_coef, kl, num_samples=1, **settings)


def test_controller_by_hand():
    check_controller(adapt_kl_coef)


@pytest.mark.parametrize(
    "mutant", [without_the_clip, pushes_away, counts_updates_not_samples], ids=lambda f: f.__name__
)
def test_controller_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_controller(mutant)


@pytest.mark.parametrize("settings", [{"target": 0}, {"horizon": 12}, {"horizon": 0}])
def test_a_controller_that_could_turn_the_sign_is_refused(settings):
    with pytest.raises(ValueError, match="expected a target above 0"):
        adapt_kl_coef(0.2, 0.0, **{"target": 6, "horizon": 10_000, "num_samples": 64, **settings})


def test_a_controller_just_within_its_range():
    """Of a horizon of 13 and 64 samples the largest fall leaves a little of the coefficient."""
    got = adapt_kl_coef(0.2, 0.0, target=0.5, horizon=13, num_samples=64)
    assert got == pytest.approx(0.2 * (1 - 0.2 * 64 / 13)) and got > 0


def test_k3_is_bounded_and_the_others_are_not():
    """39 nats would be a k3 of 8.7e16; 10 is the bound on both sides, and what lies below it is as it was."""
    d = torch.tensor([[-39.0, 39.0, -300.0, -2.0, 9.0]]).requires_grad_()
    k3 = kl_estimate(d, torch.zeros_like(d), kind="k3")
    expected = torch.tensor([[10.0, 10.0, 10.0, math.exp(2) - 3, math.exp(-9) + 8]])
    torch.testing.assert_close(k3, expected)
    (gradient,) = torch.autograd.grad(k3.sum(), d)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.0, 1 - math.exp(2), 1 - math.exp(-9)]]))
    torch.testing.assert_close(kl_estimate(d, torch.zeros_like(d), kind="k1"), d)
    torch.testing.assert_close(kl_estimate(d, torch.zeros_like(d), kind="k2"), d.square() / 2)
