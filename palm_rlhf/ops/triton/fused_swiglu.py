"""SwiGLU for GPUs: one pass over the inputs forward, and one backward, which computes the SiLU again.

Rows may have gaps between them, as where one projection computes gate and value side by side.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.operators import Operator
from palm_rlhf.ops.triton.tiles import LOG2_E, on

BLOCK = 2048
WARPS = 4


@triton.jit
def _load(ptr, stride, columns, inside):
    """Load some columns of the row of this program, in float32."""
    return tl.load(ptr + tl.program_id(0).to(tl.int64) * stride + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, width, columns, inside, x):
    """Store the same columns of a contiguous tensor."""
    tl.store(ptr + tl.program_id(0).to(tl.int64) * width + columns, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    gate_ptr, value_ptr, out_ptr, stride_gate, stride_value, width, LOG2_E: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute out = silu(gate) * value, `row d`. Grid: rows, blocks of columns."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = _load(gate_ptr, stride_gate, columns, inside)
    value = _load(value_ptr, stride_value, columns, inside)
    _store(out_ptr, width, columns, inside, gate / (1.0 + tl.math.exp2(-gate * LOG2_E)) * value)


@triton.jit
def backward_kernel(
    d_out_ptr, gate_ptr, value_ptr, d_gate_ptr, d_value_ptr, stride_d_out, stride_gate, stride_value, width,
    LOG2_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of gate and value, `row d`. Grid: rows, blocks of columns."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    d_out = _load(d_out_ptr, stride_d_out, columns, inside)
    gate = _load(gate_ptr, stride_gate, columns, inside)
    value = _load(value_ptr, stride_value, columns, inside)
    sigmoid = 1.0 / (1.0 + tl.math.exp2(-gate * LOG2_E))
    _store(d_value_ptr, width, columns, inside, d_out * gate * sigmoid)
    _store(d_gate_ptr, width, columns, inside, d_out * value * sigmoid * (1.0 + gate * (1.0 - sigmoid)))


def _rows(x: Tensor) -> Tensor:
    """Flatten to rows that are dense: `... d -> row d`."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(kernel: Any, tensors: list[Tensor], results: Sequence[Tensor]) -> None:
    """Launch a kernel that reads tensors and writes results, all `... d`."""
    if not results[0].numel():
        return
    rows, width = [_rows(t) for t in tensors], results[0].shape[-1]
    grid = len(rows[0]), triton.cdiv(width, BLOCK)
    with on(results[0].device):
        kernel[grid](*rows, *results, *(t.stride(0) for t in rows), width, LOG2_E=LOG2_E, BLOCK=BLOCK, num_warps=WARPS)


def _empty_gradients(d_out, gate, value):
    return gate.new_empty(gate.shape), value.new_empty(value.shape)


def _backward(d_out, gate, value):
    results = _empty_gradients(d_out, gate, value)
    _launch(backward_kernel, [d_out, gate, value], results)
    return results


backward_operator = Operator(
    "swiglu_backward", "(Tensor d_out, Tensor gate, Tensor value) -> (Tensor, Tensor)", _backward, _empty_gradients
)


def _empty_result(gate, value):
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, value.dtype))


def _forward(gate, value):
    out = _empty_result(gate, value)
    _launch(forward_kernel, [gate, value], [out])
    return out


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, d_out):
    return backward_operator(d_out, *ctx.saved_tensors)


forward_operator = Operator(
    "swiglu_forward", "(Tensor gate, Tensor value) -> Tensor", _forward, _empty_result, save=_save, gradients=_gradients
)


def swiglu_triton(gate: Tensor, value: Tensor) -> Tensor:
    """Return silu(gate) * value, both `... d`, rounded once."""
    return forward_operator(gate, value)
