"""Attention behind one function, which checks the shapes, chooses an implementation, and says why one cannot run."""

import warnings
from functools import lru_cache
from operator import index
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from palm_rlhf.ops import attention_choices
from palm_rlhf.ops.attention_choices import AttentionWork, group_of
from palm_rlhf.ops.attention_chunked import attention_chunked
from palm_rlhf.ops.attention_flex import attention_flex, give_up, why_not_flex
from palm_rlhf.ops.attention_fused import attention_fused
from palm_rlhf.ops.attention_reference import Masks, attention_reference
from palm_rlhf.ops.devices import why_not_triton_on

Implementation = Literal["auto", "eager", "fused", "chunked", "flex", "triton"]
# While torch.compile traces, lengths can be symbols: a choice by length would be compiled anew for each. They count as
TRACED_LENGTH, TRACED_BATCH = 2048, 8


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
            - `fused`: PyTorch's scaled_dot_product_attention: cuDNN, FlashAttention-2, or a kernel of the CPU.
            - `chunked`: matrix products over chunks of queries, in memory linear in the length under any mask; the
              fastest way to train on a CPU.
            - `flex`: PyTorch's FlexAttention, which torch.compile writes for a mask; its first call takes long.
            - `triton`: our fused kernels for GPUs.
            - `auto`: the fastest of them for this work on this device, as far as it was measured: see `choose`.
    """
    if not torch.compiler.is_compiling():
        _check(q, k, v, causal, key_mask, document_ids)
    masks: Masks = {"causal": causal, "key_mask": key_mask, "document_ids": document_ids}
    if implementation == "auto":
        name = choose(q, k, v, **masks)
        return _try_flex(q, k, v, masks) if name == "flex" else _run(name, q, k, v, masks)
    if implementation not in get_args(Implementation):
        raise ValueError(f"got implementation={implementation!r}, expected one of {get_args(Implementation)}")
    if (reason := why_not(implementation, q, k, v)) is not None:
        raise ValueError(f'implementation="{implementation}" cannot run here: {reason}; use "auto" or another')
    return _run(implementation, q, k, v, masks)


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    """Return attention by an implementation that can run here."""
    if name == "fused":
        return attention_fused(q, k, v, **masks)
    if name == "chunked":
        return attention_chunked(q, k, v, **masks)
    if name == "flex":
        return attention_flex(q, k, v, **masks)
    if name == "triton":
        from palm_rlhf.ops.triton.fused_attention import attention_triton

        return attention_triton(q, k, v, **masks)
    return attention_reference(q, k, v, **masks)


def _try_flex(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    """Return attention by FlexAttention, or where it does not compile, by the next best from now on."""
    if torch.compiler.is_compiling():
        return attention_flex(q, k, v, **masks)
    from torch._dynamo.exc import TorchDynamoException  # what torch.compile raises, which has no public name

    try:
        return attention_flex(q, k, v, **masks)
    except TorchDynamoException as error:
        warnings.warn(f"FlexAttention is left out: {give_up(error)}", stacklevel=3)
        _first_that_runs.cache_clear()
        return _run(choose(q, k, v, **masks), q, k, v, masks)


def choose(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> str:
    """Return the implementation that `auto` takes: of those that can compute these tensors, the first in the table.

    The table of `attention_choices` ranks them by device, type of numbers, head dimension, group, length and mask. It
    does not know whether there are gradients, nor the batch of whole sequences: with and without gradients, in a large
    batch or a small one, a forward is computed by the same kernel, so that the log-probabilities of a policy are the
    same bits where it is scored and where it is trained.

    q: `b (hk g) i d`, k and v: `b hk j d`, key_mask and document_ids: `b j`
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask = "documents" if document_ids is not None else "none" if key_mask is None else "padding"
    # With all queries, a bidirectional call is like a causal one: no implementation needs a mask for it.
    pass_name = "decode" if num_queries == 1 else "extend" if causal and num_queries != num_keys else "sequence"
    is_traced = torch.compiler.is_compiling()
    length, batch = (TRACED_LENGTH, TRACED_BATCH) if is_traced else (_bucket(num_keys), _bucket(len(q)))
    dim, heads, kv_heads = map(index, (q.shape[3], q.shape[1], k.shape[1]))  # no symbols, also where a graph has some
    types = (q.dtype, k.dtype, v.dtype)
    return _first(q.device, types, dim, heads, kv_heads, pass_name, mask, length, batch, is_traced)


def _bucket(size: int) -> int:
    """Return the next power of 2, so that a cache that grows by a key a token asks the table rarely."""
    return 1 << max(size - 1, 0).bit_length()


def _first(*question: Any) -> str:
    return _first_that_runs(attention_choices.current_table(), *question)


# torch.compile takes the answer for a constant, as that of `why_not_triton_on`.
_first._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions can have any attribute


@lru_cache(maxsize=4096)
def _first_that_runs(
    table: attention_choices.ChoiceTable,
    device: torch.device,
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    dim: int,
    heads: int,
    kv_heads: int,
    pass_name: str,
    mask: str,
    length: int,
    batch: int,
    is_traced: bool,
) -> str:
    """Return the first implementation of the table's ranking that runs on the device."""
    dtype, group = str(types[0]).removeprefix("torch."), group_of(heads, kv_heads)
    work = AttentionWork(pass_name, mask, dtype, dim, group, length, batch)
    for name in table.ranking(attention_choices.generation_of(device), work):
        if name == "chunked" and (is_traced or device.type == "meta"):
            continue  # its graph has a part for each chunk
        # `why_not` asks for types and dimensions, which tensors without memory have
        q, k, v = (torch.empty(1, 1, 1, dim, dtype=dtype, device="meta") for dtype in types)
        if why_not(name, q, k, v, device.type) is None:
            return name
    return "eager"  # which is in every ranking


def why_not(name: str, q: Tensor, k: Tensor, v: Tensor, device_type: str | None = None) -> str | None:
    """Return why an implementation cannot compute this attention, or None if it can.

    Args:
        name: of the implementation.
        q: `b (hk g) i d`.
        k: `b hk j d`.
        v: `b hk j d`.
        device_type: where it computes, if not on the device of `q`.
    """
    device_type = device_type or q.device.type
    if name == "flex":
        return why_not_flex(q, k, v, device_type)
    if name != "triton":
        return None
    reason = why_not_triton_on(device_type)
    if reason is None:
        from palm_rlhf.ops.triton import fused_attention

        reason = fused_attention.why_not(q, k, v)
    return reason


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, document_ids: Tensor | None) -> None:
    """Raise ValueError for tensors that do not fit together; shapes that were seen before cost one look-up."""
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask is {key_mask.dtype}; expected torch.bool, True for the keys to see")
    masks = (None if key_mask is None else key_mask.shape, None if document_ids is None else document_ids.shape)
    _check_shapes(q.shape, k.shape, v.shape, causal, *masks)


@lru_cache(maxsize=4096)
def _check_shapes(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    causal: bool,
    key_mask: torch.Size | None,
    document_ids: torch.Size | None,
) -> None:
    """Raise ValueError for shapes that do not fit together."""
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) != 4:
            raise ValueError(f"{name} has shape {tuple(shape)}; expected 4 axes, `b h n d`")
    (batch, heads, num_queries, dim), (_, kv_heads, num_keys, _) = q, k
    if k != v or k[0] != batch or k[-1] != dim:
        raise ValueError(
            f"q {tuple(q)}, k {tuple(k)} and v {tuple(v)} do not fit together; expected q `b h i d`, "
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
        if mask is not None and mask != (batch, num_keys):
            raise ValueError(f"{name} has shape {tuple(mask)}; expected `b j` = {(batch, num_keys)}")
