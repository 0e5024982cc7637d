"""Attention in bfloat16 by kernels in C: `csrc/attention_forward.c` and `csrc/attention_backward.c`."""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.ops.cpu.native_library import has_amx, library, num_threads, readable

COLUMNS = 32  # of a product: heads have multiples of it
Spans = tuple[Tensor, Tensor]  # `b i`, `b i`, int32: a query sees the keys from its first one on, up to its stop


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, c_long) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim")),
        ("first", c_void_p),
        ("stop", c_void_p),
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


def key_spans(
    q: Tensor, k: Tensor, *, causal: bool, key_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Spans | None:
    """The keys that each query sees, where they lie side by side; else None.

    They do where a row's real keys are in one piece, with pads before or after them, and so is each of its documents.

    q: `b h i d`, k: `b hk j d`, masks: `b j`
    """
    batch, (num_queries, num_keys) = len(q), (q.shape[2], k.shape[2])
    columns = torch.arange(num_keys, dtype=torch.int32, device=q.device)
    first, stop = torch.zeros_like(columns), columns + 1 if causal else torch.full_like(columns, num_keys)
    if key_mask is not None:
        start, length = key_mask.int().argmax(-1, keepdim=True), key_mask.sum(-1, keepdim=True)
        if not torch.equal(key_mask, (columns >= start) & (columns < start + length)):
            return None
        first, stop = torch.maximum(first, start), torch.minimum(stop, start + length)
    if document_ids is not None:
        begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
        in_order = document_ids.sort(dim=-1).values
        if not torch.equal(begins.sum(-1), 1 + (in_order[:, 1:] != in_order[:, :-1]).sum(-1)):
            return None  # a document in several pieces
        ends = begins.roll(-1, dims=-1)  # the first one begins, so that the last one ends
        first = torch.maximum(first, torch.where(begins, columns, 0).cummax(-1).values)
        after = torch.where(ends, columns + 1, num_keys).flip(-1).cummin(-1).values.flip(-1)
        stop = torch.minimum(stop, after)
    first, stop = (t[..., num_keys - num_queries :].expand(batch, -1).int().contiguous() for t in (first, stop))
    return first, stop


def forward_native(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of each row's sum of exponentials.

    q: `b (hk g) i d`, k and v: `b hk j d`, spans: `key_spans` -> `b (hk g) i d`, float32 `b (hk g) i`
    """
    out, lse = _like(q), torch.empty(q.shape[:3], device=q.device)
    _call("attention_forward", q, k, spans, q, k, v, out, lse)
    return out, lse


def backward_native(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, out: Tensor, lse: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from what `forward_native` took and gave, and the gradient of `out`."""
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    grads = [_like(t) for t in (q, k, v)]
    _call("attention_backward", q, k, spans, q, k, v, out, d_out, lse, *grads)
    return tuple(grads)


def _like(x: Tensor) -> Tensor:
    """Room for `b h n d`, with the heads of a position next to each other."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


def _call(name: str, q: Tensor, k: Tensor, spans: Spans, *tensors: Tensor) -> None:
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    shape = _Attention(batch, heads, kv_heads, queries, keys, dim, *(t.data_ptr() for t in spans), dim**-0.5)
    threads = num_threads()
    size = getattr(library(), f"{name}_scratch")(ctypes.byref(shape), c_int(threads))
    scratch = torch.empty(size, dtype=torch.uint8, device=q.device)
    arguments = (
        ctypes.byref(_Heads(t.data_ptr(), (c_long * 3)(*t.stride()[:3]))) if t.ndim == 4 else c_void_p(t.data_ptr())
        for t in (*tensors, scratch)
    )
    getattr(library(), name)(ctypes.byref(shape), *arguments, c_int(threads))
