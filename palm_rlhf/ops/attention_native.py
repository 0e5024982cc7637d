"""Attention in bfloat16 by kernels in C: `csrc/attention_forward.c` and `csrc/attention_backward.c`."""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache

import torch
from torch import Tensor

from .native import has_amx, library, num_threads, readable

COLUMNS = 32  # of a product: heads have multiples of it


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, c_long) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim", "causal")),
        ("scale", c_float),
    ]


class _Heads(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("strides", c_long * 3)]


@cache
def _runs() -> bool:
    """Whether the processor multiplies pairs of bfloat16; with AMX, PyTorch's products are faster still."""
    if has_amx() or library() is None:
        return False
    if not hasattr(library(), "attention_forward"):
        return False
    for name in ("attention_forward_scratch", "attention_backward_scratch"):
        getattr(library(), name).restype = c_long
    return True


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels compute these: bfloat16 on a CPU, the last axis dense and a multiple of 32."""
    fits = all(t.dtype == torch.bfloat16 for t in (q, k, v)) and readable(q, k, v)
    return fits and q.shape[-1] % COLUMNS == 0 and q.numel() > 0 and _runs()


def forward_native(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of each row's sum of exponentials; causal aligns the last query and key.

    q: `b (hk g) i d`, k and v: `b hk j d` -> `b (hk g) i d`, float32 `b (hk g) i`
    """
    out, lse = _like(q), torch.empty(q.shape[:3], device=q.device)
    _call("attention_forward", q, k, causal, q, k, v, out, lse)
    return out, lse


def backward_native(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from what `forward_native` took and gave, and the gradient of `out`."""
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    grads = [_like(t) for t in (q, k, v)]
    _call("attention_backward", q, k, causal, q, k, v, out, d_out, lse, *grads)
    return tuple(grads)


def _like(x: Tensor) -> Tensor:
    """Room for `b h n d`, with the heads of a position next to each other."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


def _call(name: str, q: Tensor, k: Tensor, causal: bool, *tensors: Tensor) -> None:
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    shape = _Attention(batch, heads, kv_heads, queries, keys, dim, causal, dim**-0.5)
    threads = num_threads()
    size = getattr(library(), f"{name}_scratch")(ctypes.byref(shape), c_int(threads))
    scratch = torch.empty(size, dtype=torch.uint8, device=q.device)
    arguments = (
        ctypes.byref(_Heads(t.data_ptr(), (c_long * 3)(*t.stride()[:3]))) if t.ndim == 4 else c_void_p(t.data_ptr())
        for t in (*tensors, scratch)
    )
    getattr(library(), name)(ctypes.byref(shape), *arguments, c_int(threads))
