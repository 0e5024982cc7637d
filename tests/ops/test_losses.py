"""Cross-entropy, masked reductions and the shift of targets, against hand values and PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.ops.cross_entropy import cross_entropy
from palm_rlhf.ops.logprobs import next_token_pairs, target_mask, token_logprobs
from palm_rlhf.ops.masked import masked_mean, masked_sum


def batch(*, rows=2, length=5, vocabulary=7, dtype=torch.float64):
    logits = torch.randn(rows, length, vocabulary, dtype=dtype, requires_grad=True)
    return logits, torch.randint(vocabulary, (rows, length))


MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool()


def test_cross_entropy_is_that_of_pytorch():
    logits, targets = batch()
    got, expected = cross_entropy(logits, targets), F.cross_entropy(logits.mT, targets)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (got, expected)), rtol=0, atol=1e-12)


def test_masked_targets_are_those_that_pytorch_ignores():
    logits, targets = batch()
    got = cross_entropy(logits, targets, MASK)
    expected = F.cross_entropy(logits.mT, targets.masked_fill(~MASK, -100))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (got, expected)), rtol=0, atol=1e-12)


def test_even_logits_cost_the_logarithm_of_the_vocabulary():
    assert cross_entropy(torch.zeros(3, 256), torch.tensor([0, 7, 255])).item() == pytest.approx(math.log(256))


def test_z_loss_by_hand():
    """Logits 0 and ln 3: Z = 4, p = 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    for target, nats in ((0, math.log(4)), (1, math.log(4 / 3))):
        got = cross_entropy(logits, torch.tensor([target]), z_loss=0.1).item()
        assert got == pytest.approx(nats + 0.1 * math.log(4) ** 2, abs=1e-14)


def test_z_loss_draws_the_normaliser_to_one_from_both_sides():
    for shift in (-3.0, 3.0):
        logits = torch.full((1, 5), shift - math.log(5), dtype=torch.float64, requires_grad=True)
        even = cross_entropy(logits, torch.tensor([0]))
        with_z = cross_entropy(logits, torch.tensor([0]), z_loss=1.0)
        pull = torch.autograd.grad(with_z - even, logits)[0].sum()
        assert pull.item() == pytest.approx(2 * shift)  # d log(Z)^2, with log Z = shift


def test_cross_entropy_passes_gradcheck():
    logits, targets = batch(rows=1, length=3, vocabulary=4)
    mask = torch.tensor([[True, False, True]])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets[:, :3], mask, z_loss=0.1, denominator=5), logits)


def test_a_denominator_makes_micro_batches_add_up():
    logits, targets = batch()
    whole = cross_entropy(logits, targets, MASK, z_loss=0.1)
    total = MASK.sum()
    for denominator in (total, int(total), float(total)):
        rows = zip(logits.split(1), targets.split(1), MASK.split(1), strict=True)
        parts = sum(cross_entropy(*row, z_loss=0.1, denominator=denominator) for row in rows)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    mean_of_means = sum(cross_entropy(*row, z_loss=0.1) for row in zip(logits, targets, MASK, strict=True)) / 2
    assert not torch.isclose(mean_of_means, whole)


def test_low_precision_logits_are_reduced_in_float32():
    logits, targets = batch(rows=4, length=50, vocabulary=300, dtype=torch.bfloat16)
    got = cross_entropy(logits, targets)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(F.cross_entropy(logits.double().mT, targets).item(), rel=1e-6)
    assert torch.autograd.grad(got, logits)[0].dtype == torch.bfloat16


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1]))
    assert loss.item() == 2e4 and torch.autograd.grad(loss, logits)[0].tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_the_mask_hides_reaches_neither_loss_nor_gradient(garbage):
    logits, targets = batch()
    clean = cross_entropy(logits, targets, MASK, z_loss=0.1)
    dirty_logits = logits.detach().masked_fill(~MASK.unsqueeze(-1), garbage).requires_grad_()
    dirty = cross_entropy(dirty_logits, targets, MASK, z_loss=0.1)
    assert torch.equal(dirty, clean)
    gradient = torch.autograd.grad(dirty, dirty_logits)[0]
    assert torch.equal(gradient[MASK], torch.autograd.grad(clean, logits)[0][MASK])


def test_masked_sum_and_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 6.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert masked_sum(x, mask).item() == 7.0
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(x, mask, denominator=14).item() == 0.5
    assert masked_mean(x, mask, denominator=torch.tensor(14)).item() == 0.5
    assert masked_mean(x[:, :1]).item() == 2.5 and masked_sum(x[:, :1]).item() == 5.0


def test_nothing_kept_gives_zero_with_a_zero_gradient():
    logits, targets = batch()
    loss = cross_entropy(logits, targets, torch.zeros_like(MASK), z_loss=0.1)
    assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()
    assert masked_mean(torch.ones(0)).item() == 0


def test_masked_gradients_of_hidden_nan_are_zero():
    x = torch.tensor([1.0, math.nan], requires_grad=True)
    assert torch.autograd.grad(masked_mean(x, torch.tensor([True, False])), x)[0].tolist() == [1.0, 0.0]


def test_next_token_pairs_by_hand():
    inputs, targets = next_token_pairs(torch.tensor([[5, 6, 7], [8, 9, 0]]))
    assert inputs.tolist() == [[5, 6], [8, 9]] and targets.tolist() == [[6, 7], [9, 0]]


def bits(text):
    return torch.tensor([[character == "1" for character in text]])


@pytest.mark.parametrize(
    "masks, expected",
    [
        ({"loss_mask": "00111"}, "0111"),
        ({"loss_mask": "10010"}, "0010"),
        ({"key_mask": "11100"}, "1100"),
        ({"key_mask": "00111"}, "0011"),  # the first token after the pads has no token before it
        ({"key_mask": "11011"}, "1001"),
        ({"loss_mask": "11101", "key_mask": "11110"}, "1100"),
        ({"loss_mask": "11111", "key_mask": "01111"}, "0111"),
    ],
)
def test_target_mask_by_hand(masks, expected):
    got = target_mask(**{name: bits(text) for name, text in masks.items()})
    assert got.tolist() == bits(expected).tolist()


def test_target_mask_does_not_predict_across_documents():
    document_ids = torch.tensor([[4, 4, 9, 9, 9, 2]])
    assert target_mask(document_ids=document_ids).tolist() == bits("10110").tolist()
    both = target_mask(document_ids=document_ids, loss_mask=bits("111101"))
    assert both.tolist() == bits("10100").tolist()
    assert target_mask() is None


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 100))
def test_token_logprobs_are_minus_the_cross_entropy(rows, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, vocabulary, generator=generator, dtype=torch.float64)
    tokens = torch.randint(vocabulary, (rows, 3), generator=generator)
    logprobs = token_logprobs(logits, tokens)
    torch.testing.assert_close(-logprobs, F.cross_entropy(logits.mT, tokens, reduction="none"), rtol=0, atol=1e-12)


def test_token_logprobs_by_hand():
    logits = torch.tensor([0.1, 0.2, 0.7]).log() + 5  # a shift of all logits changes nothing
    got = token_logprobs(logits.expand(3, 3), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(got, torch.tensor([0.1, 0.2, 0.7]).log())
    assert token_logprobs(logits.bfloat16().expand(1, 3), torch.tensor([0])).dtype == torch.float32
