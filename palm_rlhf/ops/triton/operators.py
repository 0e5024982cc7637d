"""Launchers of kernels as functions for eager calls, and as operators of PyTorch for code that looks at calls.

An operator of `torch.library` takes more Python a call than the launch of a kernel: 0.2 ms, measured beside an H200. So
an eager call goes to the launcher itself, through an autograd function if it needs gradients. The operator is for
torch.compile, fake tensors and dispatch modes, which have to see a call in order to trace or count it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)


def is_watched(x: Tensor) -> bool:
    """Return whether a call with x has to be an operator: it is traced, x is no plain tensor, or a mode is active."""
    return torch.compiler.is_compiling() or type(x) not in PLAIN or torch._C._len_torch_dispatch_stack() > 0


class Operator:
    """A launcher that takes part in autograd, in eager calls and as the operator `palm_rlhf::name`.

    Args:
        name: the name of the operator.
        schema: the arguments and results, in the notation of `torch.library`.
        launch: computes the results.
        fake: returns empty results of the same form, for tracing.
        save: keeps on `ctx` for the backward, given the inputs and the results: `save(ctx, inputs, output)`.
        gradients: returns the gradients of the inputs, given those of the results that a call returns:
            `gradients(ctx, *d_results)`. It may get more, which it ignores.
        num_results: how many results a call returns: the first ones, or all of them if it is None. The others are for
            the backward.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        launch: Callable,
        fake: Callable,
        *,
        save: Callable | None = None,
        gradients: Callable | None = None,
        num_results: int | None = None,
    ):
        self.operator = torch.library.custom_op(f"palm_rlhf::{name}", launch, mutates_args=(), schema=schema)
        self.operator.register_fake(fake)
        self.launch, self.num_results, self.function = launch, num_results, None
        if save is not None and gradients is not None:
            self.operator.register_autograd(gradients, setup_context=save)
            self.function = _autograd_function(self, save, gradients)

    def __call__(self, *inputs: Any) -> Any:
        """Return the results for these inputs, of which the first is a tensor."""
        if is_watched(inputs[0]):
            return self.returned(self.operator(*inputs))
        if self.function is not None and torch.is_grad_enabled() and any(map(_requires_grad, inputs)):
            return self.function.apply(*inputs)
        return self.returned(self.launch(*inputs))

    def returned(self, results: Any) -> Any:
        """Return those of the results that a call returns."""
        if self.num_results is None:
            return results
        return results[0] if self.num_results == 1 else results[: self.num_results]


def _requires_grad(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _autograd_function(operator: Operator, save: Callable, gradients: Callable) -> type[torch.autograd.Function]:
    """Return the autograd function of a launcher; what it does not return is saved, and freed with the graph."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            results = operator.launch(*inputs)
            save(ctx, inputs=inputs, output=results)
            return operator.returned(results)

        @staticmethod
        @once_differentiable
        def backward(ctx, *d_results):
            return gradients(ctx, *d_results)

    return Function
