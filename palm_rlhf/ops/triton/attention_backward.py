"""The backward pass of fused attention: its launcher, and the kernel that loops over keys for each tile of rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.attention_forward import accumulate, describe_keys, tile_of_rows
from palm_rlhf.ops.triton.attention_keys_backward import (
    KEY_TILES,
    MASKED_KEY_TILES,
    gradients_of_launches,
    keys_backward_kernel,
    rows_of_share,
    shares,
    sum_shares_kernel,
)
from palm_rlhf.ops.triton.attention_masks import summarise, visible_keys
from palm_rlhf.ops.triton.tiles import (
    LOG2_E,
    TensorDescriptor,
    Tile,
    block_dim,
    describe,
    load_block,
    load_rows,
    multiprocessors,
    on,
    precision,
    store_rows,
    tile_for,
)

# Tiles by head dimension, for 16-bit numbers.
QUERY_TILES = {
    "sm_80": {64: Tile(128, 32, 4), 128: Tile(64, 32, 4), 256: Tile(64, 32, 8)},
    "sm_86": {64: Tile(128, 32, 4), 128: Tile(64, 32, 4), 256: Tile(32, 32, 4)},
    "sm_90": {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 3)},
    "sm_100": {64: Tile(128, 64, 4), 128: Tile(128, 64, 4), 256: Tile(64, 32, 8)},
    "gfx942": {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(64, 16, 4, 1)},
}
DELTA_ROWS = 32
SUM_ROWS = 16


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
def _scatter(
    d_q, q, d_out, lse, delta, k_ptr, v_ptr, batch, kv_head, stride_k, stride_v, lo, whole, full, hi,
    num_keys, at, ids, key_mask_ptr, ids_ptr, scale_log2, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add contributions of keys to the gradient of a tile of rows.

    They are the keys from `whole` to `full`, or with EDGE those from lo to `whole` and from `full` to hi.
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
        v = load_block(v_ptr, batch, kv_head, stride_v, start, num_keys, EDGE, DIM, BLOCK_DIM, BLOCK_N, TMA)
        weights = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
        d_scores = weights * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if EDGE:
            visible = visible_keys(at, ids, keys, num_keys, key_mask_ptr, ids_ptr, CAUSAL)
            d_scores = tl.where(visible, d_scores, 0.0)
        d_q = accumulate(d_scores.to(k.dtype), k, d_q, PRECISION)
    return d_q


@triton.jit
def queries_backward_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_q_ptr, key_mask_ptr, ids_ptr, summary_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    kv_heads, num_queries, num_keys, num_padded, num_blocks, scale, scale_log2,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute d_q, `b i (hk g) d`. Grid: b hk, blocks of rows."""
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
            lo, whole, full, hi, num_keys, at, ids, key_mask_ptr, ids_ptr,
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


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, key_mask: Tensor | None, document_ids: Tensor | None, num_shares: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels, and return the gradients of q, k and v, in the memory order `b n h d`."""
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    group, scale = heads // kv_heads, dim**-0.5
    d_out, out = (t.transpose(1, 2).contiguous() for t in (d_out, out))  # b i h d
    summary, num_blocks = summarise(key_mask, document_ids)
    key_tile = tile_for(KEY_TILES, q, MASKED_KEY_TILES if num_blocks else None)
    query_tile = tile_for(QUERY_TILES, q)
    padding = max(key_tile.block_m, query_tile.block_m, DELTA_ROWS)
    rows = triton.cdiv(num_queries * group, padding) * padding
    d_q, (padded_lse, delta) = torch.empty_like(out), lse.new_empty(2, batch, kv_heads, rows)
    empty = k.new_empty if q.numel() else k.new_zeros
    d_k, d_v = (empty(batch, num_keys, kv_heads, dim) for _ in range(2))
    masks, strides = (key_mask, document_ids, summary), (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shape = {"GROUP": group, "DIM": dim, "BLOCK_DIM": block_dim(dim), "PRECISION": precision(q.dtype)}

    with on(q.device):
        if q.numel():
            delta_kernel[batch * kv_heads, rows // DELTA_ROWS](
                out, d_out, lse, padded_lse, delta, kv_heads, num_queries, rows, BLOCK_M=DELTA_ROWS, **shape
            )
            blocks = describe_keys(k, v, query_tile)
            queries_backward_kernel[batch * kv_heads, triton.cdiv(num_queries * group, query_tile.block_m)](
                q, *(blocks or (k, v)), d_out, padded_lse, delta, d_q, *masks, *strides,
                kv_heads, num_queries, num_keys, rows, num_blocks, scale, scale * LOG2_E,
                CAUSAL=causal, TMA=blocks is not None, **shape, **query_tile.options(),
            )  # fmt: skip
        if q.numel() and k.numel():
            _launch_keys(
                q,
                k,
                v,
                d_out,
                padded_lse,
                delta,
                d_k,
                d_v,
                masks,
                strides,
                num_blocks,
                key_tile,
                num_shares,
                causal,
                shape,
            )
    return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2)


def _launch_keys(
    q, k, v, d_out, lse, delta, d_k, d_v, masks, strides, num_blocks: int, tile: Tile, num_shares: int | None,
    causal: bool, shape: dict,
) -> None:  # fmt: skip
    """Launch the kernel for d_k and d_v, `b j hk d`, over shares of the rows, and the sum of the shares."""
    batch, _, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    group, programs = shape["GROUP"], batch * kv_heads
    key_blocks = triton.cdiv(num_keys, tile.block_n)
    if num_shares is None:
        num_shares = shares(programs * triton.next_power_of_2(key_blocks), multiprocessors(q.device))
        share = rows_of_share(num_queries, group, num_shares, tile)
    else:
        share = triton.cdiv(num_queries * group, num_shares * tile.block_m) * tile.block_m
    num_shares = triton.cdiv(num_queries * group, share)
    parts = [d_k, d_v]
    if num_shares > 1:
        parts = [d_k.new_empty(num_shares, *d_k.shape, dtype=torch.float32) for _ in range(2)]
    tiles = describe_rows(q, d_out, group, tile)
    q_rows, d_out_rows = tiles or (q, d_out)
    for part in gradients_of_launches(q):
        keys_backward_kernel[programs, key_blocks, num_shares](
            q_rows, k, v, d_out_rows, lse, delta, *parts, *masks, *strides,
            batch, kv_heads, num_queries, num_keys, lse.shape[-1], num_blocks, share, dim**-0.5, dim**-0.5 * LOG2_E,
            D_K="d_k" in part, D_V="d_v" in part, CAUSAL=causal, TMA=tiles is not None, **shape, **tile.options(),
        )  # fmt: skip
    if num_shares > 1:
        sum_shares_kernel[programs, triton.cdiv(num_keys, SUM_ROWS)](
            *parts, d_k, d_v, batch, kv_heads, num_queries, num_keys, num_shares, share,
            GROUP=group, CAUSAL=causal, DIM=dim, BLOCK_DIM=block_dim(dim),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, ROWS=SUM_ROWS,
        )  # fmt: skip
