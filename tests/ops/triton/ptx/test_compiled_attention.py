"""The kernels of fused attention, launched by their own launchers, in the PTX that Triton compiles for sm_80.

Every case is at the same time a proof that they read no byte out of bounds or never written, and race nowhere: the
emulated GPU raises at the first.
"""

import importlib
import math
import re
import sys
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from palm_rlhf.ops.triton.attention_backward import backward
from palm_rlhf.ops.triton.attention_decode import decode
from palm_rlhf.ops.triton.attention_forward import forward

from .driver import emulated
from .memory import NotLanded, OutOfBounds, Race, Uninitialised

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the largest exact number


class Case(NamedTuple):
    """Lengths that fill no tile; enough keys for the loops to start, go round and end, with and without a mask."""

    dim: int
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    masked: bool = False
    causal: bool = True
    num_shares: int = 1
    first_document: int = 0  # of two, the length; each is seen whole but at its edges

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of the result, in memory with gaps between the rows, that hold NaN."""
        lengths, heads = (self.num_queries, self.num_keys, self.num_keys), (self.heads, self.kv_heads, self.kv_heads)
        tensors = []
        for length, width in zip((*lengths, lengths[0]), (*heads, heads[0]), strict=True):
            rows = torch.full((1, length, width, self.dim + 16), float("nan"), dtype=dtype)[..., : self.dim]
            tensors.append(rows.copy_(torch.randn(rows.shape)).transpose(1, 2))
        return tensors

    def masks(self) -> dict[str, Tensor | None]:
        """The first document and some keys are hidden from the last, and rows are left that see nothing."""
        if self.first_document:
            ids = torch.arange(self.num_keys) >= self.first_document
            return {"key_mask": None, "document_ids": ids.long().expand(1, -1).contiguous()}
        if not self.masked:
            return {"key_mask": None, "document_ids": None}
        key_mask, ids = torch.rand(1, self.num_keys) < 0.7, torch.randint(3, (1, self.num_keys)).sort(dim=-1).values
        key_mask[:, torch.arange(self.num_keys) > self.num_keys - 9] = False
        return {"key_mask": key_mask, "document_ids": ids}


CASES = [
    Case(64, 6, 2, 60, 230),
    Case(64, 3, 1, 100, 150, masked=True, num_shares=2),
    Case(128, 5, 1, 60, 230, num_shares=2),
    Case(128, 8, 2, 40, 150, masked=True),
    Case(256, 2, 1, 20, 70),
]
FULL = Case(64, 2, 2, 70, 70, causal=False)
RUNS = list(product(CASES, TOLERANCE))


def exact(q, k, v, *, causal, key_mask=None, document_ids=None):
    """Softmax over the visible keys, in float64; 0 where there is none."""
    (num_queries, num_keys), group = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    at = torch.arange(num_keys - num_queries, num_keys)
    visible = torch.ones(1, num_queries, num_keys, dtype=torch.bool)
    if causal:
        visible = visible & (at[:, None] >= torch.arange(num_keys))
    if key_mask is not None:
        visible = visible & key_mask[:, None, :]
    if document_ids is not None:
        visible = visible & (document_ids[:, at, None] == document_ids[:, None, :])
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    weights = torch.where(visible[:, None], (q @ k.mT / q.shape[-1] ** 0.5).exp(), 0)
    return weights @ v / weights.sum(dim=-1, keepdim=True).clamp(min=1e-300)


def assert_accurate(results, expected, dtype) -> None:
    for got, truth in zip(results, expected, strict=True):
        assert got.dtype == dtype
        error = (got.double() - truth).abs().max()
        assert error <= TOLERANCE[dtype] * truth.abs().max(), f"{error} of {truth.abs().max()}"


WHOLE = Case(64, 16, 1, 40, 200, masked=True, first_document=30)


@pytest.mark.parametrize("case, dtype", [*RUNS, (FULL, torch.bfloat16), (WHOLE, torch.float16)], ids=str)
def test_training(case, dtype):
    q, k, v, d_out = case.tensors(dtype)
    masks = case.masks()
    with emulated() as gpu:
        out, lse = forward(q, k, v, case.causal, **masks)
        gradients = backward(d_out, q, k, v, out, lse, case.causal, **masks, num_shares=case.num_shares)
    launched = [program.name.removesuffix("_kernel") for program in gpu.launched]
    summary, shares = ["summary"] * case.masked, ["sum_shares"] * (case.num_shares > 1)
    assert launched == [*summary, "forward", *summary, "delta", "queries_backward", "keys_backward", *shares]
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    truth = exact(*inputs, causal=case.causal, **masks)
    assert_accurate((out, *gradients), (truth, *torch.autograd.grad(truth, inputs, d_out.double())), dtype)


def test_sums_stay_as_they_are_while_the_maximum_does():
    """Every key has the same score, whose scaled value is rounded: 31 blocks later the first still counts as 1.

    A factor of 1 and a rounding error for every block would favour late keys or early ones, ever more with the length.
    """
    num_keys = 2048
    q, k = torch.randn(1, 8, 1, 64, dtype=torch.float16), torch.randn(1, 1, 1, 64, dtype=torch.float16)
    keys = k.expand(-1, -1, num_keys, -1).contiguous()
    with emulated():
        _, lse = forward(q, keys, keys, False, None, None)
    exactly = (q.double() * k.double()).sum(dim=-1).flatten() / 8 * math.log2(math.e) + math.log2(num_keys)
    assert (lse.flatten() - exactly).abs().max() <= 1e-6  # a unit in the last place


@pytest.mark.parametrize("case, dtype", RUNS, ids=str)
def test_decoding(case, dtype):
    q, k, v, _ = case.tensors(dtype)
    q, key_mask = q[:, :, :2], case.masks()["key_mask"]
    with emulated() as gpu:
        out = decode(q, k, v, True, key_mask, num_splits=1 if case.masked else 3)
    assert [program.name for program in gpu.launched] == ["decode_kernel", "combine_kernel"][: 1 if case.masked else 2]
    assert_accurate([out], [exact(*(t.double() for t in (q, k, v)), causal=True, key_mask=key_mask)], dtype)


def train(edit=None, masked: bool = False, forward=forward) -> None:
    """Launch all kernels for a small case, in PTX that was edited."""
    case = Case(64, 2, 1, 33, 140, masked)
    q, k, v, d_out = case.tensors(torch.float16)
    masks = case.masks()
    with emulated(edit):
        out, lse = forward(q, k, v, True, **masks)
        backward(d_out, q, k, v, out, lse, True, **masks)


def drop(statement: str, kernel: str, which: int):
    """An edit that removes one of the places where a kernel has a statement."""

    def edit(ptx: str) -> str:
        if f".entry {kernel}(" not in ptx:
            return ptx
        place = list(re.finditer(statement, ptx))[which]
        return ptx[: place.start()] + ptx[place.end() :]

    return edit


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    """The PTX of the kernels by their names."""
    found = {}

    def keep(ptx: str) -> str:
        found[re.search(r"\.entry (\w+)", ptx)[1]] = ptx
        return ptx

    train(keep)
    return found


def faults_without(statement: str, kernel: str, ptx: str) -> list[type | None]:
    """What happens to a kernel that lacks the statement in one place, for each place."""
    faults = []
    for which in range(len(re.findall(statement, ptx))):
        try:
            train(drop(statement, kernel, which))
            faults.append(None)
        except (Race, NotLanded) as fault:
            faults.append(type(fault))
    return faults


@pytest.mark.parametrize("kernel", ["forward_kernel", "keys_backward_kernel"])
def test_a_dropped_barrier_is_caught(kernel, compiled):
    """Nearly every one: after a loop there is one more than needed."""
    faults = faults_without(r"bar\.sync\s+0;", kernel, compiled[kernel])
    assert faults.count(None) <= 2 < len(faults) and set(faults) - {None} == {Race}, faults


@pytest.mark.parametrize("kernel", ["forward_kernel", "queries_backward_kernel"])
def test_a_dropped_wait_for_copies_is_caught(kernel, compiled):
    """All but the last of all, behind which nobody touches what was copied."""
    faults = faults_without(r"cp\.async\.wait_group[^;]*;", kernel, compiled[kernel])
    assert faults[:-1] == [NotLanded] * (len(faults) - 1) and len(faults) >= 3, faults


@pytest.fixture
def mutate(root, tmp_path, monkeypatch):
    """`mutate(file, old, new)` launches the forward of a copy of the kernels in which `old` became `new`."""

    def mutant(file: str, old: str, new: str):
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
        return importlib.import_module("mutant_ops.attention_forward").forward

    yield mutant
    for name in [name for name in sys.modules if name.split(".")[0] == "mutant_ops"]:
        del sys.modules[name]


FORWARD, MASKS, TILES = "attention_forward.py", "attention_masks.py", "tiles.py"
LESS, SUMS = "rows * stride, rows < count", "rows, lse, mask=inside)"
MUTANTS = {
    "a key too many is read": (OutOfBounds, TILES, LESS, LESS.replace("<", "<=")),
    "rows past the end are read": (OutOfBounds, TILES, "elif CHECK:", "elif False:"),
    "a document id too many is read": (OutOfBounds, MASKS, "exists = positions < num_keys", "exists = positions >= 0"),
    "a block too many is read": (OutOfBounds, MASKS, "inside = blocks < stop", "inside = blocks <= stop + num_blocks"),
    "rows past the end are written": (OutOfBounds, FORWARD, SUMS, "rows, lse)"),
    "one sum is unwritten": (Uninitialised, FORWARD, SUMS, "rows, lse, mask=inside & (rows > 0))"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_caught(name, mutate):
    fault, *change = MUTANTS[name]
    with pytest.raises(fault):
        train(masked=True, forward=mutate(*change))
