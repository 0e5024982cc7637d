"""Attention against a definition that loops over the visible keys of one query at a time, in float64."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from palm_rlhf.ops.attention import attention, choose
from palm_rlhf.ops.attention_reference import visibility
from palm_rlhf.ops.devices import available_implementations

IMPLEMENTATIONS = ["eager", "fused", "chunked"]  # those that run everywhere
BATCH, DIM_HEAD = 3, 6


def naive(q, k, v, *, causal, key_mask=None, document_ids=None):
    """One softmax over the visible keys for every query of every head; nothing visible gives 0."""
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(batch):
        for i in range(num_queries):
            at = i + num_keys - num_queries
            keys = [j for j in range(num_keys) if not causal or j <= at]
            keys = [j for j in keys if key_mask is None or key_mask[b, j]]
            keys = [j for j in keys if document_ids is None or document_ids[b, j] == document_ids[b, at]]
            for h in range(heads if keys else 0):
                kv = h // (heads // kv_heads)
                weights = (k[b, kv, keys] @ q[b, h, i] / math.sqrt(dim)).exp()
                out[b, h, i] = weights @ v[b, kv, keys] / weights.sum()
    return out


def qkv(num_queries, num_keys, *, heads=4, kv_heads=2, dim=DIM_HEAD, batch=BATCH, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, num_queries, dim), *[(batch, kv_heads, num_keys, dim)] * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(function, inputs, **options):
    """The result and the gradients of a fixed projection of it."""
    out = function(*inputs, **options)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    if not out.requires_grad:  # the naive one never touched its inputs: no query saw a key
        return [out, *map(torch.zeros_like, inputs)]
    return [out.detach(), *torch.autograd.grad(out, inputs, direction)]


def assert_equal(got, expected, tolerance=1e-11):
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_close(got, expected, tolerance):
    """Equal but for rounding, in parts of the largest number."""
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), got, expected, strict=True):
        assert float((a.float() - b.float()).abs().max()) <= tolerance * float(b.abs().max().clamp(min=0.1)), name


def lengths_mask(lengths, num_keys, *, left=False):
    columns = torch.arange(num_keys)
    columns = columns.flip(0) if left else columns
    return columns < torch.tensor(lengths).unsqueeze(-1)


MASKS = {
    "plain": {},
    "right padding": {"key_mask": lengths_mask([7, 1, 4], 7)},
    "left padding": {"key_mask": lengths_mask([7, 1, 4], 7, left=True)},
    "holes": {"key_mask": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0]]).bool()},
    "nothing to see": {"key_mask": lengths_mask([7, 0, 0], 7)},
    "documents": {"document_ids": torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5] * 7, [3, 2, 1, 0, -1, -2, -3]])},
    "documents and padding": {
        "document_ids": torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]]),
        "key_mask": torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1]]).bool(),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("num_queries", [7, 3, 1])
def test_every_implementation_equals_the_naive_loop(num_queries, causal, mask):
    inputs, options = qkv(num_queries, 7), {"causal": causal, **MASKS[mask]}
    expected = run(naive, inputs, **options)
    for implementation in [*IMPLEMENTATIONS, "auto"]:
        assert_equal(run(attention, inputs, **options, implementation=implementation), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_of_query_heads_share_a_key_head(implementation, kv_heads):
    for num_queries in (5, 1):
        inputs, options = qkv(num_queries, 5, heads=6, kv_heads=kv_heads), {"causal": True, "key_mask": None}
        expected = run(naive, inputs, **options)
        assert_equal(run(attention, inputs, **options, implementation=implementation), expected)


@settings(max_examples=40)
@given(st.data(), st.integers(1, 40), st.integers(0, 30), st.booleans(), st.booleans(), st.booleans())
def test_implementations_agree_under_any_mask(data, num_queries, cached, causal, padded, packed):
    num_keys, kv_heads = num_queries + cached, data.draw(st.sampled_from([1, 2, 4]))
    inputs = qkv(num_queries, num_keys, kv_heads=kv_heads, seed=data.draw(st.integers(0, 99)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    options = {"causal": causal}
    if padded:
        options["key_mask"] = torch.rand(BATCH, num_keys, generator=generator) < data.draw(st.floats(0, 1))
    if packed:
        options["document_ids"] = torch.randint(4, (BATCH, num_keys), generator=generator).sort(dim=-1).values
    expected = run(attention, inputs, **options, implementation="eager")
    for implementation in ("fused", "chunked", "auto"):
        assert_equal(run(attention, inputs, **options, implementation=implementation), expected)


LONG_MASKS = {
    "plain": lambda n: {},
    "padding": lambda n: {"key_mask": lengths_mask([n, n // 3], n, left=True)},
    "documents": lambda n: {"document_ids": (torch.arange(n) // 97).expand(2, n)},
}


@pytest.mark.parametrize("mask", LONG_MASKS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("num_queries", [611, 300])
def test_long_sequences_agree(num_queries, causal, mask):
    """Long enough for several chunks and blocks of every implementation, none of them full."""
    inputs = qkv(num_queries, 611, batch=2)
    options = {"causal": causal, **LONG_MASKS[mask](611)}
    expected = run(attention, inputs, **options, implementation="eager")
    for implementation in ("fused", "chunked", "auto"):
        assert_equal(run(attention, inputs, **options, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize("mask", [{}, MASKS["left padding"], MASKS["documents"]], ids=["plain", "padding", "documents"])
def test_strides_do_not_matter(implementation, mask):
    inputs = qkv(7, 7)
    expected = run(attention, inputs, causal=True, **mask, implementation="eager")
    for swap in ((1, 2), (2, 3), (1, 3), (0, 2)):
        strided = [t.detach().transpose(*swap).contiguous().transpose(*swap).requires_grad_() for t in inputs]
        assert_equal(run(attention, strided, causal=True, **mask, implementation=implementation), expected)
    doubled = torch.stack([torch.stack((t.detach(), t.detach() + 1), dim=-1) for t in inputs[1:]])
    every_second = [inputs[0], *(t.requires_grad_() for t in doubled[..., 0].unbind())]
    assert_equal(run(attention, every_second, causal=True, **mask, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_sees_nothing_is_zero_and_passes_nothing_back(implementation, dtype):
    key_mask = lengths_mask([0, 3, 7], 7, left=True)
    inputs = qkv(7, 7, dtype=dtype)
    out, *grads = run(attention, inputs, causal=True, key_mask=key_mask, implementation=implementation)
    assert all(t.isfinite().all() for t in (out, *grads))
    assert not out[0].any() and not out[1, :, :4].any() and out[1, :, 4:].any() and out[2].all()
    d_q, d_k, d_v = grads
    assert not any(t[0].any() for t in grads)
    assert not d_q[1, :, :4].any() and not d_k[1, :, :4].any() and not d_v[1, :, :4].any() and d_v[2].all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_keys_and_values_may_hold_anything_finite(implementation):
    """What lies under the mask does not reach the result, huge as it may be."""
    key_mask = MASKS["holes"]["key_mask"]
    hidden = ~key_mask[:, None, :, None]
    inputs = qkv(7, 7)
    garbage = [inputs[0], *(t.detach().masked_fill(hidden, 1e30).requires_grad_() for t in inputs[1:])]
    expected = run(naive, inputs, causal=True, key_mask=key_mask)
    assert_equal(run(attention, garbage, causal=True, key_mask=key_mask, implementation=implementation), expected)


def rms(x, exact):
    return (x.double() - exact).square().mean().sqrt()


@pytest.mark.parametrize("implementation", ["fused", "chunked", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", LONG_MASKS)
def test_low_precision_is_as_exact_as_the_reference(mask, dtype, implementation):
    """Error against float64 of the same rounded inputs, beside that of the definition, which rounds its results alone.

    Outputs: at most 3 times; gradients, whose products round too: at most 5 (PyTorch's own fused backward comes to 4).
    """
    for causal, num_queries in ((True, 320), (True, 100), (False, 320)):
        inputs = qkv(num_queries, 320, batch=2, dim=32, dtype=dtype)
        options = {"causal": causal, **LONG_MASKS[mask](320)}
        wide = [t.detach().double().requires_grad_() for t in inputs]
        exact = run(attention, wide, **options, implementation="eager")
        eager = run(attention, inputs, **options, implementation="eager")
        got = run(attention, inputs, **options, implementation=implementation)
        for name, ours, reference, truth in zip(("out", "d_q", "d_k", "d_v"), got, eager, exact, strict=True):
            assert ours.dtype == dtype
            assert rms(ours, truth) <= (3 if name == "out" else 5) * rms(reference, truth), (name, causal, num_queries)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize("mask", [{}, MASKS["left padding"]], ids=["plain", "padding"])
def test_autocast_does_not_lower_the_precision_inside(implementation, mask):
    """The caller's inputs are bfloat16 already; the scores stay float32."""
    inputs = qkv(7, 7, dtype=torch.bfloat16)
    inputs[0].data.mul_(30)  # peaked: scores rounded to 8 bits would show
    options = {"causal": True, **mask, "implementation": implementation}
    under_autocast = torch.autocast("cpu", torch.bfloat16)(attention)
    assert_equal(run(under_autocast, inputs, **options), run(attention, inputs, **options), tolerance=0)


def test_large_scores_do_not_overflow():
    inputs = [t.detach().mul(300).requires_grad_() for t in qkv(64, 64, dtype=torch.float32)]
    exact = attention(*(t.double() for t in inputs), causal=True, implementation="eager")
    for implementation in IMPLEMENTATIONS:
        out, *grads = run(attention, inputs, causal=True, implementation=implementation)
        torch.testing.assert_close(out.double(), exact.detach(), rtol=1e-3, atol=1e-1)
        assert all(grad.isfinite().all() for grad in grads)


def test_auto_is_what_choose_says():
    for needs_grad in (True, False):
        for num_queries in (1, 3, 7):
            for mask in MASKS.values():
                inputs = [t.detach().requires_grad_(needs_grad) for t in qkv(num_queries, 7)]
                name = choose(*inputs, causal=True, **mask)
                assert name in available_implementations("cpu")
                auto = attention(*inputs, causal=True, **mask)
                assert torch.equal(auto, attention(*inputs, causal=True, **mask, implementation=name))


def test_meta_tensors_need_no_arithmetic():
    q, k, v = (t.to("meta") for t in qkv(7, 7))
    assert attention(q, k, v, causal=True).shape == q.shape


@pytest.mark.parametrize(
    "implementation, mask",
    [("auto", "plain"), ("auto", "documents and padding"), ("eager", "documents"), ("chunked", "documents")],
)
def test_compiles_into_one_graph(implementation, mask):
    def function(q, k, v):
        return attention(q, k, v, causal=True, **MASKS[mask], implementation=implementation)

    torch.compiler.reset()
    inputs = qkv(7, 7, dtype=torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, inputs), run(function, inputs), tolerance=1e-5)


def test_available_implementations_gives_a_reason_for_each_that_cannot_run():
    for device in ("cpu", "cuda"):
        available = available_implementations(device)
        assert set(available) == {"eager", "fused", "chunked", "flex", "triton"}
        assert all(available[name] is None for name in IMPLEMENTATIONS)
        assert all(available[name] is None or len(available[name]) > 10 for name in ("flex", "triton"))


def test_a_named_implementation_runs_or_says_why_not():
    inputs = [t.detach() for t in qkv(16, 16, dim=16, dtype=torch.float32)]
    reason = available_implementations("cpu")["triton"]
    if reason is None:
        out = attention(*inputs, causal=True, implementation="triton")
        torch.testing.assert_close(out, attention(*inputs, causal=True, implementation="eager"), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="triton") as caught:
            attention(*inputs, causal=True, implementation="triton")
        assert reason in str(caught.value)


def test_a_name_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="got implementation='flash', expected one of"):
        attention(*qkv(3, 3), causal=True, implementation="flash")


def shaped(*shapes):
    return [torch.zeros(shape) for shape in shapes]


@pytest.mark.parametrize(
    "tensors, options, message",
    [
        (shaped((4, 7, 6), (2, 7, 6), (2, 7, 6)), {}, "q has shape .4, 7, 6.; expected 4 axes"),
        (shaped((2, 4, 7, 6), (2, 7, 6), (2, 7, 6)), {}, "k has shape .* expected 4 axes"),
        (shaped((2, 4, 7, 6), (2, 2, 7, 6), (2, 2, 8, 6)), {}, "do not fit"),
        (shaped((2, 4, 7, 6), (3, 2, 7, 6), (3, 2, 7, 6)), {}, "do not fit"),
        (shaped((2, 4, 7, 6), (2, 2, 7, 8), (2, 2, 7, 8)), {}, "do not fit"),
        (shaped((2, 4, 7, 6), (2, 3, 7, 6), (2, 3, 7, 6)), {}, "4 query heads and 3 key heads; expected a multiple"),
        (shaped((2, 4, 7, 6), (2, 2, 6, 6), (2, 2, 6, 6)), {}, "7 queries and 6 keys"),
        (
            shaped((2, 4, 7, 6), (2, 2, 6, 6), (2, 2, 6, 6)),
            {"causal": False, "document_ids": torch.zeros(2, 6, dtype=torch.long)},
            "7 queries and 6 keys",
        ),
        (shaped(*[(2, 4, 7, 6)] * 3), {"key_mask": torch.ones(2, 6, dtype=torch.bool)}, "key_mask has shape .2, 6."),
        (shaped(*[(2, 4, 7, 6)] * 3), {"key_mask": torch.ones(2, 7)}, "key_mask is torch.float32; expected torch.bool"),
        (shaped(*[(2, 4, 7, 6)] * 3), {"document_ids": torch.zeros(7)}, "document_ids has shape .7,."),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **{"causal": True, **options})


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(0, 9), st.booleans(), st.integers(0, 5), st.integers(0, 5))
@example(num_queries=1, cached=0, causal=True, start=0, size=1)
def test_visibility_of_a_slice_is_a_slice_of_the_visibility(num_queries, cached, causal, start, size):
    masks = {"key_mask": torch.rand(2, num_queries + cached) < 0.5, "causal": causal}
    whole = visibility(num_queries, num_queries + cached, **masks)
    part = visibility(num_queries, num_queries + cached, **masks, queries=slice(start, start + size))
    assert torch.equal(part, whole[:, start : start + size])


def shifted_diagonal(q, k, v, *, causal, **masks):
    """Aligns the first query with the first key instead of the last with the last."""
    return naive(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]], causal=causal)


def leaks_across_documents(q, k, v, *, causal, key_mask=None, document_ids=None):
    return naive(q, k, v, causal=causal, key_mask=key_mask)


def wrong_group(q, k, v, **masks):
    """Deals the key heads out in turn: head h reads key h mod hk."""
    repeats = q.shape[1] // k.shape[1]
    return naive(q, k.repeat(1, repeats, 1, 1), v.repeat(1, repeats, 1, 1), **masks)


@pytest.mark.parametrize(
    "mutant, mask", [(shifted_diagonal, "plain"), (leaks_across_documents, "documents"), (wrong_group, "plain")]
)
def test_mutants_differ_from_the_naive_loop(mutant, mask):
    inputs, options = qkv(3, 7), {"causal": True, **MASKS[mask]}
    with pytest.raises(AssertionError):
        assert_equal(run(mutant, inputs, **options), run(naive, inputs, **options))
