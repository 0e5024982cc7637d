"""GGUF files of models of transformers, written as llama.cpp's converter writes them, by the package gguf alone."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "command-r": (CohereConfig, CohereForCausalLM),
}
EPS = {"command-r": "attention.layer_norm_epsilon"}


@torch.no_grad()
def hugging_face_model(architecture: str, seed: int = 0, **values) -> PreTrainedModel:
    """A small model of transformers with weights of which none is like another, norms and biases too."""
    config_class, model_class = CLASSES[architecture]
    extra = {"head_dim": 8} if architecture in ("llama", "qwen3") else {}
    model = model_class(config_class(**{**SIZES, **extra, **values}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.3, generator=generator)
        if "norm" in name:
            parameter.add_(1)
    return model.eval()


def neighbouring_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of llama.cpp's llama: those that the rotary turns together, i and i + d/2, beside each other."""
    moved = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for pair in range(size // 2):
            moved[head * size + 2 * pair] = rows[head * size + pair]
            moved[head * size + 2 * pair + 1] = rows[head * size + size // 2 + pair]
    return moved


def metadata_of(model: PreTrainedModel, architecture: str) -> dict:
    """The metadata of the architecture, by the keys of llama.cpp."""
    config = model.config
    values = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        EPS.get(architecture, "attention.layer_norm_rms_epsilon"): float(
            config.layer_norm_eps if architecture == "command-r" else config.rms_norm_eps
        ),
    }
    if architecture == "llama":
        values["rope.dimension_count"] = config.head_dim
    if architecture == "qwen3":
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if architecture == "command-r":
        values |= {"logit_scale": float(config.logit_scale), "rope.scaling.type": "none"}
    return values


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    kind: str = "F32",
    *,
    values: dict | None = None,
    others: dict | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    raw: dict | None = None,
    left_out: tuple[str, ...] = (),
    **options,
) -> Path:
    """Write a model; matrices have the type `kind`, and `values`, `others` and `tensors` are added or replaced.

    `values` are metadata of the architecture, and `others` have whole keys; `raw` are bytes and
    types of tensors; `options` are those of the writer.
    """
    writer = gguf.GGUFWriter(path, architecture, **options)
    metadata = {**metadata_of(model, architecture), **(values or {})}
    whole = {f"{architecture}.{key}": value for key, value in metadata.items() if key not in left_out}
    for key, value in {**whole, **(others or {})}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper().replace("-", "_")), 8)
    wanted = gguf.GGMLQuantizationType[kind]
    arrays = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().float().numpy()
        if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
            config = model.config
            array = neighbouring_pairs(
                array, config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            )
        arrays[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    for name, array in {**arrays, **(tensors or {})}.items():
        if name in left_out:
            continue
        if name in (raw or {}):
            data, own = raw[name]
            writer.add_tensor(name, data, raw_dtype=own)
            continue
        own = wanted if array.ndim == 2 and "norm" not in name else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
