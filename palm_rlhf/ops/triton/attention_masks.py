"""Masks in the kernels of attention: which keys a row sees, and which blocks every row of a tile sees whole.

`summarise` describes every block of positions once a call. From that a program finds, in a few numbers instead of all
positions, the range of blocks that it meets, and inside it a range that needs no mask: blocks of a single document, of
which every key is kept. Only the blocks around that range are masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.tiles import on

POSITIONS = 64  # of a block that is summarised
BLOCKS = 16  # that a program summarises


@triton.jit
def summary_kernel(
    key_mask_ptr, ids_ptr, summary_ptr, num_keys, num_blocks, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr
):
    """Describe blocks of positions: `b 3 blocks`. Grid: b, groups of blocks.

    The 3 numbers are the lowest and the highest document, both 0 without documents, and 0, 1 or 2 where the mask keeps
    no key, some keys or all keys.
    """
    batch = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    positions = blocks[:, None] * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    exists = positions < num_keys
    kept = exists
    if key_mask_ptr is not None:
        kept = exists & (tl.load(key_mask_ptr + batch * num_keys + positions, mask=exists, other=0) != 0)
    lowest, highest = tl.zeros((BLOCKS,), tl.int64), tl.zeros((BLOCKS,), tl.int64)
    if ids_ptr is not None:
        ids_ptr += batch * num_keys
        first = tl.load(ids_ptr + blocks * POSITIONS, mask=inside, other=0)
        ids = tl.where(exists, tl.load(ids_ptr + positions, mask=exists, other=0), first[:, None])
        lowest, highest = tl.min(ids, 1).to(tl.int64), tl.max(ids, 1).to(tl.int64)
    kept_any, kept_all = tl.max(kept.to(tl.int32), 1), tl.min((kept == exists).to(tl.int32), 1)
    summary_ptr += batch * 3 * num_blocks
    tl.store(summary_ptr + blocks, lowest, mask=inside)
    tl.store(summary_ptr + num_blocks + blocks, highest, mask=inside)
    tl.store(summary_ptr + 2 * num_blocks + blocks, (kept_any + kept_all).to(tl.int64), mask=inside)


@triton.jit
def _judge(summary_ptr, num_blocks, blocks, stop, low_id, high_id, KEYS: tl.constexpr):
    """Return which blocks before `stop` hold a document from low_id to high_id, and which hold only that one document.

    With KEYS, the first also keep a key, and the second keep all.
    """
    inside = blocks < stop
    lowest = tl.load(summary_ptr + blocks, mask=inside, other=0)
    highest = tl.load(summary_ptr + num_blocks + blocks, mask=inside, other=0)
    met = inside & (lowest <= high_id) & (highest >= low_id)
    whole = met & (lowest == highest) & (low_id == high_id)
    if KEYS:
        kept = tl.load(summary_ptr + 2 * num_blocks + blocks, mask=inside, other=0)
        met, whole = met & (kept > 0), whole & (kept == 2)
    return met, whole


@triton.jit
def meet(
    summary_ptr, num_blocks, lo, hi, low_id, high_id,
    KEYS: tl.constexpr, POSITIONS: tl.constexpr = POSITIONS, WIDTH: tl.constexpr = 128,
):  # fmt: skip
    """Return the range of positions between lo and hi that a tile meets, and a range inside it that needs no mask.

    The tile holds documents from low_id to high_id. Both ranges begin and end with a summarised block, or at lo and hi.
    The second is the first run of blocks of the tile's one document; where there is none, it ends before it begins.

    Args:
        KEYS: whether the positions are of keys, which a mask hides, or of queries.
    """
    first, stop, whole = hi, lo, hi
    for start in tl.range(lo // POSITIONS, tl.cdiv(hi, POSITIONS), WIDTH):
        blocks = start + tl.arange(0, WIDTH)
        met, seen = _judge(summary_ptr, num_blocks, blocks, tl.cdiv(hi, POSITIONS), low_id, high_id, KEYS)
        first = tl.minimum(first, tl.min(tl.where(met, blocks * POSITIONS, hi), 0))
        stop = tl.maximum(stop, tl.max(tl.where(met, blocks * POSITIONS + POSITIONS, lo), 0))
        whole = tl.minimum(whole, tl.min(tl.where(seen, blocks * POSITIONS, hi), 0))
    stop = tl.minimum(stop, hi)
    end = stop
    for start in tl.range(whole // POSITIONS, tl.cdiv(stop, POSITIONS), WIDTH):
        blocks = start + tl.arange(0, WIDTH)
        _, seen = _judge(summary_ptr, num_blocks, blocks, tl.cdiv(stop, POSITIONS), low_id, high_id, KEYS)
        end = tl.minimum(end, tl.min(tl.where(seen | (blocks * POSITIONS < whole), stop, blocks * POSITIONS), 0))
    return tl.maximum(first, lo), stop, tl.maximum(whole, lo), end


@triton.jit
def visible_keys(at, ids, keys, num_keys, key_mask_ptr, ids_ptr, DIAGONAL: tl.constexpr):
    """Return which keys each row sees, `rows keys`; a row has the key position `at` and the document `ids`."""
    exists = keys < num_keys
    visible = exists[None, :]
    if DIAGONAL:
        visible = visible & (at[:, None] >= keys[None, :])
    if key_mask_ptr is not None:
        visible = visible & (tl.load(key_mask_ptr + keys, mask=exists, other=0) != 0)[None, :]
    if ids_ptr is not None:
        visible = visible & (ids[:, None] == tl.load(ids_ptr + keys, mask=exists, other=0)[None, :])
    return visible


@triton.jit
def ids_of(positions, inside, first, ids_ptr):
    """Return the documents of the positions of a tile, with the lowest and the highest; without documents all are 0.

    Positions that are not `inside` count as in the document of `first`.
    """
    ids, low_id, high_id = positions * 0, 0, 0
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + positions, mask=inside, other=tl.load(ids_ptr + first))
        low_id, high_id = tl.min(ids, 0).to(tl.int64), tl.max(ids, 0).to(tl.int64)
    return ids, low_id, high_id


def summarise(key_mask: Tensor | None, document_ids: Tensor | None) -> tuple[Tensor | None, int]:
    """Return the summary of masks, both `b j`, as `b 3 blocks`, and the number of blocks; None and 0 without masks."""
    masks = key_mask if document_ids is None else document_ids
    if masks is None:
        return None, 0
    batch, num_keys = masks.shape
    num_blocks = triton.cdiv(num_keys, POSITIONS)
    summary = masks.new_empty(batch, 3, num_blocks, dtype=torch.long)
    if masks.numel():
        with on(masks.device):
            summary_kernel[batch, triton.cdiv(num_blocks, BLOCKS)](
                key_mask, document_ids, summary, num_keys, num_blocks, BLOCKS=BLOCKS, POSITIONS=POSITIONS
            )
    return summary, num_blocks
