"""Fused attention of a few new tokens to a long cache, whose keys are split among programs (Dao et al. 2023).

One tile of rows holds the new queries of all heads that share a key head, so that the cache is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.attention_forward import attend
from palm_rlhf.ops.triton.tiles import (
    LOG2_E,
    Tile,
    block_dim,
    load_rows,
    multiprocessors,
    on,
    precision,
    store_rows,
    tile_for,
)

MAX_ROWS = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}  # new tokens times heads that share a key head
MIN_KEYS, MAX_SPLITS = 256, 128
PROGRAMS = 4  # that a multiprocessor holds at once, and which keep its memory busy
_TILES = {64: Tile(16, 64, 4, 2), 128: Tile(16, 64, 4, 2), 256: Tile(16, 32, 4, 2)}
TILES = dict.fromkeys(("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"), _TILES)  # block_m grows with the rows


@triton.jit
def kept_range(lo, hi, key_mask_ptr):
    """Return the first kept position between lo and hi, the one after the last, and the number of kept positions."""
    first, stop, count = hi, lo, 0
    for start in tl.range(lo, hi, 1024):
        positions = start + tl.arange(0, 1024)
        kept = tl.load(key_mask_ptr + positions, mask=positions < hi, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(kept, positions, hi), 0))
        stop = tl.maximum(stop, tl.max(tl.where(kept, positions + 1, lo), 0))
        count += tl.sum(kept.to(tl.int32), 0)
    return first, stop, count


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, key_mask_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    batch_size, kv_heads, num_queries, num_keys, chunk, scale_log2,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out, `s b i (hk g) d`, and lse, `s b i (hk g)`, in base 2, of each of s chunks of keys. Grid: b hk, s."""
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    rows = tl.arange(0, BLOCK_M)
    query, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    inside, at = query < num_queries, query + num_keys - num_queries
    lo = tl.minimum(tl.program_id(1) * chunk, num_keys)
    hi = tl.minimum(lo + chunk, num_keys)
    whole, full = lo, hi
    if CAUSAL:
        full = tl.minimum(num_keys - num_queries + 1, hi)  # every query sees what the first one sees
    if key_mask_ptr is not None:
        key_mask_ptr += batch * num_keys
        first, hi, count = kept_range(lo, hi, key_mask_ptr)
        lo = tl.maximum(tl.minimum(first, hi) // BLOCK_N * BLOCK_N, lo)
        whole = tl.cdiv(first, BLOCK_N) * BLOCK_N
        full = tl.where(count == hi - first, tl.minimum(full, hi), lo)  # all between the first and the last are kept
    full = tl.maximum(tl.minimum(full, hi) // BLOCK_N * BLOCK_N, lo)
    whole = tl.maximum(tl.minimum(whole, full), lo)

    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    q = load_rows(q_ptr + batch * stride_qb, query * stride_qi + head * stride_qh, inside, True, DIM, BLOCK_DIM)
    acc = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    row_max, row_sum = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for EDGE in tl.static_range(2):
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, batch, kv_head, stride_kj, stride_vj,
            lo, whole, full, hi, num_keys, at, at, key_mask_ptr, None,
            scale_log2, EDGE, CAUSAL, DIM, BLOCK_DIM, BLOCK_N, PRECISION, False,
        )  # fmt: skip

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), row_max + tl.math.log2(row_sum))
    packed = ((tl.program_id(1) * batch_size + batch) * num_queries + query) * kv_heads * GROUP + head
    store_rows(out_ptr, packed * DIM, inside, acc / row_sum[:, None], DIM, BLOCK_DIM)
    tl.store(lse_ptr + packed, lse, mask=inside)


@triton.jit
def combine_kernel(
    parts_ptr, lse_ptr, out_ptr, num_splits, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):
    """Average the parts of a row, weighted by their sums of exponentials: `s row d`, `s row` -> `row d`. Grid: rows."""
    splits = tl.arange(0, BLOCK_SPLITS)
    inside = splits < num_splits
    packed = splits.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    lse = tl.load(lse_ptr + packed, mask=inside, other=float("-inf"))
    largest = tl.max(lse, 0)
    weights = tl.math.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    weights /= tl.where(total == 0.0, 1.0, total)
    parts = load_rows(parts_ptr, packed * DIM, inside, True, DIM, BLOCK_DIM)
    row = tl.sum(parts * weights[:, None], 0)
    dims = tl.arange(0, BLOCK_DIM)
    offset = tl.program_id(0).to(tl.int64) * DIM
    tl.store(out_ptr + offset + dims, row.to(out_ptr.dtype.element_ty), mask=dims < DIM)


def choose_splits(programs: int, num_keys: int, processors: int) -> int:
    """Return how many chunks of keys fill the GPU, with `programs` for each; no chunk is too short."""
    return max(1, min(PROGRAMS * processors // max(1, programs), num_keys // MIN_KEYS, MAX_SPLITS))


def decode(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, num_splits: int | None = None
) -> Tensor:
    """Launch the decoding kernels, for at most `MAX_ROWS` rows i g.

    Returns:
        out, `b (hk g) i d` in the memory order `b i (hk g) d`.
    """
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    group = heads // kv_heads
    if num_splits is None:
        num_splits = choose_splits(batch * kv_heads, num_keys, multiprocessors(q.device))
    tile = tile_for(TILES, q)
    tile = tile._replace(block_m=max(16, triton.next_power_of_2(num_queries * group)))
    chunk = triton.cdiv(triton.cdiv(num_keys, num_splits), tile.block_n) * tile.block_n
    shape = {"DIM": dim, "BLOCK_DIM": block_dim(dim)}
    out = q.new_empty(batch, num_queries, heads, dim)
    parts = out if num_splits == 1 else out.new_empty(num_splits, *out.shape, dtype=torch.float32)
    lse = out.new_empty(num_splits, *out.shape[:-1], dtype=torch.float32)
    if q.numel():
        with on(q.device):
            decode_kernel[batch * kv_heads, num_splits](
                q, k, v, parts, lse, key_mask, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                batch, kv_heads, num_queries, num_keys, chunk, dim**-0.5 * LOG2_E,
                GROUP=group, CAUSAL=causal, PRECISION=precision(q.dtype), **shape, **tile.options(),
            )  # fmt: skip
            if num_splits > 1:
                splits = triton.next_power_of_2(num_splits)
                combine_kernel[(batch * num_queries * heads,)](
                    parts, lse, out, num_splits, **shape, BLOCK_SPLITS=splits
                )
    return out.transpose(1, 2)
