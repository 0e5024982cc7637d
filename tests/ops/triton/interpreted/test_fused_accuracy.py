"""The kernels beside attention against definitions in float64, and mutants of them that this must reject."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from palm_rlhf.ops.cross_entropy import linear_cross_entropy_reference
from palm_rlhf.ops.logprobs import linear_logprobs_reference
from palm_rlhf.ops.rotary import rotary_tables, rotate, xpos_scales
from palm_rlhf.ops.swiglu import swiglu_reference

# Of the largest exact number, or of 0.1 if that is more.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)
MAX_RATIOS = 2, 3  # of a result's error, and a gradient's, to that of the eager definition, root mean square
FEWEST = 16  # numbers of which a root mean square says something

Function = Callable[..., list[Tensor]]


class Case(NamedTuple):
    """An operation of one form: the shapes of what has gradients, and three functions of it."""

    shapes: list[tuple[int, ...]]
    ours: Function  # of the module with the kernels as well
    eager: Function
    exact: Function


def said_and_chosen(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the tokens, logarithms of the normalisers and entropies, by their definitions."""
    z = logits.exp().sum(dim=-1)
    probs = logits.exp() / z.unsqueeze(-1)
    chosen = torch.nn.functional.one_hot(tokens, logits.shape[-1]).to(logits.dtype)
    return (logits * chosen).sum(dim=-1) - z.log(), z.log(), -(probs * probs.log()).sum(dim=-1)


def cross_entropy(n: int, v: int, *, dim: int = 24, scale: float = 0.3, z_loss: float = 0.0) -> Case:
    """Some targets do not count, and are no tokens."""
    generator = torch.Generator().manual_seed(n)
    targets, counts = torch.randint(v, (n,), generator=generator), torch.rand(n, generator=generator) + 0.5
    counts = counts * (torch.rand(n, generator=generator) < 0.7) if n > 1 else counts
    ignored = torch.where(counts == 0, torch.arange(n) * 7919 - 100, targets)

    def ours(ops, x, weight):
        return [ops.linear_cross_entropy_triton(x, weight, ignored, counts, scale, z_loss, x.dtype)]

    def eager(x, weight):
        options = {"weights": counts, "denominator": 1.0, "scale": scale, "z_loss": z_loss}
        return [linear_cross_entropy_reference(x, weight, targets, **options)]

    def exact(x, weight):
        logprobs, log_z, _ = said_and_chosen(x @ weight.T * scale, targets)
        return [(counts * (z_loss * log_z**2 - logprobs)).sum()]

    return Case([(n, dim), (v, dim)], ours, eager, exact)


def logprobs(n: int, v: int, *, dim: int = 24, scale: float = 0.3, entropy: bool = False, frozen: bool = False) -> Case:
    """Log-probabilities and entropies, of which the latter may have no gradient; nor the weight, if frozen."""
    generator = torch.Generator().manual_seed(n)
    tokens, weight = torch.randint(v, (n,), generator=generator), torch.randn(v, dim, generator=generator)
    weights = [weight] if frozen else []

    def cast(function):
        return lambda x, *more: function(x, *more, *(weight.to(torch.bfloat16).to(x.dtype) for weight in weights))

    def ours(ops, *inputs):
        return cast(lambda x, weight: ops.linear_logprobs_triton(x, weight, tokens, scale, x.dtype, entropy))(*inputs)

    def eager(x, weight):
        return linear_logprobs_reference(x, weight, tokens, scale=scale, entropy_needs_grad=entropy)

    def exact(x, weight):
        said, _, entropies = said_and_chosen(x @ weight.T * scale, tokens)
        return said, entropies if entropy else entropies.detach()

    shapes = [(n, dim)] if frozen else [(n, dim), (v, dim)]
    return Case(shapes, ours, cast(eager), cast(exact))


def swiglu(*shape: int) -> Case:
    """Gate and value side by side, as a projection makes them."""

    def halves(function):
        return lambda projected: [function(*projected.chunk(2, dim=-1))]

    def exact(gate, value):
        return gate / (1 + (-gate).exp()) * value

    def ours(ops, projected):
        return halves(ops.swiglu_triton)(projected)

    return Case([(*shape[:-1], 2 * shape[-1])], ours, halves(swiglu_reference), halves(exact))


def rotary(batch: int, n: int, heads: int, kv_heads: int, dim: int, *, xpos: bool = False) -> Case:
    """Each row of a batch at positions of its own."""
    positions = torch.arange(n) * 3 + torch.arange(batch)[:, None] * 1000
    cos, sin = (table.unsqueeze(-2) for table in rotary_tables(positions, dim))
    scales = torch.ones(batch, n, heads + kv_heads, dim, dtype=torch.float64)
    if xpos:
        scale = xpos_scales(positions, dim, dtype=torch.float64).unsqueeze(-2)
        scales[:, :, :heads] *= scale
        scales[:, :, heads:] /= scale
        cos, sin = (table * scales.float() for table in (cos, sin))

    def ours(ops, qkv):
        return ops.rotary_split_triton(qkv, cos, sin, heads=heads, kv_heads=kv_heads)

    def eager(qkv):
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=-2)
        return *rotate(qk, cos, sin).split([heads, kv_heads], dim=-2), v

    def exact(qkv):
        """Complex numbers whose parts are half a head apart, turned and scaled, with the angles of the tables."""
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=-2)
        half = dim // 2
        angles = positions.float()[..., None] * 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        turned = torch.complex(qk[..., :half], qk[..., half:]) * torch.exp(1j * angles.double())[:, :, None]
        turned = torch.cat((turned.real, turned.imag), dim=-1) * scales
        return *turned.split([heads, kv_heads], dim=-2), v

    return Case([(batch, n, heads + 2 * kv_heads, dim)], ours, eager, exact)


CASES = {
    "cross-entropy, one token of one": cross_entropy(1, 1),
    "cross-entropy, a small vocabulary": cross_entropy(70, 11, z_loss=0.1),
    "cross-entropy, 257 tokens": cross_entropy(19, 257, dim=40, scale=1.0),
    "cross-entropy, two blocks of tokens": cross_entropy(5, 8100, z_loss=1e-2),
    "log-probabilities, a small vocabulary": logprobs(67, 11),
    "log-probabilities, 257 tokens": logprobs(17, 257, entropy=True),
    "log-probabilities, two blocks of tokens": logprobs(5, 8100, entropy=True),
    "log-probabilities, a frozen weight": logprobs(33, 65, frozen=True),
    "log-probabilities and entropies, a frozen weight": logprobs(33, 65, frozen=True, entropy=True),
    "SwiGLU, one number": swiglu(1),
    "SwiGLU, ragged": swiglu(2, 3, 37),
    "SwiGLU, two blocks": swiglu(2, 2049),
    "rotary, multi-query": rotary(2, 5, 3, 1, 64),
    "rotary, grouped queries": rotary(1, 3, 20, 2, 24),
    "xPos": rotary(2, 4, 4, 2, 32, xpos=True),
}


def results(function: Function, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """What comes out, and the gradients, of numbers that every type holds."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    inputs = [draw(shape).to(dtype).requires_grad_() for shape in case.shapes]
    outs = function(*inputs)
    d_outs = [draw(out.shape).to(out.dtype) for out in outs]
    outs, d_outs = zip(*((out, d) for out, d in zip(outs, d_outs, strict=True) if out.requires_grad), strict=True)
    grads = torch.autograd.grad(outs, inputs, d_outs)
    assert all(grad.dtype == dtype for grad in grads)
    return [t.detach().double() for t in (*outs, *grads)]


def assert_accurate(function: Function, case: Case, dtype: torch.dtype) -> None:
    """Within what the type allows, and not far from the eager definition in the same type."""
    got, eager, truth = (
        results(f, case, t) for f, t in ((function, dtype), (case.eager, dtype), (case.exact, torch.float64))
    )
    for place, (ours, theirs, right) in enumerate(zip(got, eager, truth, strict=True)):
        error, allowed = (ours - right).abs().max(), right.abs().max().clamp(min=0.1)
        assert error <= TOLERANCE[dtype] * allowed, f"{place}: {error} of {allowed}"
        if right.numel() >= FEWEST:
            ours, theirs = ((x - right).square().mean().sqrt() for x in (ours, theirs))
            ratio = MAX_RATIOS[place >= len(got) - len(case.shapes)]
            assert ours <= ratio * theirs, f"{place}: root mean square {ours}, eager {theirs}"


class Operations:
    """The public functions of the kernels, of the package or of a mutant of it."""

    def __init__(self, package: str = "palm_rlhf.ops.triton"):
        for name in ("cross_entropy", "logprobs", "swiglu", "rotary"):
            vars(self).update(vars(importlib.import_module(f"{package}.fused_{name}")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_accurate_as_their_dtype(name, dtype):
    case, ops = CASES[name], Operations()
    assert_accurate(lambda *inputs: case.ours(ops, *inputs), case, dtype)


@pytest.fixture
def mutate(root, tmp_path, monkeypatch) -> Iterator[Callable[[str, str, str], Operations]]:
    """`mutate(file, old, new)` are the operations of a copy of the kernels in which `old` became `new`."""

    def operations_of(file: str, old: str, new: str) -> Operations:
        package = tmp_path / "mutant_ops"
        package.mkdir()
        for path in (root / "palm_rlhf/ops/triton").glob("*.py"):
            text = (
                path.read_text(encoding="utf-8")
                .replace("palm_rlhf::", "mutant_ops::")
                .replace("palm_rlhf.ops.triton", "mutant_ops")
            )
            if path.name == f"fused_{file}.py":
                assert text.count(old) == 1, f"{text.count(old)} times {old!r} in {file}"
                text = text.replace(old, new)
            (package / path.name).write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return Operations("mutant_ops")

    yield operations_of
    for name in [name for name in sys.modules if name.split(".")[0] == "mutant_ops"]:
        del sys.modules[name]


LOSS = [cross_entropy(9, 11, z_loss=0.1), cross_entropy(5, 8100)]
SAID = [logprobs(9, 11, entropy=True), logprobs(5, 8100, entropy=True)]
AHEAD = [logprobs(9, 11, frozen=True)]
GATED = [swiglu(3, 5), swiglu(1, 2049)]
TURNED = [rotary(2, 3, 3, 2, 24)]
ALL = [*LOSS, *SAID, *AHEAD, *GATED, *TURNED]
MUTANTS = {
    "the unchanged copy": ("cross_entropy", "TILE = 4096", "TILE = 4096", ALL),
    "padding counts": ("cross_entropy", "tl.where((columns < num_tokens)", "tl.where((columns < width)", LOSS),
    "the old sum is not scaled": ("cross_entropy", "total = total * shrink", "total = total", LOSS),
    "powers of e": ("cross_entropy", "logits * (scale * LOG2_E), LOWEST", "logits * scale, LOWEST", LOSS),
    "the target is not taken off": ("cross_entropy", "d_logprobs[:, None], 0.0)", "0.0, 0.0)", LOSS),
    "the z-loss has no gradient": ("cross_entropy", "slope += tl.load", "slope += 0 * tl.load", LOSS),
    "the gradient is not scaled": ("cross_entropy", "slope = -d_logprobs", "slope = -d_logprobs / scale", LOSS),
    "what does not count has a gradient": ("cross_entropy", "-count, ", "-(count + 1e-2), ", LOSS),
    "the z-loss is linear": ("cross_entropy", "z_loss * log_z.square()", "z_loss * log_z", LOSS),
    "the moment stays": ("cross_entropy", "(moment + total * (largest - new_largest))", "moment", SAID),
    "no entropy in its gradient": ("cross_entropy", "LOG2_E + entropy[:, None])", "LOG2_E)", SAID),
    "the entropy's gradient in bits": ("cross_entropy", "(logprobs / LOG2_E + entropy", "(logprobs + entropy", SAID),
    "no factor for a token": ("logprobs", "d_x * d_logprobs.unsqueeze(-1).to(d_x.dtype)", "d_x", AHEAD),
    "no sigmoid in the derivative": ("swiglu", "(1.0 + gate * (1.0 - sigmoid))", "1.0", GATED),
    "value and gate change places": ("swiglu", "d_out * gate * sigmoid)", "d_out * value * sigmoid)", GATED),
    "the last block is left out": ("swiglu", "triton.cdiv(width, BLOCK)", "max(width // BLOCK, 1)", GATED),
    "y turns the other way": ("rotary", "y * cos + x * sin", "y * cos - x * sin", TURNED),
    "the backward turns on": ("rotary", "sin = -sin", "sin = sin", TURNED),
    "values turn too": ("rotary", "PART < 2, REVERSE", "True, REVERSE", TURNED),
    "neighbours are a pair": ("rotary", "HALF: tl.constexpr = DIM // 2", "HALF: tl.constexpr = 1", TURNED),
    "all rows at the positions of the first": ("rotary", "cos_ptr += batch *", "cos_ptr += 0 *", TURNED),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutate, mutant):
    *change, cases = MUTANTS[mutant]
    ops = mutate(*change)
    with nullcontext() if mutant == "the unchanged copy" else pytest.raises(AssertionError):
        for case in cases:
            assert_accurate(lambda *inputs, case=case: case.ours(ops, *inputs), case, torch.float32)
