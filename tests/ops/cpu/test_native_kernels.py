"""The kernels in C beside definitions in float64: attention, SwiGLU, rotary positions. Where they cannot run, that."""

import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from palm_rlhf.ops.attention import attention
from palm_rlhf.ops.cpu import native_attention, native_elementwise
from palm_rlhf.ops.cpu.native_attention import backward_native, forward_native, key_spans
from palm_rlhf.ops.rotary import rotary_tables


def where_it_runs(test):
    """The test, or on a processor without such products, that the kernels say why they cannot run."""
    if not native_attention.is_faster():
        return lambda: torch.cpu._is_amx_tile_supported() or pytest.fail()
    reason = native_attention.why_not(*qkv(1, 1, 1, 4, 4, 32))
    return test if reason is None else lambda: re.search("AVX512_BF16|compil|PALM_RLHF_NATIVE", reason) or pytest.fail()


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}  # of one number, relative


def drawn(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(batch, heads, kv_heads, queries, keys, dim, seed=0):
    """Queries and values with the heads of a position side by side, keys with the positions of a head."""
    q, v = drawn(batch, queries, heads, dim, seed=seed), drawn(batch, keys, kv_heads, dim, seed=seed + 2)
    return q.transpose(1, 2), drawn(batch, kv_heads, keys, dim, seed=seed + 1), v.transpose(1, 2)


def by_definition(q, k, v, causal, key_mask=None, document_ids=None):
    """Attention, its log-sum-exps, and the gradients of a fixed projection, in float64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    group, ahead = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    hidden = torch.zeros(len(q), 1, *scores.shape[-2:], dtype=torch.bool)
    if causal:
        hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + ahead)
    if key_mask is not None:
        hidden |= ~key_mask[:, None, None]
    if document_ids is not None:
        hidden |= document_ids[:, None, ahead:, None] != document_ids[:, None, None]
    weights = scores.masked_fill(hidden, -1e300).softmax(-1).masked_fill(hidden, 0.0)
    out = weights @ v.repeat_interleave(group, 1)
    lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    return out, lse, torch.autograd.grad(out, (q, k, v), drawn(*q.shape, seed=9).double())


def by_kernel(q, k, v, causal, **masks):
    spans = key_spans(q, k, causal=causal, **masks)
    out, lse = forward_native(q, k, v, spans)
    return out, lse, backward_native(q, k, v, spans, out, lse, drawn(*q.shape, seed=9))


CANCELLED = 1e-3  # gradients of a smaller norm are sums of float32 that cancel: of the scores where one key is seen


def distance(got, expected):
    """Of two tensors, relative to the second's size; a NaN is infinitely far from everything."""
    got, expected = got.detach().double(), expected.detach().double()
    return float(((got - expected).norm() / expected.norm().clamp(min=CANCELLED)).nan_to_num(nan=math.inf))


def worst(q, k, v, causal, **masks):
    """The largest distance of what the kernels give from what the definition gives."""
    out, lse, grads = by_kernel(q, k, v, causal, **masks)
    expected, expected_lse, expected_grads = by_definition(q, k, v, causal, **masks)
    seen = expected_lse.isfinite()
    torch.testing.assert_close(lse[seen].double(), expected_lse[seen], rtol=0, atol=1e-4)
    assert not out[~seen].any() and (lse[~seen] == -torch.inf).all()
    distances = [distance(*pair) for pair in zip((out, *grads), (expected, *expected_grads), strict=True)]
    return float(torch.tensor(distances).max())  # which is NaN where one of them is


SHAPES = {
    "batch": st.integers(1, 3),
    "kv_heads": st.integers(1, 2),
    "group": st.integers(1, 5),
    "queries": st.integers(1, 70),
    "before": st.integers(0, 40),
    "dim": st.sampled_from([32, 64, 96]),
    "causal": st.booleans(),
    "threads": st.sampled_from([1, 2, 5]),
}
TWICE_ROUNDED = 2 * 2**-9  # weights are rounded, and results


@where_it_runs
@settings(max_examples=25)
@given(**SHAPES)
@example(batch=1, kv_heads=1, group=8, queries=600, before=0, dim=64, causal=True, threads=2)
@example(batch=1, kv_heads=2, group=2, queries=30, before=500, dim=32, causal=True, threads=5)
def test_attention_is_its_definition(batch, kv_heads, group, queries, before, dim, causal, threads):
    inputs = qkv(batch, kv_heads * group, kv_heads, queries, queries + before, dim)
    assert native_attention.why_not(*inputs) is None
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert worst(*inputs, causal) < TWICE_ROUNDED
    finally:
        torch.set_num_threads(usual)


def masks_of(batch, keys, edges, cuts):
    """Rows whose real keys begin and end at the fractions `edges` of them, and documents that end at the `cuts`."""
    columns, (first, last) = torch.arange(keys), sorted(int(edge * keys) for edge in edges)
    key_mask = torch.stack([(columns >= first - row) & (columns < last) for row in range(batch)])
    document_ids = torch.stack([sum((columns >= int(cut * keys) + row).long() for cut in cuts) for row in range(batch)])
    return {"key_mask": key_mask, "document_ids": 7 - document_ids}


MASKS = {
    "edges": st.tuples(st.floats(0, 1), st.floats(0, 1)),
    "cuts": st.lists(st.floats(0, 1), min_size=1, max_size=4),
    "which": st.sampled_from([("key_mask",), ("document_ids",), ("key_mask", "document_ids")]),
}


@where_it_runs
@settings(max_examples=40)
@given(**SHAPES | {"queries": st.integers(8, 70)}, **MASKS)
@example(2, 1, 8, 600, 0, 64, True, 2, (0.0, 1.0), [0.3, 0.5, 0.9], ("document_ids",))
@example(2, 1, 2, 40, 560, 32, True, 2, (0.6, 0.9), [0.2], ("key_mask",))
@example(1, 1, 2, 600, 0, 32, False, 1, (0.6, 0.9), [0.95], ("key_mask", "document_ids"))
@example(2, 1, 1, 8, 0, 64, False, 1, (1.0, 1.0), [0.0], ("key_mask",))  # one row sees no key, the other one
def test_masked_attention_is_its_definition(
    batch, kv_heads, group, queries, before, dim, causal, threads, edges, cuts, which
):
    inputs = qkv(batch, kv_heads * group, kv_heads, queries, queries + before, dim)
    masks = masks_of(batch, queries + before, edges, cuts)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert worst(*inputs, causal, **{name: masks[name] for name in which}) < 2 * TWICE_ROUNDED  # small sums cancel
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("mask", [{"key_mask": [1, 1, 0, 1]}, {"document_ids": [3, 3, 5, 3]}], ids=str)
def test_keys_with_a_gap_have_no_span(mask):
    q, k, _ = qkv(2, 2, 1, 4, 4, 32)
    fine = {name: torch.tensor([values[:3] + values[2:3], values[:3] + values[2:3]]) for name, values in mask.items()}
    gap = {name: torch.stack((rows[0], torch.tensor(mask[name]))) for name, rows in fine.items()}
    fine, gap = ({n: t.bool() if n == "key_mask" else t for n, t in each.items()} for each in (fine, gap))
    assert key_spans(q, k, causal=True, **fine) is not None
    assert key_spans(q, k, causal=True, **gap) is None


@where_it_runs
def test_where_one_key_is_seen_its_value_is_all_and_the_scores_have_no_gradient():
    q, k, v = qkv(1, 2, 1, 8, 8, 64)
    key_mask = torch.arange(8)[None] == 3
    out, _, (d_q, d_k, d_v) = by_kernel(q, k, v, False, key_mask=key_mask)
    assert torch.equal(out, v[:, :, 3:4].expand_as(out))
    assert max(float(d_q.abs().max()), float(d_k.abs().max())) < 1e-5
    everything = drawn(*q.shape, seed=9).double().sum(dim=(1, 2))
    assert distance(d_v[:, 0, 3], everything) < TWICE_ROUNDED
    assert not d_v[:, :, :3].any() and not d_v[:, :, 4:].any()


@where_it_runs
def test_documents_in_a_row_change_no_bit_of_each_other():
    q, k, v = qkv(1, 4, 2, 50, 50, 64)
    out, _, _ = by_kernel(q, k, v, True, document_ids=(torch.arange(50) >= 20)[None].long())
    alone = by_kernel(q[:, :, :20], k[:, :, :20], v[:, :, :20], True)[0]
    assert torch.equal(out[:, :, :20], alone)


@where_it_runs
def test_equal_keys_give_the_mean_of_the_values_that_are_seen():
    q, k, v = torch.zeros(1, 2, 8, 32), drawn(1, 1, 8, 32), torch.arange(8.0)[None, None, :, None].expand(1, 1, 8, 32)
    out, lse, (_, d_k, d_v) = by_kernel(*(t.bfloat16() for t in (q, k, v)), causal=True)
    seen = torch.arange(1.0, 9.0)
    assert torch.equal(out[0, 0, :, 0].float(), ((seen - 1) / 2).bfloat16().float())
    torch.testing.assert_close(lse[0, 1], seen.log())
    assert not d_k.any() and d_v.any()


@where_it_runs
def test_what_comes_later_changes_no_bit():
    q, k, v = qkv(2, 4, 2, 40, 40, 64)
    out, lse, _ = by_kernel(q, k, v, causal=True)
    later_k, later_v = k.clone(), v.clone()
    later_k[:, :, 20:], later_v[:, :, 20:] = 7.0, 1e4
    changed, changed_lse = forward_native(q, later_k, later_v, key_spans(q, k, causal=True))
    assert torch.equal(changed[:, :, :20], out[:, :, :20]) and torch.equal(changed_lse[:, :, :20], lse[:, :, :20])


@where_it_runs
def test_attention_is_the_same_wherever_the_numbers_lie():
    dense = [t.contiguous() for t in qkv(2, 4, 2, 33, 33, 32)]
    spread = [torch.cat((t, t), dim=-2).transpose(0, 1).contiguous().transpose(0, 1)[..., :33, :] for t in dense]
    got, expected = by_kernel(*spread, True), by_kernel(*dense, True)
    assert all(map(torch.equal, (got[0], got[1], *got[2]), (expected[0], expected[1], *expected[2])))


@where_it_runs
def test_auto_takes_the_kernels_for_bfloat16_alone_and_autograd_knows_them():
    for masks in ({}, {"document_ids": (torch.arange(20) // 7)[None]}, {"key_mask": (torch.arange(20) > 3)[None]}):
        q, k, v = (t.detach().requires_grad_() for t in qkv(1, 4, 1, 20, 20, 64))
        attention(q, k, v, causal=True, **masks).backward(drawn(*q.shape, seed=9))
        for t, grad in zip((q, k, v), by_kernel(q.detach(), k.detach(), v.detach(), True, **masks)[2], strict=True):
            assert torch.equal(t.grad, grad)
    assert "bfloat16" in native_attention.why_not(q.float(), k.float(), v.float())
    assert "multiple of 32" in native_attention.why_not(*(t[..., :40] for t in (q, k, v)))
    assert "not dense" in native_attention.why_not(*(t.mT.contiguous().mT for t in (q, k, v)))


@pytest.fixture
def used_memory():
    """All bits of the memory that PyTorch gives out are set, so that reading it before writing always shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow(9)
@pytest.mark.parametrize(
    "file, old, new",
    [
        ("attention_forward.c", "s->stop[place], from", "s->stop[place] - 1, from"),
        ("attention_forward.c", "s->first[place], s->stop", "from, s->stop"),
        ("attention_forward.c", "from * LANES, LANES * width", "0, LANES * width"),
        ("attention_forward.c", "(scores[j] - most) * scale", "(scores[j] - most)"),
        ("attention_forward.c", "most * scale + logf", "most + logf"),
        ("attention_forward.c", "(r - start) * d + c] / sums[r - start]", "(r - start) * d + c] / sums[0]"),
        ("attention_backward.c", "key < rows->stop[r]", "key <= rows->stop[r]"),
        ("attention_backward.c", "key >= rows->first[r]", "1"),
        ("attention_backward.c", "first > from / CHUNK * CHUNK;", "first > 0;"),
        ("attention_backward.c", "+ (from - first) * LANES", ""),
        ("attention_backward.c", "- rows->delta[r]", ""),
        ("attention_backward.c", "before, sums", "0, sums"),
        ("attention_backward.c", "(long part = 0; part < parts; part++", "(long part = 1; part < parts; part++"),
        ("attention_backward.c", "* BLOCK + r - start] * s->scale", "* BLOCK + r - start]"),
        ("attention_backward.c", "of_key * s->scale", "of_key"),
        ("attention_backward.c", "(first % CHUNK + k) * LANES", "k * LANES"),
        ("attention.h", "_mm512_loadu_ps(c + r * c_row) :", "_mm512_setzero_ps() :"),
    ],
)
def test_a_mutant_of_attention_is_found_out(used_memory, mutate, file, old, new):
    inputs, masks = qkv(1, 4, 2, 120, 600, 32), {"document_ids": (torch.arange(600) // 190)[None]}
    if native_attention.why_not(*inputs) is not None:
        return
    assert worst(*inputs, True, **masks) < TWICE_ROUNDED
    mutate(file, old, new)
    try:
        found = worst(*qkv(1, 4, 2, 120, 600, 32, seed=5), True, **masks)
    except AssertionError:
        return  # the log-sum-exps already differ
    assert not found <= 4 * TWICE_ROUNDED  # it may be NaN


def swiglu_by_definition(gate, value, d_hidden):
    gate, value = (t.double().requires_grad_() for t in (gate, value))
    hidden = gate / (1 + (-gate).exp()) * value
    return *torch.autograd.grad(hidden, (gate, value), d_hidden.double()), hidden.detach()


def swiglu_distance(dtype, n=1003):
    gate, value, d_hidden = (drawn(n, dtype=dtype, seed=seed) * 4 for seed in range(3))
    expected = swiglu_by_definition(gate, value, d_hidden)
    forward = distance(native_elementwise.swiglu_native(gate, value), expected[-1])
    return max(forward, *map(distance, native_elementwise.swiglu_backward_native_(d_hidden, gate, value), expected))


@DTYPES
@pytest.mark.parametrize("n", [1, 15, 64, 1003])
def test_swiglu_is_its_definition_rounded_once(dtype, n):
    if native_elementwise.why_not_swiglu(torch.ones(1)) is None:
        assert swiglu_distance(dtype, n) < 8 * 2**-24 + ROUNDING[dtype]


def test_swiglu_of_extreme_gates():
    if native_elementwise.why_not_swiglu(torch.ones(1)) is None:
        gate = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30, torch.nan])
        got = native_elementwise.swiglu_native(gate, torch.ones(7))
        torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.0, 0.0, 200.0, 1e30, torch.nan]), equal_nan=True)


def rotation_distance(dtype, *, per_head=False, rows=2):
    x = drawn(2, 7, 5, 8, dtype=dtype)[..., 1:4, :]
    cos, sin = (t[:, :, None] for t in rotary_tables(torch.arange(rows * 7).view(rows, 7), 8))
    if per_head:
        cos, sin = (torch.cat((t, 2 * t, 3 * t), dim=2) for t in (cos, sin))
    first, second = x.double().chunk(2, dim=-1)
    expected = x.double() * cos + torch.cat((second, first), dim=-1) * sin
    got = native_elementwise.rotate_native(x, cos, sin)
    if per_head:
        return distance(got, expected)
    back = native_elementwise.rotate_native(got, cos, sin, inverse=True, out=torch.empty_like(x))
    return max(distance(got, expected), distance(back, x.double()) / 2)


@DTYPES
@pytest.mark.parametrize("per_head", [False, True], ids=["one table", "a table a head"])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation_is_its_definition_and_turns_back(dtype, per_head, rows):
    if native_elementwise.why_not_swiglu(torch.ones(1)) is None:
        assert rotation_distance(dtype, per_head=per_head, rows=rows) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize(
    "old, new, distance_of",
    [
        ("(1.0f + g - silu)", "(1.0f - silu)", swiglu_distance),
        ("OF(store)(d * silu)", "OF(store)(d * sigmoid)", swiglu_distance),
        ("OF(store)(silu * v)", "OF(store)(silu)", swiglu_distance),
        ("first * sine[i + half] * s->sign", "first * sine[i] * s->sign", rotation_distance),
        ("second * sine[i] * s->sign", "second * sine[i]", rotation_distance),
        ("head * s->table_head_stride", "0", lambda dtype: rotation_distance(dtype, per_head=True)),
        ("batch * s->table_batch_stride", "0", rotation_distance),
    ],
)
def test_a_mutant_of_the_elementwise_kernels_is_found_out(mutate, old, new, distance_of):
    if native_elementwise.why_not_swiglu(torch.ones(1)) is None:
        assert distance_of(torch.float32) < 1e-5
        mutate("elementwise_body.h", old, new)
        assert distance_of(torch.float32) > 1e-3


def test_kernels_take_neither_other_types_nor_strides():
    why_not = native_elementwise.why_not_swiglu
    assert "float32" in why_not(torch.ones(4, dtype=torch.float64))
    assert "contiguous" in why_not(torch.ones(4, 5).mT)
    assert "several dtypes" in why_not(torch.ones(4), torch.ones(4).bfloat16())
    assert "empty" in why_not(torch.ones(0))
    x, table = torch.ones(1, 4, 2, 6), torch.ones(1, 4, 1, 6)
    assert "float32" in native_elementwise.why_not_rotate(x, table.double(), table.double())
    assert "strides" in native_elementwise.why_not_rotate(x, table, torch.ones(4, 1, 1, 6).transpose(0, 1))
    assert "not dense" in native_elementwise.why_not_rotate(torch.ones(1, 4, 6, 2).mT, table, table)
