"""RMSNorm (Zhang and Sennrich 2019, equation 4): division of rows by their root mean square."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from palm_rlhf.ops.cpu.native_elementwise import rms_norm_backward_native, rms_norm_native, why_not_rms_norm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, rounded once to the type of x: `... d`, `d`."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, weight.dtype)  # of two types PyTorch warns, and rounds twice
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm by the kernels in C; the backward computes the root mean squares again."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm_native(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        d_x, d_weight = rms_norm_backward_native(d_out, x, weight, ctx.eps, of_weight=ctx.needs_input_grad[1])
        return d_x, d_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `rms_norm_reference` of these tensors, on a CPU by a kernel in C, since PyTorch takes many passes there.

    `torch.compile` gets the reference, which it fuses itself.
    """
    if why_not_rms_norm(x, weight) is not None:
        return rms_norm_reference(x, weight, eps)
    x = x.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm_native(x, weight, eps)
