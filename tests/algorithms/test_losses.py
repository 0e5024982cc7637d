"""The clipped losses by hand and by their gradients, pads, and the one normaliser of a step."""

import math

import pytest
import torch

from palm_rlhf.algorithms.losses import PolicyLoss, ValueLoss, policy_loss, step_denominator, value_loss
from palm_rlhf.ops.masked import masked_mean

NAN = float("nan")


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def everywhere(x):
    return torch.ones_like(x, dtype=torch.bool)


RATIOS = (0.1, 0.79, 0.81, 1.0, 1.19, 1.21, 1.29, 1.31, 5.0)
ADVANTAGES = (-2.0, -0.5, 0.0, 0.5, 2.0)


def check_clip(policy_loss, clip_eps_high=None):
    """Of every ratio with every advantage: d loss / d logprob = -A r, or 0 where the clip has taken it away."""
    ratios = doubles(*RATIOS).expand(len(ADVANTAGES), -1)
    advantages = doubles(*ADVANTAGES).unsqueeze(-1).expand_as(ratios)
    old_logprobs = torch.randn_like(ratios)
    logprobs = (old_logprobs + ratios.log()).requires_grad_()
    result = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        everywhere(ratios),
        clip_eps=0.2,
        clip_eps_high=clip_eps_high,
        denominator=1,
        num_tokens=1,
    )
    highest = 1.2 if clip_eps_high is None else 1 + clip_eps_high
    is_clipped = ((advantages > 0) & (ratios > highest)) | ((advantages < 0) & (ratios < 0.8))
    got = gradient(result.loss, logprobs)
    assert not got[is_clipped].any()
    torch.testing.assert_close(got, (-advantages * ratios).masked_fill(is_clipped, 0.0), rtol=0, atol=1e-12)
    limited = torch.where(advantages > 0, ratios.clamp(max=highest), ratios.clamp(min=0.8))
    torch.testing.assert_close(result.loss, (-advantages * limited).sum(), rtol=0, atol=1e-12)
    assert result.clip_fraction == is_clipped.sum()


def mutant_of_policy_loss(loss_of):
    """A policy loss of `loss_of(advantages, ratio, clipped ratio)`."""

    def policy_loss(
        logprobs, old_logprobs, advantages, mask, *, clip_eps, clip_eps_high=None, denominator=None, num_tokens=None
    ):
        ratio = (logprobs - old_logprobs).exp()
        clipped = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high))
        loss = masked_mean(loss_of(advantages, ratio, clipped), mask, denominator=denominator)
        fraction = masked_mean((-advantages * clipped > -advantages * ratio).double(), mask, denominator=num_tokens)
        return PolicyLoss(loss, fraction, *ratio.new_zeros(3))

    return policy_loss


CLIP_MUTANTS = {
    "min and max swapped": mutant_of_policy_loss(lambda a, r, clipped: torch.minimum(-a * r, -a * clipped)),
    "always clipped": mutant_of_policy_loss(lambda a, r, clipped: -a * clipped),
    "never clipped": mutant_of_policy_loss(lambda a, r, clipped: -a * r),
    "sign lost": mutant_of_policy_loss(lambda a, r, clipped: torch.maximum(a * r, a * clipped)),
    "advantage clipped too": mutant_of_policy_loss(lambda a, r, clipped: -torch.minimum(a * r, a.abs() * clipped)),
}


@pytest.mark.parametrize("clip_eps_high", [None, 0.3])
def test_the_gradient_is_zero_exactly_where_the_clip_says(clip_eps_high):
    check_clip(policy_loss, clip_eps_high)
    right = mutant_of_policy_loss(lambda a, r, clipped: torch.maximum(-a * r, -a * clipped))
    check_clip(right, clip_eps_high)  # it is the mutations that the mutants are refused for


@pytest.mark.parametrize("mutant", CLIP_MUTANTS.values(), ids=CLIP_MUTANTS)
def test_the_clip_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_clip(mutant)


def test_the_clip_sees_a_higher_bound_that_is_ignored():
    def symmetrical(*tensors, clip_eps, clip_eps_high, **sums):
        return policy_loss(*tensors, clip_eps=clip_eps, **sums)

    with pytest.raises(AssertionError):
        check_clip(symmetrical, 0.3)


def test_metrics_by_hand():
    """Ratios 1, 2 and 1/4; k3 of old to new is r - 1 - log r."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = doubles([-1.0, -1.0], [-1.0, NAN]).requires_grad_()
    old_logprobs = doubles([-1.0, -1.0 - math.log(2)], [-1.0 + math.log(4), NAN])
    result = policy_loss(logprobs, old_logprobs, doubles([1.0, 1.0], [1.0, NAN]), mask, clip_eps=0.25)
    assert result.loss.item() == pytest.approx(-(1 + 1.25 + 0.25) / 3)
    assert result.clip_fraction.item() == pytest.approx(1 / 3)
    assert result.approx_kl.item() == pytest.approx(((1 - math.log(2)) + (math.log(4) - 0.75)) / 3)
    assert (result.ratio_min.item(), result.ratio_max.item()) == (pytest.approx(0.25), pytest.approx(2.0))
    assert not any(x.requires_grad for x in result[1:])


@pytest.mark.parametrize("denominator", [1000, torch.tensor([[50.0], [7.0]])], ids=["constant", "of each row"])
def test_metrics_are_means_over_tokens_whatever_the_loss_is_divided_by(denominator):
    """Ratios 1, 2 and 1/4 with advantage 1: one of three is clipped."""
    mask = torch.tensor([[True, True], [True, False]])
    ratios = doubles([1.0, 2.0], [0.25, NAN])
    ones = torch.ones_like(ratios)
    result = policy_loss(ratios.log(), 0 * ones, ones, mask, clip_eps=0.25, denominator=denominator)
    assert result.clip_fraction.item() == pytest.approx(1 / 3)
    assert result.approx_kl.item() == pytest.approx(((1 - math.log(2)) + (math.log(4) - 0.75)) / 3)
    part = policy_loss(ratios.log(), 0 * ones, ones, mask, clip_eps=0.25, denominator=denominator, num_tokens=6)
    assert part.clip_fraction.item() == pytest.approx(1 / 6)
    assert part.loss == result.loss and result.loss.item() != pytest.approx(-2.5 / 3)


def test_ratios_are_bounded():
    """94 nats overflow float32, and infinity times an advantage of 0 is NaN; 20 nats are the bound on either side."""
    moves, advantages = torch.tensor([[94.0, 94.0, -300.0, 19.0]]), torch.tensor([[0.0, 1.0, -1.0, -1.0]])
    logprobs = moves.clone().requires_grad_()
    result = policy_loss(logprobs, 0 * moves, advantages, everywhere(moves), clip_eps=0.2)
    by_hand = (0 - 1.2 + 0.8 + math.exp(19)) / 4
    assert result.loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert result.ratio_max.item() == pytest.approx(math.exp(20), rel=1e-6)
    assert result.ratio_min.item() == pytest.approx(math.exp(-20), rel=1e-6)
    assert result.approx_kl.item() <= 10
    expected = torch.tensor([[0.0, 0.0, 0.0, math.exp(19) / 4]])
    torch.testing.assert_close(gradient(result.loss, logprobs), expected)


@pytest.mark.parametrize("low, high", [(1.5, 4.0), (0.25, 0.5)])
def test_ratio_extremes_are_of_actions_alone(low, high):
    logprobs = doubles([math.log(low), math.log(high), 30.0])
    zeros, mask = torch.zeros_like(logprobs), torch.tensor([[True, True, False]])
    result = policy_loss(logprobs, zeros, zeros, mask, clip_eps=0.2)
    assert (result.ratio_min.item(), result.ratio_max.item()) == (pytest.approx(low), pytest.approx(high))


def test_without_actions_everything_is_neutral():
    logprobs = doubles([NAN, 3.0]).requires_grad_()
    result = policy_loss(logprobs, logprobs.detach(), logprobs.detach(), torch.zeros(1, 2).bool(), clip_eps=0.2)
    assert [x.item() for x in result] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert not gradient(result.loss, logprobs).any()


def check_value_loss(value_loss):
    """Clipped at 0.5 about an old value of 1, returns 2 and 0: the larger of two errors counts."""
    values = doubles([1.2, 3.0, 0.0, 1.8, 2.4]).requires_grad_()
    returns = doubles([2.0, 2.0, 2.0, 0.0, 2.0])
    result = value_loss(values, torch.ones_like(returns), returns, everywhere(returns), value_clip_eps=0.5)
    expected = doubles(0.64, 1.0, 4.0, 3.24, 0.25)  # 2.4 errs by 0.16, its clip to 1.5 by 0.25
    torch.testing.assert_close(result.loss, expected.mean() / 2, rtol=0, atol=1e-12)
    followed = doubles([1.2 - 2, 3.0 - 2, 0.0 - 2, 1.8 - 0, 0.0]) / 5
    torch.testing.assert_close(gradient(result.loss, values), followed, rtol=0, atol=1e-12)
    assert result.clip_fraction.item() == pytest.approx(1 / 5)


def mutant_of_value_loss(loss_of):
    """A value loss of `loss_of(free error, clipped error)`, both squared."""

    def value_loss(values, old_values, returns, mask, *, value_clip_eps):
        near = old_values + (values - old_values).clamp(-value_clip_eps, value_clip_eps)
        free, clipped = (values - returns).square(), (near - returns).square()
        return ValueLoss(masked_mean(loss_of(free, clipped), mask), masked_mean((clipped > free).double(), mask))

    return value_loss


VALUE_MUTANTS = {
    "min and max swapped": mutant_of_value_loss(lambda free, clipped: 0.5 * torch.minimum(free, clipped)),
    "half forgotten": mutant_of_value_loss(torch.maximum),
    "always clipped": mutant_of_value_loss(lambda free, clipped: 0.5 * clipped),
    "never clipped": mutant_of_value_loss(lambda free, clipped: 0.5 * free),
}


def test_value_loss_by_hand():
    check_value_loss(value_loss)


@pytest.mark.parametrize("mutant", VALUE_MUTANTS.values(), ids=VALUE_MUTANTS)
def test_value_loss_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_value_loss(mutant)


def test_without_a_bound_the_value_loss_is_half_the_squared_error():
    values, old_values, returns = torch.randn(3, 4, 5).requires_grad_()
    result = value_loss(values, old_values, returns, everywhere(values), value_clip_eps=None)
    torch.testing.assert_close(result.loss, (values - returns).square().mean() / 2)
    torch.testing.assert_close(gradient(result.loss, values), (values - returns) / 20)
    assert result.clip_fraction == 0
    within = value_loss(values, values.detach() + 0.1, returns, everywhere(values), value_clip_eps=0.2)
    assert within.clip_fraction == 0  # also in float32, where old + (new - old) is not new


LENGTHS = (4, 1, 3)


def ragged_parts(num_tensors):
    """Rows of different lengths, without pads, and the same in one block whose pads hold NaN or infinity."""
    rows = [torch.randn(num_tensors, 1, length, dtype=torch.float64) for length in LENGTHS]
    block = torch.full((num_tensors, len(LENGTHS), 7), NAN, dtype=torch.float64)
    block[:, 1] = torch.inf
    for index, row in enumerate(rows):
        block[:, index, : row.shape[-1]] = row[:, 0]
    return rows, block, torch.arange(7) < torch.tensor(LENGTHS).unsqueeze(-1)


def check_pads(loss_of, num_tensors, num_sums):
    """Loss, metrics and gradient of the block are those of its rows, summed over 8 actions."""
    rows, block, mask = ragged_parts(num_tensors)
    of_rows = []
    expected = torch.zeros_like(block[0])
    for index, row in enumerate(rows):
        new = row[0].requires_grad_()
        of_rows.append(loss_of(new, *row[1:], everywhere(new), denominator=8))
        expected[index, : LENGTHS[index]] = gradient(of_rows[-1].loss, new)[0]
    new = block[0].requires_grad_()
    for denominator in (None, 8):
        result = loss_of(new, *block[1:], mask, denominator=denominator)
        for got, *parts in zip(result[:num_sums], *of_rows):
            torch.testing.assert_close(got, sum(parts), rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient(result.loss, new), expected, rtol=0, atol=1e-12)
    return result, of_rows


def clipped_policy_loss(*tensors, denominator):
    return policy_loss(*tensors, clip_eps=0.2, denominator=denominator, num_tokens=denominator)


def clipped_value_loss(*tensors, denominator):
    return value_loss(*tensors, value_clip_eps=0.2, denominator=denominator)


def pads_in_the_mean(*tensors, denominator):
    *tensors, mask = tensors
    clean = [x.nan_to_num(nan=1.0, posinf=1.0) for x in tensors]
    return policy_loss(*clean, everywhere(mask), clip_eps=0.2, denominator=denominator, num_tokens=denominator)


def masked_after_the_exponential(logprobs, old_logprobs, advantages, mask, *, denominator):
    """Its loss is right; its gradient is 0 times NaN."""
    loss = mutant_of_policy_loss(lambda a, r, clipped: torch.maximum(-a * r, -a * clipped))
    return loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2, denominator=denominator)


def divided_by_all_places(*tensors, denominator):
    return clipped_policy_loss(*tensors, denominator=tensors[0].numel())


def test_pads_are_nothing_to_the_policy_loss():
    result, of_rows = check_pads(clipped_policy_loss, num_tensors=3, num_sums=3)
    assert result.ratio_min == min(row.ratio_min for row in of_rows)
    assert result.ratio_max == max(row.ratio_max for row in of_rows)


def test_pads_are_nothing_to_the_value_loss():
    check_pads(clipped_value_loss, num_tensors=3, num_sums=2)


@pytest.mark.parametrize(
    "mutant", [pads_in_the_mean, masked_after_the_exponential, divided_by_all_places], ids=lambda f: f.__name__
)
def test_pads_see_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_pads(mutant, num_tensors=3, num_sums=1)


MAX_LENGTH = 9


def batch_of_uneven_rows():
    """Eight rows of 1 to 7 actions."""
    mask = torch.arange(7) < torch.tensor([[1], [7], [2], [2], [5], [3], [6], [4]])
    old_logprobs, advantages = torch.randn(2, 8, 7, dtype=torch.float64)
    logprobs = (old_logprobs + 0.3 * torch.randn(8, 7, dtype=torch.float64)).requires_grad_()
    return logprobs, old_logprobs, advantages, mask


def by_definition(aggregation, logprobs, old_logprobs, advantages, mask):
    """The losses of each row alone, summed and divided as the papers write it."""
    rows = [
        -torch.minimum(a * (new - old).exp(), a * (new - old).exp().clamp(0.8, 1.2))[keep]
        for new, old, a, keep in zip(logprobs, old_logprobs, advantages, mask, strict=True)
    ]
    return {
        "token": sum(row.sum() for row in rows) / 30,
        "sequence": sum(row.mean() for row in rows) / 8,
        "constant": sum(row.sum() for row in rows) / (8 * MAX_LENGTH),
    }[aggregation]


def check_normaliser(denominator_of, aggregation, num_parts):
    batch = batch_of_uneven_rows()
    expected = by_definition(aggregation, *batch)
    losses = []
    for part in zip(*(x.chunk(num_parts) for x in batch), strict=True):
        denominator = denominator_of(
            part[-1], aggregation=aggregation, num_tokens=30, num_sequences=8, max_length=MAX_LENGTH
        )
        losses.append(policy_loss(*part, clip_eps=0.2, denominator=denominator).loss)
    torch.testing.assert_close(sum(losses), expected, rtol=0, atol=1e-12)
    got, wanted = (gradient(x, batch[0]) for x in (sum(losses), expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_parts", [1, 4])
def test_with_the_ratio_of_a_sequence_a_response_is_one_action(num_parts):
    """RLOO's: the product of a row's ratios, clipped as one, times its advantage, a mean over the rows."""
    logprobs, old_logprobs, advantages, mask = batch_of_uneven_rows()
    advantages = advantages[:, :1].expand(-1, 7)
    expected, num_clipped = 0.0, 0
    for new, old, advantage, keep in zip(logprobs, old_logprobs, advantages[:, 0], mask, strict=True):
        ratio = math.prod(torch.exp(a - b) for a, b in zip(new[keep], old[keep], strict=True))
        free, clipped = -advantage * ratio, -advantage * min(max(ratio, 0.8 + 0 * ratio), 1.2 + 0 * ratio)
        expected = expected + max(free, clipped) / 8
        num_clipped += int(keep.sum()) if clipped > free else 0
    assert 0 < num_clipped < 30
    results = []
    for part in zip(*(x.chunk(num_parts) for x in (logprobs, old_logprobs, advantages, mask)), strict=True):
        denominator = step_denominator(
            part[-1], aggregation="sequence", num_tokens=30, num_sequences=8, max_length=MAX_LENGTH
        )
        options = {"clip_eps": 0.2, "ratio_level": "sequence", "denominator": denominator, "num_tokens": 30}
        results.append(policy_loss(*part, **options))
    got = sum(result.loss for result in results)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(got, logprobs), gradient(expected, logprobs), rtol=0, atol=1e-12)
    assert sum(result.clip_fraction for result in results).item() == pytest.approx(num_clipped / 30)
    moved = (logprobs - old_logprobs).detach()[mask]
    approx_kl = (moved.exp() - 1 - moved).sum() / 30  # of each token, still
    torch.testing.assert_close(sum(result.approx_kl for result in results), approx_kl, rtol=0, atol=1e-12)


def mean_of_means(action_mask, *, aggregation, num_sequences, **step):
    """Each part by its own size, then the mean over the parts."""
    num_parts = num_sequences // len(action_mask)
    own = {**step, "num_tokens": action_mask.sum(), "num_sequences": len(action_mask)}
    return num_parts * step_denominator(action_mask, aggregation=aggregation, **own)


def size_of_the_part(action_mask, **step):
    return step_denominator(action_mask, **{**step, "num_tokens": action_mask.sum(), "num_sequences": len(action_mask)})


AGGREGATIONS = ("token", "sequence", "constant")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("num_parts", [1, 2, 4, 8])
def test_parts_of_a_step_add_up_to_the_step(aggregation, num_parts):
    check_normaliser(step_denominator, aggregation, num_parts)


def test_a_mean_of_means_is_seen():
    with pytest.raises(AssertionError):
        check_normaliser(mean_of_means, "token", 4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_size_of_a_part_is_seen(aggregation):
    with pytest.raises(AssertionError):
        check_normaliser(size_of_the_part, aggregation, 4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("other", AGGREGATIONS)
def test_aggregations_are_told_apart(aggregation, other):
    if aggregation != other:
        with pytest.raises(AssertionError):
            check_normaliser(
                lambda mask, **step: step_denominator(mask, **{**step, "aggregation": other}), aggregation, 1
            )


def test_counts_may_be_tensors_and_an_empty_row_adds_nothing():
    mask = torch.tensor([[True, True], [False, False]])
    numbers = {"num_tokens": torch.tensor(6), "num_sequences": torch.tensor(4), "max_length": 5}
    got = {name: step_denominator(mask, aggregation=name, **numbers) for name in AGGREGATIONS}
    assert got["token"].item() == 6 and got["constant"].item() == 20
    loss = masked_mean(torch.ones(2, 2), mask, denominator=got["sequence"])
    assert loss.item() == 0.25


def test_low_precision_is_widened():
    tensors, mask = torch.randn(3, 2, 4).bfloat16(), torch.ones(2, 4, dtype=torch.bool)
    exact = policy_loss(*tensors.double(), mask, clip_eps=0.2)
    for got, expected in zip(policy_loss(*tensors, mask, clip_eps=0.2), exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert value_loss(*tensors, mask, value_clip_eps=0.2).loss.dtype == torch.float32


def test_advantages_of_sequences_are_not_broadcast_unseen():
    with pytest.raises(ValueError, match=r"'advantages': \(3,\).*expand what is to be repeated"):
        policy_loss(*torch.zeros(2, 3, 3), torch.zeros(3), torch.ones(3, 3, dtype=torch.bool), clip_eps=0.2)
