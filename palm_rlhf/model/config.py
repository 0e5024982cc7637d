"""The config of a PaLM, and the sizes of the paper."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from palm_rlhf.ops.rotary_scaling import RotaryScaling

Block: TypeAlias = Literal["parallel", "serial"]
Norm: TypeAlias = Literal["layer", "rms"]
# Switches of other architectures: the config.json of a PaLM does not mention them.
SWITCHES = ("block", "norm", "qkv_bias", "tie_embeddings", "rotary_scaling")


@dataclass(frozen=True)
class PaLMConfig:
    """The config of a model, which is saved beside its weights; every field is a keyword of `PaLM`.

    The defaults are those of PaLM. LLaMA (Touvron et al. 2023) has block="serial", norm="rms", and kv_heads=heads; its
    kin differ by the switches that follow.

    Raises ValueError for a number out of its range.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the residual stream.
        depth: number of blocks.
        heads: query heads.
        dim_head: width of a head.
        kv_heads: heads of keys and values; 1 is multi-query (Shazeer 2019), more is grouped-query (Ainslie 2023).
        ff_mult: hidden units of the feed-forward, in multiples of `dim`.
        ff_inner_dim: hidden units of the feed-forward, instead of `ff_mult`.
        causal: False gives a bidirectional encoder.
        rotary_theta: base of the rotary wavelengths.
        xpos: rotary with the length-extrapolating scales of xPos.
        logit_scale: factor of the logits; None is the paper's `dim**-0.5`.
        z_loss: weight of the auxiliary loss `log(Z)^2`, which is added in `train()` mode only.
        norm_eps: epsilon of every layer norm.
        qk_norm: normalise each head of queries and keys before the rotary (Command R+; Qwen3, Yang et al. 2025).
        dropout: rate of dropout on the embeddings and on the output of each block.
        max_seq_len: the context that a server offers, in tokens; the rotary positions have no limit.
        flash_attn: False computes attention eagerly in float32.
        gradient_checkpointing: keep the inputs of the blocks in training, and compute the rest again in the backward.
        block: "parallel" (Chowdhery et al. 2022, section 2), or "serial": attention, then feed-forward, with two norms.
        norm: "layer" (Ba et al. 2016) or "rms" (Zhang and Sennrich 2019), of all norms.
        qkv_bias: add biases to queries, keys and values (Qwen2, Yang et al. 2024).
        tie_embeddings: use the token embeddings as the output layer; False gives it weights of its own.
        rotary_scaling: stretch the wavelengths of the rotary for long contexts; a `RotaryScaling` or its fields.
    """

    num_tokens: int
    dim: int
    depth: int
    heads: int = 8
    dim_head: int = 64
    kv_heads: int = 1
    ff_mult: float = 4
    ff_inner_dim: int | None = None
    causal: bool = True
    rotary_theta: float = 10000.0
    xpos: bool = False
    logit_scale: float | None = None
    z_loss: float = 1e-4
    norm_eps: float = 1e-5
    qk_norm: bool = False
    dropout: float = 0.0
    max_seq_len: int = 2048
    flash_attn: bool = True
    gradient_checkpointing: bool = False
    block: Block = "parallel"
    norm: Norm = "layer"
    qkv_bias: bool = False
    tie_embeddings: bool = True
    rotary_scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rotary_scaling, Mapping):
            object.__setattr__(self, "rotary_scaling", RotaryScaling.from_dict(self.rotary_scaling))
        for name, choices in (("block", ("parallel", "serial")), ("norm", ("layer", "rms"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {choices}")
        if self.qkv_bias and self.block == "parallel":
            raise ValueError('got qkv_bias=True with block="parallel"; expected block="serial", or no biases')
        if self.xpos and self.rotary_scaling is not None:
            raise ValueError("got xpos=True and a rotary_scaling; expected one of them: both stretch the context")
        for name in ("num_tokens", "dim", "depth", "heads", "dim_head", "kv_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("norm_eps", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if self.rotary_theta <= 0:
            raise ValueError(f"rotary_theta is {self.rotary_theta}; expected above 0, such as 10000")
        if self.rotary_scaling is not None and self.rotary_scaling.rope_type == "yarn" and self.rotary_theta <= 1:
            raise ValueError(f"rotary_theta is {self.rotary_theta}; expected above 1 with yarn, such as 10000")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}; expected a multiple, "
                "so that every key head serves the same number of query heads"
            )
        if self.dim_head % 2:
            raise ValueError(f"dim_head is {self.dim_head}; expected an even number, since rotary turns pairs")
        if self.inner_dim < 1:
            raise ValueError(
                f"the feed-forward has {self.inner_dim} units; expected at least 1: raise ff_mult or ff_inner_dim"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 <= dropout < 1")

    @property
    def inner_dim(self) -> int:
        """The number of hidden units of the feed-forward."""
        return int(self.dim * self.ff_mult) if self.ff_inner_dim is None else self.ff_inner_dim

    @property
    def output_scale(self) -> float:
        """The factor of the logits."""
        return self.dim**-0.5 if self.logit_scale is None else self.logit_scale

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them, without the switches of other architectures that are off."""
        values, defaults = dataclasses.asdict(self), {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in SWITCHES or value != defaults[name]}

    @classmethod
    def from_dict(cls, values: dict) -> "PaLMConfig":
        """Return the config of a `to_dict`; ValueError names the fields that this version does not know."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"the config holds unknown fields {unknown}; was it written by a newer palm_rlhf?")
        return cls(**values)


# Chowdhery et al. 2022, table 1.
PRESETS = {
    "8B": {"depth": 32, "heads": 16, "dim": 4096},
    "62B": {"depth": 64, "heads": 32, "dim": 8192},
    "540B": {"depth": 118, "heads": 48, "dim": 18432},
}
PRESET_COMMON = {"num_tokens": 256_000, "dim_head": 256, "kv_heads": 1, "ff_mult": 4}
