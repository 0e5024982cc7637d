"""Attention behind one function, which checks the shapes, chooses an implementation, and says why one cannot run."""

import warnings
from functools import lru_cache
from operator import index
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from palm_rlhf.ops import attention_choices
from palm_rlhf.ops.attention_choices import AttentionWork, ChoiceTable, group_of
from palm_rlhf.ops.attention_chunked import attention_chunked
from palm_rlhf.ops.attention_flex import attention_flex, give_up, why_not_flex
from palm_rlhf.ops.attention_fused import attention_fused
from palm_rlhf.ops.attention_reference import Masks, attention_reference
from palm_rlhf.ops.devices import why_not_triton_on

Implementation = Literal["auto", "eager", "fused", "chunked", "flex", "triton"]
IMPLEMENTATIONS = get_args(Implementation)
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
    masks: Masks = {"causal": causal, "key_mask": key_mask, "document_ids": document_ids}
    if not torch.compiler.is_compiling():
        _check(q.shape, k.shape, v.shape, causal, _form(key_mask), _form(document_ids))
    if implementation == "auto":
        name = choose(q, k, v, **masks)
        return _try_flex(q, k, v, masks) if name == "flex" else _run(name, q, k, v, masks)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"got implementation={implementation!r}, expected one of {IMPLEMENTATIONS}")
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
        forget_choices()
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
    mask = "documents" if document_ids is not None else "none" if key_mask is None else "padding"
    types = (q.dtype, k.dtype, v.dtype)
    if not torch.compiler.is_compiling():
        return _choice(attention_choices.current_table(), q.device, types, q.shape, k.shape, causal, mask)
    dim, heads, kv_heads = map(index, (q.shape[3], q.shape[1], k.shape[1]))  # no symbols, also where a graph has some
    pass_name = _pass_name(q.shape[2], k.shape[2], causal)
    return _choice_of_graph(q.device, types, dim, heads, kv_heads, pass_name, mask)


@lru_cache(maxsize=4096)
def _choice(
    table: ChoiceTable,
    device: torch.device,
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    q: torch.Size,
    k: torch.Size,
    causal: bool,
    mask: str,
) -> str:
    """Return the choice for tensors of these shapes; a model asks for the same in each layer."""
    batch, heads, num_queries, dim = q
    kv_heads, num_keys = k[1:3]
    pass_name = _pass_name(num_queries, num_keys, causal)
    lengths = (_bucket(num_keys), _bucket(batch))
    return _first_that_runs(table, device, types, dim, heads, kv_heads, pass_name, mask, *lengths, is_traced=False)


def _choice_of_graph(*question: Any) -> str:
    table = attention_choices.current_table()
    return _first_that_runs(table, *question, TRACED_LENGTH, TRACED_BATCH, is_traced=True)


# torch.compile takes the answer for a constant, as that of `why_not_triton_on`.
_choice_of_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions can have any attribute


def _pass_name(num_queries: int, num_keys: int, causal: bool) -> str:
    """Return the pass of the table; a bidirectional call needs no mask for its lengths, and is like a square one."""
    return "decode" if num_queries == 1 else "extend" if causal and num_queries != num_keys else "sequence"


def _bucket(size: int) -> int:
    """Return the next power of 2, so that a cache that grows by a key a token asks the table rarely."""
    return 1 << max(size - 1, 0).bit_length()


@lru_cache(maxsize=4096)
def _first_that_runs(
    table: ChoiceTable,
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


def forget_choices() -> None:
    """Ask anew what can run, the next time."""
    _choice.cache_clear()
    _first_that_runs.cache_clear()


Form: TypeAlias = tuple[torch.Size, torch.dtype] | None


def _form(mask: Tensor | None) -> Form:
    """Return what has to fit of a mask."""
    return None if mask is None else (mask.shape, mask.dtype)


@lru_cache(maxsize=4096)
def _check(q: torch.Size, k: torch.Size, v: torch.Size, causal: bool, key_mask: Form, document_ids: Form) -> None:
    """Raise ValueError for shapes that do not fit together; those that were seen before cost one look-up."""
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
        if mask is not None and mask[0] != (batch, num_keys):
            raise ValueError(f"{name} has shape {tuple(mask[0])}; expected `b j` = {(batch, num_keys)}")
    if key_mask is not None and key_mask[1] != torch.bool:
        raise ValueError(f"key_mask is {key_mask[1]}; expected torch.bool, True for the keys to see")
