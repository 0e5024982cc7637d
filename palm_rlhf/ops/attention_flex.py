"""PyTorch's FlexAttention: a kernel that torch.compile writes for a mask, and that leaves out blocks nobody sees.

Dong et al. 2024, "FlexAttention: A Programming Model for Generating Optimized Attention Kernels". `create_block_mask`
of PyTorch evaluates the mask for every pair of a query and a key. The block mask here comes from the first and last
document of each block instead, so that neither time nor memory grow with the number of pairs.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from palm_rlhf.ops.attention_fused import is_captured
from palm_rlhf.ops.devices import GPUS, why_not_flex_on

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions

BLOCK = 128  # queries and keys of a block, the default of FlexAttention
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_DIM, MAX_DIM = 16, 256
# PyTorch has another kernel for fewer than 128 queries, and takes it only where it knows the length when it compiles.
# Without it, a result does not depend on what was compiled before.
KERNEL_OPTIONS: "FlexKernelOptions" = {"FORCE_USE_FLEX_ATTENTION": True}

# Set where torch.compile could not write a kernel in this process, so that `auto` tries it once.
_failure: str | None = None


def why_not_flex(q: Tensor, k: Tensor, v: Tensor, device_type: str | None = None) -> str | None:
    """Return why FlexAttention cannot compute this attention, or None if it can.

    Args:
        q: `b (hk g) i d`.
        k: `b hk j d`.
        v: `b hk j d`.
        device_type: where it computes, if not on the device of `q`.
    """
    device_type = device_type or q.device.type
    if (reason := why_not_flex_on(device_type) or _failure) is not None:
        return reason
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; it takes one of {DTYPES} for all three"
    dim = q.shape[-1]
    if not MIN_DIM <= dim <= MAX_DIM:
        return f"heads have {dim} dimensions; it takes {MIN_DIM} to {MAX_DIM}"
    if dim & (dim - 1) and torch.__version__ < (2, 8):  # type: ignore[operator]  # TorchVersion compares with tuples
        return f"heads have {dim} dimensions; before torch 2.8 it takes powers of 2"
    if not q.numel():
        return "there are no queries"
    if device_type not in GPUS and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return "it has no gradients on a CPU"
    return None


def give_up(error: Exception) -> str:
    """Remember that FlexAttention does not compile here, so that `auto` passes it over; return the reason."""
    global _failure
    _failure = f"it did not compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return _failure


class _LastMask(NamedTuple):
    """The block mask that was built last, and all that it was built from."""

    lengths: tuple[int, int, bool]
    tensors: tuple[Tensor | None, Tensor | None]
    versions: tuple[int, int]  # of the tensors' contents
    block_mask: "BlockMask"


_last: _LastMask | None = None


def mask_for(
    q: Tensor, k: Tensor, *, causal: bool, key_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> "BlockMask":
    """Return `block_mask` of these tensors; the layers of a model, which pass the same masks, share one.

    q: `b (hk g) i d`, k: `b hk j d`, key_mask and document_ids: `b j`
    """
    global _last
    lengths = (q.shape[2], k.shape[2], causal)
    masks = (key_mask, document_ids)
    if torch.compiler.is_compiling() or not _may_keep(q, masks):
        return block_mask(*lengths, key_mask=key_mask, document_ids=document_ids, device=q.device)
    versions = tuple(0 if t is None else t._version for t in masks)
    last = _last  # another thread may replace it
    if (
        last is None
        or last.lengths != lengths
        or last.versions != versions
        or any(kept is not given for kept, given in zip(last.tensors, masks, strict=True))
        or last.block_mask.kv_num_blocks.device != q.device
    ):
        built = block_mask(*lengths, key_mask=key_mask, document_ids=document_ids, device=q.device)
        _last = last = _LastMask(lengths, masks, versions, built)  # type: ignore[arg-type]  # two versions
    return last.block_mask


def _may_keep(q: Tensor, masks: tuple[Tensor | None, Tensor | None]) -> bool:
    """Return whether a block mask of these tensors stays true as long as they and their versions are the same.

    Tensors of inference mode have no version. A CUDA graph must compute its masks anew each time it is replayed.
    """
    if any(t is not None and t.is_inference() for t in masks):
        return False
    return not is_captured(q)


def block_mask(
    num_queries: int,
    num_keys: int,
    causal: bool,
    *,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> "BlockMask":
    """Return FlexAttention's form of `attention_reference.visibility`: blocks to compute, and the mask inside them.

    A block is left out where no query can see a key of it: all keys are later, or under the mask, or the ranges of the
    document ids do not meet. A block needs no mask where every query sees every key. Documents in several pieces cost
    blocks, never exactness, for the mask decides inside.

    Args:
        num_queries: i.
        num_keys: j.
        causal: a query sees no later key; the last query is at the position of the last key.
        key_mask: `b j`, bool, True for the keys to see.
        document_ids: `b j`; a query sees only the keys of its own document.
        device: where the blocks are.
    """
    from torch.nn.attention.flex_attention import BlockMask

    offset = num_keys - num_queries
    rows, columns = (torch.arange(-(-n // BLOCK), device=device) * BLOCK for n in (num_queries, num_keys))
    rows, columns = rows.view(1, -1, 1), columns.view(1, 1, -1)  # the first query and key of each block
    some = torch.ones(1, rows.shape[1], columns.shape[2], dtype=torch.bool, device=device)
    whole = (rows + BLOCK <= num_queries) & (columns + BLOCK <= num_keys)
    if causal:
        last_rows = (rows + BLOCK).clamp(max=num_queries) - 1
        some = some & (last_rows + offset >= columns)
        whole = whole & (rows + offset >= columns + BLOCK - 1)
    if key_mask is not None:
        kept = _in_blocks(key_mask, 0, columns.shape[2])
        some = some & kept.any(dim=-1).unsqueeze(1)
        whole = whole & kept.all(dim=-1).unsqueeze(1)
    if document_ids is not None:
        first, last = (t.unsqueeze(2) for t in _in_blocks(document_ids, offset, rows.shape[1]).aminmax(dim=-1))
        key_first, key_last = (t.unsqueeze(1) for t in _in_blocks(document_ids, 0, columns.shape[2]).aminmax(dim=-1))
        some = some & (first <= key_last) & (key_first <= last)
        whole = whole & (first == last) & (key_first == key_last) & (first == key_first)
    whole = whole & some
    return BlockMask.from_kv_blocks(
        *_in_order(some & ~whole),
        *_in_order(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_of_pairs(offset, causal, key_mask, document_ids, device),
        seq_lengths=(num_queries, num_keys),
    )


def _in_blocks(x: Tensor, start: int, num_blocks: int) -> Tensor:
    """Cut columns from `start` on into blocks, of which the last one repeats the last column: `b j -> b blocks 128`."""
    columns = (start + torch.arange(num_blocks * BLOCK, device=x.device)).clamp(max=x.shape[1] - 1)
    return x[:, columns].unflatten(1, (num_blocks, BLOCK))


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of each row are marked, and their numbers before all others: `b 1 i` and `b 1 i j`."""
    blocks = blocks.unsqueeze(1).int()
    return blocks.sum(dim=-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()


def _mask_of_pairs(
    offset: int, causal: bool, key_mask: Tensor | None, document_ids: Tensor | None, device: torch.device | str
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the mask of one pair of a query and a key, which torch.compile writes into the kernel."""
    # A tensor, since another number would be compiled anew.
    shift = torch.tensor(offset, dtype=torch.int32, device=device) if offset else None

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query if shift is None else query + shift
        visible = row >= key if causal else key >= 0
        if key_mask is not None:
            visible = visible & key_mask[batch, key]
        if document_ids is not None:
            visible = visible & (document_ids[batch, row] == document_ids[batch, key])
        return visible

    return sees


@cache
def _compiled(device_type: str, *kind: object) -> Callable[..., Tensor]:
    """Return FlexAttention compiled for a kind of call: type of the numbers, heads, masks, with gradients or without.

    torch.compile counts how often a function was compiled, by its code, and refuses after 8 times. So each kind has a
    code of its own, and its lengths alone may vary: the second one is compiled for all. On a CPU each length is a kind,
    since the C++ that torch 2.13 writes for all of them has errors.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def flex(q: Tensor, k: Tensor, v: Tensor, mask: "BlockMask") -> Tensor:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=KERNEL_OPTIONS)

    flex.__code__ = flex.__code__.replace(co_name="flex_" + "_".join(map(str, kind)))
    # fullgraph: an error rather than all scores in memory where it cannot be compiled
    return torch.compile(flex, fullgraph=True, dynamic=None if device_type in GPUS else False)


def attention_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return what `attention_reference` returns, by FlexAttention; the first call of a kind takes some 10 seconds.

    q: `b (hk g) i d`, k and v: `b hk j d`, key_mask and document_ids: `b j` -> `b (hk g) i d`
    """
    mask = mask_for(q, k, causal=causal, key_mask=key_mask, document_ids=document_ids)
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=KERNEL_OPTIONS)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    masks = (causal, key_mask is not None, document_ids is not None, q.shape[2] == k.shape[2])
    kind = (q.dtype, q.shape[1], k.shape[1], q.shape[3], *masks, needs_grad)
    lengths = () if q.device.type in GPUS else (len(q), q.shape[2], k.shape[2])
    return _compiled(q.device.type, *kind, *lengths)(q, k, v, mask)
