"""The kernels of fused attention against a definition in float64, and mutants of them that this must reject."""

import importlib
import sys
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from palm_rlhf.ops.attention import attention
from palm_rlhf.ops.attention_reference import attention_reference

# Of the largest exact number, or of 0.1 if that is more.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)
NAMES = ("out", "d_q", "d_k", "d_v")
MAX_RATIO = dict(zip(NAMES, (2, 3, 3, 3), strict=True))  # to the root mean square error of the eager definition


class Case(NamedTuple):
    num_queries: int
    num_keys: int
    heads: int
    kv_heads: int
    dim: int
    masks: str = ""
    causal: bool = True
    batch: int = 1

    def options(self) -> dict:
        generator = torch.Generator().manual_seed(self.num_keys)
        shape, options = (self.batch, self.num_keys), {"causal": self.causal}
        if "keys" in self.masks:
            options["key_mask"] = torch.rand(shape, generator=generator) < 0.7
        if "padding" in self.masks:
            start = torch.randint(self.num_keys, (self.batch, 1), generator=generator)
            options["key_mask"] = torch.arange(self.num_keys) >= start
        if "documents" in self.masks:
            options["document_ids"] = torch.randint(4, shape, generator=generator).sort(dim=-1).values
        if "scattered" in self.masks:
            options["document_ids"] = torch.randint(3, shape, generator=generator)
        return options

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of the result."""
        q, k = (
            (self.batch, n, h, self.dim) for n, h in ((self.num_queries, self.heads), (self.num_keys, self.kv_heads))
        )
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in (q, k, k, q)]


CASES = [
    Case(1, 1, 1, 1, 32),
    Case(17, 17, 3, 1, 64),
    Case(63, 63, 8, 2, 64, "keys", batch=2),
    Case(65, 65, 5, 1, 128),
    Case(100, 100, 6, 2, 48, "documents", batch=2),
    Case(128, 128, 2, 2, 32),
    Case(129, 129, 4, 1, 64, "padding", batch=2),
    Case(200, 200, 7, 1, 64, "keys", causal=False),
    Case(65, 65, 2, 1, 256),
    Case(17, 129, 6, 2, 64, causal=False),
    Case(63, 200, 3, 3, 80, "scattered padding"),
    Case(1, 100, 5, 1, 64, "documents"),
    Case(128, 200, 2, 1, 128, "documents", causal=False),
]


def exact(q, k, v, *, causal, key_mask=None, document_ids=None):
    """Softmax over the visible keys, in the dtype of its inputs."""
    (num_queries, num_keys), group = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    at = torch.arange(num_keys - num_queries, num_keys)
    visible = torch.ones(1, num_queries, num_keys, dtype=torch.bool)
    if causal:
        visible = visible.tril(num_keys - num_queries)
    if key_mask is not None:
        visible = visible & key_mask[:, None, :]
    if document_ids is not None:
        visible = visible & (document_ids[:, at, None] == document_ids[:, None, :])
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    weights = torch.where(visible[:, None], (q @ k.mT / q.shape[-1] ** 0.5).exp(), 0)
    return weights @ v / weights.sum(dim=-1, keepdim=True).clamp(min=1e-300)


def results(function, tensors, dtype, options) -> dict[str, Tensor]:
    *inputs, d_out = (t.to(dtype) for t in tensors)
    inputs = [t.requires_grad_() for t in inputs]
    out = function(*inputs, **options)
    grads = torch.autograd.grad(out, inputs, d_out)
    assert all(t.dtype == dtype for t in (out, *grads))
    return dict(zip(NAMES, (t.detach().double() for t in (out, *grads)), strict=True))


def assert_accurate(function, case: Case, dtype: torch.dtype) -> None:
    """Within what the dtype allows, and not far from the eager definition, which rounds nothing but its results."""
    tensors, options = case.tensors(dtype), case.options()
    got = results(function, tensors, dtype, options)
    truth = results(exact, tensors, torch.float64, options)
    eager = results(attention_reference, tensors, dtype, options)
    for name in NAMES:
        error, allowed = (got[name] - truth[name]).abs().max(), truth[name].abs().max().clamp(min=0.1)
        assert error <= TOLERANCE[dtype] * allowed, f"{name}: {error} of {allowed}"
        if case.num_queries >= 17:
            ours, theirs = ((x[name] - truth[name]).square().mean().sqrt() for x in (got, eager))
            assert ours <= MAX_RATIO[name] * theirs, f"{name}: root mean square {ours}, eager {theirs}"


def triton(*tensors, **options):
    return attention(*tensors, **options, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_as_accurate_as_their_dtype(case, dtype):
    assert_accurate(triton, case, dtype)


@pytest.fixture
def mutate(root, tmp_path, monkeypatch):
    """`mutate(file, old, new)` is the attention of a copy of the kernels in which `old` became `new`."""

    def attention_of(file: str, old: str, new: str):
        package = tmp_path / "mutant_ops"
        package.mkdir()
        for path in (root / "palm_rlhf/ops/triton").glob("*.py"):
            text = (
                path.read_text(encoding="utf-8")
                .replace("palm_rlhf::", "mutant_ops::")
                .replace("palm_rlhf.ops.triton", "mutant_ops")
            )
            if path.name == file:
                assert text.count(old) == 1, f"{text.count(old)} times {old!r} in {file}"
                text = text.replace(old, new)
            (package / path.name).write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module("mutant_ops.fused_attention").attention_triton

    yield attention_of
    for name in [name for name in sys.modules if name.split(".")[0] == "mutant_ops"]:
        del sys.modules[name]


FORWARD, BACKWARD = "attention_forward.py", "attention_backward.py"
MUTANTS = {
    "the unchanged copy": (FORWARD, "at[:, None] >= keys[None, :]", "at[:, None] >= keys[None, :]"),
    "the diagonal is hidden": (FORWARD, "at[:, None] >= keys[None, :]", "at[:, None] > keys[None, :]"),
    "the next key is visible": (FORWARD, "at[:, None] >= keys[None, :]", "at[:, None] + 1 >= keys[None, :]"),
    "the scale is missing": (FORWARD, "dim**-0.5 * LOG2_E", "LOG2_E"),
    "powers of e": (FORWARD, "dim**-0.5 * LOG2_E", "dim**-0.5"),
    "one block too many without a mask": (FORWARD, "full = first_at + 1", "full = first_at + 1 + BLOCK_N"),
    "the old sum is not scaled": (FORWARD, "row_sum * shrink +", "row_sum +"),
    "keys past the end count": (FORWARD, "exists = keys < num_keys", "exists = keys < num_keys + 1"),
    "heads dealt out in turn": (FORWARD, "kv_head * GROUP + rows % GROUP", "kv_head + rows % GROUP * 2"),
    "the backward's diagonal is hidden": (BACKWARD, "[None, :] >= keys[:, None]", "[None, :] > keys[:, None]"),
    "no delta": (BACKWARD, "weights * (d_weights - delta[None, :])", "weights * d_weights"),
    "delta in another order": (BACKWARD, "if out_ptr.dtype.element_ty == tl.float32:", "if False:"),
    "d_k is not scaled": (BACKWARD, "d_k * scale", "d_k"),
    "the first rows of a block are left out": (
        BACKWARD,
        "lo * GROUP // BLOCK_M * BLOCK_M",
        "tl.cdiv(lo * GROUP, BLOCK_M) * BLOCK_M",
    ),
}


MUTANT_CASES = [
    Case(65, 65, 4, 2, 32),
    Case(33, 70, 2, 1, 32, causal=False),
    Case(20, 140, 2, 1, 32),
    Case(1, 1, 8, 1, 128),  # d_q is the difference of two equal sums
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutate, mutant):
    function = mutate(*MUTANTS[mutant])
    with nullcontext() if mutant == "the unchanged copy" else pytest.raises(AssertionError):
        for case in MUTANT_CASES:
            assert_accurate(function, case, torch.float32)
