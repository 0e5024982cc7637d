"""Rotary positions against complex numbers, and the laws that make them relative."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from palm_rlhf.ops.rotary import rotary_split, rotary_tables, rotate, xpos_scales

DIM, HEADS, KV_HEADS = 8, 4, 2
POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 100, 0, 3]])


def turned(x, positions, theta=10000.0, *, xpos=0):
    """First half + i second half, times exp(i position theta^(-2m/d)): x `... n h d`, positions `... n`.

    xPos: a query (1) or a key (-1) is also multiplied by ((2m/d + 0.4) / 1.4)^(+-position / 512).
    """
    dim, at = x.shape[-1], positions.double()[..., None, None]
    angles = at * torch.tensor([theta ** (-2 * m / dim) for m in range(dim // 2)], dtype=torch.float64)
    zeta = torch.tensor([(2 * m / dim + 0.4) / 1.4 for m in range(dim // 2)], dtype=torch.float64)
    z = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.polar(zeta ** (xpos * at / 512), angles)
    return torch.cat((z.real, z.imag), dim=-1)


def tables(positions, theta=10000.0, dim=DIM, dtype=torch.float64):
    return [t.unsqueeze(-2) for t in rotary_tables(positions, dim, theta=theta, dtype=dtype)]


def xpos_tables(positions, *, heads=HEADS, kv_heads=KV_HEADS, dim=DIM):
    """A row for each head: queries enlarged, keys shrunk."""
    scale = xpos_scales(positions, dim, dtype=torch.float64).unsqueeze(-2)
    scales = torch.cat([scale] * heads + [1 / scale] * kv_heads, dim=-2)
    return [t * scales for t in tables(positions, dim=dim)]


def fused(positions, *, heads=HEADS, kv_heads=KV_HEADS, dim=DIM):
    return torch.randn(*positions.shape, heads + 2 * kv_heads, dim, dtype=torch.float64)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotation_is_complex_multiplication(theta):
    x = fused(POSITIONS)
    torch.testing.assert_close(rotate(x, *tables(POSITIONS, theta)), turned(x, POSITIONS, theta), rtol=0, atol=1e-12)


def test_a_quarter_turn_by_hand():
    """With d = 2 the only angle is the position, in radians."""
    cos, sin = rotary_tables(torch.tensor([math.pi / 2, math.pi]), 2, dtype=torch.float64)
    rotated = rotate(torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64), cos, sin)
    torch.testing.assert_close(rotated, torch.tensor([[-4.0, 3.0], [-3.0, -4.0]], dtype=torch.float64))


def test_position_zero_changes_nothing():
    x = fused(torch.zeros(1, 3))
    assert torch.equal(rotate(x, *tables(torch.zeros(1, 3, dtype=torch.long))), x)


def test_split_rotates_queries_and_keys_and_leaves_values():
    qkv = fused(POSITIONS)
    q, k, v = rotary_split(qkv, *tables(POSITIONS), heads=HEADS, kv_heads=KV_HEADS)
    expected_q, expected_k, expected_v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=-2)
    torch.testing.assert_close(q, turned(expected_q, POSITIONS), rtol=0, atol=1e-12)
    torch.testing.assert_close(k, turned(expected_k, POSITIONS), rtol=0, atol=1e-12)
    assert torch.equal(v, expected_v)


@settings(max_examples=50)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000), st.sampled_from([1e4, 5e5]), st.booleans())
def test_scores_see_distances_only(i, j, shift, theta, xpos):
    generator = torch.Generator().manual_seed(i)
    q, k = torch.randn(2, 1, 1, DIM, generator=generator, dtype=torch.float64)

    def score(at_q, at_k):
        positions = torch.tensor([at_q, at_k])
        scale = xpos_scales(positions, DIM, dtype=torch.float64) if xpos else torch.ones(2, DIM).double()
        cos, sin = rotary_tables(positions, DIM, theta=theta, dtype=torch.float64)
        turned_q = rotate(q, cos[:1] * scale[:1], sin[:1] * scale[:1])
        turned_k = rotate(k, cos[1:] / scale[1:], sin[1:] / scale[1:])
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift), rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=8), st.sampled_from([2, 6, 64]))
def test_rotation_keeps_lengths(positions, dim):
    positions = torch.tensor(positions)
    x = torch.randn(len(positions), 3, dim, dtype=torch.float64)
    rotated = rotate(x, *tables(positions, dim=dim))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


def test_xpos_scores_by_hand():
    """Sum over pairs of zeta^(distance / 512) Re(q conj(k) e^(i angle)), zeta = (2m/d + 0.4) / 1.4."""
    q, k = torch.randn(2, DIM, dtype=torch.float64)
    positions = torch.tensor([[0, 40, 300]])
    qkv = torch.stack((q, k, k)).expand(1, 3, 3, DIM)
    turned_q, turned_k, _ = rotary_split(qkv, *xpos_tables(positions, heads=1, kv_heads=1), heads=1, kv_heads=1)
    for i in range(3):
        for j in range(i + 1):
            distance, score = int(positions[0, i] - positions[0, j]), 0.0
            for m in range(DIM // 2):
                zeta = (2 * m / DIM + 0.4) / 1.4
                turn = complex(q[m], q[m + DIM // 2]) * complex(k[m], k[m + DIM // 2]).conjugate()
                angle = distance * 10000.0 ** (-2 * m / DIM)
                score += zeta ** (distance / 512) * (turn * complex(math.cos(angle), math.sin(angle))).real
            assert float(turned_q[0, i, 0] @ turned_k[0, j, 0]) == pytest.approx(score, abs=1e-11)


def test_xpos_decays_with_the_distance():
    distances = torch.arange(0, 4096, 64)
    envelope = xpos_scales(distances, 64, dtype=torch.float64)
    assert (envelope[0] == 1).all() and (envelope.diff(dim=0) < 0).all()
    assert (envelope > 0).all() and (envelope[-1, 0] < 1e-4)


@pytest.mark.parametrize("positions", [POSITIONS, POSITIONS[:1]], ids=["rows of their own", "one row for all"])
@pytest.mark.parametrize("make_tables", [tables, xpos_tables], ids=["shared", "a row for each head"])
def test_gradients_are_those_of_the_formula(make_tables, positions):
    cos, sin = make_tables(positions)
    qkv = fused(POSITIONS).requires_grad_()
    assert gradcheck(lambda x: rotary_split(x, cos, sin, heads=HEADS, kv_heads=KV_HEADS), qkv)

    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=-2)
    xpos = int(make_tables is xpos_tables)
    expected = turned(q, positions, xpos=xpos), turned(k, positions, xpos=-xpos), v
    got = rotary_split(qkv, cos, sin, heads=HEADS, kv_heads=KV_HEADS)
    directions = [torch.randn_like(t) for t in expected]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for used in ((0, 1, 2), (0,), (1,), (2,)):  # an output that nobody used has no gradient
        grads = [
            torch.autograd.grad([outs[n] for n in used], qkv, [directions[n] for n in used], retain_graph=True)[0]
            for outs in (got, expected)
        ]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_without_gradients_the_result_is_the_same():
    qkv, options = fused(POSITIONS), {"heads": HEADS, "kv_heads": KV_HEADS}
    expected = rotary_split(qkv.clone().requires_grad_(), *tables(POSITIONS), **options)
    for ours, theirs in zip(rotary_split(qkv, *tables(POSITIONS), **options), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_may_come_transposed():
    """Attention hands its gradients back as `b h n d`, seen through a transposed view."""
    cos, sin = tables(POSITIONS)
    qkv = fused(POSITIONS).requires_grad_()
    outs = rotary_split(qkv, cos, sin, heads=HEADS, kv_heads=KV_HEADS)
    directions = [torch.randn_like(t) for t in outs]
    expected = torch.autograd.grad(outs, qkv, directions, retain_graph=True)[0]
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in directions]
    assert torch.equal(torch.autograd.grad(outs, qkv, strided)[0], expected)


def test_bfloat16_is_rounded_once():
    """The turn happens in the precision of the tables."""
    qkv = fused(POSITIONS).bfloat16().requires_grad_()
    outs = rotary_split(qkv, *tables(POSITIONS, dtype=torch.float32), heads=HEADS, kv_heads=KV_HEADS)
    for out, x in zip(outs[:2], qkv.detach().split([HEADS, KV_HEADS, KV_HEADS], dim=-2)[:2], strict=True):
        assert out.dtype == torch.bfloat16
        exact = turned(x.double(), POSITIONS)
        assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
    (gradient,) = torch.autograd.grad(sum(out.float().sum() for out in outs), qkv)
    assert gradient.dtype == torch.bfloat16


def test_compiled_equals_eager():
    cos, sin = xpos_tables(POSITIONS)
    qkv = fused(POSITIONS).requires_grad_()

    def function(x):
        return rotary_split(x, cos, sin, heads=HEADS, kv_heads=KV_HEADS)

    torch.compiler.reset()
    results = [function(qkv), torch.compile(function, fullgraph=True, backend="aot_eager")(qkv)]
    for ours, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, ours, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(sum((out * out).sum() for out in outs), qkv)[0] for outs in results]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def interleaved(x, positions):
    """Turns neighbours (2m, 2m + 1) instead of halves."""
    pairs = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return turned(pairs, positions).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("mutant", [interleaved, lambda x, p: turned(x, -p), lambda x, p: turned(x, p, theta=100.0)])
def test_mutants_differ_from_complex_multiplication(mutant):
    x = fused(POSITIONS)
    torch.testing.assert_close(mutant(x, POSITIONS).norm(), x.norm())
    assert not torch.allclose(mutant(x, POSITIONS), turned(x, POSITIONS), atol=1e-3)
