"""What benchmarks and checks of kernels share: tensors, operations and bytes, memory, how exact results must be."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf.ops.attention import attention
from palm_rlhf.ops.attention_reference import attention_reference

# Largest error, of the largest exact number or of 0.1 if that is more.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
NAMES = ("out", "d_q", "d_k", "d_v")
PRODUCTS = {"forward": 2, "backward": 5, "both": 7, "decode": 2}  # of queries and keys by d


class Work(NamedTuple):
    """Causal attention of the last `num_queries` of `num_keys` positions."""

    batch: int
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    dim: int
    dtype: torch.dtype
    device: str

    def tensors(self) -> list[Tensor]:
        """q, k, v and the gradient of the result, `b h n d`, their heads inside their tokens in memory."""
        shapes = [(self.num_queries, self.heads), *[(self.num_keys, self.kv_heads)] * 2, (self.num_queries, self.heads)]
        generator = torch.Generator().manual_seed(self.num_keys)
        drawn = (torch.randn(self.batch, n, heads, self.dim, generator=generator) for n, heads in shapes)
        *inputs, d_out = (t.to(self.device, self.dtype).transpose(1, 2) for t in drawn)
        return [*(t.requires_grad_() for t in inputs), d_out]

    def flops(self, direction: str) -> int:
        """Operations of the matrix products, without those of pairs that no query sees."""
        pairs = self.num_queries * self.num_keys - self.num_queries * (self.num_queries - 1) // 2
        return PRODUCTS[direction] * 2 * self.batch * self.heads * pairs * self.dim

    def moved(self, direction: str) -> int:
        """Bytes that must be read or written, each once: inputs, results, gradients."""
        q = self.batch * self.heads * self.num_queries * self.dim
        kv = 2 * self.batch * self.kv_heads * self.num_keys * self.dim
        forward, backward = 2 * q + kv, 4 * q + 2 * kv
        elements = {"forward": forward, "decode": forward, "backward": backward, "both": forward + backward}[direction]
        return elements * self.dtype.itemsize


def gradients(function: Callable, tensors: list[Tensor], **options: object) -> list[Tensor]:
    """out and the gradients of q, k and v."""
    *inputs, d_out = tensors
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def exact(tensors: list[Tensor], **options: object) -> list[Tensor]:
    """out and the gradients in float64."""
    return gradients(attention_reference, [t.detach().double().requires_grad_() for t in tensors], **options)


def error(got: Tensor, truth: Tensor) -> float:
    """The largest error of a result, in parts of what its type allows."""
    allowed = TOLERANCE[got.dtype] * truth.abs().max().clamp(min=0.1)
    return float(((got.double() - truth).abs().max() / allowed).detach())


def errors(got: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """The largest error of each, in parts of what its type allows."""
    return {name: error(a, b) for name, a, b in zip(NAMES, got, truth, strict=True)}


def largest(numbers: Iterable[float]) -> float:
    """The largest of some numbers, or NaN where one of them is: Python's `max` would depend on their order."""
    return float(torch.tensor(list(numbers), dtype=torch.float64).max())


def implementation(name: str) -> Callable:
    """The attention of that name."""
    return lambda *tensors, **options: attention(*tensors, **options, implementation=name)


def peak_on_gpu(step: Callable[[], object]) -> int:
    """The MB of GPU memory that a step needs beyond what is allocated, once it has run before."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) >> 20
