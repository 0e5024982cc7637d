"""KTO, SimPO and ORPO: their papers' formulas as loops over responses and tokens, hand values, gradients, mutants."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.algorithms.preferences import kto_baseline, kto_loss, orpo_loss, simpo_loss

LN2 = math.log(2)
# What a policy and a reference give each token of some responses, in probabilities.
POLICY = [[0.5, 0.9], [0.3], [0.8, 0.2, 0.6], [0.1, 0.7], [0.95, 0.9, 0.85, 0.99]]
REFERENCE = [[0.4, 0.8], [0.6], [0.5, 0.5, 0.5], [0.2, 0.2], [0.9, 0.9, 0.9, 0.9]]
OTHERS = [[0.2, 0.6], [0.9], [0.7, 0.4, 0.1], [0.3, 0.8], [0.5, 0.5, 0.6, 0.6]]
DESIRABLE = [True, False, False, True, False]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def sums(rows):
    return torch.tensor([sum(map(math.log, row)) for row in rows], dtype=torch.float64)


def means(rows):
    return torch.tensor([sum(map(math.log, row)) / len(row) for row in rows], dtype=torch.float64)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def numeric_gradient(function, x, step=1e-6):
    """By central differences."""
    result = torch.zeros_like(x)
    for index in range(len(x)):
        shift = torch.zeros_like(x)
        shift[index] = step
        result[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return result


def check_baseline(kto_baseline):
    """Ethayarajh et al. 2024, section 4.1: the mean log-ratio of responses to other prompts, never below 0."""
    for policy, reference in ((OTHERS, POLICY), (POLICY, OTHERS)):
        total = 0.0
        for ours, theirs in zip(policy, reference, strict=True):
            for probability, ref_probability in zip(ours, theirs, strict=True):
                total += math.log(probability / ref_probability)
        logprobs = sums(policy).requires_grad_()
        baseline = kto_baseline(logprobs, sums(reference))
        assert baseline.item() == pytest.approx(max(0.0, total / len(policy)), abs=1e-12)
        assert not baseline.requires_grad
    assert total > 0  # the estimate the other way round was below


def not_clamped(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).mean().detach()


def not_detached(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).mean().clamp(min=0)


def each_clamped(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).clamp(min=0).mean().detach()


def summed(logprobs, ref_logprobs):
    return kto_baseline(logprobs, ref_logprobs) * len(logprobs)


def of_the_reference(logprobs, ref_logprobs):
    return kto_baseline(ref_logprobs, logprobs)


def test_the_baseline_of_kto_by_its_definition():
    check_baseline(kto_baseline)


@pytest.mark.parametrize(
    "mutant", [not_clamped, not_detached, each_clamped, summed, of_the_reference], ids=lambda f: f.__name__
)
def test_the_baseline_of_kto_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_baseline(mutant)


def kto_by_definition(beta, z_0, weights, denominator):
    """The value function, a loop over responses; and each reward."""
    total, rewards = 0.0, []
    for ours, theirs, is_desirable in zip(POLICY, REFERENCE, DESIRABLE, strict=True):
        reward = 0.0
        for probability, ref_probability in zip(ours, theirs, strict=True):
            reward += math.log(probability / ref_probability)
        if is_desirable:
            total += weights[0] - weights[0] * sigmoid(beta * (reward - z_0))
        else:
            total += weights[1] - weights[1] * sigmoid(beta * (z_0 - reward))
        rewards.append(beta * reward)
    return total / denominator, rewards


def check_kto(kto_loss):
    desirable, weights = torch.tensor(DESIRABLE), {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    for z_0, denominator in ((0.0, None), (0.4, None), (0.4, 8)):
        logprobs = sums(POLICY).requires_grad_()
        baseline = torch.tensor(z_0, dtype=torch.float64, requires_grad=True)
        got = kto_loss(
            logprobs, sums(REFERENCE), desirable, baseline=baseline, beta=0.5, **weights, denominator=denominator
        )
        loss, rewards = kto_by_definition(0.5, z_0, (1.3, 0.7), denominator or len(POLICY))
        assert got.loss.item() == pytest.approx(loss, abs=1e-12)
        assert got.rewards.tolist() == pytest.approx(rewards, abs=1e-12)
        assert not got.rewards.requires_grad
        # d/dr of weight * sigmoid(-margin): towards the desirable, away from the others
        slopes = []
        for reward, is_desirable in zip(rewards, DESIRABLE, strict=True):
            right = sigmoid(reward - 0.5 * z_0)
            slopes.append((-1.3 if is_desirable else 0.7) * 0.5 * right * (1 - right) / (denominator or len(POLICY)))
        (followed,) = gradients(got.loss, logprobs)
        assert followed.tolist() == pytest.approx(slopes, abs=1e-12)
        assert baseline.grad is None


def labels_swapped(logprobs, ref_logprobs, desirable, **options):
    return kto_loss(logprobs, ref_logprobs, ~desirable, **options)


def weights_swapped(*tensors, desirable_weight, undesirable_weight, **options):
    return kto_loss(*tensors, desirable_weight=undesirable_weight, undesirable_weight=desirable_weight, **options)


def weights_ignored(*tensors, desirable_weight, undesirable_weight, **options):
    return kto_loss(*tensors, **options)


def no_reference(logprobs, ref_logprobs, desirable, **options):
    return kto_loss(logprobs, torch.zeros_like(logprobs), desirable, **options)


def no_baseline(*tensors, baseline, **options):
    return kto_loss(*tensors, baseline=torch.zeros_like(baseline), **options)


def baseline_added(*tensors, baseline, **options):
    return kto_loss(*tensors, baseline=-baseline, **options)


def baseline_outside_beta(*tensors, baseline, beta, **options):
    return kto_loss(*tensors, baseline=baseline / beta, beta=beta, **options)


def a_sum(*tensors, denominator, **options):
    return kto_loss(*tensors, denominator=1, **options)


def test_kto_by_its_definition():
    check_kto(kto_loss)


@pytest.mark.parametrize(
    "mutant",
    [
        labels_swapped,
        weights_swapped,
        weights_ignored,
        no_reference,
        no_baseline,
        baseline_added,
        baseline_outside_beta,
        a_sum,
    ],
    ids=lambda f: f.__name__,
)
def test_kto_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_kto(mutant)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5)])
def test_at_the_reference_kto_costs_half_of_the_weights(weights):
    reference, desirable = torch.randn(4, dtype=torch.float64), torch.tensor([True, True, True, False])
    options = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    loss = kto_loss(reference, reference, desirable, baseline=torch.tensor(0.0), beta=0.1, **options).loss
    assert loss.item() == pytest.approx((3 * weights[0] + weights[1]) / 8, abs=1e-12)


def test_the_baseline_of_kto_gets_no_gradient():
    baseline = torch.tensor(0.5, requires_grad=True)
    logprobs = torch.randn(3, requires_grad=True)
    loss = kto_loss(logprobs, torch.zeros(3), torch.tensor([True, False, True]), baseline=baseline, beta=0.3).loss
    assert torch.autograd.grad(loss, (logprobs, baseline), allow_unused=True)[1] is None


def simpo_by_definition(beta, gamma, denominator):
    """Meng et al. 2024, equations 4 and 6, over pairs of neighbours; and the rewards of both sides."""
    total, rewards = 0.0, ([], [])
    for chosen, rejected in pairwise(POLICY):
        for side, row in enumerate((chosen, rejected)):
            reward = 0.0
            for probability in row:
                reward += beta / len(row) * math.log(probability)
            rewards[side].append(reward)
        total -= math.log(sigmoid(rewards[0][-1] - rewards[1][-1] - gamma))
    return total / denominator, rewards


def check_simpo(simpo_loss, means=means):
    for denominator in (None, 9):
        chosen, rejected = means(POLICY[:-1]).requires_grad_(), means(POLICY[1:]).requires_grad_()
        got = simpo_loss(chosen, rejected, beta=2.5, gamma=0.6, denominator=denominator)
        loss, rewards = simpo_by_definition(2.5, 0.6, denominator or 4)
        assert got.loss.item() == pytest.approx(loss, abs=1e-12)
        assert got.chosen_rewards.tolist() == pytest.approx(rewards[0], abs=1e-12)
        assert got.rejected_rewards.tolist() == pytest.approx(rewards[1], abs=1e-12)
        assert not got.chosen_rewards.requires_grad and not got.rejected_rewards.requires_grad
        slopes = [
            -2.5 * sigmoid(worse - better + 0.6) / (denominator or 4) for better, worse in zip(*rewards, strict=True)
        ]
        towards, away = gradients(got.loss, chosen, rejected)
        assert towards.tolist() == pytest.approx(slopes, abs=1e-12)
        assert away.tolist() == pytest.approx([-slope for slope in slopes], abs=1e-12)


SIMPO_MUTANTS = {
    "labels swapped": lambda chosen, rejected, **o: simpo_loss(rejected, chosen, **o),
    "no margin": lambda *sides, gamma, **o: simpo_loss(*sides, gamma=0.0, **o),
    "margin taken off": lambda *sides, gamma, **o: simpo_loss(*sides, gamma=-gamma, **o),
    "margin times beta": lambda *sides, gamma, beta, **o: simpo_loss(*sides, gamma=gamma * beta, beta=beta, **o),
    "no beta": lambda *sides, beta, **o: simpo_loss(*sides, beta=1.0, **o),
    "a sum": lambda *sides, denominator, **o: simpo_loss(*sides, denominator=1, **o),
    "a mean whatever the denominator": lambda *sides, denominator, **o: simpo_loss(*sides, **o),
    "no gradient to the rejected": lambda chosen, rejected, **o: simpo_loss(chosen, rejected.detach() + 0 * rejected,
                                                                            **o),
}  # fmt: skip


def test_simpo_by_its_definition():
    check_simpo(simpo_loss)
    with pytest.raises(AssertionError):  # it is the length-normalised reward that the paper is about
        check_simpo(simpo_loss, means=sums)


@pytest.mark.parametrize("mutant", SIMPO_MUTANTS.values(), ids=SIMPO_MUTANTS)
def test_simpo_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_simpo(mutant)


@given(st.floats(0, 3), st.floats(-4, 0))
def test_of_equal_responses_simpo_costs_its_margin(gamma, logprob):
    same = torch.tensor([logprob], dtype=torch.float64)
    assert simpo_loss(same, same, beta=2.0, gamma=gamma).loss.item() == pytest.approx(math.log1p(math.exp(gamma)))


def orpo_by_definition(beta, denominator):
    """Hong et al. 2024, equations 3 to 7: probabilities per token, odds, their ratio, and the likelihood."""
    total, log_odds = 0.0, ([], [])
    for chosen, rejected in pairwise(POLICY):
        odds = []
        for side, row in enumerate((chosen, rejected)):
            probability = 1.0
            for one in row:
                probability *= one ** (1 / len(row))
            odds.append(probability / (1 - probability))
            log_odds[side].append(math.log(odds[side]))
        likelihood = 0.0
        for one in chosen:
            likelihood += math.log(one) / len(chosen)
        total += -likelihood - beta * math.log(sigmoid(math.log(odds[0] / odds[1])))
    return total / denominator, log_odds


def check_orpo(orpo_loss, means=means):
    for denominator in (None, 9):
        chosen, rejected = means(POLICY[:-1]).requires_grad_(), means(POLICY[1:]).requires_grad_()
        got = orpo_loss(chosen, rejected, beta=0.3, denominator=denominator)
        loss, log_odds = orpo_by_definition(0.3, denominator or 4)
        assert got.loss.item() == pytest.approx(loss, abs=1e-12)
        assert got.chosen_rewards.tolist() == pytest.approx(log_odds[0], abs=1e-12)
        assert got.rejected_rewards.tolist() == pytest.approx(log_odds[1], abs=1e-12)
        assert not got.chosen_rewards.requires_grad and not got.rejected_rewards.requires_grad
        # d log odds / d log p is 1 / (1 - p)
        towards, away = [], []
        for better, worse in zip(*log_odds, strict=True):
            pull = 0.3 * sigmoid(worse - better)
            towards.append((-1 - pull * (1 + math.exp(better))) / (denominator or 4))
            away.append(pull * (1 + math.exp(worse)) / (denominator or 4))
        followed = gradients(got.loss, chosen, rejected)
        assert followed[0].tolist() == pytest.approx(towards, abs=1e-12)
        assert followed[1].tolist() == pytest.approx(away, abs=1e-12)


def nll(side):
    return -side.sum()


ORPO_MUTANTS = {
    "labels swapped": lambda chosen, rejected, **o: orpo_loss(rejected, chosen, **o),
    "no likelihood": lambda chosen, rejected, *, denominator, **o: (
        lambda r: r._replace(loss=r.loss - nll(chosen) / (denominator or len(chosen)))
    )(orpo_loss(chosen, rejected, denominator=denominator, **o)),
    "beta over the likelihood too": lambda chosen, rejected, *, denominator, beta, **o: (
        lambda r: r._replace(loss=r.loss - (1 - beta) * nll(chosen) / (denominator or len(chosen)))
    )(orpo_loss(chosen, rejected, denominator=denominator, beta=beta, **o)),
    "beta inside": lambda chosen, rejected, *, beta, **o: orpo_loss(beta * chosen, beta * rejected, beta=beta, **o),
    "twice beta": lambda *sides, beta, **o: orpo_loss(*sides, beta=2 * beta, **o),
    "a sum": lambda *sides, denominator, **o: orpo_loss(*sides, denominator=1, **o),
    "probabilities for odds": lambda chosen, rejected, *, beta, denominator, **o: (
        lambda r: r._replace(
            loss=(-chosen - beta * torch.nn.functional.logsigmoid(chosen - rejected)).sum() / (denominator or 4)
        )
    )(orpo_loss(chosen, rejected, beta=beta)),
}


def test_orpo_by_its_definition():
    check_orpo(orpo_loss)
    with pytest.raises(AssertionError):
        check_orpo(orpo_loss, means=sums)


@pytest.mark.parametrize("mutant", ORPO_MUTANTS.values(), ids=ORPO_MUTANTS)
def test_orpo_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_orpo(mutant)


def test_of_equal_responses_orpo_costs_their_likelihood_and_beta_times_ln_2():
    same = torch.tensor([-0.7, -2.0], dtype=torch.float64)
    assert orpo_loss(same, same, beta=0.1).loss.item() == pytest.approx(1.35 + 0.1 * LN2, abs=1e-12)
    # by hand: odds of a half are 1, those of a quarter 1/3
    half, quarter = torch.tensor([[math.log(0.5)], [math.log(0.25)]], dtype=torch.float64)
    assert orpo_loss(half, quarter, beta=1.0).loss.item() == pytest.approx(LN2 + math.log(4 / 3), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_is_finite_where_a_response_is_certain_or_hopeless(dtype):
    chosen = torch.tensor([0.0, -1e-9, -200.0, -1e-4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-200.0, -1e-9, 0.0, -90.0], dtype=dtype, requires_grad=True)
    loss = orpo_loss(chosen, rejected, beta=0.1).loss
    assert loss.isfinite() and all(side.isfinite().all() for side in gradients(loss, chosen, rejected))


def test_slopes_are_those_of_differences():
    chosen, rejected = means(POLICY[:-1]), means(POLICY[1:])
    for loss in (
        lambda c, r: orpo_loss(c, r, beta=0.4).loss,
        lambda c, r: simpo_loss(c, r, beta=2.0, gamma=1.0).loss,
        lambda c, r: (
            kto_loss(c, r.detach(), torch.tensor([1, 0, 0, 1]).bool(), baseline=torch.tensor(0.1), beta=2).loss
        ),
    ):
        x = chosen.clone().requires_grad_()
        (followed,) = gradients(loss(x, rejected), x)
        torch.testing.assert_close(
            followed, numeric_gradient(lambda c, f=loss: f(c, rejected), chosen), rtol=0, atol=1e-8
        )


def test_parts_of_a_step_add_up():
    chosen, rejected, desirable = *torch.randn(2, 6, dtype=torch.float64).neg().exp().neg(), torch.rand(6) < 0.5
    baseline = torch.tensor(0.3)
    for loss in (
        lambda rows, n: kto_loss(
            chosen[rows], rejected[rows], desirable[rows], baseline=baseline, beta=1, denominator=n
        ),
        lambda rows, n: simpo_loss(chosen[rows], rejected[rows], beta=2, gamma=1, denominator=n),
        lambda rows, n: orpo_loss(chosen[rows], rejected[rows], beta=0.2, denominator=n),
    ):
        whole = loss(slice(None), None).loss
        parts = loss(slice(0, 1), 6).loss + loss(slice(1, 4), 6).loss + loss(slice(4, 6), 6).loss
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_what_has_no_meaning_is_refused():
    pair, label = torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool)
    for call in (
        lambda: kto_loss(*pair, label, baseline=torch.tensor(0.0), beta=0),
        lambda: kto_loss(*pair, label.long(), baseline=torch.tensor(0.0), beta=1),
        lambda: kto_loss(*pair, label, baseline=torch.zeros(3), beta=1),
        lambda: simpo_loss(*pair, beta=0, gamma=1),
        lambda: orpo_loss(*pair, beta=0),
        lambda: orpo_loss(*pair, beta=-1),
        lambda: kto_loss(*pair, label[:1], baseline=torch.tensor(0.0), beta=1),
        lambda: kto_baseline(pair, pair[0]),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_low_precision_is_widened():
    chosen, rejected = -torch.rand(2, 4).bfloat16()
    label = torch.tensor([True, False, True, True])
    assert orpo_loss(chosen, rejected, beta=0.1).loss.dtype == torch.float32
    assert simpo_loss(chosen, rejected, beta=0.1, gamma=1).loss.dtype == torch.float32
    assert kto_baseline(chosen, rejected).dtype == torch.float32
    assert kto_loss(chosen, rejected, label, baseline=torch.tensor(0.0), beta=1).loss.dtype == torch.float32
