"""The metadata of a GGUF file as the config.json of Hugging Face that its model had."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from palm_rlhf.model.interop.gguf_header import GGUFHeader
from palm_rlhf.ops.rotary_scaling import RotaryScaling

ARCHITECTURE = "general.architecture"
EMBEDDINGS, OUTPUT, QUERY_BIAS = "token_embd.weight", "output.weight", "blk.0.attn_q.bias"
ROPE_FACTORS = "rope_freqs.weight"
# The architectures of llama.cpp, and the model types of Hugging Face.
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "command-r": "cohere"}
# The numbers of an architecture, with their names in config.json; None is a number that a file must have.
NUMBERS = {
    "block_count": ("num_hidden_layers", None),
    "embedding_length": ("hidden_size", None),
    "feed_forward_length": ("intermediate_size", None),
    "attention.head_count": ("num_attention_heads", None),
    "context_length": ("max_position_embeddings", None),
    "rope.freq_base": ("rope_theta", 10000.0),
}
FLOATS = {"rope.freq_base", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "logit_scale"}
RMS_EPS = {"attention.layer_norm_rms_epsilon": ("rms_norm_eps", None)}
LAYER_EPS = {"attention.layer_norm_epsilon": ("layer_norm_eps", None), "logit_scale": ("logit_scale", None)}
# Metadata that repeat what the numbers and the tensors say, or that `config_of` checks.
OTHERS = {
    *("vocab_size", "tensor_data_layout", "use_parallel_residual"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
}
# Metadata that are accepted with these values only.
EXPECTED: dict[str, float] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
}
EXPECTED |= {f"rope.scaling.{name}": 1.0 for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")}
EXPECTED |= {"rope.scaling.yarn_log_multiplier": 0.0}
OLD_FACTOR = "rope.scale_linear"  # in files from before November 2023
SCALING = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}
TENSORS_OF_BLOCK = 8  # of command-r; others have more
# Llama 3.1 to 3.3: the numbers of their config.json that a file does not have.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192


def config_of(header: GGUFHeader, rope_factors: Sequence[float] | None) -> dict[str, Any]:
    """Return the values of config.json. `rope_factors` are the numbers of `rope_freqs.weight`, if the file has it.

    Raises ValueError for another architecture, and for metadata that are missing, of a wrong type, or not known here.
    """
    where, metadata = header.path, header.metadata
    architecture = metadata.get(ARCHITECTURE)
    if not isinstance(architecture, str) or architecture not in MODEL_TYPES:
        raise ValueError(
            f"{where} has the architecture {architecture!r}, expected one of {list(MODEL_TYPES)}: take another model"
        )
    if EMBEDDINGS not in header.tensors or len(header.tensors[EMBEDDINGS].shape) != 2:
        raise ValueError(f"{where} lacks {EMBEDDINGS} of two axes; expected all tensors of a model")
    prefix = f"{architecture}."
    values = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    numbers = NUMBERS | (LAYER_EPS if architecture == "command-r" else RMS_EPS)
    config: dict[str, Any] = {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": header.tensors[EMBEDDINGS].shape[0],
    }
    for name, (ours, default) in numbers.items():
        config[ours] = number(values, name, default, where)
    check_known(values, numbers, where)
    found = [name.split(".")[1] for name in header.tensors if name.startswith("blk.")]
    blocks = len(set(found))
    if blocks != config["num_hidden_layers"] or len(found) < TENSORS_OF_BLOCK * blocks:
        raise ValueError(
            f"{where} has the block_count {config['num_hidden_layers']} and {len(found)} tensors of {blocks} blocks, "
            f"expected as many blocks, and at least {TENSORS_OF_BLOCK} tensors of each: copy or download the file again"
        )
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = number(values, "attention.head_count_kv", heads, where)
    width = number(values, "attention.key_length", config["hidden_size"] // max(heads, 1), where)
    config["head_dim"] = width
    for name in ("attention.value_length", "rope.dimension_count"):
        if (got := number(values, name, width, where)) != width:
            raise ValueError(f"{where} has the {name} {got}, expected the width of a head, {width}")
    scaling = scaling_of(values, config, rope_factors, where)
    config["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": config["rope_theta"]}
    config["hidden_act"] = "silu"
    config["tie_word_embeddings"] = OUTPUT not in header.tensors
    if architecture == "command-r":
        config["tie_word_embeddings"] = True  # a copy of the embeddings may be there
        config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in header.tensors
    if architecture != "qwen2":
        config["attention_bias"] = QUERY_BIAS in header.tensors
    return config


def number(values: dict[str, Any], name: str, default: float | None, where: Path) -> Any:
    """Return a number of the metadata. Raises ValueError where it is missing or something else."""
    value = values.get(name, default)
    if value is None:
        raise ValueError(f"{where} lacks the metadata {name}, expected a number: convert the model again")
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]  # the same number for every block
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where} has the {name} {value!r:.80}, expected one number for all blocks")
    return value


def check_known(values: dict[str, Any], numbers: dict[str, Any], where: Path) -> None:
    """Raise ValueError that names metadata of the architecture that a PaLM cannot compute or does not know."""
    known = {*numbers, *OTHERS, OLD_FACTOR, "rope.dimension_count", *(f"rope.scaling.{name}" for name in SCALING)}
    refused = sorted(
        f"{name}={value!r:.40}"
        for name, value in values.items()
        if name not in known and not (name in EXPECTED and value == EXPECTED[name])
    )
    if refused:
        raise ValueError(f"{where} has {', '.join(refused)}, which a PaLM cannot compute; take another model")


def scaling_of(
    values: dict[str, Any], config: dict[str, Any], rope_factors: Sequence[float] | None, where: Path
) -> dict[str, Any]:
    """Return the fields of the rotary scaling in config.json, none without a scaling.

    As in llama.cpp, a factor without a type is that of a linear scaling. A file of Llama 3.1 has the divisors of the
    frequencies instead, of which those of the released models are known.
    """
    factor = number(values, "rope.scaling.factor", number(values, OLD_FACTOR, 1, where), where)
    kind = values.get("rope.scaling.type", "linear")
    if kind in ("linear", "yarn") and factor in (0, 1):
        kind = "none"
    trained = LLAMA3_CONTEXT if rope_factors is not None else config["max_position_embeddings"]
    context = number(values, "rope.scaling.original_context_length", trained, where)
    if rope_factors is not None:
        if kind != "none":
            raise ValueError(f"{where} has {ROPE_FACTORS} and the rope.scaling.type {kind!r}, expected one of them")
        return llama3_scaling(config, rope_factors, context, where)
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = context
        for name in ("beta_fast", "beta_slow"):
            if (value := values.get(f"rope.scaling.yarn_{name}")) is not None:
                scaling[name] = value
    return scaling


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of the architecture, without its name before the keys, for the values of a config.json."""
    rope = config["rope_parameters"]
    values = {**config, "rope_theta": rope["rope_theta"]}
    numbers = NUMBERS | (LAYER_EPS if config["model_type"] == "cohere" else RMS_EPS)
    metadata = {key: float(values[ours]) if key in FLOATS else values[ours] for key, (ours, _) in numbers.items()}
    width = config["head_dim"]
    metadata |= {"vocab_size": config["vocab_size"], "attention.head_count_kv": config["num_key_value_heads"]}
    metadata |= {"attention.key_length": width, "attention.value_length": width, "rope.dimension_count": width}
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):  # the divisors of llama3 are a tensor
        metadata["rope.scaling.type"] = "none"
    else:
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if (context := rope.get("original_max_position_embeddings")) is not None:
        metadata["rope.scaling.original_context_length"] = context
    for name in ("beta_fast", "beta_slow"):
        if name in rope:
            metadata[f"rope.scaling.yarn_{name}"] = float(rope[name])
    return metadata


def llama3_scaling(config: dict[str, Any], factors: Sequence[float], context: int, where: Path) -> dict[str, Any]:
    """Return the scaling of Llama 3.1 that has these divisors. Raises ValueError where there is none."""
    scaling = {"rope_type": "llama3", "factor": max(factors, default=0.0), **LLAMA3}
    scaling["original_max_position_embeddings"] = context
    width = config["head_dim"]
    try:
        expected = llama3_factors(RotaryScaling.from_dict(scaling), config["rope_theta"], width)
        same = torch.allclose(expected, torch.tensor(factors, dtype=torch.float64), rtol=1e-3)
    except (ValueError, RuntimeError, ArithmeticError):  # a factor below 1, another number of them
        same = False
    if not same:
        raise ValueError(
            f"{where} has a {ROPE_FACTORS} other than that of Llama 3.1 and its context of {context} tokens, which a "
            "PaLM cannot compute; take another model"
        )
    return scaling


def llama3_factors(scaling: RotaryScaling, theta: float, dim_head: int) -> torch.Tensor:
    """Return the divisors of the rotary's frequencies, in float64: `d/2`."""
    frequencies = float(theta) ** -(torch.arange(0, dim_head, 2, dtype=torch.float64) / dim_head)
    return frequencies / scaling.stretched(frequencies, theta)
