"""Settings that the config.json of every decoder of Hugging Face has, read and written."""

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from palm_rlhf.model.config import PaLMConfig

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The fields of each kind of rotary; `rope_type` (earlier, `type`) names the kind, and any may have `rope_theta`.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
}
OTHER_ROPE_FIELDS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim", "truncate")


# Settings of other architectures (SmolLM3 and nanotron, Gemma 2, Granite, OLMo, MiniCPM), with the values that change
# nothing. transformers ignores them in a config.json of the architectures here.
FOREIGN: dict[str, tuple] = {
    "no_rope_layers": (),
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_multiplier": (),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "logits_scaling": (1,),
    "clip_qkv": (),
    "scale_emb": (1,),
}
MOST = 2**63  # above it, integers do not fit the types of torch


def require_settings(settings: Mapping[str, tuple[Any, tuple]], where: Path) -> None:
    """Raise ValueError that names each setting with a value, other than null, that a PaLM cannot compute."""
    refused = []
    for name, (got, computable) in settings.items():
        if got is not None and got not in computable:
            expected = f"one of {computable}" if len(computable) > 1 else repr(*computable or (None,))
            refused.append(f"{name}={got!r}, not {expected}")
    if refused:
        raise ValueError(f"{where} has {', '.join(refused)}: a PaLM cannot compute that; take another model")


def common_settings(values: Mapping[str, Any], architecture: str) -> dict[str, tuple[Any, tuple]]:
    """Return the settings that every architecture must have, with the values which a PaLM can compute."""
    rope = rope_of(values)
    known = {*OTHER_ROPE_FIELDS, *chain.from_iterable(ROPE_FIELDS.values())}
    unknown = {name: value for name, value in rope.items() if name not in known and value is not None}
    return {
        "attention_bias": (values.get("attention_bias"), (False,)),
        "hidden_act": (values.get("hidden_act"), ("silu",)),
        "the rope type": (rope["rope_type"], tuple(ROPE_FIELDS)),
        "the rope settings": (unknown or None, ()),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", values.get("partial_rotary_factor")), (1,)),
        "quantization_config": (values.get("quantization_config"), ()),
        "architectures": (values.get("architectures"), ([architecture],)),
        "tie_word_embeddings": (values.get("tie_word_embeddings"), (True, False)),
        **{name: (values.get(name), computable) for name, computable in FOREIGN.items()},
    }


def rope_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary, from where transformers 5 and 4 write them, with their `rope_type`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = dict(rope) if isinstance(rope, dict) else {"rope_type": rope}
    nested = any(isinstance(value, dict) for value in rope.values())  # one rotary for each type of layer
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return {**rope, "rope_type": dict(rope) if nested else kind}


def rotary_fields(values: Mapping[str, Any], default_theta: float | None, where: Path) -> dict[str, Any]:
    """Return `rotary_theta` and `rotary_scaling` of a config whose kind of rotary is one of ROPE_FIELDS.

    Raises ValueError for a setting of the rotary that a PaLM lacks, and for a value that must be a number.
    """
    rope = rope_of(values)
    kind = rope["rope_type"]
    fields = {name: rope[name] for name in ROPE_FIELDS[kind] if rope.get(name) is not None}
    if (name := "original_max_position_embeddings") in ROPE_FIELDS[kind]:
        fields[name] = values.get(name) or fields.get(name) or values.get("max_position_embeddings")
    theta = rope.get("rope_theta", values.get("rope_theta", default_theta))
    if kind == "default":
        require_numbers({"rope_theta": theta}, values, where)
        return {"rotary_theta": theta, "rotary_scaling": None}
    require_numbers({"rope_theta": theta, "factor": rope.get("factor"), **fields}, values, where)
    if kind == "yarn":
        require_settings({"truncate": (rope.get("truncate"), (True,))}, where)
        scales = {name: rope[name] for name in ("mscale", "mscale_all_dim") if rope.get(name)}
        require_numbers(scales, values, where)
        if len(scales) == 2 and "attention_factor" not in fields:
            one, all_dims = (0.1 * scale * math.log(fields["factor"]) + 1 for scale in scales.values())
            fields["attention_factor"] = one / all_dims
    return {"rotary_theta": theta, "rotary_scaling": {"rope_type": kind, **fields}}


def require_numbers(numbers: Mapping[str, Any], values: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError that names each of the given values of a config.json that is not a finite number."""
    missing = [
        name for name, number in numbers.items() if isinstance(number, bool) or not isinstance(number, (int, float))
    ]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}; expected all the numbers of a {values.get('model_type')} model"
        )
    if endless := [f"{name}={number}" for name, number in numbers.items() if not -MOST < number < MOST]:
        raise ValueError(
            f"{where} has {', '.join(endless):.200}, expected finite numbers below 2^63: copy or download it again"
        )


def common_fields(
    values: Mapping[str, Any],
    where: Path,
    *,
    theta: float | None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """Return the fields of a PaLMConfig that all architectures have; the z-loss is 0.

    Raises ValueError that names the values which must be numbers and are none.

    Args:
        values: the values of config.json.
        where: its path.
        theta: the default of rope_theta; None if it has none.
        kv_heads: num_key_value_heads where the file does not mention it; None is num_attention_heads.
        head_dim: the same of head_dim; None is the share of a head in hidden_size.
    """
    sizes: dict[str, Any] = {name: values.get(name) for name in SIZES}
    optional = {"num_key_value_heads": values.get("num_key_value_heads", kv_heads)}
    optional["head_dim"] = values.get("head_dim", head_dim)
    given = {name: number for name, number in optional.items() if number is not None}
    require_numbers(sizes | given, values, where)
    heads = sizes["num_attention_heads"]
    return {
        "num_tokens": sizes["vocab_size"],
        "dim": sizes["hidden_size"],
        "depth": sizes["num_hidden_layers"],
        "heads": heads,
        "dim_head": given.get("head_dim", sizes["hidden_size"] // max(heads, 1)),
        "kv_heads": given.get("num_key_value_heads", heads),
        "ff_inner_dim": sizes["intermediate_size"],
        **rotary_fields(values, theta, where),
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


def unrepresentable(config: PaLMConfig, switches: Mapping[str, Any]) -> list[str]:
    """Return the options of a model that a format of Hugging Face cannot hold, each with a way to mend it.

    `switches` are fields of the config, and the values that they must have.
    """
    refused = []
    if config.xpos:
        refused.append("xpos=True (train or build the model without it)")
    if not config.causal:
        refused.append("causal=False (the format is of causal models)")
    for name, value in switches.items():
        if getattr(config, name) != value:
            refused.append(f"{name}={getattr(config, name)!r} (the format is of models with {name}={value!r})")
    return refused


def require_representable(refused: list[str], scopes: list[str], *, format: str) -> None:
    """Raise ValueError that names the options in `refused`, and LoRA scopes, if there are any."""
    if scopes:
        scoped = f"the finetune scopes {scopes} (call palm.merge_finetune_params, or remove them, first)"
        refused = [*refused, scoped]
    if refused:
        raise ValueError(f'format="{format}" cannot hold {" and ".join(refused)}; format="palm" can')
