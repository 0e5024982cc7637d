"""Attention in bfloat16 by the kernels in C of `csrc/attention_forward.c` and `csrc/attention_backward.c`."""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.ops.cpu.native_library import has_amx, library, num_threads
from palm_rlhf.ops.devices import why_not_native

COLUMNS = 32  # the width of one product in the kernels: the dimension of a head is a multiple of it
# The first key that each query sees, and the first key after those that it sees: `b i`, `b i`, int32.
Spans: TypeAlias = tuple[Tensor, Tensor]


class _Attention(ctypes.Structure):
    """`Attention` of `csrc/attention.h`."""

    _fields_ = [
        *((name, c_long) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim")),
        ("first", c_void_p),
        ("stop", c_void_p),
        ("scale", c_float),
    ]


class _Heads(ctypes.Structure):
    """`Heads` of `csrc/attention.h`."""

    _fields_ = [("data", c_void_p), ("strides", c_long * 3)]


@cache
def _why_not_here() -> str | None:
    """Return why the kernels cannot run on this processor, or None if they can."""
    if (reason := why_not_native()) is not None:
        return reason
    if not hasattr(library(), "attention_forward"):
        return "the processor has no products of bfloat16 pairs (AVX512_BF16)"
    return None


@cache
def is_faster() -> bool:
    """Return whether the kernels are faster here than products by PyTorch; not on a processor with AMX."""
    return not has_amx()


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the kernels cannot compute this attention, or None if they can.

    They are for bfloat16 on a CPU, and for heads with a multiple of 32 dimensions.
    """
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return "q, k and v are not all bfloat16"
    if q.shape[-1] % COLUMNS:
        return "the dimension of a head is no multiple of 32"
    if not q.numel():
        return "there are no queries"
    return why_not_native(q, k, v) or _why_not_here()


def key_spans(
    q: Tensor, k: Tensor, *, causal: bool, key_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Spans | None:
    """Return the span of keys that each query sees, or None if some query's keys are not next to each other.

    They are next to each other if padding comes only before or after the real keys of a row, and if the tokens of each
    document are in one piece.

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
        ends = begins.roll(-1, dims=-1)  # column 0 begins a document, so the last column ends one
        first = torch.maximum(first, torch.where(begins, columns, 0).cummax(-1).values)
        after = torch.where(ends, columns + 1, num_keys).flip(-1).cummin(-1).values.flip(-1)
        stop = torch.minimum(stop, after)
    first, stop = (t[..., num_keys - num_queries :].expand(batch, -1).int().contiguous() for t in (first, stop))
    return first, stop


def forward_native(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """Return attention, and the logarithm of the sum of exponentials of each row.

    q: `b (hk g) i d`, k and v: `b hk j d`, spans: `key_spans` -> `b (hk g) i d`, float32 `b (hk g) i`
    """
    out, lse = _like(q), torch.empty(q.shape[:3], device=q.device)
    _call("attention_forward", q, k, spans, q, k, v, out, lse)
    return out, lse


def backward_native(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, out: Tensor, lse: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, from the inputs and outputs of `forward_native` and the gradient of `out`."""
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    d_q, d_k, d_v = _like(q), _like(k), _like(v)
    _call("attention_backward", q, k, spans, q, k, v, out, d_out, lse, d_q, d_k, d_v)
    return d_q, d_k, d_v


def _like(x: Tensor) -> Tensor:
    """Return an empty tensor `b h n d`, in whose memory the heads of a position are next to each other."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


def _call(name: str, q: Tensor, k: Tensor, spans: Spans, *tensors: Tensor) -> None:
    """Call a kernel with the shape, the tensors (`b h n d` with their strides, others as pointers) and scratch."""
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    shape = _Attention(batch, heads, kv_heads, queries, keys, dim, *(t.data_ptr() for t in spans), dim**-0.5)
    threads = num_threads()
    scratch_bytes = getattr(library(), f"{name}_scratch")
    scratch_bytes.restype = c_long
    scratch = torch.empty(scratch_bytes(ctypes.byref(shape), c_int(threads)), dtype=torch.uint8, device=q.device)
    arguments = (
        ctypes.byref(_Heads(t.data_ptr(), (c_long * 3)(*t.stride()[:3]))) if t.ndim == 4 else c_void_p(t.data_ptr())
        for t in (*tensors, scratch)
    )
    getattr(library(), name)(ctypes.byref(shape), *arguments, c_int(threads))
