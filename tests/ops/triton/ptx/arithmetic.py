"""What each instruction that every thread executes for itself computes from its operands."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from .program import TYPES

SMALLEST_NORMAL = np.float32(2.0**-126)


class Operation(NamedTuple):
    """A function of arrays, one number for each thread; the types it takes them in, and that of its result."""

    function: Callable[..., np.ndarray]
    sources: list[type]
    result: type


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to the nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_float16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of float16."""
    return x.astype(np.float16).view(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float16(bits: np.ndarray) -> np.ndarray:
    """The bits of float16 -> float32."""
    return bits.view(np.float16).astype(np.float32)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def shift_left(x, by):
    """Shifts as far as the number is wide, or farther, leave nothing."""
    bits = 8 * x.itemsize
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), 0).astype(x.dtype)


def shift_right(x, by):
    """Of a signed number the sign moves in."""
    bits = 8 * x.itemsize
    if x.dtype.kind == "i":
        return x >> np.minimum(by, bits - 1).astype(x.dtype)
    return np.where(by < bits, x >> np.minimum(by, bits - 1).astype(x.dtype), 0).astype(x.dtype)


def fused_multiply_add(a, b, c):
    """The product of two float32 numbers is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def divide(a, b):
    """Integers towards zero."""
    if a.dtype.kind == "f":
        return a / b
    down = a // b
    return down + ((down * b != a) & ((a < 0) != (b < 0)))


def remainder(a, b):
    """Of the sign of the dividend."""
    return a - divide(a, b) * b


def extract_bits(x, start, length):
    """`length` bits from `start` on, sign-extended for a signed x; those past the end are its sign, or zero."""
    bits = 8 * x.itemsize
    start, length = (np.minimum(n & 0xFF, bits).astype(np.int64) for n in (start, length))
    kept = np.minimum(length, bits - np.minimum(start, bits))
    low = shift_left(x, bits - kept - np.minimum(start, bits - kept))
    return np.where(kept > 0, shift_right(low, bits - np.maximum(kept, 1)), 0).astype(x.dtype)


def funnel_shift(low, high, by, *, left: bool):
    """Shift the 64 bits `high low` by up to 31 (wrapping), and keep 32 of them."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    by = (by & 31).astype(np.uint64)
    return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)


def look_up(a, b, c, table):
    """Any logical function of three bits, given as the table of its 8 values (lop3)."""
    result = np.zeros_like(a)
    for row in range(8):
        bits = ((x if row >> i & 1 else ~x) for x, i in ((a, 2), (b, 1), (c, 0)))
        result = result | np.where(table >> np.uint32(row) & 1, np.bitwise_and.reduce([*np.broadcast_arrays(*bits)]), 0)
    return result.astype(np.uint32)


def permute_bytes(a, b, selector):
    """Four of the 8 bytes `b a`, chosen by four bits each; the highest of these bits spreads the sign (prmt)."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros_like(both)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)).astype(np.uint64)
        byte = both >> ((choice & 7) * 8).astype(np.uint64) & 0xFF
        byte = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint64)
        result = result | byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def float_to_integer(x, *, kind: type):
    """Towards zero, into the range of the integers; NaN gives 0."""
    limits = np.iinfo(kind)
    return np.clip(np.trunc(np.nan_to_num(x.astype(np.float64))), limits.min, limits.max).astype(kind)


BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": divide, "rem": remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
UNARY = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "mov": lambda x: x, "sqrt": np.sqrt,
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
BITS = {"bfe": extract_bits, "lop3": look_up, "prmt": permute_bytes}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(name: str, kind: type) -> Callable[..., np.ndarray]:
    """`lt` and its sisters; of floats these are false where one is NaN, and `ltu` and its sisters are true there."""
    if kind is not np.float32:
        return COMPARISONS[name]

    def unordered(a, b):
        return np.isnan(a) | np.isnan(b)

    if name == "nan":
        return unordered
    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if name.endswith("u"):
        return lambda a, b: COMPARISONS[name[:-1]](a, b) | unordered(a, b)
    return lambda a, b: COMPARISONS[name](a, b) & ~unordered(a, b)


def conversion(modifiers: tuple[str, ...]) -> Operation:
    """cvt: between integers; from integers to float32, and back towards zero; from float32 to 16 bits, and back."""
    *rounding, to, source = modifiers
    if set(rounding) - {"rn", "rzi", "ftz"}:
        raise KeyError(rounding)
    match to, source:
        case "bf16" | "f16", "f32":
            return Operation(to_bfloat16 if to == "bf16" else to_float16, [np.float32], np.uint16)
        case "bf16x2" | "f16x2", "f32":
            half = to_bfloat16 if to == "bf16x2" else to_float16
            return Operation(
                lambda high, low: half(high).astype(np.uint32) << np.uint32(16) | half(low), [np.float32] * 2, np.uint32
            )
        case "f32", "bf16" | "f16":
            return Operation(from_bfloat16 if source == "bf16" else from_float16, [np.uint16], np.float32)
        case _, "f32" if "rzi" in rounding:
            return Operation(partial(float_to_integer, kind=TYPES[to]), [np.float32], TYPES[to])
        case _ if (source != "f32" and to != "f32") or rounding == ["rn"]:
            return Operation(lambda x: x.astype(TYPES[to]), [TYPES[source]], TYPES[to])
    raise KeyError(modifiers)


def wide(kind: type) -> type:
    """The type of twice the width."""
    return np.dtype(f"{np.dtype(kind).kind}{2 * np.dtype(kind).itemsize}").type


def multiplication(name: str, modifiers: tuple[str, ...], kind: type) -> Operation:
    """mul and mad of integers: the low half of the product, its high half, or all of it."""
    sources, result = [kind, kind], kind
    match modifiers[0]:
        case "lo":
            function = np.multiply
        case "wide":
            result = wide(kind)

            def function(a, b):
                return a.astype(result) * b.astype(result)

        case "hi":
            double, bits = wide(kind), 8 * np.dtype(kind).itemsize

            def function(a, b):
                return (a.astype(double) * b.astype(double) >> double(bits)).astype(kind)

        case _:
            raise KeyError(modifiers)
    if name == "mad":
        return Operation(lambda a, b, c: function(a, b) + c, [*sources, result], result)
    return Operation(function, sources, result)


def extremum(name: str, modifiers: tuple[str, ...], kind: type) -> Operation:
    """min and max; of floats, NaN loses against a number unless asked for."""
    if kind is np.float32 and "NaN" not in modifiers:
        return Operation({"min": np.fmin, "max": np.fmax}[name], [kind] * 2, kind)
    return Operation({"min": np.minimum, "max": np.maximum}[name], [kind] * 2, kind)


def flushed(operation: Operation) -> Operation:
    """The same on numbers none of which is subnormal."""
    return operation._replace(function=lambda *numbers: flush(operation.function(*map(flush, numbers))))


def operation(name: str, modifiers: tuple[str, ...]) -> Operation:
    """What an instruction computes; KeyError if it is none of those known here."""
    if name == "cvt":
        return conversion(modifiers)
    kind = TYPES[modifiers[-1]]
    match name:
        case "setp":
            found = Operation(comparison(modifiers[0], kind), [kind] * 2, np.bool_)
        case "selp":
            found = Operation(lambda a, b, chosen: np.where(chosen, a, b), [kind, kind, np.bool_], kind)
        case "min" | "max":
            found = extremum(name, modifiers, kind)
        case "mul" | "mad" if kind is not np.float32:
            found = multiplication(name, modifiers, kind)
        case "fma" | "mad":
            found = Operation(fused_multiply_add, [kind] * 3, kind)
        case "shl" | "shr":
            found = Operation(shift_left if name == "shl" else shift_right, [kind, np.uint32], kind)
        case "shf":
            found = Operation(partial(funnel_shift, left=modifiers[0] == "l"), [kind] * 3, kind)
        case "bfe" | "lop3" | "prmt":
            found = Operation(BITS[name], [kind, *[np.uint32] * (3 if name == "lop3" else 2)], kind)
        case _ if name in UNARY:
            found = Operation(UNARY[name], [kind], kind)
        case _:
            found = Operation(BINARY[name], [kind] * 2, kind)
    return flushed(found) if "ftz" in modifiers else found
