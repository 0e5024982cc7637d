"""Tests of Triton kernels on CPU tensors, in Triton's interpreter.

`TRITON_INTERPRET=1` must be set before Triton is imported, and leaves nothing to compile for a GPU. So these run in
processes of their own, which `test_fused_attention.py` and `test_fused_layers.py` start; elsewhere they are left out.
"""

import os

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to the nearest, ties to even, as a GPU does."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


@pytest.fixture(scope="session", autouse=True)
def arithmetic():
    """Products and casts as a GPU makes them.

    The interpreter holds bfloat16 as 16-bit integers: it multiplies matrices of those, and rounds towards zero. Its
    products of float32 are those of a BLAS, which adds up the elements at the edges of a matrix in another order.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, acc, *rest):
        if a.dtype.scalar == tl.float32:
            rows, columns = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data.T)
            return TensorHandle(np.einsum("ik,jk->ij", rows, columns) + acc.data, tl.float32)
        wide = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, *wide, acc, *rest)

    def cast_impl(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(x.data), tl.bfloat16)
        return cast(self, x, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        yield
