"""The memory of tensors: counted while real code runs, on real tensors or on tensors without numbers."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palm_rlhf.model import block as block_module


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside the block return, for as long as they live.

    Views share the bytes of their base. Memory that an operation takes and gives back within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def restart_peak(self) -> int:
        """Let the peak begin at the bytes that live now, and return them."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # the address of the storage itself, which lives as long as a tensor holds it
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def without_numbers() -> Iterator[LiveMemory]:
    """Run the block on tensors that have shapes and types and no numbers, and count what they would take.

    Norms and attention take what kernels for them keep: their inputs, outputs and a number or two for each row.
    """
    with FakeTensorMode(), fused_kernels(), LiveMemory() as memory:
        yield memory


def without_weights(module: nn.Module) -> None:
    """Give a module on the meta device weights that count as weights on a CPU, inside `without_numbers`."""
    given: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in given:
                    blank = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    given[id(parameter)] = nn.Parameter(blank, parameter.requires_grad)
                part._parameters[name] = given[id(parameter)]  # type: ignore[assignment]  # they are parameters
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Let operations that PyTorch composes of many on a CPU take the memory of the kernels that do them at once.

    Only tensors without numbers are treated so. A mode of PyTorch would not reach what the backward computes again.
    """
    block: Any = block_module
    norm, attention = F.rms_norm, block.attention

    def rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        return _NormMemory.apply(x, weight) if isinstance(x, FakeTensor) else norm(x, shape, weight, eps)

    def fused_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        fused = isinstance(q, FakeTensor) and options["implementation"] != "eager"
        return _AttentionMemory.apply(q, k, v) if fused else attention(q, k, v, **options)

    F.rms_norm, block.attention = rms_norm, fused_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.rms_norm, block.attention = norm, attention


class _NormMemory(torch.autograd.Function):
    """The memory of RMSNorm by one kernel, which keeps its input."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _AttentionMemory(torch.autograd.Function):
    """The memory of attention by one kernel, which keeps inputs, output and a float32 number for each query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx, d_out):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))
