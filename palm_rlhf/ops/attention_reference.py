"""Scaled dot-product attention, written out: the definition that every faster implementation is tested against."""

from contextlib import AbstractContextManager, nullcontext
from typing import TypedDict

import torch
from einops import rearrange
from torch import Tensor


class Masks(TypedDict):
    """The keywords by which every implementation of attention is told which keys a query sees."""

    causal: bool
    key_mask: Tensor | None
    document_ids: Tensor | None


def visibility(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    queries: slice = slice(None),
    device: torch.device | None = None,
) -> Tensor | None:
    """Return which keys each query sees, `b i j` or `1 i j`, bool, or None if every query sees every key.

    The last query is at the position of the last key, as it is where a few new tokens meet a longer cache.

    Args:
        num_queries: i.
        num_keys: j.
        causal: a query sees no later key.
        key_mask: `b j`, bool, True for the keys to see.
        document_ids: `b j`; a query sees only the keys of its own document.
        queries: the rows of i to return.
        device: the device of the result.
    """
    rows = torch.arange(num_keys - num_queries, num_keys, device=device)[queries]
    visible = None
    if causal:
        visible = rearrange(rows, "i -> 1 i 1") >= torch.arange(num_keys, device=device)
    if key_mask is not None:
        keep = rearrange(key_mask, "b j -> b 1 j")
        visible = keep if visible is None else visible & keep
    if document_ids is not None:
        same = rearrange(document_ids[:, rows], "b i -> b i 1") == rearrange(document_ids, "b j -> b 1 j")
        visible = same if visible is None else visible & same
    if visible is not None and visible.shape[1] == 1:
        visible = visible.expand(-1, len(rows), -1)
    return visible


def full_precision(device_type: str) -> AbstractContextManager:
    """Return a context in which autocast leaves float32 products in float32."""
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else nullcontext()


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# torch.compile takes the answer for a constant. Before torch 2.7 it cannot trace the question.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions can have any attribute


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v in float32, or in float64 for float64; a query that sees no key returns 0.

    Vaswani et al. 2017, equation 1; shared keys and values: Shazeer 2019 and Ainslie et al. 2023.

    q: `b (hk g) i d`, k and v: `b hk j d`, key_mask and document_ids: `b j` -> `b (hk g) i d`
    """
    dtype = q.dtype
    compute = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(compute) for t in (q, k, v))
    q = rearrange(q, "b (hk g) i d -> b hk g i d", hk=k.shape[1])

    with full_precision(q.device.type):
        scores = torch.einsum("b k g i d, b k j d -> b k g i j", q, k) * q.shape[-1] ** -0.5
    visible = visibility(
        q.shape[-2], k.shape[-2], causal=causal, key_mask=key_mask, document_ids=document_ids, device=q.device
    )
    if visible is not None:
        visible = rearrange(visible, "b i j -> b 1 1 i j")
        scores = scores.masked_fill(~visible, torch.finfo(compute).min)
    weights = scores.softmax(dim=-1)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0.0)

    with full_precision(q.device.type):
        out = torch.einsum("b k g i j, b k j d -> b k g i d", weights, v)
    return rearrange(out, "b hk g i d -> b (hk g) i d").to(dtype)
