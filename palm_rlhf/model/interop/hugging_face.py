"""Common parts of the decoders of Hugging Face: the names of their tensors, and the settings in their config.json.

Cohere's rotary turns pairs of neighbouring coordinates; LLaMA's and ours turn pairs that are half a head apart. So for
Cohere, the rows of queries and keys, and the scales of their norms, change their order.
"""

import math
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
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The fields of each kind of rotary; `rope_type` (earlier, `type`) names the kind, and any may have `rope_theta`.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
}


class Weights(Protocol):
    """Weights under the names of Hugging Face: a `WeightsFolder`, or another file that presents itself as one."""

    path: Path
    config: dict[str, Any]  # the values of config.json
    shapes: dict[str, tuple[int, ...]]

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, which is read now."""

    def require_unchanged(self) -> None:
        """Raise ValueError if another process has changed the files since they were opened."""


@dataclass(frozen=True)
class Part:
    """A tensor of a Hugging Face model, which holds some rows of one of our tensors."""

    name: str
    shape: tuple[int, ...]
    paired_heads: int = 0  # the number of heads whose rows are in pairs there, and in halves here


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


def require_settings(settings: Mapping[str, tuple[Any, tuple]], where: Path) -> None:
    """Raise ValueError that names each setting that is none of the values which a PaLM can compute."""
    refused = [f"{name}={got!r}, not {fine[-1]!r}" for name, (got, fine) in settings.items() if got not in fine]
    if refused:
        raise ValueError(f"{where} has {', '.join(refused)}: a PaLM cannot compute that; take another model")


def common_settings(values: Mapping[str, Any], architecture: str) -> dict[str, tuple[Any, tuple]]:
    """Return the settings that every architecture must have, with the values which a PaLM can compute."""
    rope = rope_of(values)
    return {
        "attention_bias": (values.get("attention_bias"), (None, False)),
        "hidden_act": (values.get("hidden_act"), (None, "swish", "silu")),
        "the rope type": (rope["rope_type"], tuple(ROPE_FIELDS)),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", values.get("partial_rotary_factor")), (None, 1)),
        "quantization_config": (values.get("quantization_config"), (None,)),
        "architectures": (values.get("architectures"), (None, [architecture])),
    }


def rope_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary, from where transformers 5 and 4 write them, with their `rope_type`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = dict(rope) if isinstance(rope, dict) else {"rope_type": rope}
    nested = any(isinstance(value, dict) for value in rope.values())  # one rotary for each type of layer
    return {**rope, "rope_type": dict(rope) if nested else rope.get("rope_type", rope.get("type", "default"))}


def rotary_fields(values: Mapping[str, Any], default_theta: float | None, where: Path) -> dict[str, Any]:
    """Return `rotary_theta` and `rotary_scaling` of a config whose kind of rotary is known to be one of ours.

    Raises ValueError for a setting of the rotary that a PaLM lacks.
    """
    rope = rope_of(values)
    kind = rope["rope_type"]
    fields = {name: rope[name] for name in ROPE_FIELDS[kind] if rope.get(name) is not None}
    if kind in ("llama3", "yarn"):
        pretrained = values.get("original_max_position_embeddings", values.get("max_position_embeddings"))
        fields.setdefault("original_max_position_embeddings", pretrained)
    if kind == "yarn":
        require_settings({"truncate": (rope.get("truncate"), (None, True))}, where)
        one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
        if one and all_dims and "factor" in fields and "attention_factor" not in fields:
            growth = 0.1 * math.log(fields["factor"])
            fields["attention_factor"] = (one * growth + 1) / (all_dims * growth + 1)
    scaling = {"rope_type": kind, **fields} if kind != "default" else None
    return {
        "rotary_theta": rope.get("rope_theta", values.get("rope_theta", default_theta)),
        "rotary_scaling": scaling,
    }


def common_fields(
    values: Mapping[str, Any],
    where: Path,
    *,
    more_numbers: Mapping[str, Any],
    theta: float | None = None,
    kv_heads: int | None = None,
    dim_head: int | None = None,
) -> dict[str, Any]:
    """Return the fields of a PaLMConfig that all architectures have; the z-loss is 0.

    Args:
        more_numbers: further values that must be numbers.
        theta: the default of rope_theta; None if it has none.
        kv_heads: the default of num_key_value_heads; None is as many as query heads.
        dim_head: the default of head_dim; None is the width divided by the query heads.

    Raises ValueError that names the values which are no numbers.
    """
    rotary = rotary_fields(values, theta, where)
    sizes: dict[str, Any] = {name: values.get(name) for name in SIZES}
    numbers = {**sizes, "rope_theta": rotary["rotary_theta"], **more_numbers}
    missing = [
        name for name, number in numbers.items() if isinstance(number, bool) or not isinstance(number, (int, float))
    ]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}; expected all the numbers of a {values.get('model_type')} model"
        )
    heads = sizes["num_attention_heads"]
    return {
        "num_tokens": sizes["vocab_size"],
        "dim": sizes["hidden_size"],
        "depth": sizes["num_hidden_layers"],
        "heads": heads,
        "dim_head": values.get("head_dim", dim_head) or sizes["hidden_size"] // max(heads, 1),
        "kv_heads": values.get("num_key_value_heads", kv_heads) or heads,
        "ff_inner_dim": sizes["intermediate_size"],
        **rotary,
        "z_loss": 0.0,
    }


def common_config(config: PaLMConfig, *, model_type: str, architecture: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the values of a config.json that all architectures have, with the names of transformers 4 and 5.

    A PaLM has no special tokens, so their ids are null.
    """
    scaling = config.rotary_scaling
    kind = "default" if scaling is None else scaling.rope_type
    rope: dict[str, Any] = {"rope_type": kind}
    rope |= {name: value for name in ROPE_FIELDS[kind] if (value := getattr(scaling, name)) is not None}
    return {
        "model_type": model_type,
        "architectures": [architecture],
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
        "rope_parameters": {**rope, "rope_theta": config.rotary_theta},
        **({} if scaling is None else {"rope_scaling": rope}),
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def require_representable(config: PaLMConfig, scopes: list[str], *, format: str, switches: Mapping[str, tuple]) -> None:
    """Raise ValueError that names each option of a model that a format of Hugging Face cannot hold.

    `switches` are the values that the fields of the config may have.
    """
    refused = unrepresentable(config, scopes, switches)
    if refused:
        raise ValueError(f'format="{format}" cannot hold {" and ".join(refused)}; format="palm" can')


def unrepresentable(config: PaLMConfig, scopes: list[str], switches: Mapping[str, tuple]) -> list[str]:
    """Return the options of a model that a format cannot hold, each with a way to mend it."""
    refused = []
    if config.xpos:
        refused.append("xpos=True (train or build the model without it)")
    if not config.causal:
        refused.append("causal=False (the format is of causal models)")
    for name, allowed in switches.items():
        if (value := getattr(config, name)) not in allowed:
            refused.append(f"{name}={value!r} (it has {name}={allowed[0]!r})")
    if scopes:
        refused.append(f"the finetune scopes {scopes} (call palm.merge_finetune_params, or remove them, first)")
    return refused
