"""One layer of PaLM: attention and feed-forward in parallel, from one norm and one input projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf.model.cache import Cache
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.lora import BlockLoRA
from palm_rlhf.ops.attention import attention
from palm_rlhf.ops.linear import split_linear, swiglu_sum_linear
from palm_rlhf.ops.rotary import rotary_split, rotary_tables, xpos_scales


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, without a bias (Ba et al. 2016); its scale starts at 1.

    `shape` is that of the scale: the last axis alone, or heads and last axis, where every head has its own scale.
    """

    weight: nn.Parameter

    def __init__(self, *shape: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 1:
            return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)
        return F.layer_norm(x, x.shape[-1:], None, None, self.eps) * self.weight


class ParallelBlock(nn.Module):
    """y = x + attention(norm(x)) + ff(norm(x)) (Chowdhery et al. 2022, section 2): `b n e -> b n e`.

    The rows of `in_proj` are, in this order: queries, keys, values, the gate of the feed-forward, its value.
    """

    norm: LayerNorm
    in_proj: nn.Linear
    attn_out: nn.Linear
    ff_out: nn.Linear
    q_norm: LayerNorm  # where config.qk_norm
    k_norm: LayerNorm

    def __init__(self, config: PaLMConfig):
        super().__init__()
        self.config = config
        q_dim, kv_dim, inner = config.heads * config.dim_head, config.kv_heads * config.dim_head, config.inner_dim
        self.sizes = [q_dim + 2 * kv_dim, inner, inner]
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.in_proj = nn.Linear(config.dim, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(q_dim, config.dim, bias=False)
        self.ff_out = nn.Linear(inner, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm = LayerNorm(config.heads, config.dim_head, eps=config.norm_eps)
            self.k_norm = LayerNorm(config.kv_heads, config.dim_head, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        document_ids: Tensor | None,
        cache: Cache | None,
        layer: int,
        lora: BlockLoRA | None,
    ) -> Tensor:
        normed = self.norm(x)
        qkv, gate, value = split_linear(normed, self.in_proj.weight, self.sizes)
        if lora is not None:
            qkv = qkv + lora.qkv(normed)
        q, k, v = self._heads(qkv, tables)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        attended = attention(
            q,
            k,
            v,
            causal=self.config.causal,
            key_mask=key_mask,
            document_ids=document_ids,
            implementation="auto" if self.config.flash_attn else "eager",
        )
        attended = attended.transpose(1, 2).flatten(2)  # b n (h d)
        out = swiglu_sum_linear(attended, self.attn_out.weight, gate, value, self.ff_out.weight)
        if lora is not None:
            out = out + lora.out(attended)
        return x + (self.dropout(out) if cache is None else out)

    def _heads(self, qkv: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised and rotated queries and keys, and values: `b n (q k v) -> b h n d, b hk n d, b hk n d`."""
        qkv = qkv.unflatten(-1, (-1, self.config.dim_head))  # b n (q k v) d
        if self.config.qk_norm:
            qkv = self._normalised(qkv)
        q, k, v = rotary_split(qkv, *tables, heads=self.config.heads, kv_heads=self.config.kv_heads)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _normalised(self, qkv: Tensor) -> Tensor:
        """Normalise each query and key head, and leave the values as they are: `... (q k v) d`."""
        heads, kv_heads = self.config.heads, self.config.kv_heads
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=-2)
        return torch.cat((self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v), dim=-2)


def position_tables(config: PaLMConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for `rotary_split`: `b n -> b n 1 d`, or with xPos, scaled, `b n (h + hk) d`."""
    tables = rotary_tables(positions, config.dim_head, theta=config.rotary_theta, dtype=dtype)
    cos, sin = (table.unsqueeze(-2) for table in tables)
    if not config.xpos:
        return cos, sin
    scale = xpos_scales(positions, config.dim_head, dtype=dtype).unsqueeze(-2)
    scales = torch.cat((scale,) * config.heads + (scale.reciprocal(),) * config.kv_heads, dim=-2)
    return cos * scales, sin * scales
