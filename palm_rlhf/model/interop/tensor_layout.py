"""Tensors of the decoders of Hugging Face: their names and shapes, and the order of their rows.

Cohere's rotary turns pairs of neighbouring coordinates; LLaMA's and ours turn pairs that are half a head apart. So for
Cohere, the rows of queries and keys, and the scales of their norms, change their order.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.weights_folder import check_shapes

EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
FREQUENCIES = "rotary_emb.inv_freq"  # in the folders of the first LLaMAs, though the config determines them


class Weights(Protocol):
    """Weights under the names of Hugging Face: a `WeightsFolder`, or another file that presents itself as one."""

    path: Path
    config: dict[str, Any]  # the values of config.json
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype | None  # for all tensors, unless each is to have its own

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, which is read now."""

    def require_unchanged(self) -> None:
        """Raise ValueError if another process has changed the files since they were opened."""


@dataclass(frozen=True)
class Part:
    """A tensor of a Hugging Face model, which holds some rows of one of our tensors."""

    name: str
    shape: tuple[int, ...]
    paired_heads: int = 0  # heads with rows in pairs there and in halves here


def layout(config: PaLMConfig) -> dict[str, list[Part]]:
    """Return, for each of our tensors, the tensors of Hugging Face that are concatenated along its rows."""
    dim, inner, heads, kv_heads, d = config.dim, config.inner_dim, config.heads, config.kv_heads, config.dim_head
    serial = config.block == "serial"
    pairs, kv_pairs = (0, 0) if serial else (heads, kv_heads)
    parts = {"token_emb.weight": [Part(EMBEDDINGS, (config.num_tokens, dim))]}
    for i in range(config.depth):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, feed_forward = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv = [
            Part(f"{attention}.q_proj.weight", (heads * d, dim), pairs),
            Part(f"{attention}.k_proj.weight", (kv_heads * d, dim), kv_pairs),
            Part(f"{attention}.v_proj.weight", (kv_heads * d, dim)),
        ]
        gate_and_value = [Part(f"{feed_forward}.{name}_proj.weight", (inner, dim)) for name in ("gate", "up")]
        parts[f"{ours}.norm.weight"] = [Part(f"{theirs}.input_layernorm.weight", (dim,))]
        if serial:
            parts[f"{ours}.in_proj.weight"] = qkv
            parts[f"{ours}.ff_norm.weight"] = [Part(f"{theirs}.post_attention_layernorm.weight", (dim,))]
            parts[f"{ours}.ff_proj.weight"] = gate_and_value
        else:
            parts[f"{ours}.in_proj.weight"] = qkv + gate_and_value
        if config.qkv_bias:
            biases = [Part(part.name.replace("weight", "bias"), part.shape[:1]) for part in qkv]
            parts[f"{ours}.in_proj.bias"] = biases
        parts[f"{ours}.attn_out.weight"] = [Part(f"{attention}.o_proj.weight", (dim, heads * d))]
        parts[f"{ours}.ff_out.weight"] = [Part(f"{feed_forward}.down_proj.weight", (dim, inner))]
        if config.qk_norm:
            one_scale = config.norm == "rms"
            q_shape, k_shape = ((d,), (d,)) if one_scale else ((heads, d), (kv_heads, d))
            parts[f"{ours}.q_norm.weight"] = [Part(f"{attention}.q_norm.weight", q_shape, pairs)]
            parts[f"{ours}.k_norm.weight"] = [Part(f"{attention}.k_norm.weight", k_shape, kv_pairs)]
    parts["norm.weight"] = [Part("model.norm.weight", (dim,))]
    if not config.tie_embeddings:
        parts["lm_head.weight"] = [Part(OUTPUT, (config.num_tokens, dim))]
    return parts


def to_halves(x: Tensor, heads: int, dim_head: int) -> Tensor:
    """Reorder the rows of heads from neighbouring pairs (Cohere) to two halves (ours): `(h d) e` or `h d`."""
    pairs = x.reshape(heads, dim_head, -1)
    return rearrange(pairs, "h (i pair) e -> h (pair i) e", pair=2).reshape(x.shape)


def to_pairs(x: Tensor, heads: int, dim_head: int) -> Tensor:
    """Reorder the rows of heads from two halves (ours) to neighbouring pairs (Cohere): `(h d) e` or `h d`."""
    halves = x.reshape(heads, dim_head, -1)
    return rearrange(halves, "h (pair i) e -> h (i pair) e", pair=2).reshape(x.shape)


def read_tensors(config: PaLMConfig, weights: Weights) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Return the names of our tensors and their parts, after checking all shapes; the parts are read when used.

    Raises ValueError for a missing or unexpected tensor, one of another shape, and an output layer that is not the
    embeddings although the config ties them.
    """
    parts = layout(config)
    expected = {part.name: part.shape for group in parts.values() for part in group}
    found = {name: shape for name, shape in weights.shapes.items() if not name.endswith(FREQUENCIES)}
    if not config.tie_embeddings and OUTPUT not in found:
        raise ValueError(
            f"{weights.path} lacks {OUTPUT}, expected an output layer of its own, since tie_word_embeddings is false "
            "there; copy or download it again, or set tie_word_embeddings to true if it was trained so"
        )
    has_copy = config.tie_embeddings and found.pop(OUTPUT, None) is not None
    check_shapes(found, expected, weights.path)
    if has_copy and not torch.equal(weights[OUTPUT], weights[EMBEDDINGS]):
        raise ValueError(
            f"{weights.path} has a {OUTPUT} of its own; expected the embeddings, since tie_word_embeddings is true "
            "there: take another model, or set it to false if its architecture has an output layer"
        )

    def read(part: Part) -> Tensor:
        rows = weights[part.name]
        return to_halves(rows, part.paired_heads, config.dim_head) if part.paired_heads else rows

    return ((name, map(read, group)) for name, group in parts.items())


def named_tensors(config: PaLMConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state dict of ours by the names of Hugging Face; tied embeddings are there once."""
    tensors = {}
    for name, parts in layout(config).items():
        for part, rows in zip(parts, state[name].split([part.shape[0] for part in parts]), strict=True):
            tensors[part.name] = to_pairs(rows, part.paired_heads, config.dim_head) if part.paired_heads else rows
    return tensors
