"""Attention behind one function: it checks the shapes, chooses an implementation, and says why one is refused."""

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor

from palm_rlhf.ops.attention_chunked import attention_chunked
from palm_rlhf.ops.attention_reference import attention_reference, visibility

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
    """softmax(q k^T / sqrt(d)) v, with keys and values shared by groups of query heads.

    Causal attention aligns the last query with the last key. A query that sees no key returns 0.

    - `eager`: the float32 definition, holding all scores at once.
    - `fused`: PyTorch's scaled_dot_product_attention.
    - `chunked`: matrix products over chunks of queries; linear memory under any mask, fastest to train on a CPU.
    - `triton`: the fused GPU kernel.
    - `auto`: `triton` on a GPU that has it, else whichever of `fused` and `chunked` suits the call.

    q: `b (hk g) i d`, k and v: `b hk j d`, key_mask: `b j` bool, document_ids: `b j` integer -> `b (hk g) i d`

    Raises:
        ValueError: shapes that do not fit, or a named implementation that cannot run here.
    """
    if not torch.compiler.is_compiling():
        _check(q, k, v, causal, key_mask, document_ids)
    if implementation == "triton" and (reason := _triton_refusal(q, k, v)) is not None:
        raise ValueError(f'implementation="triton" cannot run here: {reason}; use "auto" or another')
    masks = {"causal": causal, "key_mask": key_mask, "document_ids": document_ids}
    if implementation == "auto":
        implementation = choose(q, k, v, **masks)
    if implementation == "triton":
        from palm_rlhf.ops.triton.fused_attention import attention_triton

        return attention_triton(q, k, v, **masks)
    run = {"eager": attention_reference, "fused": attention_fused, "chunked": attention_chunked}[implementation]
    return run(q, k, v, **masks)


@beartype
def available_implementations(device_type: str = "cpu") -> dict[str, str | None]:
    """For each implementation, None where it can run on such a device, else the reason why not."""
    return {"eager": None, "fused": None, "chunked": None, "triton": _device_refusal(device_type)}


def _device_refusal(device_type: str) -> str | None:
    return _find_device_refusal(device_type)


# What torch.compiler.assume_constant_result does, without importing the compiler, which is slow and loads Triton.
_device_refusal._dynamo_marked_constant = True


@cache
def _find_device_refusal(device_type: str) -> str | None:
    """Why Triton cannot run on such a device, or None; found out when it is first asked for, not at import."""
    try:
        from palm_rlhf.ops.triton.tiles import refusal
    except ImportError as error:
        return str(error)
    return refusal(device_type)


def _triton_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    reason = _device_refusal(q.device.type)
    if reason is None:
        from palm_rlhf.ops.triton.fused_attention import cannot_run

        reason = cannot_run(q, k, v)
    return reason


def choose(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> str:
    """The implementation that `auto` takes for a call; by shapes and types, so the same with and without gradients.

    q: `b (hk g) i d`, k and v: `b hk j d`, masks: `b j`
    """
    if q.device.type == "cuda" and _triton_refusal(q, k, v) is None:
        return "triton"
    if torch.compiler.is_compiling():
        return "fused"
    if q.shape[-2] == 1 or q.device.type == "meta":
        return "fused"
    masked = key_mask is not None or document_ids is not None
    return "chunked" if masked or q.device.type == "cpu" or (causal and q.shape[-2] != k.shape[-2]) else "fused"


def attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """PyTorch's fused attention. With one new query, the heads that share a key become its query axis."""
    num_queries, num_keys, kv_heads = q.shape[-2], k.shape[-2], k.shape[1]
    if num_queries == 1:
        causal = False  # the last query sees every key
    plain = key_mask is None and document_ids is None and (not causal or num_queries == num_keys)
    visible = None
    if not plain:
        visible = visibility(
            num_queries, num_keys, causal=causal, key_mask=key_mask, document_ids=document_ids, device=q.device
        ).unsqueeze(1)  # b 1 i j
    if num_queries == 1:
        rows = q.reshape(len(q), kv_heads, -1, q.shape[-1])  # b hk g d
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible).reshape(q.shape)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=plain and causal, enable_gqa=kv_heads != q.shape[1]
        )
    if visible is None:
        return out
    return out.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, document_ids: Tensor | None) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; expected 4 axes, `b h n d`")
    (batch, heads, num_queries, dim), (_, kv_heads, num_keys, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[-1] != dim:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; expected q `b h i d`, "
            "k and v both `b hk j d`, with the same b and d"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} key heads; expected a multiple: groups share a key head")
    if (causal or document_ids is not None) and num_queries > num_keys:
        raise ValueError(
            f"{num_queries} queries over {num_keys} keys; expected at least as many keys as queries, "
            "since the last query stands at the last key"
        )
    for name, mask in (("key_mask", key_mask), ("document_ids", document_ids)):
        if mask is not None and mask.shape != (batch, num_keys):
            raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected `b j` = {(batch, num_keys)}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask is {key_mask.dtype}; expected torch.bool, True for the keys to keep")
