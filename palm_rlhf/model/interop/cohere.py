"""Weights of Hugging Face's `CohereForCausalLM` (Command R, Aya 23), which is a PaLM under other names."""

from collections.abc import Mapping
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

MODEL_TYPE, ARCHITECTURE = "cohere", "CohereForCausalLM"
SWITCHES = {"block": "parallel", "norm": "layer", "qkv_bias": False, "tie_embeddings": True}


def to_cohere_config(config: PaLMConfig, *, scopes: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a Cohere folder, with the names of transformers 4 and 5.

    Settings of training are left out: dropout, the z-loss, gradient checkpointing. A PaLM has no special tokens, so
    their ids are null; until they are set, transformers generates up to the maximal length. vLLM and llama.cpp also
    expect `heads * dim_head == dim`. Raises ValueError for a model that the format cannot represent.
    """
    require_representable(unrepresentable(config, SWITCHES), scopes, format=MODEL_TYPE)
    return {
        **common_config(config, model_type=MODEL_TYPE, architecture=ARCHITECTURE, dtype=dtype),
        "logit_scale": config.output_scale,
        "layer_norm_eps": config.norm_eps,
        "use_qk_norm": config.qk_norm,
    }


def to_cohere_tensors(config: PaLMConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a Cohere folder, without the output layer, which is tied to the embeddings."""
    return named_tensors(config, state)


def from_cohere_config(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the fields of a PaLMConfig from the config.json of a Cohere folder; its z-loss is 0.

    Raises ValueError that names settings which a PaLM cannot compute, or missing numbers.
    """
    tied = {"tie_word_embeddings": (values.get("tie_word_embeddings"), (True,))}
    require_settings(common_settings(values, ARCHITECTURE) | tied, where)
    numbers = {"logit_scale": values.get("logit_scale", 0.0625), "layer_norm_eps": values.get("layer_norm_eps", 1e-5)}
    # the context of Command R is longer than max_position_embeddings, and is stated here
    numbers["context"] = values.get("model_max_length") or values.get("max_position_embeddings", 8192)
    require_numbers(numbers, values, where)
    return {
        **common_fields(values, where, theta=None),  # the default of rope_theta differs between versions
        "logit_scale": numbers["logit_scale"],
        "norm_eps": numbers["layer_norm_eps"],
        "qk_norm": bool(values.get("use_qk_norm")),
        "max_seq_len": numbers["context"],
    }
