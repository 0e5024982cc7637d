"""SwiGLU (Shazeer 2020, equation 6): a feed-forward's hidden units, gated by the SiLU of another projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.ops.cpu.native_elementwise import swiglu_backward_native_, swiglu_native, takes
from palm_rlhf.ops.devices import uses_triton


def swiglu_reference(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, both `... d`."""
    return F.silu(gate) * value


def swiglu_forward(gate: Tensor, value: Tensor) -> Tensor:
    """The same, unknown to autograd, by a kernel in C where it runs."""
    if gate.is_contiguous() and value.is_contiguous() and takes(gate, value):
        return swiglu_native(gate, value)
    return F.silu(gate).mul_(value)


def swiglu_backward_(d_hidden: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and value, the latter over `d_hidden`, and the hidden units once more: all `... d`."""
    if all(t.is_contiguous() for t in (d_hidden, gate, value)) and takes(d_hidden, gate, value):
        return swiglu_backward_native_(d_hidden, gate, value)
    silu = F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(d_hidden * value, gate)
    return d_gate, d_hidden.mul_(silu), silu.mul_(value)


class _SwiGLU(torch.autograd.Function):
    """Saves its two inputs alone: the SiLU is computed again in the backward."""

    @staticmethod
    def forward(ctx, gate, value):
        ctx.save_for_backward(gate, value)
        return swiglu_forward(gate, value)

    @staticmethod
    def backward(ctx, d_out):
        d_gate, d_value, _ = swiglu_backward_(d_out.clone(), *ctx.saved_tensors)
        return d_gate, d_value


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, both `... d`; `torch.compile` gets the reference, which it fuses itself."""
    if torch.compiler.is_compiling():
        return swiglu_reference(gate, value)
    if uses_triton(gate, value):
        from palm_rlhf.ops.triton.fused_swiglu import swiglu_triton

        return swiglu_triton(gate, value)
    if not torch.is_grad_enabled():
        return swiglu_forward(gate, value)
    return _SwiGLU.apply(gate, value)
