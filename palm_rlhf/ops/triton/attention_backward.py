"""The backward kernels of fused attention: one loops over rows for each block of keys, one over keys for each tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.attention_forward import describe_keys, ids_of, span, tile_of_rows, visible_keys
from palm_rlhf.ops.triton.tiles import (
    LOG2_E,
    TensorDescriptor,
    Tile,
    block_dim,
    describe,
    load_block,
    load_rows,
    load_tile,
    multiprocessors,
    on,
    precision,
    store_rows,
    tile_for,
)

# Tiles by head dimension, for 16-bit numbers.
KEY_TILES = {
    "sm_80": {64: Tile(32, 128, 8), 128: Tile(128, 64, 8), 256: Tile(32, 64, 8)},
    "sm_86": {64: Tile(32, 128, 8), 128: Tile(64, 64, 8), 256: Tile(32, 32, 8)},
    "sm_90": {64: Tile(128, 64, 4), 128: Tile(64, 128, 8), 256: Tile(32, 64, 8, 3)},
    "sm_100": {64: Tile(64, 128, 4), 128: Tile(64, 128, 4), 256: Tile(32, 64, 8)},
    "gfx942": {64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
}
QUERY_TILES = {
    "sm_80": {64: Tile(128, 32, 4), 128: Tile(64, 32, 4), 256: Tile(64, 32, 8)},
    "sm_86": {64: Tile(128, 32, 4), 128: Tile(64, 32, 4), 256: Tile(32, 32, 4)},
    "sm_90": {64: Tile(64, 64, 4), 128: Tile(128, 64, 8), 256: Tile(64, 32, 8)},
    "sm_100": {64: Tile(128, 64, 4), 128: Tile(128, 64, 4), 256: Tile(64, 32, 8)},
    "gfx942": {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(64, 16, 4, 1)},
}
# Exceptions for calls with a mask, which need more registers.
MASKED_KEY_TILES = {
    "sm_80": {128: Tile(64, 64, 8)},
    "sm_90": {64: Tile(64, 64, 4), 128: Tile(32, 128, 8), 256: Tile(64, 32, 8)},
}
MASKED_QUERY_TILES = {"sm_90": {256: Tile(32, 32, 4)}}
DELTA_ROWS = 32
MAX_SHARES = 8


@triton.jit
def delta_kernel(
    out_ptr, d_out_ptr, lse_ptr, padded_lse_ptr, delta_ptr, kv_heads, num_queries, num_padded,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute delta, the sum of out * d_out of every row: `b i (hk g) d` -> `b hk rows`. Grid: b hk, blocks of rows.

    It also copies the lse, and makes it infinite for the rows that fill the last tile: their weights then are 0.
    """
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, heads = rows // GROUP, kv_heads * GROUP
    inside = query < num_queries
    offsets = (batch * num_queries * heads + query * heads + kv_head * GROUP + rows % GROUP) * DIM
    out = load_rows(out_ptr, offsets, inside, True, DIM, BLOCK_DIM).to(tl.float32)
    d_out = load_rows(d_out_ptr, offsets, inside, True, DIM, BLOCK_DIM).to(tl.float32)
    lse = tl.load(lse_ptr + tl.program_id(0).to(tl.int64) * num_queries * GROUP + rows, mask=inside, other=float("inf"))
    padded = tl.program_id(0).to(tl.int64) * num_padded + rows
    tl.store(padded_lse_ptr + padded, lse, mask=rows < num_padded)
    if out_ptr.dtype.element_ty == tl.float32:
        # Summed in the order of the product of d_out and v, so that both cancel exactly in rows that see a single key.
        products = tl.dot(d_out, tl.trans(out), input_precision=PRECISION)
        delta = tl.sum(tl.where(rows[:, None] == rows[None, :], products, 0.0), 1)
    else:
        delta = tl.sum(out * d_out, 1)
    tl.store(delta_ptr + padded, delta, mask=rows < num_padded)


@triton.jit
def _range_of_rows(
    first_key, key_ids, num_queries, num_keys, ids_ptr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the bounds of the rows that meet a block of keys: from lo to `full` with the causal mask, then to hi."""
    shift = num_keys - num_queries
    lo, hi = 0, num_queries
    if CAUSAL:
        lo = tl.maximum(first_key - shift, 0)
    if ids_ptr is not None:
        first_at, stop_at = span(lo + shift, num_keys, tl.min(key_ids, 0), tl.max(key_ids, 0), None, ids_ptr)
        lo, hi = first_at - shift, stop_at - shift
    lo, hi = lo * GROUP // BLOCK_M * BLOCK_M, hi * GROUP
    full = lo
    if CAUSAL:
        last = tl.maximum(first_key + BLOCK_N - 1 - shift, 0)
        full = tl.maximum(tl.minimum(tl.cdiv(last * GROUP, BLOCK_M) * BLOCK_M, hi), lo)
    return lo, full, hi


@triton.jit
def _gather(
    d_k, d_v, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, ids_ptr, batch, first_head, stride_qi, stride_qh, heads,
    lo, hi, num_queries, shift, keys, key_ids, scale_log2, DIAGONAL: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add the contributions of the rows from lo to hi to the gradients of a block of keys and values."""
    for start in tl.range(lo, hi, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_tile(
            q_ptr, start, batch, first_head, stride_qi, stride_qh, num_queries, GROUP, DIM, BLOCK_DIM, BLOCK_M, TMA
        )
        lse = tl.load(lse_ptr + rows)
        weights = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])  # n m
        if DIAGONAL:
            weights = tl.where((rows // GROUP + shift)[None, :] >= keys[:, None], weights, 0.0)
        if ids_ptr is not None:
            at = tl.minimum(rows // GROUP, num_queries - 1) + shift
            weights = tl.where(tl.load(ids_ptr + at)[None, :] == key_ids[:, None], weights, 0.0)
        d_out = load_tile(
            d_out_ptr, start, batch, first_head, heads * DIM, DIM, num_queries, GROUP, DIM, BLOCK_DIM, BLOCK_M, TMA
        )
        d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        delta = tl.load(delta_ptr + rows)
        d_scores = weights * (d_weights - delta[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit
def keys_backward_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_k_ptr, d_v_ptr, key_mask_ptr, ids_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    batch_size, kv_heads, num_queries, num_keys, num_padded, scale, scale_log2,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute d_k and d_v, `s b j hk d`, summed over each of s shares of the rows. Grid: b hk, blocks of keys, s."""
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    first_key, heads = tl.program_id(1) * BLOCK_N, kv_heads * GROUP
    keys = first_key + tl.arange(0, BLOCK_N)
    exists = keys < num_keys
    kept = exists
    if key_mask_ptr is not None:
        kept = exists & (tl.load(key_mask_ptr + batch * num_keys + keys, mask=exists, other=0) != 0)
    if ids_ptr is not None:
        ids_ptr += batch * num_keys
    key_ids = ids_of(keys, exists, first_key, ids_ptr)
    lo, full, hi = _range_of_rows(first_key, key_ids, num_queries, num_keys, ids_ptr, GROUP, CAUSAL, BLOCK_M, BLOCK_N)
    if key_mask_ptr is not None:
        hi = tl.where(tl.max(kept.to(tl.int32), 0) == 0, lo, hi)  # no row sees these keys
    share = tl.cdiv(tl.cdiv(hi - lo, BLOCK_M), tl.num_programs(2)) * BLOCK_M
    lo = tl.minimum(lo + share * tl.program_id(2), hi)
    hi = tl.minimum(lo + share, hi)
    full = tl.maximum(tl.minimum(full, hi), lo)

    if not TMA:
        q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
        d_out_ptr += (batch * num_queries * heads + kv_head * GROUP) * DIM
    lse_ptr += tl.program_id(0).to(tl.int64) * num_padded
    delta_ptr += tl.program_id(0).to(tl.int64) * num_padded
    k = load_rows(k_ptr + batch * stride_kb + kv_head * stride_kh, keys * stride_kj, exists, True, DIM, BLOCK_DIM)
    v = load_rows(v_ptr + batch * stride_vb + kv_head * stride_vh, keys * stride_vj, exists, True, DIM, BLOCK_DIM)
    d_k, d_v = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32), tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32)
    for FULL in tl.static_range(0 if CAUSAL else 1, 2):
        d_k, d_v = _gather(
            d_k, d_v, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, ids_ptr, batch.to(tl.int32), kv_head * GROUP,
            stride_qi, stride_qh, heads, full if FULL else lo, hi if FULL else full,
            num_queries, num_keys - num_queries, keys, key_ids,
            scale_log2, not FULL, GROUP, DIM, BLOCK_DIM, BLOCK_M, PRECISION, TMA,
        )  # fmt: skip
    d_k, d_v = tl.where(kept[:, None], d_k * scale, 0.0), tl.where(kept[:, None], d_v, 0.0)
    offsets = ((tl.program_id(2) * batch_size + batch) * num_keys * kv_heads + keys * kv_heads + kv_head) * DIM
    store_rows(d_k_ptr, offsets, exists, d_k, DIM, BLOCK_DIM)
    store_rows(d_v_ptr, offsets, exists, d_v, DIM, BLOCK_DIM)


@triton.jit
def _scatter(
    d_q, q, d_out, lse, delta, k_ptr, v_ptr, batch, kv_head, stride_k, stride_v, lo, hi, num_keys, at, ids,
    key_mask_ptr, ids_ptr, scale_log2, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add the contributions of the keys from lo to hi to the gradient of a tile of rows."""
    for start in tl.range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_block(k_ptr, batch, kv_head, stride_k, start, num_keys, EDGE, DIM, BLOCK_DIM, BLOCK_N, TMA)
        v = load_block(v_ptr, batch, kv_head, stride_v, start, num_keys, EDGE, DIM, BLOCK_DIM, BLOCK_N, TMA)
        weights = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
        d_scores = weights * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if EDGE or (key_mask_ptr is not None or ids_ptr is not None):
            visible = visible_keys(at, ids, keys, num_keys, key_mask_ptr, ids_ptr, EDGE and CAUSAL)
            d_scores = tl.where(visible, d_scores, 0.0)
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)
    return d_q


@triton.jit
def queries_backward_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_q_ptr, key_mask_ptr, ids_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    kv_heads, num_queries, num_keys, num_padded, scale, scale_log2,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute d_q, `b i (hk g) d`. Grid: b hk, blocks of rows."""
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    if key_mask_ptr is not None:
        key_mask_ptr += batch * num_keys
    if ids_ptr is not None:
        ids_ptr += batch * num_keys
    rows, query, head, inside, at, ids, lo, full, hi = tile_of_rows(
        kv_head, num_queries, num_keys, key_mask_ptr, ids_ptr, GROUP, CAUSAL, BLOCK_M, BLOCK_N
    )
    heads = kv_heads * GROUP
    packed = tl.program_id(0).to(tl.int64) * num_padded + rows
    offsets = (batch * num_queries * heads + query * heads + head) * DIM
    q = load_rows(q_ptr + batch * stride_qb, query * stride_qi + head * stride_qh, inside, True, DIM, BLOCK_DIM)
    d_out = load_rows(d_out_ptr, offsets, inside, True, DIM, BLOCK_DIM)
    lse, delta = tl.load(lse_ptr + packed), tl.load(delta_ptr + packed)
    if not TMA:
        k_ptr += batch * stride_kb + kv_head * stride_kh
        v_ptr += batch * stride_vb + kv_head * stride_vh
    d_q = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    for EDGE in tl.static_range(2):
        d_q = _scatter(
            d_q, q, d_out, lse, delta, k_ptr, v_ptr, batch.to(tl.int32), kv_head, stride_kj, stride_vj,
            full if EDGE else lo, hi if EDGE else full, num_keys, at, ids, key_mask_ptr, ids_ptr,
            scale_log2, EDGE, CAUSAL, DIM, BLOCK_DIM, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip
    store_rows(d_q_ptr, offsets, inside, d_q * scale, DIM, BLOCK_DIM)


def describe_rows(
    q: Tensor, d_out: Tensor, group: int, tile: Tile
) -> "tuple[TensorDescriptor, TensorDescriptor] | None":
    """Return descriptors of q, `b h i d`, and d_out, `b i h d`, for copies of tiles of rows, or None without TMA."""
    if group & (group - 1):  # a tile holds whole groups, or a group whole tiles
        return None
    block = (1, max(1, tile.block_m // group), min(group, tile.block_m), block_dim(q.shape[-1]))
    queries, gradients = describe(q.transpose(1, 2), block), describe(d_out, block)
    return None if queries is None or gradients is None else (queries, gradients)


def shares(blocks: int, processors: int) -> int:
    """Return into how many shares the rows of a block of keys are split, so that few blocks still fill the GPU."""
    return max(1, min(MAX_SHARES, processors // max(1, blocks)))


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, key_mask: Tensor | None, document_ids: Tensor | None, num_shares: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels, and return the gradients of q, k and v, in the memory order `b n h d`."""
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    group, scale = heads // kv_heads, dim**-0.5
    d_out, out = (t.transpose(1, 2).contiguous() for t in (d_out, out))  # b i h d
    masked = key_mask is not None or document_ids is not None
    key_tile = tile_for(KEY_TILES, q, MASKED_KEY_TILES if masked else None)
    query_tile = tile_for(QUERY_TILES, q, MASKED_QUERY_TILES if masked else None)
    padding = max(key_tile.block_m, query_tile.block_m, DELTA_ROWS)
    rows = triton.cdiv(num_queries * group, padding) * padding
    d_q, (padded_lse, delta) = torch.empty_like(out), lse.new_empty(2, batch, kv_heads, rows)
    key_blocks = triton.cdiv(num_keys, key_tile.block_n)
    if num_shares is None:
        num_shares = shares(batch * kv_heads * key_blocks, multiprocessors(q.device))
    dtype, empty = k.dtype if num_shares == 1 else torch.float32, k.new_empty if q.numel() else k.new_zeros
    d_k, d_v = (empty(num_shares, batch, num_keys, kv_heads, dim, dtype=dtype) for _ in range(2))
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    shape = {"GROUP": group, "DIM": dim, "BLOCK_DIM": block_dim(dim), "PRECISION": precision(q.dtype)}

    with on(q.device):
        if q.numel():
            delta_kernel[batch * kv_heads, rows // DELTA_ROWS](
                out, d_out, lse, padded_lse, delta, kv_heads, num_queries, rows, BLOCK_M=DELTA_ROWS, **shape
            )
            blocks = describe_keys(k, v, query_tile)
            queries_backward_kernel[batch * kv_heads, triton.cdiv(num_queries * group, query_tile.block_m)](
                q, *(blocks or (k, v)), d_out, padded_lse, delta, d_q, key_mask, document_ids, *strides,
                kv_heads, num_queries, num_keys, rows, scale, scale * LOG2_E,
                CAUSAL=causal, TMA=blocks is not None, **shape, **query_tile.options(),
            )  # fmt: skip
        if q.numel() and k.numel():
            tiles = describe_rows(q, d_out, group, key_tile)
            q_rows, d_out_rows = tiles or (q, d_out)
            keys_backward_kernel[batch * kv_heads, key_blocks, num_shares](
                q_rows, k, v, d_out_rows, padded_lse, delta, d_k, d_v, key_mask, document_ids, *strides,
                batch, kv_heads, num_queries, num_keys, rows, scale, scale * LOG2_E,
                CAUSAL=causal, TMA=tiles is not None, **shape, **key_tile.options(),
            )  # fmt: skip
    d_k, d_v = (t[0] if num_shares == 1 else t.sum(dim=0).to(k.dtype) for t in (d_k, d_v))
    return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2)
