"""SwiGLU (Shazeer 2020, equation 6): the hidden units of a feed-forward layer, gated by the SiLU of a projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.ops.cpu.native_elementwise import swiglu_backward_native_, swiglu_native, why_not_swiglu
from palm_rlhf.ops.devices import why_not_triton


def swiglu_reference(gate: Tensor, value: Tensor) -> Tensor:
    """Return silu(gate) * value, both `... d`."""
    return F.silu(gate) * value


def swiglu_forward(gate: Tensor, value: Tensor) -> Tensor:
    """Return silu(gate) * value without a graph for autograd, by the kernel in C where it can run: `... d`."""
    if why_not_swiglu(gate, value) is None:
        return swiglu_native(gate, value)
    return F.silu(gate).mul_(value)


def swiglu_backward_(d_hidden: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and value, and the hidden units, computed again: all `... d`.

    The gradient of value takes the memory of `d_hidden`.
    """
    if why_not_swiglu(d_hidden, gate, value) is None:
        return swiglu_backward_native_(d_hidden, gate, value)
    silu = F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(d_hidden * value, gate)
    return d_gate, d_hidden.mul_(silu), silu.mul_(value)


class _SwiGLU(torch.autograd.Function):
    """SwiGLU that saves only its two inputs: the backward computes the SiLU again."""

    @staticmethod
    def forward(ctx, gate, value):
        ctx.save_for_backward(gate, value)
        return swiglu_forward(gate, value)

    @staticmethod
    def backward(ctx, d_out):
        d_gate, d_value, _ = swiglu_backward_(d_out.clone(), *ctx.saved_tensors)
        return d_gate, d_value


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """Return silu(gate) * value, both `... d`; `torch.compile` gets the reference, which it fuses itself."""
    if torch.compiler.is_compiling():
        return swiglu_reference(gate, value)
    if why_not_triton(gate, value) is None:
        from palm_rlhf.ops.triton.fused_swiglu import swiglu_triton

        return swiglu_triton(gate, value)
    if not torch.is_grad_enabled():
        return swiglu_forward(gate, value)
    return _SwiGLU.apply(gate, value)
