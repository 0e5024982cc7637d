"""Losses of pairs and rankings, and of DPO and IPO: hand values, what they have in common, and their optima."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.algorithms.preferences import bradley_terry_loss, dpo_loss, plackett_luce_loss, ranking_loss

NAN, LN2 = float("nan"), math.log(2)


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def nats(x):
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def check_pairs(bradley_terry_loss):
    chosen, rejected = doubles(2.0, -1.0), doubles(1.0, 1.0)
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx((nats(1) + nats(-2)) / 2)
    assert bradley_terry_loss(chosen, chosen).item() == pytest.approx(LN2, abs=1e-12)
    got = bradley_terry_loss(chosen, rejected, margin=doubles(0.5, 1.0), centering=0.1, denominator=4)
    assert got.item() == pytest.approx((nats(0.5) + nats(-3) + 0.1 * 9 + 0.1 * 0) / 4)


def chosen_and_rejected_swapped(chosen, rejected, **options):
    return bradley_terry_loss(rejected, chosen, **options)


def margin_added(chosen, rejected, *, margin=None, **options):
    return bradley_terry_loss(chosen, rejected, margin=None if margin is None else -margin, **options)


def centering_of_the_difference(chosen, rejected, *, centering=0.0, denominator=None, **options):
    penalty = centering * (chosen - rejected).square().sum() / (denominator or len(chosen))
    return bradley_terry_loss(chosen, rejected, denominator=denominator, **options) + penalty


def a_mean_in_spite_of_the_denominator(chosen, rejected, *, denominator=None, **options):
    return bradley_terry_loss(chosen, rejected, **options)


def test_pairs_by_hand():
    check_pairs(bradley_terry_loss)


@pytest.mark.parametrize(
    "mutant",
    [
        chosen_and_rejected_swapped,
        margin_added,
        centering_of_the_difference,
        a_mean_in_spite_of_the_denominator,
    ],
    ids=lambda f: f.__name__,
)
def test_pairs_see_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_pairs(mutant)


def test_far_apart_scores_have_finite_losses_and_gradients():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, -chosen.detach())
    assert loss.item() == pytest.approx(1e4)
    assert gradient(loss, chosen).tolist() == pytest.approx([0.0, -0.5])


RANKED = [[3.0, 1.0, 0.0], [2.0, NAN, 2.5], [9.0, NAN, NAN], [NAN, NAN, NAN]]
EXISTING = [[True, True, True], [True, False, True], [True, False, False], [False, False, False]]


def check_ranking(ranking_loss):
    scores, mask = doubles(*RANKED).requires_grad_(), torch.tensor(EXISTING)
    rows = (nats(2) + nats(3) + nats(1)) / 3, nats(-0.5)
    assert ranking_loss(scores, mask).item() == pytest.approx(sum(rows) / 2)
    assert ranking_loss(scores, mask, denominator=5).item() == pytest.approx(sum(rows) / 5)
    sums = (16 + 9 + 1) / 3, 4.5**2
    assert ranking_loss(scores, mask, centering=0.1).item() == pytest.approx((sum(rows) + 0.1 * sum(sums)) / 2)
    assert ranking_loss(scores[:1]).item() == pytest.approx(rows[0])
    followed = gradient(ranking_loss(scores, mask), scores)
    assert followed.isfinite().all() and not followed[~mask].any() and not followed[2].any()


def worst_first(scores, mask=None, **options):
    return ranking_loss(scores.flip(-1), None if mask is None else mask.flip(-1), **options)


def neighbours_only(scores, mask=None, **options):
    best, rest = scores[:, :-1].nan_to_num(), scores[:, 1:].nan_to_num()
    return bradley_terry_loss(best.flatten(), rest.flatten(), **options)


def a_mean_over_all_pairs(scores, mask=None, *, centering=0.0, denominator=None):
    """Long rankings weigh more than short ones."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    pairs = [
        (i, j, row) for row in range(len(scores)) for i in range(3) for j in range(i + 1, 3) if mask[row, [i, j]].all()
    ]
    best, rest, rows = torch.tensor(pairs).T
    return bradley_terry_loss(scores[rows, best], scores[rows, rest], centering=centering, denominator=denominator)


def every_row_counts(scores, mask=None, *, denominator=None, **options):
    return ranking_loss(scores, mask, denominator=len(scores) if denominator is None else denominator, **options)


def test_rankings_by_hand():
    check_ranking(ranking_loss)


@pytest.mark.parametrize(
    "mutant", [worst_first, neighbours_only, a_mean_over_all_pairs, every_row_counts], ids=lambda f: f.__name__
)
def test_rankings_see_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_ranking(mutant)


def check_probabilities(plackett_luce_loss, scores):
    """One of the orders must come about, and the first place goes by the softmax."""
    order = list(permutations(range(len(scores))))
    probabilities = doubles(*(plackett_luce_loss(scores[list(places)][None]) for places in order)).neg().exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    for first, expected in enumerate(scores.softmax(dim=-1)):
        came_first = torch.tensor([places[0] == first for places in order])
        assert probabilities[came_first].sum().item() == pytest.approx(expected.item(), abs=1e-12)


def check_likelihood(plackett_luce_loss):
    scores, mask = doubles(*RANKED).requires_grad_(), torch.tensor(EXISTING)
    first = math.log(math.exp(3) + math.exp(1) + 1) - 3 + nats(1)
    assert plackett_luce_loss(scores[:1]).item() == pytest.approx(first)
    assert plackett_luce_loss(scores, mask).item() == pytest.approx((first + nats(-0.5)) / 2)
    assert plackett_luce_loss(scores, mask, denominator=5).item() == pytest.approx((first + nats(-0.5)) / 5)
    followed = gradient(plackett_luce_loss(scores, mask), scores)
    assert followed.isfinite().all() and not followed[~mask].any()
    torch.testing.assert_close(followed.nan_to_num().sum(dim=-1), torch.zeros(4).double(), rtol=0, atol=1e-12)


def with_replacement(scores, mask=None, *, denominator=None):
    """What was drawn is not taken away."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = scores.masked_fill(~mask, -torch.inf)
    rows = (scores.logsumexp(dim=-1, keepdim=True) - scores)[mask].sum()
    return rows / (denominator or (mask.sum(dim=-1) > 1).sum())


def from_the_last_place(scores, mask=None, **options):
    return plackett_luce_loss(scores.flip(-1), None if mask is None else mask.flip(-1), **options)


def a_mean_over_places(scores, mask=None, **options):
    return plackett_luce_loss(scores, mask, **options) / scores.shape[-1]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=4))
def test_the_probabilities_of_all_orders_sum_to_one(scores):
    check_probabilities(plackett_luce_loss, doubles(*scores))


def test_likelihoods_by_hand():
    check_likelihood(plackett_luce_loss)


@pytest.mark.parametrize(
    "mutant", [with_replacement, from_the_last_place, a_mean_over_places], ids=lambda f: f.__name__
)
def test_likelihoods_see_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_likelihood(mutant)
    with pytest.raises(AssertionError):
        check_probabilities(mutant, doubles(0.3, -1.0, 2.0))


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1))
def test_of_two_completions_all_losses_are_bradley_terry(pairs):
    scores = torch.tensor(pairs, dtype=torch.float64)
    expected = bradley_terry_loss(*scores.T)
    for loss in (ranking_loss, plackett_luce_loss):
        torch.testing.assert_close(loss(scores), expected, rtol=0, atol=1e-12)
    centred = bradley_terry_loss(*scores.T, centering=0.3)
    torch.testing.assert_close(ranking_loss(scores, centering=0.3), centred, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [ranking_loss, plackett_luce_loss], ids=lambda f: f.__name__)
def test_rankings_of_nobody_cost_nothing(loss):
    scores = torch.full((2, 3), NAN, requires_grad=True)
    result = loss(scores, torch.zeros(2, 3, dtype=torch.bool))
    assert result.item() == 0 and not gradient(result, scores).any()


@pytest.mark.parametrize("loss", [ranking_loss, plackett_luce_loss], ids=lambda f: f.__name__)
def test_parts_of_a_step_add_up(loss):
    scores, mask = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4) < 0.6
    num_rows = int((mask.sum(dim=-1) > 1).sum())
    assert 2 < num_rows < 6
    parts = zip(scores.split(2), mask.split(2), strict=True)
    total = sum(loss(*part, denominator=num_rows) for part in parts)
    torch.testing.assert_close(total, loss(scores, mask), rtol=0, atol=1e-12)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 3)), min_size=1))
def test_a_row_of_weight_n_counts_as_n_rows(rows):
    scores = torch.tensor([row[:2] for row in rows], dtype=torch.float64)
    counts = torch.tensor([count for *_, count in rows])
    if not counts.any():
        return
    repeated, weights = scores.repeat_interleave(counts, dim=0), counts.double()
    for loss in (ranking_loss, plackett_luce_loss, lambda scores, **options: bradley_terry_loss(*scores.T, **options)):
        torch.testing.assert_close(loss(scores, weights=weights), loss(repeated), rtol=0, atol=1e-12)
        torch.testing.assert_close(loss(scores, weights=weights, denominator=7), loss(repeated) * len(repeated) / 7)


@pytest.mark.parametrize("loss", [ranking_loss, plackett_luce_loss], ids=lambda f: f.__name__)
def test_a_row_of_one_completion_has_no_weight(loss):
    scores, weights = doubles([1.0, 2.0, 3.0], [1.0, NAN, NAN]), doubles(0.5, 4.0)
    mask = torch.tensor([[True] * 3, [True, False, False]])
    torch.testing.assert_close(loss(scores, mask, weights=weights), loss(scores[:1]), rtol=0, atol=1e-12)


def check_dpo(dpo_loss):
    chosen, rejected = doubles(-1.0, -4.0).requires_grad_(), doubles(-2.0, -3.0).requires_grad_()
    ref_chosen, ref_rejected = doubles(-1.5, -2.0), doubles(-1.0, -6.0)
    result = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.4)
    margins = 0.4 * (0.5 + 1.0), 0.4 * (-2.0 - 3.0)
    assert result.loss.item() == pytest.approx(sum(map(nats, margins)) / 2)
    assert result.chosen_rewards.tolist() == pytest.approx([0.4 * 0.5, 0.4 * -2.0])
    assert result.rejected_rewards.tolist() == pytest.approx([0.4 * -1.0, 0.4 * 3.0])
    # Rafailov et al. 2023, section 4: beta * sigmoid(-margin), towards the chosen and away from the rejected
    followed = doubles(*(-0.4 / (1 + math.exp(margin)) / 2 for margin in margins))
    got = torch.autograd.grad(result.loss, (chosen, rejected))
    torch.testing.assert_close(got, (followed, -followed), rtol=0, atol=1e-12)


def without_the_reference(chosen, rejected, ref_chosen, ref_rejected, **options):
    return dpo_loss(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected), **options)


def reference_aliased_to_policy(chosen, rejected, ref_chosen, ref_rejected, **options):
    return dpo_loss(chosen, rejected, chosen, rejected, **options)


def labels_swapped(chosen, rejected, ref_chosen, ref_rejected, **options):
    return dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **options)


def beta_inverted(*logprobs, beta, **options):
    return dpo_loss(*logprobs, beta=1 / beta, **options)


def test_dpo_by_hand():
    check_dpo(dpo_loss)


@pytest.mark.parametrize(
    "mutant",
    [without_the_reference, reference_aliased_to_policy, labels_swapped, beta_inverted],
    ids=lambda f: f.__name__,
)
def test_dpo_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_dpo(mutant)


def test_at_the_reference_dpo_costs_ln_2_and_pulls_by_half_of_beta():
    reference = torch.randn(2, 1, dtype=torch.float64)
    policy = reference.clone().requires_grad_()
    result = dpo_loss(*policy, *reference, beta=0.3)
    assert result.loss.item() == pytest.approx(LN2, abs=1e-12)
    torch.testing.assert_close(gradient(result.loss, policy), doubles([-0.15], [0.15]), rtol=0, atol=1e-12)
    assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_ipo_is_at_its_best_where_the_log_ratios_differ_by_half_of_one_over_beta(beta):
    best = 1 / (2 * beta)
    chosen, zeros = doubles(best, best - 1, best + 2).requires_grad_(), doubles(0.0, 0.0, 0.0)
    loss = dpo_loss(chosen, zeros, zeros, zeros, beta=beta, kind="ipo", denominator=1).loss
    assert loss.item() == pytest.approx(0 + 1 + 4)
    torch.testing.assert_close(gradient(loss, chosen), doubles(0.0, -2.0, 4.0), rtol=0, atol=1e-9)
    result = dpo_loss(doubles(1.0), doubles(-1.0), doubles(0.5), doubles(0.0), beta=beta, kind="ipo")
    assert result.loss.item() == pytest.approx((1.5 - best) ** 2)
    assert result.chosen_rewards.item() == pytest.approx(beta * 0.5)


@given(st.floats(-9, 9), st.floats(0, 0.5))
def test_label_smoothing_is_the_mean_over_which_label_is_right(margin, smoothing):
    zero, logprob = doubles(0.0), doubles(margin)
    got = dpo_loss(logprob, zero, zero, zero, beta=1, label_smoothing=smoothing).loss.item()
    assert got == pytest.approx((1 - smoothing) * nats(margin) + smoothing * nats(-margin), abs=1e-12)
    even = [dpo_loss(x, zero, zero, zero, beta=1, label_smoothing=0.5).loss.item() for x in (logprob, -logprob)]
    assert even[0] == pytest.approx(even[1], abs=1e-12)


def test_the_optimum_under_label_smoothing_is_its_log_odds():
    logprob = doubles(math.log(0.8 / 0.2)).requires_grad_()
    zero = doubles(0.0)
    loss = dpo_loss(logprob, zero, zero, zero, beta=1, label_smoothing=0.2).loss
    assert gradient(loss, logprob).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0},
        {"beta": -0.1},
        {"beta": 0.1, "label_smoothing": 0.501},
        {"beta": 0.1, "label_smoothing": -0.001},
        {"beta": 0.1, "label_smoothing": 0.1, "kind": "ipo"},
    ],
    ids=str,
)
def test_options_without_a_meaning_are_refused(options):
    with pytest.raises(ValueError, match="expected a beta above 0"):
        dpo_loss(*torch.zeros(4, 2), **options)


def test_labels_that_are_wrong_half_of_the_time_teach_nothing():
    """At the end of the range the two terms weigh the same: the gradient vanishes where the margin does."""
    chosen = torch.zeros(2, requires_grad=True)
    loss = dpo_loss(chosen, *torch.zeros(3, 2), beta=1e-3, label_smoothing=0.5).loss
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert chosen.grad.abs().max() == 0


def test_shapes_that_would_be_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"'rejected': \(2, 1\).*expected one shape"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="expected one shape"):
        plackett_luce_loss(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))


def test_low_precision_is_widened():
    scores = torch.randn(4, 8).bfloat16()
    assert bradley_terry_loss(scores[0], scores[1]).dtype == torch.float32
    assert ranking_loss(scores).dtype == plackett_luce_loss(scores).dtype == torch.float32
    exact = dpo_loss(*scores.double(), beta=0.1).loss
    torch.testing.assert_close(dpo_loss(*scores, beta=0.1).loss.double(), exact, rtol=1e-5, atol=1e-6)
