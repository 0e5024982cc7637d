"""One matrix, several outputs: the fused input projection of a parallel block."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class _SplitLinear(torch.autograd.Function):
    """The backward reads each output's gradient where it lies: joining them first would cost a fifth of a CPU step."""

    @staticmethod
    def forward(ctx, x, weight, sizes):
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return tuple(F.linear(x, part) for part in weight.split(sizes))

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        rows = rearrange(x, "... i -> (...) i")
        grads = [rearrange(grad, "... o -> (...) o") for grad in grads]
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            parts = weight.split(ctx.sizes)
            d_x = grads[0] @ parts[0]
            for grad, part in zip(grads[1:], parts[1:], strict=True):
                d_x.addmm_(grad, part)
            d_x = d_x.view_as(x)
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight)
            for grad, part in zip(grads, d_weight.split(ctx.sizes), strict=True):
                torch.mm(grad.mT, rows, out=part)
        return d_x, d_weight, None


def split_linear(x: Tensor, weight: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """`x @ weight.T`, split along the last axis into outputs of the given sizes.

    x: `... i`, weight: `sum(sizes) i` -> one `... size` for each size
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not needs_grad:
        return F.linear(x, weight).split(sizes, dim=-1)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
    return _SplitLinear.apply(x, weight, sizes)
