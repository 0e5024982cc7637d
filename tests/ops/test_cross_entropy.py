"""The loss in chunks is the loss of all logits, its gradients are theirs, and it never holds them."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.ops import cross_entropy as module
from palm_rlhf.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three tokens at a vocabulary of 11."""
    monkeypatch.setattr(module, "CHUNK", 33)


def inputs(batch=3, n=5, dim=8, num_tokens=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(batch * 100 + n)
    x = torch.randn(batch, n, dim, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(num_tokens, dim, dtype=dtype, generator=generator).requires_grad_()
    targets = torch.randint(num_tokens, (batch, n), generator=generator)
    mask = torch.rand(batch, n, generator=generator) < 0.7
    return x, weight, targets, mask


def by_definition(x, weight, targets, counts, scale, z_loss):
    """The sum over tokens, one at a time."""
    total = 0.0
    for row, target, count in zip(x.flatten(0, 1), targets.flatten(), counts.flatten(), strict=True):
        logits = weight @ row * scale
        log_z = logits.exp().sum().log()
        total = total + count * (log_z - logits[target] + z_loss * log_z**2)
    return total


def gradients(loss, *tensors):
    return torch.autograd.grad(3 * loss, tensors)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    n=st.integers(1, 7),
    scale=st.sampled_from([1.0, 0.3]),
    z_loss=st.sampled_from([0.0, 0.1]),
    chunk=st.sampled_from([1, 33, 1000]),
)
def test_it_is_the_loss_by_definition(batch, n, scale, z_loss, chunk):
    x, weight, targets, mask = inputs(batch, n)
    expected = by_definition(x, weight, targets, mask.double() / max(int(mask.sum()), 1), scale, z_loss)
    before, module.CHUNK = module.CHUNK, chunk
    try:
        loss = linear_cross_entropy(x, weight, targets, mask, scale=scale, z_loss=z_loss)
    finally:
        module.CHUNK = before
    assert loss.item() == pytest.approx(float(expected), abs=1e-12)
    if mask.any():
        for one, other in zip(gradients(loss, x, weight), gradients(expected, x, weight), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["mask", "denominator", "rows", "weights", "nothing"])
def test_it_normalises_as_the_reference_does(small_chunks, form):
    x, weight, targets, mask = inputs()
    options = {
        "mask": {"mask": mask},
        "denominator": {"mask": mask, "denominator": torch.tensor(40)},
        "rows": {"mask": mask, "denominator": torch.tensor([[2], [5], [9]])},
        "weights": {"weights": torch.rand(3, 5, dtype=torch.float64) * mask},
        "nothing": {},
    }[form]
    ours, reference = (f(x, weight, targets, **options) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    for one, other in zip(gradients(ours, x, weight), gradients(reference, x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_z_loss_whose_gradient_is_left_out_is_noticed(small_chunks):
    x, weight, targets, _ = inputs()
    with_z, without = (gradients(linear_cross_entropy(x, weight, targets, z_loss=z), x)[0] for z in (0.1, 0.0))
    assert (with_z - without).abs().max() > 1e-3


def test_only_what_is_trained_gets_a_gradient(small_chunks):
    x, weight, targets, _ = inputs()
    frozen = weight.detach()
    linear_cross_entropy(x, frozen, targets).backward()
    assert x.grad is not None and frozen.grad is None
    linear_cross_entropy(x.detach(), weight, targets).backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad


def test_bfloat16_autocast_rounds_like_the_reference(small_chunks):
    x, weight, targets, mask = inputs(dtype=torch.float32, dim=64)
    exact = gradients(linear_cross_entropy_reference(x, weight, targets, mask, scale=0.125), x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            f(x, weight, targets, mask, scale=0.125) for f in (linear_cross_entropy, linear_cross_entropy_reference)
        ]
    assert losses[0].dtype == torch.float32
    ours, reference = (gradients(loss, x, weight) for loss in losses)
    for mine, theirs, right in zip(ours, reference, exact, strict=True):
        assert (mine - right).norm() <= 1.5 * (theirs - right).norm() + 1e-6


def test_it_compiles_in_one_graph():
    x, weight, targets, mask = inputs(dtype=torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, targets, mask), linear_cross_entropy(x, weight, targets, mask))


PEAK = """
import resource, torch
from palm_rlhf.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
x, weight = torch.randn(4, 256, 64, requires_grad=True), torch.randn(50257, 64, requires_grad=True)
targets = torch.randint(50257, (4, 256))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for loss in (linear_cross_entropy, linear_cross_entropy_reference):
    loss(x, weight, targets, scale=1 / 8).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_its_peak_memory_is_a_quarter_at_most_of_that_with_all_logits(root):
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=root, capture_output=True, text=True, check=True)
    chunked, all_logits = map(int, done.stdout.split())  # the smaller peak comes first
    assert chunked <= all_logits / 4
