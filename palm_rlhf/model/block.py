"""The two kinds of layers: PaLM's, attention and feed-forward in parallel; LLaMA's, one after the other."""

import torch
from torch import Tensor, nn

from palm_rlhf.model.cache import Cache
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.lora import BlockLoRA
from palm_rlhf.model.norms import LayerNorm, RMSNorm, head_norm, residual_norm
from palm_rlhf.ops.attention import attention
from palm_rlhf.ops.linear import linear, split_linear, swiglu_linear, swiglu_sum_linear
from palm_rlhf.ops.rotary import rotary_split, rotary_tables, xpos_scales


class Block(nn.Module):
    """The attention of a layer, and the sizes of its matrices; a subclass adds the feed-forward.

    The first rows of `in_proj` make queries, keys and values, in this order.
    """

    norm: LayerNorm | RMSNorm
    in_proj: nn.Linear
    attn_out: nn.Linear
    ff_out: nn.Linear
    q_norm: LayerNorm | RMSNorm  # where config.qk_norm
    k_norm: LayerNorm | RMSNorm

    def __init__(self, config: PaLMConfig, more_rows: int = 0):
        super().__init__()
        self.config = config
        q_dim, kv_dim, inner = config.heads * config.dim_head, config.kv_heads * config.dim_head, config.inner_dim
        self.qkv_sizes, self.ff_sizes = [q_dim, kv_dim, kv_dim], [inner, inner]
        self.norm = residual_norm(config)
        self.in_proj = nn.Linear(config.dim, sum(self.qkv_sizes) + more_rows, bias=config.qkv_bias)
        self.attn_out = nn.Linear(q_dim, config.dim, bias=False)
        self.ff_out = nn.Linear(inner, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm = head_norm(config, config.heads)
            self.k_norm = head_norm(config, config.kv_heads)
        self.dropout = nn.Dropout(config.dropout)

    def matrices(self) -> dict[str, list[int]]:
        """Return the names of the matrices, and the rows of each that belong together, in order."""
        raise NotImplementedError

    def attend(
        self,
        qkv: Tensor,
        tables: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        document_ids: Tensor | None,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        """Return the averaged values, before their output projection: `b n (q k v) -> b n (h d)`."""
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
        return attended.transpose(1, 2).flatten(2)

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


class ParallelBlock(Block):
    """y = x + attention(norm(x)) + ff(norm(x)) (Chowdhery et al. 2022, section 2): `b n e -> b n e`.

    After queries, keys and values, the rows of `in_proj` are the gate of the feed-forward and its value.
    """

    def __init__(self, config: PaLMConfig):
        super().__init__(config, more_rows=2 * config.inner_dim)
        self.sizes = [sum(self.qkv_sizes), *self.ff_sizes]

    def matrices(self) -> dict[str, list[int]]:
        """Return the names of the matrices, and the rows of each that belong together, in order."""
        dim = self.config.dim
        return {"in_proj": [*self.qkv_sizes, *self.ff_sizes], "attn_out": [dim], "ff_out": [dim]}

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
            qkv = lora.add_qkv(qkv, normed)
            gate, value = lora.add_hidden(gate, value, normed)
        attended = self.attend(qkv, tables, key_mask, document_ids, cache, layer)
        out = swiglu_sum_linear(attended, self.attn_out.weight, gate, value, self.ff_out.weight)
        if lora is not None:
            out = lora.add_ff_out(lora.add_out(out, attended), gate, value)
        return x + (self.dropout(out) if cache is None else out)


class SerialBlock(Block):
    """y = x + attention(norm(x)), then y + ff(ff_norm(y)) (Touvron et al. 2023, section 2.2): `b n e -> b n e`.

    The rows of `ff_proj` are the gate of the feed-forward and its value.
    """

    ff_norm: LayerNorm | RMSNorm
    ff_proj: nn.Linear

    def __init__(self, config: PaLMConfig):
        super().__init__(config)
        self.ff_norm = residual_norm(config)
        self.ff_proj = nn.Linear(config.dim, sum(self.ff_sizes), bias=False)

    def matrices(self) -> dict[str, list[int]]:
        """Return the names of the matrices, and the rows of each that belong together, in order."""
        dim = self.config.dim
        return {"in_proj": self.qkv_sizes, "attn_out": [dim], "ff_proj": self.ff_sizes, "ff_out": [dim]}

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
        qkv = linear(normed, self.in_proj.weight, self.in_proj.bias)
        if lora is not None:
            qkv = lora.add_qkv(qkv, normed)
        attended = self.attend(qkv, tables, key_mask, document_ids, cache, layer)
        out = linear(attended, self.attn_out.weight)
        if lora is not None:
            out = lora.add_out(out, attended)
        x = x + (self.dropout(out) if cache is None else out)

        normed = self.ff_norm(x)
        gate, value = split_linear(normed, self.ff_proj.weight, self.ff_sizes)
        if lora is not None:
            gate, value = lora.add_hidden(gate, value, normed)
        out = swiglu_linear(gate, value, self.ff_out.weight)
        if lora is not None:
            out = lora.add_ff_out(out, gate, value)
        return x + (self.dropout(out) if cache is None else out)


def new_block(config: PaLMConfig) -> Block:
    """Return a freshly initialised block of the kind that the config names."""
    return SerialBlock(config) if config.block == "serial" else ParallelBlock(config)


def position_tables(config: PaLMConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for `rotary_split`: `b n -> b n 1 d`, or with xPos, scaled, `b n (h + hk) d`."""
    tables = rotary_tables(
        positions, config.dim_head, theta=config.rotary_theta, scaling=config.rotary_scaling, dtype=dtype
    )
    cos, sin = (table.unsqueeze(-2) for table in tables)
    if not config.xpos:
        return cos, sin
    scale = xpos_scales(positions, config.dim_head, dtype=dtype).unsqueeze(-2)
    scales = torch.cat((scale,) * config.heads + (scale.reciprocal(),) * config.kv_heads, dim=-2)
    return cos * scales, sin * scales


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Draw kernels from N(0, 1/fan_in) and embeddings from N(0, 1) (Chowdhery et al. 2022, section 5); biases are 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_()
