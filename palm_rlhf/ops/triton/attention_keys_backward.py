"""The backward kernel of fused attention that loops over rows for each block of keys, and the sum of its shares.

Few heads of keys make few blocks of keys. Then the rows of a block are split into shares of equal length, and each is
the work of a program. With the causal mask the first keys meet all rows and the last keys few, so that blocks are
unequal work, but shares are equal work. They are added up in their order: the bits are the same every time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.attention_forward import accumulate
from palm_rlhf.ops.triton.attention_masks import ids_of, meet
from palm_rlhf.ops.triton.tiles import Tile, architecture, block_dim, load_rows, load_tile, store_rows

# Tiles by head dimension, for 16-bit numbers.
KEY_TILES = {
    "sm_80": {64: Tile(32, 128, 8), 128: Tile(128, 64, 8), 256: Tile(32, 64, 8)},
    "sm_86": {64: Tile(32, 128, 8), 128: Tile(64, 64, 8), 256: Tile(32, 32, 8)},
    "sm_90": {64: Tile(64, 64, 4, 3), 128: Tile(64, 128, 8, 3), 256: Tile(32, 128, 8)},
    "sm_100": {64: Tile(64, 128, 4), 128: Tile(64, 128, 4), 256: Tile(32, 64, 8)},
    "gfx942": {64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
}
# An exception for calls with a mask: their loop over the edges needs more registers.
MASKED_KEY_TILES = {"sm_90": {128: Tile(32, 128, 8, 3)}}
# The smallest 16-bit tile of a head whose two gradients do not fit into the registers: a launch computes each.
SEPARATE = {"sm_90": 256}
PROGRAMS = 6  # for each multiprocessor, so that the last to end keep few of them waiting
MAX_SHARES = 16
MIN_ROWS = 512  # of a share


@triton.jit
def first_row(first_key, shift, GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return where the tiles of rows begin that see a key from `first_key` on."""
    row = 0
    if CAUSAL:
        row = tl.maximum(first_key - shift, 0) * GROUP // BLOCK_M * BLOCK_M
    return row


@triton.jit
def _range_of_rows(
    first_key, low_id, high_id, num_queries, num_keys, summary_ptr, num_blocks, share,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return which rows of this program's share meet a block of keys: the bounds lo, `whole`, `full` and hi.

    Every row from `whole` to `full` sees every key, as far as the key mask allows. Some see keys from lo to `whole` and
    from `full` to hi.
    """
    shift = num_keys - num_queries
    lo, whole = first_row(first_key, shift, GROUP, CAUSAL, BLOCK_M), 0
    full, hi = num_queries * GROUP, num_queries * GROUP
    if CAUSAL:
        last = tl.maximum(first_key + BLOCK_N - 1 - shift, 0)
        whole = tl.cdiv(last * GROUP, BLOCK_M) * BLOCK_M
    if summary_ptr is not None:
        at = shift + lo // GROUP
        first, stop, seen, end = meet(summary_ptr, num_blocks, at, num_keys, low_id, high_id, False)
        lo, hi = (first - shift) * GROUP // BLOCK_M * BLOCK_M, (stop - shift) * GROUP
        whole = tl.maximum(whole, tl.cdiv((seen - shift) * GROUP, BLOCK_M) * BLOCK_M)
        full = tl.where(end == num_keys, hi, (end - shift) * GROUP // BLOCK_M * BLOCK_M)
    lo = tl.maximum(lo, tl.program_id(2) * share)
    hi = tl.minimum(hi, tl.program_id(2) * share + share)
    whole = tl.maximum(tl.minimum(whole, hi), lo)
    full = tl.maximum(tl.minimum(full, hi), whole)
    return lo, whole, full, hi


@triton.jit
def _gather(
    d_k, d_v, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, ids_ptr, batch, first_head, stride_qi, stride_qh, heads,
    lo, whole, full, hi, num_queries, shift, keys, key_ids, scale_log2,
    EDGE: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add contributions of rows to the gradients of a block of keys and values.

    They are the rows from `whole` to `full`, or with EDGE those from lo to `whole` and from `full` to hi.
    """
    begin, end = whole, full
    if EDGE:
        begin, end = lo, hi - (full - whole)
    for step in tl.range(begin, end, BLOCK_M):
        start = step
        if EDGE:
            start = tl.where(step < whole, step, step + full - whole)
        rows = start + tl.arange(0, BLOCK_M)
        q = load_tile(
            q_ptr, start, batch, first_head, stride_qi, stride_qh, num_queries, GROUP, DIM, BLOCK_DIM, BLOCK_M, TMA
        )
        lse = tl.load(lse_ptr + rows)
        weights = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])  # n m
        if EDGE and CAUSAL:
            weights = tl.where((rows // GROUP + shift)[None, :] >= keys[:, None], weights, 0.0)
        if EDGE and ids_ptr is not None:
            at = tl.minimum(rows // GROUP, num_queries - 1) + shift
            weights = tl.where(tl.load(ids_ptr + at)[None, :] == key_ids[:, None], weights, 0.0)
        d_out = load_tile(
            d_out_ptr, start, batch, first_head, heads * DIM, DIM, num_queries, GROUP, DIM, BLOCK_DIM, BLOCK_M, TMA
        )
        if D_V:
            d_v = accumulate(weights.to(d_out.dtype), d_out, d_v, PRECISION)
        if D_K:
            d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            delta = tl.load(delta_ptr + rows)
            d_scores = weights * (d_weights - delta[None, :])
            d_k = accumulate(d_scores.to(q.dtype), q, d_k, PRECISION)
    return d_k, d_v


@triton.jit
def keys_backward_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_k_ptr, d_v_ptr, key_mask_ptr, ids_ptr, summary_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    batch_size, kv_heads, num_queries, num_keys, num_padded, num_blocks, share, scale, scale_log2,
    D_K: tl.constexpr, D_V: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute d_k and d_v, `s b j hk d`, summed over each of s shares of the rows. Grid: b hk, blocks of keys, s.

    Without D_K it computes d_v alone, and without D_V d_k alone. A program writes nothing where the causal mask hides
    its block of keys from the whole share.
    """
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    first_key, heads, shift = tl.program_id(1) * BLOCK_N, kv_heads * GROUP, num_keys - num_queries
    keys = first_key + tl.arange(0, BLOCK_N)
    first_share = first_row(first_key, shift, GROUP, CAUSAL, BLOCK_M) // share
    exists = keys < tl.where(tl.program_id(2) >= first_share, num_keys, 0)
    kept = exists
    if key_mask_ptr is not None:
        kept = exists & (tl.load(key_mask_ptr + batch * num_keys + keys, mask=exists, other=0) != 0)
    if ids_ptr is not None:
        ids_ptr += batch * num_keys
    if summary_ptr is not None:
        summary_ptr += batch * 3 * num_blocks
    key_ids, low_id, high_id = ids_of(keys, exists, first_key, ids_ptr)
    lo, whole, full, hi = _range_of_rows(
        first_key, low_id, high_id, num_queries, num_keys, summary_ptr, num_blocks, share,
        GROUP, CAUSAL, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if key_mask_ptr is not None:
        hidden = tl.max(kept.to(tl.int32), 0) == 0  # no row sees these keys
        hi, full = tl.where(hidden, lo, hi), tl.where(hidden, whole, full)
        whole, full = tl.where(hidden, lo, whole), tl.where(hidden, lo, full)

    if not TMA:
        q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
        d_out_ptr += (batch * num_queries * heads + kv_head * GROUP) * DIM
    lse_ptr += tl.program_id(0).to(tl.int64) * num_padded
    delta_ptr += tl.program_id(0).to(tl.int64) * num_padded
    k = load_rows(k_ptr + batch * stride_kb + kv_head * stride_kh, keys * stride_kj, exists, True, DIM, BLOCK_DIM)
    v = load_rows(v_ptr + batch * stride_vb + kv_head * stride_vh, keys * stride_vj, exists, True, DIM, BLOCK_DIM)
    d_k, d_v = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32), tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32)
    EDGES: tl.constexpr = CAUSAL or ids_ptr is not None
    for FULL in tl.static_range(0 if EDGES else 1, 2):
        d_k, d_v = _gather(
            d_k, d_v, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, ids_ptr, batch.to(tl.int32), kv_head * GROUP,
            stride_qi, stride_qh, heads, lo, whole, full, hi, num_queries, shift, keys, key_ids, scale_log2,
            not FULL, D_K, D_V, GROUP, CAUSAL, DIM, BLOCK_DIM, BLOCK_M, PRECISION, TMA,
        )  # fmt: skip
    offsets = ((tl.program_id(2) * batch_size + batch) * num_keys * kv_heads + keys * kv_heads + kv_head) * DIM
    if D_K:
        store_rows(d_k_ptr, offsets, exists, tl.where(kept[:, None], d_k * scale, 0.0), DIM, BLOCK_DIM)
    if D_V:
        store_rows(d_v_ptr, offsets, exists, tl.where(kept[:, None], d_v, 0.0), DIM, BLOCK_DIM)


@triton.jit
def sum_shares_kernel(
    parts_k_ptr, parts_v_ptr, d_k_ptr, d_v_ptr, batch_size, kv_heads, num_queries, num_keys, num_shares, share,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up the shares of d_k and d_v in their order, `s b j hk d` -> `b j hk d`. Grid: b hk, blocks of ROWS keys.

    BLOCK_M and BLOCK_N are the tile of `keys_backward_kernel`, which wrote the shares.
    """
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    keys = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = keys < num_keys
    first_key = tl.program_id(1) * ROWS // BLOCK_N * BLOCK_N
    first = first_row(first_key, num_keys - num_queries, GROUP, CAUSAL, BLOCK_M) // share
    d_k, d_v = tl.zeros((ROWS, BLOCK_DIM), tl.float32), tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    for part in tl.range(first, num_shares):
        offsets = ((part * batch_size + batch) * num_keys * kv_heads + keys * kv_heads + kv_head) * DIM
        d_k += load_rows(parts_k_ptr, offsets, exists, True, DIM, BLOCK_DIM)
        d_v += load_rows(parts_v_ptr, offsets, exists, True, DIM, BLOCK_DIM)
    offsets = (batch * num_keys * kv_heads + keys * kv_heads + kv_head) * DIM
    store_rows(d_k_ptr, offsets, exists, d_k, DIM, BLOCK_DIM)
    store_rows(d_v_ptr, offsets, exists, d_v, DIM, BLOCK_DIM)


def gradients_of_launches(q: Tensor) -> tuple[tuple[str, ...], ...]:
    """Return which gradients each launch of the kernel computes, for q, `... d`."""
    smallest = SEPARATE.get(architecture(q.device))
    together = smallest is None or block_dim(q.shape[-1]) < smallest or q.dtype == torch.float32
    return (("d_k", "d_v"),) if together else (("d_k",), ("d_v",))


def shares(blocks: int, processors: int) -> int:
    """Return into how many shares the rows are split, so that blocks of keys become enough programs to balance.

    It is a power of 2: a few positions more or less leave it, and so the order of the sums, as it is.
    """
    needed = PROGRAMS * processors / max(1, blocks)
    return min(MAX_SHARES, 2 ** max(0, math.ceil(math.log2(needed))))


def rows_of_share(num_queries: int, group: int, num_shares: int, tile: Tile) -> int:
    """Return how many rows a share has: whole tiles, and as many for all lengths up to the next power of 2."""
    rows = triton.cdiv(triton.next_power_of_2(num_queries) * group, num_shares)
    return triton.cdiv(max(rows, MIN_ROWS), tile.block_m) * tile.block_m
