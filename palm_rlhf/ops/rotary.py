"""Rotary positions: queries and keys turned by angles that grow with their positions, so that scores see distances."""

import torch
from torch import Tensor

from palm_rlhf.ops.cpu.native_elementwise import rotate_native, why_not_rotate
from palm_rlhf.ops.devices import why_not_triton
from palm_rlhf.ops.rotary_scaling import RotaryScaling

XPOS_SCALE_BASE = 512


def rotary_tables(
    positions: Tensor,
    dim_head: int,
    *,
    theta: float = 10000.0,
    scaling: RotaryScaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines of the angles `position * theta^(-2i/d)` (Su et al. 2021, section 3.2.2).

    Pair i consists of entries i and i + d/2. The first half of the sines is negative, as `rotate` expects. A scaling
    stretches the wavelengths.

    positions: `...` -> two of `... d`
    """
    exponents = torch.arange(0, dim_head, 2, device=positions.device, dtype=dtype) / dim_head
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = scaling.stretched(frequencies, theta)
    angles = positions.unsqueeze(-1).to(dtype) * frequencies
    cos, sin = _twice(angles.cos()), _twice(angles.sin(), sign=-1)
    factor = 1.0 if scaling is None else scaling.table_factor
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def xpos_scales(positions: Tensor, dim_head: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the factor by which xPos scales a query up and a key down (Sun et al. 2022, section 3.2).

    positions: `...` -> `... d`
    """
    base = (torch.arange(0, dim_head, 2, device=positions.device, dtype=dtype) + 0.4 * dim_head) / (1.4 * dim_head)
    return _twice(base ** (positions.unsqueeze(-1).to(dtype) / XPOS_SCALE_BASE))


def _twice(half: Tensor, sign: int = 1) -> Tensor:
    return torch.cat((half * sign, half), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of the last axis by its angle, in the precision of the tables: `... d -> ... d`."""
    wide = x.to(cos.dtype)
    # in place, since allocating memory costs more than the arithmetic
    return wide.roll(x.shape[-1] // 2, dims=-1).mul_(sin).addcmul_(wide, cos).to(x.dtype)


class _RotarySplit(torch.autograd.Function):
    """The rotation of queries and keys in one pass; the backward writes all three gradients to one tensor."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, kv_heads):
        ctx.save_for_backward(cos, sin)
        ctx.sizes = (heads, kv_heads)
        return _rotary_split(qkv, cos, sin, heads, kv_heads)

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):
        cos, sin = ctx.saved_tensors
        heads, kv_heads = ctx.sizes
        d_qkv = d_q.new_empty(*d_q.shape[:-2], heads + 2 * kv_heads, d_q.shape[-1])
        parts = d_qkv.split([heads, kv_heads, kv_heads], dim=-2)
        if cos.shape[-2] > 1:  # a row of the tables for each head
            tables = list(zip(*(t.split([heads, kv_heads], dim=-2) for t in (cos, sin)), strict=True))
        else:
            tables = [(cos, sin), (cos, sin)]
        for part, grad, (cos, sin) in zip(parts[:2], (d_q, d_k), tables, strict=True):
            if why_not_rotate(grad, cos, sin) is None:
                rotate_native(grad, cos, sin, inverse=True, out=part)
            else:
                part.copy_(rotate(grad, cos, -sin))
        parts[2].copy_(d_v)
        return d_qkv, None, None, None, None


def _rotary_split(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    qk, v = qkv.split_with_sizes([heads + kv_heads, kv_heads], dim=-2)
    turned = rotate_native(qk, cos, sin) if why_not_rotate(qk, cos, sin) is None else rotate(qk, cos, sin)
    q, k = turned.split_with_sizes([heads, kv_heads], dim=-2)
    return q, k, v


def rotary_split(qkv: Tensor, cos: Tensor, sin: Tensor, *, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into queries, keys and values, and rotate the queries and keys.

    Triton kernels do it where they can. `torch.compile` gets the definition, which it fuses itself.

    qkv: `b n (heads + 2 kv_heads) d`, cos and sin: `b|1 n 1 d`, or one row for each query and key head
    -> `b n heads d`, `b n kv_heads d`, `b n kv_heads d`
    """
    if not torch.compiler.is_compiling() and why_not_triton(qkv, cos, sin) is None:
        from palm_rlhf.ops.triton.fused_rotary import rotary_split_triton

        return rotary_split_triton(qkv, cos, sin, heads=heads, kv_heads=kv_heads)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and qkv.requires_grad):
        return _rotary_split(qkv, cos, sin, heads, kv_heads)
    return _RotarySplit.apply(qkv, cos, sin, heads, kv_heads)
