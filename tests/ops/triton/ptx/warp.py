"""What the 32 threads of a warp compute together: exchanges, reductions, and products of matrices on tensor cores.

Arrays are over all threads; thread 4 g + t of a warp is the t-th of its group g, of which there are 8. Which thread
holds which elements of a matrix is laid down in the PTX manual under "Matrix Fragments for mma.m16n8k16".
"""

import numpy as np

from .arithmetic import from_bfloat16, from_float16

WARP = 32
REDUCTIONS = {
    "min": np.minimum, "max": np.maximum, "add": np.add,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def shuffle(mode: str, x: np.ndarray, operand: np.ndarray) -> np.ndarray:
    """shfl.sync over whole warps: the x of the thread whose number is `operand`, or differs by these bits (bfly)."""
    threads = np.arange(x.size)
    lane = threads ^ operand if mode == "bfly" else operand
    return x[threads // WARP * WARP + lane % WARP]


def reduce(name: str, x: np.ndarray) -> np.ndarray:
    """redux.sync: every thread gets what its whole warp comes to."""
    return np.repeat(REDUCTIONS[name].reduce(x.reshape(-1, WARP), axis=1), WARP).astype(x.dtype)


def matrices_from_rows(rows: np.ndarray, transpose: bool) -> list[np.ndarray]:
    """ldmatrix: rows of 8 16-bit numbers, `(warps matrices 8) 16` bytes, in order -> a register for each matrix.

    The threads of group g get row g, two numbers each; or, transposed, column g.
    """
    matrices = rows.view(np.uint16).reshape(rows.shape[0], -1, 8, 8)  # warps, matrices, row, column
    if transpose:
        matrices = matrices.swapaxes(2, 3)
    registers = np.ascontiguousarray(matrices).view(np.uint32)  # warps, matrices, g, t
    return [registers[:, i].reshape(-1) for i in range(registers.shape[1])]


def halves(registers: list[np.ndarray], bfloat16: bool) -> np.ndarray:
    """Registers of two 16-bit floats each -> float32, `register warp g t half`."""
    bits = np.stack(registers).reshape(len(registers), -1, 8, 4, 1).view(np.uint16)
    return from_bfloat16(bits) if bfloat16 else from_float16(bits)


def multiply_matrices(
    a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], bfloat16: bool
) -> list[np.ndarray]:
    """mma.m16n8k16: the four registers of a @ b + c, summed in float32. a: 4 registers, `16 16`; b: 2, `16 8`; c: 4."""
    warps = a[0].size // WARP
    left = halves(a, bfloat16).reshape(2, 2, warps, 8, 4, 2)  # columns + 8, rows + 8, warp, row, t, half
    left = left.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16)
    right = halves(b, bfloat16)  # rows + 8, warp, column, t, half
    right = right.transpose(1, 0, 3, 4, 2).reshape(warps, 16, 8)
    total = np.stack(c).reshape(2, 2, warps, 8, 4)  # rows + 8, column in a pair, warp, row, t
    total = total.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
    result = (left @ right + total).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return list(result.reshape(4, -1))
