"""Fused attention for GPUs, forward and backward, in memory linear in the length (Dao 2023, FlashAttention-2).

The query heads that share a key head are packed into the rows of a tile, row = query * group + head. So keys and values
are never expanded, and the gradient of a shared key is summed in registers, always in the same order. One loop without
a mask takes the blocks of keys that all rows of a tile see. Another with a mask takes the blocks on the diagonal, at
the edges of documents and around padding. Blocks that no row sees are left out. Exponentials are powers of 2, so that
the scale of the scores can be folded into the subtraction of the maximum.

This file has the operators for autograd and torch.compile. The kernels and their launchers are in
`attention_forward.py`, `attention_backward.py`, `attention_keys_backward.py` and `attention_decode.py`, and masks in
`attention_masks.py`.
"""

import torch
from torch import Tensor

from palm_rlhf.ops.triton.attention_backward import backward
from palm_rlhf.ops.triton.attention_decode import MAX_ROWS, decode
from palm_rlhf.ops.triton.attention_forward import forward
from palm_rlhf.ops.triton.operators import Operator

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 256
MASKS = "bool causal, Tensor? key_mask, Tensor? document_ids"


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the kernels cannot compute this attention, or None if they can."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; it takes one of {DTYPES} for all three"
    if q.shape[-1] > MAX_DIM:
        return f"heads have {q.shape[-1]} dimensions; it takes up to {MAX_DIM}"
    return None


def _fake_backward(d_out, q, k, v, out, lse, causal, key_mask, document_ids):
    return tuple(t.new_empty(*t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))


backward_operator = Operator(
    "attention_backward",
    f"(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {MASKS}) -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _fake_forward(q, k, v, causal, key_mask, document_ids):
    batch, heads, num_queries, dim = q.shape
    out = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    return out, q.new_empty(batch, k.shape[1], num_queries * (heads // k.shape[1]), dtype=torch.float32)


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, key_mask, document_ids = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, key_mask, document_ids)


def _gradients(ctx, d_out, *_):
    q, k, v, out, lse, key_mask, document_ids = ctx.saved_tensors
    return *backward_operator(d_out, q, k, v, out, lse, ctx.causal, key_mask, document_ids), None, None, None


forward_operator = Operator(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {MASKS}) -> (Tensor, Tensor)",
    forward,
    _fake_forward,
    save=_save,
    gradients=_gradients,
    num_results=1,  # the lse is for the backward
)


def _fake_decode(q, k, v, causal, key_mask):
    return q.new_empty(*q.transpose(1, 2).shape).transpose(1, 2)


decode_operator = Operator(
    "attention_decode",
    "(Tensor q, Tensor k, Tensor v, bool causal, Tensor? key_mask) -> Tensor",
    decode,
    _fake_decode,
)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return what `attention_reference` returns, by fused kernels; few queries over a longer cache take `decode`.

    Whole sequences, however short, take the forward kernel of training, also without gradients, so that their bits are
    the same with and without.

    q: `b (hk g) i d`, k and v: `b hk j d`, key_mask and document_ids: `b j` -> `b (hk g) i d`
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    key_mask = None if key_mask is None else key_mask.contiguous()
    document_ids = None if document_ids is None else document_ids.contiguous()
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    few = q.shape[2] < k.shape[2] and q.shape[1] // k.shape[1] * q.shape[2] <= MAX_ROWS[q.dtype]
    if few and document_ids is None and not needs_grad:
        return decode_operator(q, k, v, causal, key_mask)
    return forward_operator(q, k, v, causal, key_mask, document_ids)
