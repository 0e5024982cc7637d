"""Attention's forward in bfloat16 by a kernel in C; `csrc/attention.c` is the kernel."""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache

import torch
from torch import Tensor

from .native import library

COLUMNS = 32  # of a product: heads have multiples of it


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, c_long) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim")),
        *((f"{name}_strides", c_long * 3) for name in ("q", "k", "v", "out")),
        ("causal", c_long),
        ("scale", c_float),
    ]


@cache
def _function() -> ctypes._CFuncPtr | None:
    """The kernel, where the processor multiplies pairs of bfloat16; with AMX, PyTorch's own is as fast."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    if amx or library() is None or not hasattr(library(), "attention_forward"):
        return None
    library().attention_scratch.restype = c_long
    library().attention_forward.argtypes = [*(c_void_p,) * 7, c_int]
    library().attention_forward.restype = None
    return library().attention_forward


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel computes these: bfloat16 on a CPU, the last axis dense and a multiple of 32."""
    fits = all(t.device.type == "cpu" and t.dtype == torch.bfloat16 and t.stride(-1) == 1 for t in (q, k, v))
    return fits and q.shape[-1] % COLUMNS == 0 and q.numel() > 0 and _function() is not None


def attention_native(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of each row's sum of exponentials; causal aligns the last query and key.

    q: `b (hk g) i d`, k and v: `b hk j d` -> `b (hk g) i d`, float32 `b (hk g) i`
    """
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    out = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    lse = torch.empty(batch, heads, queries)
    strides = ((c_long * 3)(*t.stride()[:3]) for t in (q, k, v, out))
    shape = _Attention(batch, heads, kv_heads, queries, keys, dim, *strides, causal, dim**-0.5)
    threads = torch.get_num_threads()
    scratch = torch.empty(library().attention_scratch(ctypes.byref(shape), threads), dtype=torch.uint8)
    pointers = (t.data_ptr() for t in (q, k, v, scratch, out, lse))
    _function()(ctypes.byref(shape), *pointers, threads)
    return out, lse
