"""The other fused operations in the PTX that Triton compiles for sm_80: results, gradients, and no stray access."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.ops.triton.fused_cross_entropy import linear_cross_entropy_triton
from palm_rlhf.ops.triton.fused_logprobs import linear_logprobs_triton
from palm_rlhf.ops.triton.fused_rotary import rotary_split_triton
from palm_rlhf.ops.triton.fused_swiglu import swiglu_triton

from .driver import emulated

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the largest exact number
DTYPES = list(TOLERANCE)


def assert_accurate(compiled: Callable, exact: Callable, inputs: list[Tensor]) -> None:
    """Results and gradients of both, the exact ones in float64."""
    dtype = inputs[0].dtype
    ours, theirs = ([t.to(d).requires_grad_() for t in inputs] for d in (dtype, torch.float64))
    with emulated() as gpu:
        got = compiled(*ours)
        d_got = [torch.randn(t.shape).to(t.dtype) for t in got]
        got = *got, *torch.autograd.grad(got, ours, d_got)
    assert gpu.launched
    truth = exact(*theirs)
    truth = *truth, *torch.autograd.grad(truth, theirs, [t.double() for t in d_got])
    for a, b in zip(got, truth, strict=True):
        error = (a.double() - b).abs().max()
        assert error <= TOLERANCE[dtype] * b.abs().max(), f"{error} of {b.abs().max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype):
    gate, value = torch.randn(2, 5, 2, 1500).to(dtype).unbind(2)
    assert_accurate(lambda *inputs: [swiglu_triton(*inputs)], lambda g, v: [F.silu(g) * v], [gate, value])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(dtype):
    angles = torch.randn(1, 17, 1, 32)
    cos, sin = (wave(angles).repeat(1, 1, 1, 2) for wave in (torch.cos, torch.sin))

    def exact(qkv):
        """The first half of a head holds real parts, the second the imaginary ones."""
        q, k, v = qkv.split((3, 1, 1), dim=2)
        turn = torch.polar(torch.ones_like(angles), angles)
        turned = (torch.complex(*x.chunk(2, dim=-1)) * turn for x in (q, k))
        return [*(torch.cat((x.real, x.imag), dim=-1) for x in turned), v]

    qkv = torch.randn(2, 17, 5, 64).to(dtype)
    assert_accurate(lambda x: rotary_split_triton(x, cos, sin, heads=3, kv_heads=1), exact, [qkv])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(dtype):
    x, weight, tokens = torch.randn(70, 48).to(dtype), torch.randn(1001, 48).to(dtype), torch.randint(1001, (70,))
    counts = torch.rand(70)

    def exact_loss(x, weight):
        logits = x @ weight.T / 4
        z_loss = 1e-3 * logits.logsumexp(-1).square()
        return [((F.cross_entropy(logits, tokens, reduction="none") + z_loss) * counts).sum()]

    def exact_logprobs(x, weight):
        logprobs = (x @ weight.T / 4).log_softmax(-1)
        return [logprobs.gather(1, tokens[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)]

    def loss(x, weight):
        return [linear_cross_entropy_triton(x, weight, tokens, counts, 0.25, 1e-3, dtype)]

    assert_accurate(loss, exact_loss, [x, weight])
    assert_accurate(lambda x, w: linear_logprobs_triton(x, w, tokens, 0.25, dtype, True), exact_logprobs, [x, weight])
