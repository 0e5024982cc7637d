"""The forward kernel of fused attention, and the functions that the other kernels of attention share with it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.attention_masks import ids_of, meet, summarise, visible_keys
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
    "sm_90": {64: Tile(64, 64, 4, 3), 128: Tile(128, 128, 8, 3), 256: Tile(128, 64, 8, 2)},
    "sm_100": {64: Tile(128, 64, 4, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    "gfx942": {64: Tile(128, 64, 4, 1), 128: Tile(128, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
}
# Exceptions for calls with a mask: their loop over the edges needs more registers.
MASKED_TILES = {
    "sm_80": {128: Tile(128, 32, 8, 2)},
    "sm_86": {128: Tile(128, 32, 8, 2)},
    "sm_100": {64: Tile(64, 64, 4, 2), 256: Tile(64, 64, 8, 2)},
}


@triton.jit
def tile_of_rows(
    kv_head, num_queries, num_keys, ids_ptr, summary_ptr, num_blocks,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the rows of this program, the longest first, and the range of keys that they meet.

    Returned are the rows, their query and head, whether they exist, their key position and document, and the bounds lo,
    `whole`, `full` and hi: every row sees every key from `whole` to `full`, and some see keys from lo to `whole` and
    from `full` to hi.
    """
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    query, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    shift = num_keys - num_queries
    inside, at, first_at = query < num_queries, query + shift, first // GROUP + shift
    ids, low_id, high_id = ids_of(at, inside, first_at, ids_ptr)

    lo, whole, full, hi = 0, 0, num_keys, num_keys
    if CAUSAL:
        hi = tl.minimum((first + BLOCK_M - 1) // GROUP + shift + 1, num_keys)
        full = first_at + 1
    if summary_ptr is not None:
        lo, hi, whole, end = meet(summary_ptr, num_blocks, 0, hi, low_id, high_id, True)
        lo, whole, full = lo // BLOCK_N * BLOCK_N, tl.cdiv(whole, BLOCK_N) * BLOCK_N, tl.minimum(full, end)
    full = tl.maximum(tl.minimum(full, hi) // BLOCK_N * BLOCK_N, lo)
    whole = tl.maximum(tl.minimum(whole, full), lo)
    return rows, query, head, inside, at, ids, lo, whole, full, hi


@triton.jit
def accumulate(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b.

    In float32 the product of the two blocks is summed by itself. Rounding errors then grow with the number of blocks
    that were added, and not with the number of rows. Without `max_num_imprecise_acc`, which says nothing in float32,
    the compiler would fold the addition into the product again.
    """
    IN_FLOAT32: tl.constexpr = a.dtype == tl.float32
    if IN_FLOAT32 and PRECISION == "ieee":
        total += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, batch, kv_head, stride_k, stride_v, lo, whole, full, hi, num_keys, at, ids,
    key_mask_ptr, ids_ptr, scale_log2, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax (Milakov & Gimelshein 2018) of a tile of rows.

    It goes over the keys from `whole` to `full`, or with EDGE over the keys from lo to `whole` and from `full` to hi.
    `row_max` is the largest scaled score, in base 2: it is rounded once, so that as long as it stays the same, the sums
    before are scaled by exactly 1.
    """
    begin, end = whole, full
    if EDGE:
        begin, end = lo, hi - (full - whole)
    for step in tl.range(begin, end, BLOCK_N):
        start = step
        if EDGE:
            start = tl.where(step < whole, step, step + full - whole)
        keys = start + tl.arange(0, BLOCK_N)
        k = load_block(k_ptr, batch, kv_head, stride_k, start, num_keys, EDGE, DIM, BLOCK_DIM, BLOCK_N, TMA)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if EDGE:
            visible = visible_keys(at, ids, keys, num_keys, key_mask_ptr, ids_ptr, CAUSAL)
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        offset = new_max
        if EDGE:
            offset = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have seen no key yet
        shrink = tl.math.exp2(row_max - offset)
        weights = tl.math.exp2(scores * scale_log2 - offset[:, None])
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        v = load_block(v_ptr, batch, kv_head, stride_v, start, num_keys, EDGE, DIM, BLOCK_DIM, BLOCK_N, TMA)
        acc = accumulate(weights.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, key_mask_ptr, ids_ptr, summary_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    kv_heads, num_queries, num_keys, num_blocks, scale_log2,
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
    if summary_ptr is not None:
        summary_ptr += batch * 3 * num_blocks
    rows, query, head, inside, at, ids, lo, whole, full, hi = tile_of_rows(
        kv_head, num_queries, num_keys, ids_ptr, summary_ptr, num_blocks, GROUP, CAUSAL, BLOCK_M, BLOCK_N
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
            lo, whole, full, hi, num_keys, at, ids, key_mask_ptr, ids_ptr,
            scale_log2, EDGE, CAUSAL, DIM, BLOCK_DIM, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("inf"), row_max + tl.math.log2(row_sum))
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
    summary, num_blocks = summarise(key_mask, document_ids)
    if q.numel():
        with on(q.device):
            forward_kernel[grid](
                q, *(sources or (k, v)), out, lse, key_mask, document_ids, summary,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                kv_heads, num_queries, num_keys, num_blocks, dim**-0.5 * LOG2_E,
                GROUP=group, CAUSAL=causal, DIM=dim, BLOCK_DIM=block_dim(dim), PRECISION=precision(q.dtype),
                TMA=sources is not None, **tile.options(),
            )  # fmt: skip
    return out.transpose(1, 2), lse
