"""The forward kernel of fused attention, and the functions that the other kernels of attention share with it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.tiles import (
    LOG2_E,
    TensorDescriptor,
    Tile,
    block_dim,
    describe,
    load_block,
    load_rows,
    on,
    precision,
    store_rows,
    tile_for,
)

# Tiles by head dimension, for 16-bit numbers.
TILES = {
    "sm_80": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "sm_86": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "sm_90": {64: Tile(128, 128, 4, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    "sm_100": {64: Tile(128, 64, 4, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    "gfx942": {64: Tile(128, 64, 4, 1), 128: Tile(128, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
}
# Exceptions for calls with a mask, which need more registers.
MASKED_TILES = {
    "sm_80": {128: Tile(128, 32, 8, 2)},
    "sm_86": {128: Tile(128, 32, 8, 2)},
    "sm_90": {64: Tile(64, 128, 4, 2), 256: Tile(128, 32, 8, 2)},
    "sm_100": {64: Tile(128, 128, 8, 2), 256: Tile(64, 64, 8, 2)},
}


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
def span(lo, hi, low_id, high_id, key_mask_ptr, ids_ptr):
    """Return the first position, and the one after the last, that the mask keeps between lo and hi.

    With documents, only those from `low_id` to `high_id` count.
    """
    first, stop = hi, lo
    for start in tl.range(lo, hi, 1024):
        positions = start + tl.arange(0, 1024)
        found = positions < hi
        if key_mask_ptr is not None:
            found = found & (tl.load(key_mask_ptr + positions, mask=found, other=0) != 0)
        if ids_ptr is not None:
            ids = tl.load(ids_ptr + positions, mask=found, other=0)
            found = found & (ids >= low_id) & (ids <= high_id)
        first = tl.minimum(first, tl.min(tl.where(found, positions, hi), 0))
        stop = tl.maximum(stop, tl.max(tl.where(found, positions + 1, lo), 0))
    return first, stop


@triton.jit
def ids_of(positions, inside, first, ids_ptr):
    """Return the documents of the positions of a tile, or any numbers without documents.

    Positions that are not `inside` count as in the document of `first`.
    """
    ids = positions
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + positions, mask=inside, other=tl.load(ids_ptr + first))
    return ids


@triton.jit
def tile_of_rows(
    kv_head, num_queries, num_keys, key_mask_ptr, ids_ptr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the rows of this program, the longest first, and the range of keys that they meet.

    Returned are the rows, their query and head, whether they exist, their key position and document, and the bounds lo,
    `full` and hi: every row sees the keys from lo to `full`, as far as masks allow, and some the keys from there to hi.
    """
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    query, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    shift = num_keys - num_queries
    inside, at, first_at = query < num_queries, query + shift, first // GROUP + shift
    ids = ids_of(at, inside, first_at, ids_ptr)

    lo, hi, full = 0, num_keys, num_keys
    if CAUSAL:
        hi = tl.minimum((first + BLOCK_M - 1) // GROUP + shift + 1, num_keys)
        full = first_at + 1
    if key_mask_ptr is not None or ids_ptr is not None:
        lo, hi = span(0, hi, tl.min(ids, 0), tl.max(ids, 0), key_mask_ptr, ids_ptr)
        lo = lo // BLOCK_N * BLOCK_N
    full = tl.maximum(tl.minimum(full, hi) // BLOCK_N * BLOCK_N, lo)
    return rows, query, head, inside, at, ids, lo, full, hi


@triton.jit
def attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, batch, kv_head, stride_k, stride_v, lo, hi, num_keys, at, ids,
    key_mask_ptr, ids_ptr, scale_log2, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax (Milakov & Gimelshein 2018) of a tile of rows over the keys from lo to hi."""
    MASKED: tl.constexpr = EDGE or (key_mask_ptr is not None or ids_ptr is not None)
    for start in tl.range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_block(k_ptr, batch, kv_head, stride_k, start, num_keys, EDGE, DIM, BLOCK_DIM, BLOCK_N, TMA)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            visible = visible_keys(at, ids, keys, num_keys, key_mask_ptr, ids_ptr, EDGE and CAUSAL)
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        offset = new_max * scale_log2
        if MASKED:
            offset = tl.where(new_max == float("-inf"), 0.0, offset)  # rows that have seen no key yet
        shrink = tl.math.exp2(row_max * scale_log2 - offset)
        weights = tl.math.exp2(scores * scale_log2 - offset[:, None])
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        v = load_block(v_ptr, batch, kv_head, stride_v, start, num_keys, EDGE, DIM, BLOCK_DIM, BLOCK_N, TMA)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, key_mask_ptr, ids_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    kv_heads, num_queries, num_keys, scale_log2,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute out, `b i (hk g) d`, and lse, `b hk (i g)`, in base 2. Grid: b hk, blocks of rows.

    The lse of a row that sees no key is infinite.
    """
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    if key_mask_ptr is not None:
        key_mask_ptr += batch * num_keys
    if ids_ptr is not None:
        ids_ptr += batch * num_keys
    rows, query, head, inside, at, ids, lo, full, hi = tile_of_rows(
        kv_head, num_queries, num_keys, key_mask_ptr, ids_ptr, GROUP, CAUSAL, BLOCK_M, BLOCK_N
    )
    if not TMA:
        k_ptr += batch * stride_kb + kv_head * stride_kh
        v_ptr += batch * stride_vb + kv_head * stride_vh
    q = load_rows(q_ptr + batch * stride_qb, query * stride_qi + head * stride_qh, inside, True, DIM, BLOCK_DIM)
    acc = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    row_max, row_sum = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for EDGE in tl.static_range(2):
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, batch.to(tl.int32), kv_head, stride_kj, stride_vj,
            full if EDGE else lo, hi if EDGE else full, num_keys, at, ids, key_mask_ptr, ids_ptr,
            scale_log2, EDGE, CAUSAL, DIM, BLOCK_DIM, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("inf"), row_max * scale_log2 + tl.math.log2(row_sum))
    heads = kv_heads * GROUP
    out_ptr += batch * num_queries * heads * DIM
    store_rows(out_ptr, (query * heads + head) * DIM, inside, acc / row_sum[:, None], DIM, BLOCK_DIM)
    tl.store(lse_ptr + tl.program_id(0).to(tl.int64) * num_queries * GROUP + rows, lse, mask=inside)


def describe_keys(k: Tensor, v: Tensor, tile: Tile) -> "tuple[TensorDescriptor, TensorDescriptor] | None":
    """Return descriptors of keys and values, both `b hk j d`, for copies of whole blocks, or None without TMA."""
    keys, values = (describe(t, (1, 1, tile.block_n, block_dim(t.shape[-1]))) for t in (k, v))
    return None if keys is None or values is None else (keys, values)


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Returns:
        out, `b (hk g) i d` in the memory order `b i (hk g) d`, and lse, `b hk (i g)`.
    """
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    group = heads // kv_heads
    out = q.new_empty(batch, num_queries, heads, dim)
    lse = q.new_empty(batch, kv_heads, num_queries * group, dtype=torch.float32)
    masked = key_mask is not None or document_ids is not None
    tile = tile_for(TILES, q, MASKED_TILES if masked else None)
    grid = (batch * kv_heads, triton.cdiv(num_queries * group, tile.block_m))
    sources = describe_keys(k, v, tile)
    if q.numel():
        with on(q.device):
            forward_kernel[grid](
                q, *(sources or (k, v)), out, lse, key_mask, document_ids,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], kv_heads, num_queries, num_keys, dim**-0.5 * LOG2_E,
                GROUP=group, CAUSAL=causal, DIM=dim, BLOCK_DIM=block_dim(dim), PRECISION=precision(q.dtype),
                TMA=sources is not None, **tile.options(),
            )  # fmt: skip
    return out.transpose(1, 2), lse
