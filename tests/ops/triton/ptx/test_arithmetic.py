"""Instructions that every thread executes for itself, against Python's whole numbers and known answers."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .assembly import compute, floats


def signed(x: int) -> int:
    """The number that 32 bits mean."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def truncated(a: int, b: int) -> int:
    return int(Fraction(a, b))


INTEGERS = {
    "add.s32 TO, ABC": lambda a, b: a + b,
    "sub.s32 TO, ABC": lambda a, b: a - b,
    "mul.lo.s32 TO, ABC": lambda a, b: a * b,
    "mul.hi.s32 TO, ABC": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.hi.u32 TO, ABC": lambda a, b: a * b >> 32,
    "mad.lo.s32 TO, ABC, %r1": lambda a, b: a * b + a,
    "div.s32 TO, ABC": lambda a, b: truncated(signed(a), signed(b)),
    "div.u32 TO, ABC": lambda a, b: a // b,
    "rem.s32 TO, ABC": lambda a, b: signed(a) - truncated(signed(a), signed(b)) * signed(b),
    "min.s32 TO, ABC": lambda a, b: min(signed(a), signed(b)),
    "max.u32 TO, ABC": max,
    "and.b32 TO, ABC": lambda a, b: a & b,
    "or.b32 TO, ABC": lambda a, b: a | b,
    "xor.b32 TO, ABC": lambda a, b: a ^ b,
    "lop3.b32 TO, ABC, 0x0000ffff, 0xEA": lambda a, b: a & b | 0xFFFF,
    "lop3.b32 TO, ABC, -1, 0x96": lambda a, b: a ^ b ^ 0xFFFFFFFF,
    "prmt.b32 TO, ABC, 0x5410": lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 TO, ABC, 0x7632": lambda a, b: a >> 16 | b >> 16 << 16,
    "prmt.b32 TO, ABC, 0xBBBB": lambda a, b: -1 if a >> 31 else 0,
    "shf.l.wrap.b32 TO, ABC, 8": lambda a, b: b << 8 | a >> 24,
    "shf.r.wrap.b32 TO, ABC, 40": lambda a, b: a >> 8 | b << 24,
}
UNARY = {
    "neg.s32 TO, ABC": lambda a: -a,
    "not.b32 TO, ABC": lambda a: ~a,
    "abs.s32 TO, ABC": lambda a: abs(signed(a)),
    "shl.b32 TO, ABC, 5": lambda a: a << 5,
    "shl.b32 TO, ABC, 32": lambda a: 0,
    "shr.u32 TO, ABC, 5": lambda a: a >> 5,
    "shr.s32 TO, ABC, 5": lambda a: signed(a) >> 5,
    "shr.s32 TO, ABC, 99": lambda a: signed(a) >> 31,
    "bfe.u32 TO, ABC, 3, 4": lambda a: a >> 3 & 15,
    "bfe.s32 TO, ABC, 28, 3": lambda a: (a >> 28 & 7) - (8 if a >> 30 & 1 else 0),
    "bfe.s32 TO, ABC, 30, 9": lambda a: signed(a) >> 30,
    "bfe.u32 TO, ABC, 8, 0": lambda a: 0,
    "add.s32 TO, ABC, -8": lambda a: a - 8,
}
WIDE = {
    "mul.wide.s32 TO, ABC": lambda a, b: signed(a) * signed(b),
    "mul.wide.u32 TO, ABC": lambda a, b: a * b,
    "mad.wide.s32 TO, ABC, 7": lambda a, b: signed(a) * signed(b) + 7,
    "mov.b64 TO, {ABC}": lambda a, b: b << 32 | a,
    "cvt.s64.s32 TO, %r2": lambda a, b: signed(b),
    "cvt.u64.u32 TO, %r2": lambda a, b: b,
}
WORD = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
PAIRS = st.lists(st.tuples(WORD, WORD.filter(bool)), min_size=1, max_size=64)  # nothing is divided by 0


@settings(max_examples=4)
@given(PAIRS)
def test_integers(pairs):
    columns = list(zip(*pairs, strict=True))
    for instruction, expected in INTEGERS.items():
        assert compute(instruction, *columns) == [expected(*pair) % 2**32 for pair in pairs], instruction
    for instruction, expected in UNARY.items():
        assert compute(instruction, columns[0]) == [expected(a) % 2**32 for a in columns[0]], instruction
    for instruction, expected in WIDE.items():
        got = compute(instruction, *columns, result="b64")
        assert got == [expected(*pair) % 2**64 for pair in pairs], instruction


INF, NAN, TINY = float("inf"), float("nan"), 2.0**-140  # TINY is subnormal
FLOATS = {
    "add.f32 TO, ABC": [(1.5, 2.25, 3.75), (INF, -INF, NAN)],
    "sub.f32 TO, ABC": [(1.5, 2.25, -0.75)],
    "mul.f32 TO, ABC": [(3.0, -0.5, -1.5), (INF, 0.0, NAN)],
    "div.full.f32 TO, ABC": [(1.0, 4.0, 0.25), (1.0, 0.0, INF)],
    # 2^12 + 1 squared is 2^24 + 2^13 + 1, whose last bit a product rounded by itself would lose
    "fma.rn.f32 TO, ABC, 0fCB800000": [(4097.0, 4097.0, 8193.0)],
    "fma.rn.f32 TO, ABC, 0f00000000": [(TINY, 0.5, TINY / 2)],
    "fma.rn.ftz.f32 TO, ABC, 0f00000000": [(TINY, 2.0**20, 0.0), (2.0**-100, 2.0**-30, 0.0), (-3.0, 2.0, -6.0)],
    "max.f32 TO, ABC": [(1.0, 2.0, 2.0), (NAN, 2.0, 2.0), (-INF, -1.0, -1.0)],
    "max.NaN.f32 TO, ABC": [(1.0, 2.0, 2.0), (NAN, 2.0, NAN)],
    "min.f32 TO, ABC": [(1.0, 2.0, 1.0), (1.0, NAN, 1.0)],
    "ex2.approx.ftz.f32 TO, %r1": [(3.0, 0.0, 8.0), (-INF, 0.0, 0.0), (0.5, 0.0, 2**0.5), (-140.0, 0.0, 0.0)],
    "lg2.approx.f32 TO, %r1": [(8.0, 0.0, 3.0), (0.0, 0.0, -INF)],
    "rcp.approx.ftz.f32 TO, %r1": [(4.0, 0.0, 0.25)],
    "rsqrt.approx.f32 TO, %r1": [(4.0, 0.0, 0.5)],
    "neg.f32 TO, %r1": [(4.0, 0.0, -4.0)],
    "cvt.rn.f32.s32 TO, 16777217": [(0.0, 0.0, 16777216.0)],
}


@pytest.mark.parametrize("instruction", FLOATS)
def test_floats(instruction):
    a, b, expected = zip(*FLOATS[instruction], strict=True)
    got = np.array(compute(instruction, floats(a), floats(b)), np.uint32).view(np.float32)
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


COMPARED = {  # of (1, 2), (2, 2), (2, 1), (NaN, 1)
    "lt.f32": "1000", "le.f32": "1100", "eq.f32": "0100", "ne.f32": "1010", "gt.f32": "0010", "ge.f32": "0110",
    "ltu.f32": "1001", "neu.f32": "1011", "geu.f32": "0111", "equ.f32": "0101", "num.f32": "1110", "nan.f32": "0001",
}  # fmt: skip


@pytest.mark.parametrize("comparison", COMPARED)
def test_comparisons(comparison):
    columns = floats([1.0, 2.0, 2.0, NAN]), floats([2.0, 2.0, 1.0, 1.0])
    instruction = f"setp.{comparison} %p1, ABC; selp.b32 TO, 1, 0, %p1"
    assert compute(instruction, *columns) == [int(digit) for digit in COMPARED[comparison]]


def test_integers_are_compared_with_or_without_sign():
    columns = [0, 2**32 - 1], [1, 1]
    results = {
        name: compute(f"setp.{name} %p1, ABC; selp.b32 TO, 1, 0, %p1", *columns)
        for name in ("lt.s32", "lt.u32", "ge.s32")
    }
    assert results == {"lt.s32": [1, 1], "lt.u32": [1, 0], "ge.s32": [0, 0]}


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_16_bit_floats(name, dtype):
    x = torch.cat([torch.randn(60), torch.tensor([1.00390625, 1.01171875, INF, 65520.0])])  # with ties
    expected = [int(i) % 2**16 for i in x.to(dtype).view(torch.int16)]
    assert compute(f"cvt.rn.{name}.f32 TO, ABC", floats(x.tolist()), result="b16") == expected
    packed = compute(f"cvt.rn.{name}x2.f32 TO, ABC", floats(x.tolist()), floats((-x).tolist()))
    assert [word >> 16 for word in packed] == expected
    assert [word & 0xFFFF for word in packed] == [half ^ 0x8000 for half in expected]
    widened = compute(f"mov.b32 {{_, %rs1}}, ABC; cvt.f32.{name} TO, %rs1", packed)
    assert widened == floats(x.to(dtype).tolist())
