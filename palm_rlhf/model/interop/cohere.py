"""Weights of `CohereForCausalLM` of Hugging Face (Command R, Aya 23), a PaLM whose tensors have other names.

Its rotary turns pairs of neighbouring coordinates; ours turns pairs that are half a head apart. So the rows of queries
and keys, and the scales of their norms, are in another order.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.weights_folder import WeightsFolder, check_shapes

ARCHITECTURE = "CohereForCausalLM"
EMBEDDINGS, UNTIED = "model.embed_tokens.weight", "lm_head.weight"
# The numbers that config.json must have, with the defaults of transformers. None has no default: the default of
# rope_theta differs between versions.
NUMBERS = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
NUMBERS |= {"rope_theta": None, "logit_scale": 0.0625, "layer_norm_eps": 1e-5}


@dataclass(frozen=True)
class CoherePart:
    """A tensor of a Cohere model, which holds some rows of one of our tensors."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0  # the number of heads whose rows the rotary turns; 0 if it turns none


def layout(config: PaLMConfig) -> dict[str, list[CoherePart]]:
    """Return, for each of our tensors, the tensors of a Cohere model that are concatenated along its rows."""
    dim, inner, heads, kv_heads, d = config.dim, config.inner_dim, config.heads, config.kv_heads, config.dim_head
    parts = {"token_emb.weight": [CoherePart(EMBEDDINGS, (config.num_tokens, dim))]}
    for i in range(config.depth):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        parts[f"{ours}.norm.weight"] = [CoherePart(f"{theirs}.input_layernorm.weight", (dim,))]
        parts[f"{ours}.in_proj.weight"] = [
            CoherePart(f"{theirs}.self_attn.q_proj.weight", (heads * d, dim), heads),
            CoherePart(f"{theirs}.self_attn.k_proj.weight", (kv_heads * d, dim), kv_heads),
            CoherePart(f"{theirs}.self_attn.v_proj.weight", (kv_heads * d, dim)),
            CoherePart(f"{theirs}.mlp.gate_proj.weight", (inner, dim)),
            CoherePart(f"{theirs}.mlp.up_proj.weight", (inner, dim)),
        ]
        parts[f"{ours}.attn_out.weight"] = [CoherePart(f"{theirs}.self_attn.o_proj.weight", (dim, heads * d))]
        parts[f"{ours}.ff_out.weight"] = [CoherePart(f"{theirs}.mlp.down_proj.weight", (dim, inner))]
        if config.qk_norm:
            parts[f"{ours}.q_norm.weight"] = [CoherePart(f"{theirs}.self_attn.q_norm.weight", (heads, d), heads)]
            parts[f"{ours}.k_norm.weight"] = [CoherePart(f"{theirs}.self_attn.k_norm.weight", (kv_heads, d), kv_heads)]
    parts["norm.weight"] = [CoherePart("model.norm.weight", (dim,))]
    return parts


def to_halves(x: Tensor, heads: int, dim_head: int) -> Tensor:
    """Reorder the rows of heads from neighbouring pairs (Cohere) to two halves (ours): `(h d) e` or `h d`."""
    pairs = x.reshape(heads, dim_head, -1)
    return rearrange(pairs, "h (i pair) e -> h (pair i) e", pair=2).reshape(x.shape)


def to_pairs(x: Tensor, heads: int, dim_head: int) -> Tensor:
    """Reorder the rows of heads from two halves (ours) to neighbouring pairs (Cohere): `(h d) e` or `h d`."""
    halves = x.reshape(heads, dim_head, -1)
    return rearrange(halves, "h (pair i) e -> h (i pair) e", pair=2).reshape(x.shape)


def to_cohere_config(config: PaLMConfig, *, scopes: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a Cohere folder, with the names of transformers 4 and 5.

    Settings of training are left out: dropout, the z-loss, gradient checkpointing. A PaLM has no special tokens, so
    their ids are null; until they are set, transformers generates up to the maximal length. vLLM and llama.cpp also
    expect `heads * dim_head == dim`. Raises ValueError for a model that the format cannot represent.
    """
    refused = []
    if config.xpos:
        refused.append("xpos=True (train or build the model without it)")
    if not config.causal:
        refused.append("causal=False (the format is of causal models)")
    if scopes:
        refused.append(f"the finetune scopes {scopes} (call palm.merge_finetune_params, or remove them, first)")
    if refused:
        raise ValueError(f'format="cohere" cannot hold {" and ".join(refused)}; format="palm" can')
    return {
        "model_type": "cohere",
        "architectures": [ARCHITECTURE],
        "vocab_size": config.num_tokens,
        "hidden_size": config.dim,
        "intermediate_size": config.inner_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rotary_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_theta},
        "logit_scale": config.output_scale,
        "layer_norm_eps": config.norm_eps,
        "use_qk_norm": config.qk_norm,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def to_cohere_tensors(config: PaLMConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a Cohere folder, without the output layer, which is tied to the embeddings."""
    tensors = {}
    for name, parts in layout(config).items():
        for part, rows in zip(parts, state[name].split([part.shape[0] for part in parts]), strict=True):
            tensors[part.name] = to_pairs(rows, part.heads, config.dim_head) if part.heads else rows
    return tensors


def from_cohere_config(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the fields of a PaLMConfig from the config.json of a Cohere folder; its z-loss is 0.

    Raises ValueError that names settings which a PaLM cannot compute, or missing numbers.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    expected = {
        "attention_bias": (values.get("attention_bias"), (None, False)),
        "hidden_act": (values.get("hidden_act"), (None, "silu")),
        "tie_word_embeddings": (values.get("tie_word_embeddings"), (None, True)),
        "the rope type": (rope.get("rope_type", rope.get("type")), (None, "default")),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", values.get("partial_rotary_factor")), (None, 1)),
        "quantization_config": (values.get("quantization_config"), (None,)),
        "architectures": (values.get("architectures"), (None, [ARCHITECTURE])),
    }
    refused = [f"{name}={got!r}, not {fine[-1]!r}" for name, (got, fine) in expected.items() if got not in fine]
    if refused:
        raise ValueError(f"{where} has {', '.join(refused)}: a PaLM cannot compute that; take another model")
    numbers = {name: values.get(name, default) for name, default in NUMBERS.items()}
    numbers["rope_theta"] = rope.get("rope_theta", numbers["rope_theta"])
    if missing := [name for name, number in numbers.items() if not isinstance(number, (int, float))]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; expected all the numbers of a Cohere model")
    heads = numbers["num_attention_heads"]
    return {
        "num_tokens": numbers["vocab_size"],
        "dim": numbers["hidden_size"],
        "depth": numbers["num_hidden_layers"],
        "heads": heads,
        "dim_head": values.get("head_dim") or numbers["hidden_size"] // max(heads, 1),
        "kv_heads": values.get("num_key_value_heads") or heads,
        "ff_inner_dim": numbers["intermediate_size"],
        "rotary_theta": numbers["rope_theta"],
        "logit_scale": numbers["logit_scale"],
        "z_loss": 0.0,
        "norm_eps": numbers["layer_norm_eps"],
        "qk_norm": bool(values.get("use_qk_norm")),
        # the context of Command R is longer than max_position_embeddings, and is stated here
        "max_seq_len": values.get("model_max_length") or values.get("max_position_embeddings", 8192),
    }


def from_cohere_tensors(config: PaLMConfig, folder: WeightsFolder) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Return the names of our tensors and their parts, after checking all shapes; the parts are read when used."""
    parts = layout(config)
    expected = {part.name: part.shape for group in parts.values() for part in group}
    found = dict(folder.shapes)
    if found.pop(UNTIED, None) and not torch.equal(folder[UNTIED], folder[EMBEDDINGS]):
        raise ValueError(
            f"{folder.path} has a {UNTIED} of its own; expected the embeddings, as in a PaLM: take another model"
        )
    check_shapes(found, expected, folder.path)

    def read(part: CoherePart) -> Tensor:
        return to_halves(folder[part.name], part.heads, config.dim_head) if part.heads else folder[part.name]

    return ((name, map(read, group)) for name, group in parts.items())
