"""Rotary frequencies for contexts longer than in pretraining: linear, Llama 3's and YaRN's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RotaryScaling:
    """How the frequencies of the rotary are stretched; the fields have the names of Hugging Face's config.json.

    linear: every frequency is divided by `factor` (Chen et al. 2023, position interpolation). llama3: low frequencies
    are divided, high ones stay, and in between the two are mixed linearly in the frequency (Llama 3.1, Dubey et al.
    2024, as in Meta's released code). yarn: the same, but mixed linearly in the number of the pair, as in the authors'
    code, and the scores of attention are sharpened (Peng et al. 2023, sections 3.2 and 3.4).

    Args:
        rope_type: the kind.
        factor: how many times longer the context is.
        original_max_position_embeddings: the context of pretraining, in tokens; llama3 and yarn need it.
        low_freq_factor: llama3: wavelengths above the context divided by this are stretched in full.
        high_freq_factor: llama3: wavelengths below the context divided by this stay.
        beta_fast: yarn: frequencies with more rotations than this in the context of pretraining stay.
        beta_slow: yarn: frequencies with fewer rotations than this are stretched in full.
        attention_factor: yarn: the factor of cosines and sines; None is `0.1 log(factor) + 1`.

    Raises ValueError for another kind, or a number out of its range.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in KINDS:
            raise ValueError(f"got the rotary scaling {self.rope_type!r}, expected one of {KINDS}")
        if not self.factor >= 1:
            raise ValueError(f"got a rotary scaling of factor {self.factor}, expected at least 1")
        if self.rope_type != "linear" and not self.original_max_position_embeddings:
            raise ValueError(f"got {self.rope_type} without original_max_position_embeddings, expected that number")
        for name in ("original_max_position_embeddings", "attention_factor"):
            if (number := getattr(self, name)) is not None and not number > 0:
                raise ValueError(f"got a rotary scaling with {name}={number}, expected above 0")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"got low_freq_factor={self.low_freq_factor} and high_freq_factor={self.high_freq_factor}, "
                "expected the first to be lower"
            )
        if not self.beta_fast >= self.beta_slow > 0:
            raise ValueError(
                f"got beta_fast={self.beta_fast} and beta_slow={self.beta_slow}, expected numbers above 0, "
                "the first not the lower one"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RotaryScaling":
        """Return the scaling of a dict of its fields; a field that is None has its default.

        Raises ValueError for a field that it has not, such as yarn's `mscale` and `truncate`.
        """
        values = {name: value for name, value in values.items() if value is not None}
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"got a rotary scaling with {unknown}, expected {[field.name for field in fields(cls)]}")
        if missing := sorted({"rope_type", "factor"} - set(values)):
            raise ValueError(f"got a rotary scaling without {missing}, expected its kind and factor")
        return cls(**values)

    @property
    def table_factor(self) -> float:
        """The factor of cosines and sines, so that scores grow by its square: above 1 for yarn alone."""
        if self.rope_type != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def stretched(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the frequencies for the longer context, in radians a token: `d/2 -> d/2`."""
        if self.rope_type == "linear":
            return frequencies / self.factor
        context = float(self.original_max_position_embeddings or 0)
        if self.rope_type == "llama3":
            rotations = context * frequencies / (2 * math.pi)
            kept = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            size = 2 * len(frequencies)
            first, last = (
                size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))
                for rotations in (self.beta_fast, self.beta_slow)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
            pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
            kept = 1 - (pairs - first) / (last - first or 0.001)
        kept = kept.clamp(0, 1)
        return frequencies * kept + frequencies / self.factor * (1 - kept)
