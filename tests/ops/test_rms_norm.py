"""RMSNorm: the formula in float64, its gradients by autograd, and one arithmetic with and without gradients."""

import pytest
import torch

from palm_rlhf.ops.cpu import native_elementwise, native_library
from palm_rlhf.ops.rms_norm import rms_norm

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 0.1  # so large that a lost one shows
SHAPES = [(1, 7), (3, 4, 16), (65, 33), (64, 5), (2, 3, 2, 18)]


def formula(x, weight):
    return x / (x.square().sum(dim=-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * weight


def drawn(shape, dtype=torch.float64, of_weight=None):
    torch.manual_seed(0)
    x, d_out, weight = torch.randn(shape), torch.randn(shape), torch.rand(shape[-1]) + 0.5
    return x.to(dtype).requires_grad_(), weight.to(of_weight or dtype).requires_grad_(), d_out.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype, of_weight, tolerance",
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 5e-3),
        (torch.bfloat16, torch.float32, 5e-3),  # queries under autocast
        (torch.float32, torch.bfloat16, 1e-6),
    ],
    ids=str,
)
def test_it_is_the_formula_with_its_gradients(dtype, of_weight, tolerance, shape):
    x, weight, d_out = drawn(shape, dtype, of_weight)
    got = rms_norm(x, weight, EPS)
    assert got.dtype == dtype
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = formula(*wide)
    pairs = [(got, expected)]
    grads = torch.autograd.grad(got, (x, weight), d_out)
    pairs += zip(grads, torch.autograd.grad(expected, wide, d_out.double()), strict=True)
    for ours, theirs in pairs:
        limit = max(tolerance, 5e-3 if ours.dtype == torch.bfloat16 else 0)
        assert (ours.double() - theirs).norm() <= limit * theirs.norm()
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS), got)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_side_may_be_frozen(frozen):
    x, weight, d_out = drawn((65, 33), torch.float32)
    expected = torch.autograd.grad(formula(x, weight), (x, weight), d_out)
    (x if frozen == "x" else weight).requires_grad_(False)
    (got,) = torch.autograd.grad(rms_norm(x, weight, EPS), weight if frozen == "x" else x, d_out)
    torch.testing.assert_close(got, expected[frozen == "x"], rtol=1e-5, atol=1e-5)


def test_strided_rows_and_gradients_are_read_as_they_are():
    """Queries are a part of every token's projection, and their gradients come transposed."""
    x, weight, d_out = drawn((3, 8, 16), torch.float32)
    d_out = torch.randn(3, 16, 4).mT
    got = torch.autograd.grad(rms_norm(x[:, 2:6], weight, EPS), (x, weight), d_out)
    expected = torch.autograd.grad(formula(x[:, 2:6], weight), (x, weight), d_out)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once():
    x, weight, _ = drawn((64, 33), torch.bfloat16)
    assert (rms_norm(x, weight, EPS) == formula(x.double(), weight.double()).bfloat16()).float().mean() > 0.999


def test_the_number_of_threads_changes_no_bit():
    x, weight, d_out = drawn((333, 24), torch.float32)
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            out = rms_norm(x, weight, EPS)
            found.append((out, *torch.autograd.grad(out, (x, weight), d_out)))
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, *found))


def test_gradients_of_the_kernel_are_not_differentiated_again_in_silence():
    if native_library.why_not() is None:
        x, weight, _ = drawn((4, 8), torch.float32)
        (gradient,) = torch.autograd.grad(rms_norm(x, weight, EPS).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("called", ["rms_norm_native", "rms_norm_backward_native"])
def test_the_kernel_does_it(called, monkeypatch):
    if native_library.why_not() is None:
        calls, plain = [], getattr(native_elementwise, called)
        monkeypatch.setattr(f"palm_rlhf.ops.rms_norm.{called}", lambda *a, **o: calls.append(1) or plain(*a, **o))
        x, weight, d_out = drawn((4, 8), torch.float32)
        rms_norm(x, weight, EPS).backward(d_out)
        assert calls == [1]
        drawn_wide = drawn((4, 8))  # of float64, which it does not know
        rms_norm(*drawn_wide[:2], EPS)
        assert calls == [1]


def test_compiled_it_is_the_same():
    torch.compiler.reset()
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for of_weight in (torch.bfloat16, torch.float32):
        x, weight, _ = drawn((4, 8), torch.bfloat16, of_weight)
        torch.testing.assert_close(compiled(x, weight, EPS), rms_norm(x, weight, EPS))
