"""Rotary and xPos for GPUs: one pass splits the fused projection, and rotates its queries and keys.

The backward is the same pass in reverse, with negative angles: it writes all three gradients to one tensor. A program
takes one token.
"""

import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.operators import Operator
from palm_rlhf.ops.triton.tiles import block_dim, on

MAX_HEADS = 16  # at once
WARPS = 4


@triton.jit
def turn(
    source_ptr, target_ptr, cos_ptr, sin_ptr, stride, num_heads,
    TURNS: tl.constexpr, REVERSE: tl.constexpr, DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Copy the heads of a token, `head d`, and rotate them if TURNS; the tables are `head d`, `stride` apart.

    A pair (x, y), half a head apart, becomes (x cos - y sin, y cos + x sin); in reverse the sine has the other sign.
    """
    HALF: tl.constexpr = DIM // 2
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    for first in tl.range(0, num_heads, BLOCK_HEADS):
        heads = (first + tl.arange(0, BLOCK_HEADS))[:, None]
        inside = (heads < num_heads) & (dims < HALF)
        x = tl.load(source_ptr + heads * DIM + dims, mask=inside)
        y = tl.load(source_ptr + heads * DIM + dims + HALF, mask=inside)
        if TURNS:
            cos = tl.load(cos_ptr + heads * stride + dims, mask=inside).to(tl.float32)
            sin = tl.load(sin_ptr + heads * stride + dims + HALF, mask=inside).to(tl.float32)  # the positive half
            if REVERSE:
                sin = -sin
            x, y = x.to(tl.float32), y.to(tl.float32)
            x, y = x * cos - y * sin, y * cos + x * sin
        tl.store(target_ptr + heads * DIM + dims, x.to(target_ptr.dtype.element_ty), mask=inside)
        tl.store(target_ptr + heads * DIM + dims + HALF, y.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, stride_b, stride_n,
    table_stride_b, table_stride_n, table_stride_h, num_tokens, heads, kv_heads,
    REVERSE: tl.constexpr, DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Fill q, k and v, `b n h d`, from qkv, `b n (h hk hk) d`, or in reverse qkv from them. Grid: b n."""
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // num_tokens, token % num_tokens
    qkv_ptr += batch * stride_b + position * stride_n
    q_ptr, k_ptr, v_ptr = q_ptr + token * heads * DIM, k_ptr + token * kv_heads * DIM, v_ptr + token * kv_heads * DIM
    cos_ptr += batch * table_stride_b + position * table_stride_n
    sin_ptr += batch * table_stride_b + position * table_stride_n
    for PART in tl.static_range(3):
        joined_ptr, part_ptr = qkv_ptr, q_ptr if PART == 0 else k_ptr if PART == 1 else v_ptr
        if PART > 0:
            joined_ptr += (heads + (PART - 1) * kv_heads) * DIM
            cos_ptr += (heads if PART == 1 else kv_heads) * table_stride_h
            sin_ptr += (heads if PART == 1 else kv_heads) * table_stride_h
        turn(
            part_ptr if REVERSE else joined_ptr, joined_ptr if REVERSE else part_ptr, cos_ptr, sin_ptr, table_stride_h,
            kv_heads if PART else heads, PART < 2, REVERSE, DIM, BLOCK_HALF, BLOCK_KV_HEADS if PART else BLOCK_HEADS,
        )  # fmt: skip


def _launch(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, reverse: bool) -> None:
    """Launch the kernel that fills contiguous q, k and v, `b n h d`, from qkv, or in reverse qkv from them."""
    if not qkv.numel():
        return
    batch, num_tokens, heads, dim = q.shape
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    strides = (stride if size > 1 else 0 for size, stride in zip(cos.shape[:3], cos.stride(), strict=False))
    blocks = (min(triton.next_power_of_2(t.shape[2]), MAX_HEADS) for t in (q, k))
    tile = dict(zip(("BLOCK_HEADS", "BLOCK_KV_HEADS"), blocks, strict=True)) | {"BLOCK_HALF": block_dim(dim // 2)}
    with on(qkv.device):
        rotary_kernel[(batch * num_tokens,)](
            qkv, q, k, v, cos, sin, *qkv.stride()[:2], *strides, num_tokens, heads, k.shape[2],
            REVERSE=reverse, DIM=dim, **tile, num_warps=WARPS,
        )  # fmt: skip


def _empty_joined(d_q, d_k, d_v, cos, sin):
    return d_q.new_empty(*d_q.shape[:2], d_q.shape[2] + 2 * d_k.shape[2], d_q.shape[-1])


def _join(d_q, d_k, d_v, cos, sin):
    d_qkv = _empty_joined(d_q, d_k, d_v, cos, sin)
    _launch(d_qkv, d_q.contiguous(), d_k.contiguous(), d_v.contiguous(), cos, sin, reverse=True)
    return d_qkv


join_operator = Operator(
    "rotary_join", "(Tensor d_q, Tensor d_k, Tensor d_v, Tensor cos, Tensor sin) -> Tensor", _join, _empty_joined
)


def _empty_parts(qkv, cos, sin, heads, kv_heads):
    q, k, v = (qkv.new_empty(*qkv.shape[:2], n, qkv.shape[-1]) for n in (heads, kv_heads, kv_heads))
    return q, k, v


def _split(qkv, cos, sin, heads, kv_heads):
    if qkv.stride()[-2:] != (qkv.shape[-1], 1):
        qkv = qkv.contiguous()
    q, k, v = _empty_parts(qkv, cos, sin, heads, kv_heads)
    _launch(qkv, q, k, v, cos, sin, reverse=False)
    return q, k, v


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])


def _gradients(ctx, d_q, d_k, d_v):
    return join_operator(d_q, d_k, d_v, *ctx.saved_tensors), None, None, None, None


split_operator = Operator(
    "rotary_split",
    "(Tensor qkv, Tensor cos, Tensor sin, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)",
    _split,
    _empty_parts,
    save=_save,
    gradients=_gradients,
)


def rotary_split_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into queries, keys and values, and rotate the queries and keys in float32.

    qkv: `b n (heads + 2 kv_heads) d`, cos and sin: `b|1 n 1 d`, or one row for each query and key head
    -> `b n heads d`, `b n kv_heads d`, `b n kv_heads d`
    """
    return split_operator(qkv, cos, sin, heads, kv_heads)
