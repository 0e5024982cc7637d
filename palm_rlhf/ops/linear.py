"""The products of a block: one matrix with several outputs, hidden units, and the sum of two products.

Their backwards are written for a CPU. They read and write gradients in place, where autograd would first concatenate
or split them. For the gradient of a weight they transpose the narrow operand explicitly; oneDNN would transpose the
wide one, and the product would take three times as long.
"""

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from palm_rlhf.ops.devices import why_not_triton
from palm_rlhf.ops.swiglu import swiglu, swiglu_backward_, swiglu_forward


class QuantisedMatrix(Protocol):
    """A weight in fewer bits, `o i`, which the functions of this module take in place of a tensor."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x @ weight.T + bias`: `... i -> ... o`."""
        ...


class _SplitLinear(torch.autograd.Function):
    """`split_linear`, with a backward that never concatenates the gradients."""

    @staticmethod
    def forward(ctx, x, weight, sizes):
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return tuple(F.linear(x, part) for part in weight.split(sizes))

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            parts = weight.split(ctx.sizes)
            d_x = rows[0] @ parts[0]
            for grad, part in zip(rows[1:], parts[1:], strict=True):
                d_x.addmm_(grad, part)
            d_x = d_x.view_as(x)
        if ctx.needs_input_grad[1]:
            columns = x.reshape(-1, x.shape[-1]).mT.contiguous()
            d_weight = torch.empty_like(weight)
            for grad, part in zip(rows, d_weight.split(ctx.sizes), strict=True):
                part.copy_((columns @ grad).mT)
        return d_x, d_weight, None


class _SwiGLUSumLinear(torch.autograd.Function):
    """`swiglu_sum_linear`, with a backward that computes the hidden units again.

    The backward writes over gradients that it no longer needs: allocating memory costs a CPU more than the arithmetic,
    since the system has to hand out every page.
    """

    @staticmethod
    def forward(ctx, x, weight, gate, value, hidden_weight):
        ctx.save_for_backward(x, weight, gate, value, hidden_weight)
        return F.linear(x, weight).add_(F.linear(swiglu_forward(gate, value), hidden_weight))

    @staticmethod
    def backward(ctx, d_out):
        x, weight, gate, value, hidden_weight = ctx.saved_tensors
        needs_x, needs_weight, needs_gate, needs_value, needs_hidden_weight = ctx.needs_input_grad
        rows = d_out.reshape(-1, d_out.shape[-1])
        columns = rows.mT
        if needs_weight or needs_hidden_weight:
            columns = columns.contiguous()
        d_x = (rows @ weight).view_as(x) if needs_x else None
        d_weight = columns @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        d_hidden = rows @ hidden_weight
        d_gate, d_value, hidden = swiglu_backward_(d_hidden, *(t.reshape(d_hidden.shape) for t in (gate, value)))
        return (
            d_x,
            d_weight,
            d_gate.view_as(gate) if needs_gate else None,
            d_value.view_as(value) if needs_value else None,
            columns @ hidden if needs_hidden_weight else None,
        )


class _SwiGLULinear(torch.autograd.Function):
    """`swiglu_linear`, with the backward of `_SwiGLUSumLinear`."""

    @staticmethod
    def forward(ctx, gate, value, weight):
        ctx.save_for_backward(gate, value, weight)
        return F.linear(swiglu_forward(gate, value), weight)

    @staticmethod
    def backward(ctx, d_out):
        gate, value, weight = ctx.saved_tensors
        needs_gate, needs_value, needs_weight = ctx.needs_input_grad
        rows = d_out.reshape(-1, d_out.shape[-1])
        d_hidden = rows @ weight
        d_gate, d_value, hidden = swiglu_backward_(d_hidden, *(t.reshape(d_hidden.shape) for t in (gate, value)))
        return (
            d_gate.view_as(gate) if needs_gate else None,
            d_value.view_as(value) if needs_value else None,
            rows.mT.contiguous() @ hidden if needs_weight else None,
        )


def split_linear(x: Tensor, weight: Tensor | QuantisedMatrix, sizes: list[int]) -> tuple[Tensor, ...]:
    """Return `x @ weight.T`, split along the last axis into outputs of the given sizes.

    x: `... i`, weight: `sum(sizes) i` -> one `... size` for each size
    """
    if not _is_faster(x, weight):
        return linear(x, weight).split_with_sizes(sizes, dim=-1)
    return _SplitLinear.apply(*_autocast(x, weight), sizes)


def swiglu_sum_linear(
    x: Tensor, weight: Tensor | QuantisedMatrix, gate: Tensor, value: Tensor, hidden_weight: Tensor | QuantisedMatrix
) -> Tensor:
    """Return `x @ weight.T + swiglu(gate, value) @ hidden_weight.T`.

    x: `... i`, weight: `o i`, gate and value: `... j`, hidden_weight: `o j` -> `... o`
    """
    if not _is_faster(x, weight, hidden_weight) or why_not_triton(gate, value) is None:
        return linear(x, weight) + linear(swiglu(gate, value), hidden_weight)
    return _SwiGLUSumLinear.apply(*_autocast(x, weight, gate, value, hidden_weight))


def swiglu_linear(gate: Tensor, value: Tensor, weight: Tensor | QuantisedMatrix) -> Tensor:
    """Return `swiglu(gate, value) @ weight.T`: `... j`, `... j`, `o j` -> `... o`."""
    if not _is_faster(gate, weight) or why_not_triton(gate, value) is None:
        return linear(swiglu(gate, value), weight)
    return _SwiGLULinear.apply(*_autocast(gate, value, weight))


def linear(x: Tensor, weight: Tensor | QuantisedMatrix, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`; for one row on a CPU as a matrix-vector product, which reads the weights faster.

    x: `... i`, weight: `o i`, bias: `o` -> `... o`
    """
    if not isinstance(weight, Tensor):
        return weight.product(x, bias)
    plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_dense(weight)
    if plain or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if x.numel() == weight.shape[1]:
        row = x.flatten()
        product = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return product.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def _is_dense(weight: Tensor | QuantisedMatrix) -> bool:
    """Return whether a weight is a plain tensor, and neither in fewer bits nor a subclass, such as one in shards.

    A tensor without numbers stands for a plain one, for the same operations.
    """
    return type(weight) in (Tensor, nn.Parameter, FakeTensor)


def _is_faster(x: Tensor, *weights: Tensor | QuantisedMatrix) -> bool:
    """Return whether the functions above are faster than autograd: on a CPU, for more than one new token.

    It must not matter whether gradients are wanted: RLHF compares the log-probabilities that it recorded while sampling
    with those of the training forward.
    """
    one_token = x.ndim < 2 or x.shape[-2] == 1
    plain = not one_token and all(map(_is_dense, weights))
    return x.device.type == "cpu" and plain and not torch.compiler.is_compiling()


def _autocast(*operands: Tensor | QuantisedMatrix) -> tuple[Tensor, ...]:
    """Cast the dense operands of a product as autocast would; it does not do so for an autograd.Function."""
    tensors = cast(tuple[Tensor, ...], operands)
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype("cpu")) for t in tensors)
