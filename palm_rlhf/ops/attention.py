"""Attention behind one function, which checks the shapes, chooses an implementation, and says why one cannot run."""

from typing import Literal

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor

from palm_rlhf.ops.attention_chunked import attention_chunked
from palm_rlhf.ops.attention_reference import Masks, attention_reference, visibility
from palm_rlhf.ops.devices import GPUS, why_not_triton_on

Implementation = Literal["auto", "eager", "fused", "chunked", "triton"]


@beartype
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, with keys and values shared by groups of query heads: `b (hk g) i d`.

    A query that sees no key returns 0. Raises ValueError for shapes that do not fit together, and for a named
    implementation that cannot run here.

    Args:
        q: `b (hk g) i d`.
        k: `b hk j d`.
        v: `b hk j d`.
        causal: a query sees no later key; the last query is at the position of the last key.
        key_mask: `b j`, bool, True for the keys to see.
        document_ids: `b j`, integer; a query sees only the keys of its own document.
        implementation: which code computes it.

            - `eager`: the float32 definition, with all scores in memory.
            - `fused`: PyTorch's scaled_dot_product_attention.
            - `chunked`: matrix products over chunks of queries, in memory linear in the length under any mask; the
              fastest way to train on a CPU.
            - `triton`: our fused kernels for GPUs.
            - `auto`: `triton` on a GPU that can run it, else whichever of `fused` and `chunked` is faster.
    """
    if not torch.compiler.is_compiling():
        _check(q, k, v, causal, key_mask, document_ids)
    if implementation == "triton" and (reason := _why_not_triton(q, k, v)) is not None:
        raise ValueError(f'implementation="triton" cannot run here: {reason}; use "auto" or another')
    masks: Masks = {"causal": causal, "key_mask": key_mask, "document_ids": document_ids}
    if implementation == "auto":
        implementation = choose(q, k, v, **masks)
    if implementation == "triton":
        from palm_rlhf.ops.triton.fused_attention import attention_triton

        return attention_triton(q, k, v, **masks)
    run = {"eager": attention_reference, "fused": attention_fused, "chunked": attention_chunked}[implementation]
    return run(q, k, v, **masks)


def choose(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Implementation:
    """Return the implementation that `auto` takes: the fastest of those that can compute these tensors.

    Only shapes and dtypes decide, so that a forward computes the same bits with and without gradients.

    q: `b (hk g) i d`, k and v: `b hk j d`, key_mask and document_ids: `b j`
    """
    if q.device.type in GPUS and _why_not_triton(q, k, v) is None:
        return "triton"
    if torch.compiler.is_compiling() or q.shape[-2] == 1 or q.device.type == "meta":
        return "fused"
    masked = key_mask is not None or document_ids is not None
    return "chunked" if masked or q.device.type == "cpu" or (causal and q.shape[-2] != k.shape[-2]) else "fused"


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the Triton kernels cannot compute this attention here, or None if they can."""
    reason = why_not_triton_on(q.device.type)
    if reason is None:
        from palm_rlhf.ops.triton.fused_attention import why_not

        reason = why_not(q, k, v)
    return reason


def attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return PyTorch's fused attention. With one new query, the heads that share a key become its query axis."""
    num_queries, num_keys, kv_heads = q.shape[-2], k.shape[-2], k.shape[1]
    if num_queries == 1:
        causal = False  # the last query sees every key
    visible = None
    is_square = not causal or num_queries == num_keys  # PyTorch's own causal mask starts at the first key
    if key_mask is not None or document_ids is not None or not is_square:
        visible = visibility(
            num_queries, num_keys, causal=causal, key_mask=key_mask, document_ids=document_ids, device=q.device
        )
    if visible is not None:
        visible = visible.unsqueeze(1)  # b 1 i j
    if num_queries == 1:
        rows = q.reshape(len(q), kv_heads, -1, q.shape[-1])  # b hk g d
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible).reshape(q.shape)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None and causal, enable_gqa=kv_heads != q.shape[1]
        )
    if visible is None:
        return out
    return out.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, document_ids: Tensor | None) -> None:
    """Raise ValueError for shapes that do not fit together."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; expected 4 axes, `b h n d`")
    (batch, heads, num_queries, dim), (_, kv_heads, num_keys, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[-1] != dim:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together; expected q `b h i d`, "
            "k and v both `b hk j d`, with the same b and d"
        )
    if heads % kv_heads:
        raise ValueError(
            f"got {heads} query heads and {kv_heads} key heads; expected a multiple, since groups of query heads share "
            "a key head"
        )
    if (causal or document_ids is not None) and num_queries > num_keys:
        raise ValueError(
            f"got {num_queries} queries and {num_keys} keys; expected at least as many keys as queries, since the last "
            "query is at the position of the last key"
        )
    for name, mask in (("key_mask", key_mask), ("document_ids", document_ids)):
        if mask is not None and mask.shape != (batch, num_keys):
            raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected `b j` = {(batch, num_keys)}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask is {key_mask.dtype}; expected torch.bool, True for the keys to see")
