"""The kernels of fused attention against a definition in float64, and mutants of them that this must reject."""

import importlib
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from palm_rlhf.ops.attention import attention
from palm_rlhf.ops.attention_reference import attention_reference
from palm_rlhf.ops.triton import tiles
from palm_rlhf.ops.triton.attention_keys_backward import rows_of_share, shares
from palm_rlhf.ops.triton.tiles import Tile

# Of the largest exact number, or of 0.1 if that is more.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
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
        if "runs" in self.masks:  # longer than blocks of keys, beginning inside them, and one document comes twice
            starts = torch.tensor([70, 250, 390])
            runs = torch.searchsorted(starts, torch.arange(self.num_keys), right=True)
            options["document_ids"] = torch.tensor([2, 0, 2, 1])[runs].expand(shape).contiguous()
        if "holes" in self.masks:
            keys = torch.arange(self.num_keys)
            kept = ((keys % 280 < 21) | (keys % 280 > 30)) & (keys < 395)
            options["key_mask"] = kept.expand(shape).contiguous()
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


@pytest.mark.parametrize(
    "case, dtype",
    # the types by turns: the kernels compute in float32 whatever they read
    [(case, list(TOLERANCE)[index % 3]) for index, case in enumerate(CASES)],
    ids=str,
)
def test_kernels_are_as_accurate_as_their_dtype(case, dtype):
    assert_accurate(triton, case, dtype)


# Every part of a range of blocks occurs: hidden ones, ones that need a mask, some between them that need none.
RUNS = [
    Case(400, 400, 2, 1, 128, "runs"),
    Case(203, 400, 4, 2, 64, "runs holes", causal=False),
    Case(200, 400, 2, 1, 64, "runs"),
    Case(330, 330, 2, 1, 32, "holes"),
]


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_blocks_that_need_no_mask_are_between_blocks_that_do(case):
    assert_accurate(triton, case, torch.float32)


def test_the_masks_of_a_case_are_those_it_names():
    options = RUNS[1].options()
    ids, kept = options["document_ids"][0], options["key_mask"][0]
    assert [int(ids[i]) for i in (0, 69, 70, 249, 250, 389, 390)] == [2, 2, 0, 0, 2, 2, 1]
    assert (~kept).nonzero().flatten().tolist() == [*range(21, 31), *range(301, 311), *range(395, 400)]


@pytest.mark.parametrize("dim", [64, 256])
def test_rows_in_shares_are_as_accurate(dim, monkeypatch):
    """On a GPU with so many multiprocessors that the rows of a block of keys are split among programs."""
    monkeypatch.setattr(tiles, "properties", lambda device: ("sm_90", 108))
    case = Case(300, 330, 4, 1, dim, "runs")
    assert_accurate(triton, case, torch.float32)
    assert shares(6, 108) > 1 and rows_of_share(300, 4, shares(6, 108), Tile(64, 64, 4)) == 512 < 300 * 4


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


MASKS, FORWARD, BACKWARD = "attention_masks.py", "attention_forward.py", "attention_backward.py"
KEYS = "attention_keys_backward.py"
MUTANTS = {
    "the unchanged copy": (MASKS, "at[:, None] >= keys[None, :]", "at[:, None] >= keys[None, :]"),
    "the diagonal is hidden": (MASKS, "at[:, None] >= keys[None, :]", "at[:, None] > keys[None, :]"),
    "the next key is visible": (MASKS, "at[:, None] >= keys[None, :]", "at[:, None] + 1 >= keys[None, :]"),
    "the scale is missing": (FORWARD, "dim**-0.5 * LOG2_E", "LOG2_E"),
    "powers of e": (FORWARD, "dim**-0.5 * LOG2_E", "dim**-0.5"),
    "one block too many without a mask": (FORWARD, "full = first_at + 1", "full = first_at + 1 + BLOCK_N"),
    "the old sum is not scaled": (FORWARD, "row_sum * shrink +", "row_sum +"),
    "keys past the end count": (MASKS, "exists = keys < num_keys", "exists = keys < num_keys + 1"),
    "heads dealt out in turn": (FORWARD, "kv_head * GROUP + rows % GROUP", "kv_head + rows % GROUP * 2"),
    "the backward's diagonal is hidden": (KEYS, "[None, :] >= keys[:, None]", "[None, :] > keys[:, None]"),
    "no delta": (KEYS, "weights * (d_weights - delta[None, :])", "weights * d_weights"),
    "delta in another order": (BACKWARD, "if out_ptr.dtype.element_ty == tl.float32:", "if False:"),
    "d_k is not scaled": (KEYS, "d_k * scale", "d_k"),
    "the first rows of a block are left out": (
        KEYS,
        "tl.maximum(first_key - shift, 0) * GROUP // BLOCK_M * BLOCK_M",
        "tl.cdiv(tl.maximum(first_key - shift, 0) * GROUP, BLOCK_M) * BLOCK_M",
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
    with rejected(mutant):
        for case in MUTANT_CASES:
            assert_accurate(function, case, torch.float32)


RUN = "tl.where(step < whole, step, step + full - whole)"
MASK_MUTANTS = {  # and the case that it spoils
    "the unchanged copy": (MASKS, "whole & (kept == 2)", "whole & (kept == 2)", 2),
    "rows of several documents see all": (MASKS, " & (low_id == high_id)", "", 2),
    "blocks of several documents are seen whole": (MASKS, " & (lowest == highest)", "", 2),
    "blocks with a hidden key are seen whole": (MASKS, "whole & (kept == 2)", "whole & (kept > 0)", 1),
    "blocks after the run are seen whole": (MASKS, "tl.maximum(whole, lo), end", "tl.maximum(whole, lo), stop", 2),
    "keys after the run are left out": (FORWARD, RUN, "step", 0),
    "d_q lacks the keys after the run": (BACKWARD, RUN, "step", 0),
    "d_k lacks the rows after the run": (KEYS, RUN, "step", 1),
    "a block is left out": (MASKS, "tl.maximum(first, lo), stop", "tl.maximum(first, lo) + POSITIONS, stop", 2),
    "rows before the run need no mask": (
        KEYS,
        "tl.cdiv((seen - shift) * GROUP, BLOCK_M) * BLOCK_M",
        "(seen - shift) * GROUP // BLOCK_M * BLOCK_M",
        1,
    ),
    "blocks have the document of their first position": (
        MASKS,
        "tl.where(exists, tl.load",
        "tl.where(~exists, tl.load",
        2,
    ),
}
SHARE_MUTANTS = {
    "the unchanged copy": (KEYS, "tl.range(first, num_shares)", "tl.range(first, num_shares)"),
    "the first share is left out": (KEYS, "tl.range(first, num_shares)", "tl.range(first + 1, num_shares)"),
    "a share is not written": (KEYS, "tl.program_id(2) >= first_share", "tl.program_id(2) > first_share"),
    "rows are in two shares": (KEYS, "tl.program_id(2) * share + share", "tl.program_id(2) * share + share + BLOCK_M"),
}


def rejected(name: str) -> AbstractContextManager:
    """Within, an error is expected, unless the mutant is none."""
    return nullcontext() if name == "the unchanged copy" else pytest.raises(AssertionError)


@pytest.mark.parametrize("mutant", MASK_MUTANTS)
def test_mutants_of_masks_are_rejected(mutate, mutant):
    *change, case = MASK_MUTANTS[mutant]
    function = mutate(*change)
    with rejected(mutant):
        assert_accurate(function, RUNS[case], torch.float32)


@pytest.mark.parametrize("mutant", SHARE_MUTANTS)
def test_mutants_of_shares_are_rejected(mutate, mutant, monkeypatch):
    function = mutate(*SHARE_MUTANTS[mutant])
    monkeypatch.setattr(importlib.import_module("mutant_ops.tiles"), "properties", lambda device: ("sm_90", 108))
    with rejected(mutant):
        assert_accurate(function, Case(300, 330, 4, 1, 64), torch.float32)
