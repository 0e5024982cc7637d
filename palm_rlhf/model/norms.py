"""The two normalisations of blocks: LayerNorm in a PaLM, RMSNorm in a LLaMA; neither has a bias."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.ops.rms_norm import rms_norm


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, without a bias (Ba et al. 2016); its scale starts at 1.

    `shape` is that of the scale: the last axis alone, or heads and last axis, where every head has its own scale.
    """

    weight: nn.Parameter

    def __init__(self, *shape: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 1:
            return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)
        return F.layer_norm(x, x.shape[-1:], None, None, self.eps) * self.weight


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis (Zhang and Sennrich 2019); its scale starts at 1."""

    weight: nn.Parameter

    def __init__(self, size: int, *, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def residual_norm(config: PaLMConfig) -> LayerNorm | RMSNorm:
    """Return a norm of the residual stream, `... e -> ... e`."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.dim, eps=config.norm_eps)


def head_norm(config: PaLMConfig, heads: int) -> LayerNorm | RMSNorm:
    """Return a norm of queries or keys, `... h d -> ... h d`.

    A layer norm has a scale for each head (Cohere 2024); an RMSNorm has one scale for all (Qwen3, Yang et al. 2025).
    """
    if config.norm == "rms":
        return RMSNorm(config.dim_head, eps=config.norm_eps)
    return LayerNorm(heads, config.dim_head, eps=config.norm_eps)
