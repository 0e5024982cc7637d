"""Rotary positions: queries and keys turned by angles that grow with the position, so that scores see distances."""

import torch
from torch import Tensor

XPOS_SCALE_BASE = 512


def rotary_tables(
    positions: Tensor, dim_head: int, *, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `position * theta^(-2i/d)` (Su et al. 2021, section 3.2.2).

    positions: `...` -> two of `... d/2`
    """
    exponents = torch.arange(0, dim_head, 2, device=positions.device, dtype=dtype) / dim_head
    angles = positions.unsqueeze(-1).to(dtype) * theta**-exponents
    return angles.cos(), angles.sin()


def xpos_scales(positions: Tensor, dim_head: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The factor by which xPos enlarges a query, and shrinks a key (Sun et al. 2022, section 3.2).

    positions: `...` -> `... d/2`
    """
    base = (torch.arange(0, dim_head, 2, device=positions.device, dtype=dtype) + 0.4 * dim_head) / (1.4 * dim_head)
    return base ** (positions.unsqueeze(-1).to(dtype) / XPOS_SCALE_BASE)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn each pair (first half, second half) of the last axis by its angle, in the precision of the tables.

    x: `... d`, cos and sin: `... d/2` -> `... d`
    """
    if out is None:
        out = torch.empty_like(x)
    half = x.shape[-1] // 2
    first, second = x.to(cos.dtype).split(half, dim=-1)
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half:] = (second * cos).addcmul_(first, sin)
    return out


class _RotarySplit(torch.autograd.Function):
    """Rotates in one pass forward, and joins the three gradients in one pass backward."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, kv_heads):
        ctx.save_for_backward(cos, sin)
        ctx.sizes = (heads, kv_heads)
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=-2)
        q, k = rotate(qk, cos, sin).split([heads, kv_heads], dim=-2)
        return q, k, v

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):
        cos, sin = ctx.saved_tensors
        heads, kv_heads = ctx.sizes
        d_qkv = d_q.new_empty(*d_q.shape[:-2], heads + 2 * kv_heads, d_q.shape[-1])
        parts = d_qkv.split([heads, kv_heads, kv_heads], dim=-2)
        for grad, part, rows in zip((d_q, d_k), parts, (slice(0, heads), slice(heads, None)), strict=False):
            shared = cos.shape[-2] == 1
            rotate(grad, cos if shared else cos[..., rows, :], -(sin if shared else sin[..., rows, :]), out=part)
        parts[2].copy_(d_v)
        return d_qkv, None, None, None, None


def rotary_split(qkv: Tensor, cos: Tensor, sin: Tensor, *, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into queries, keys and values, the first two rotated.

    qkv: `b n (heads + 2 kv_heads) d`, cos and sin: `b|1 n 1 d/2`, or one row for each query and key head
    -> `b n heads d`, `b n kv_heads d`, `b n kv_heads d`
    """
    if torch.compiler.is_compiling():
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=-2)
        first, second = qk.to(cos.dtype).chunk(2, dim=-1)
        qk = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
        return *qk.split([heads, kv_heads], dim=-2), v
    return _RotarySplit.apply(qkv, cos, sin, heads, kv_heads)
