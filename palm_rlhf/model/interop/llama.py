"""Weights of LLaMA and its kin in folders of Hugging Face: llama, mistral, qwen2 and qwen3.

SmolLM2, Vicuna, TinyLlama and many others are of the model_type llama.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.interop.config_json import (
    common_config,
    common_fields,
    common_settings,
    require_numbers,
    require_representable,
    require_settings,
    unrepresentable,
)
from palm_rlhf.model.interop.tensor_layout import named_tensors


@dataclass(frozen=True)
class Architecture:
    """What tells one of the architectures from LLaMA: its switches, settings that it needs, and defaults of its own.

    The defaults are for settings that a config.json does not mention; see `common_fields`.
    """

    class_name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)  # of the config.json that is written


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", constants={"mlp_bias": False}),
    "mistral": Architecture("MistralForCausalLM", kv_heads=8, constants={"sliding_window": None}),
    "qwen2": Architecture("Qwen2ForCausalLM", qkv_bias=True, kv_heads=32, constants={"use_sliding_window": False}),
    "qwen3": Architecture(
        "Qwen3ForCausalLM", qk_norm=True, kv_heads=32, head_dim=128, constants={"use_sliding_window": False}
    ),
}
# Architectures for which people look here, and why a PaLM cannot compute them.
OTHERS = {
    "gpt_neox": "its blocks have two norms in parallel, biases everywhere, GELU, and a rotary of a part of each head",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
    "cohere2": "most of its layers attend to a sliding window",
    "smollm3": "some of its layers have no rotary",
    "gemma": "its feed-forward is gated by GELU, and its norms are scaled by 1 + weight",
    "gemma2": "its feed-forward is gated by GELU, and half of its layers attend to a sliding window",
    "gemma3_text": "its feed-forward is gated by GELU, and most of its layers attend to a sliding window",
    "phi3": "its tensors are fused, and its rotary may turn a part of each head",
    "gemma3": "its feed-forward is gated by GELU, and most of its layers attend to a sliding window",
    "olmo": "its norms have no weights",
    "olmo2": "its norms follow attention and feed-forward",
    "granite": "it has factors of embeddings, residuals and logits",
    "gpt_oss": "it is a mixture of experts",
    "deepseek_v3": "it is a mixture of experts, and its attention is latent",
    "llama4": "it is a mixture of experts",
    "phi": "it has biases everywhere, and a rotary of a part of each head",
    "ministral": "most of its layers attend to a sliding window",
    "falcon": "its feed-forward has no gate",
    "gpt2": "its positions are learnt, and it has biases everywhere",
}


def from_llama_config(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the fields of a PaLMConfig from a config.json of one of ARCHITECTURES; its z-loss is 0.

    Raises ValueError that names settings which a PaLM cannot compute, or missing numbers.
    """
    model_type = values["model_type"]
    kind = ARCHITECTURES[model_type]
    settings = common_settings(values, kind.class_name) | {
        "mlp_bias": (values.get("mlp_bias"), (False,)),
        "use_sliding_window": (values.get("use_sliding_window"), (False,)),
        "layer_types": (_kinds_of(values.get("layer_types")), (["full_attention"],)),
        "logit_scale": (values.get("logit_scale"), (1,)),
        "use_qk_norm": (values.get("use_qk_norm"), (False,)),
    }
    require_settings(settings, where)
    window = values.get("sliding_window", 4096) if model_type == "mistral" else None  # 4096 is its default
    if window is not None:
        raise ValueError(
            f"{where} has sliding_window={window}, expected null: a PaLM attends to all earlier tokens. Up to {window} "
            "tokens that is the same: for texts that are no longer, set sliding_window to null and "
            f"max_position_embeddings to {window} there"
        )
    norm_eps, context = values.get("rms_norm_eps", 1e-6), values.get("max_position_embeddings") or 2048
    require_numbers({"rms_norm_eps": norm_eps, "max_position_embeddings": context}, values, where)
    return {
        **common_fields(values, where, theta=10_000.0, kv_heads=kind.kv_heads, head_dim=kind.head_dim),
        "logit_scale": 1.0,
        "norm_eps": norm_eps,
        "qk_norm": kind.qk_norm,
        "max_seq_len": context,
        "block": "serial",
        "norm": "rms",
        "qkv_bias": kind.qkv_bias,
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
    }


def _kinds_of(layer_types: Any) -> Any:
    """Return the kinds of layers in a list of them, each once; anything else is returned as it is."""
    if isinstance(layer_types, list) and layer_types and all(isinstance(kind, str) for kind in layer_types):
        return sorted(set(layer_types))
    return layer_types


def to_llama_config(config: PaLMConfig, *, scopes: list[str], dtype: torch.dtype, model_type: str) -> dict[str, Any]:
    """Return the config.json of a folder of one of ARCHITECTURES, with the names of transformers 4 and 5.

    Settings of training are left out: dropout, the z-loss, gradient checkpointing. A PaLM has no special tokens, so
    their ids are null; until they are set, transformers generates up to the maximal length. Raises ValueError for a
    model that the format cannot represent.
    """
    require_representable(refusals(config, model_type), scopes, format=model_type)
    kind = ARCHITECTURES[model_type]
    return {
        **common_config(config, model_type=model_type, architecture=kind.class_name, dtype=dtype),
        "rms_norm_eps": config.norm_eps,
        **kind.constants,
    }


def to_llama_tensors(config: PaLMConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a folder of one of ARCHITECTURES.

    They have no factor of the logits: the scale of the last norm takes it up.
    """
    if config.output_scale != 1.0:
        state = {**state, "norm.weight": state["norm.weight"] * config.output_scale}
    return named_tensors(config, state)


def refusals(config: PaLMConfig, model_type: str) -> list[str]:
    """Return the options of a model that one of ARCHITECTURES cannot hold, each with a way to mend it."""
    kind = ARCHITECTURES[model_type]
    switches = {"block": "serial", "norm": "rms", "qkv_bias": kind.qkv_bias, "qk_norm": kind.qk_norm}
    refused = unrepresentable(config, switches)
    if model_type == "llama" and config.dim % config.heads:
        refused.append(f"dim={config.dim}, which is no multiple of heads={config.heads} (take format='mistral')")
    return refused


def model_type_of(config: PaLMConfig) -> str:
    """Return the first of ARCHITECTURES that holds a model, or else the one that refuses fewest of its options."""
    return min(ARCHITECTURES, key=lambda name: len(refusals(config, name)))
