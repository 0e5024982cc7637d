"""The optimiser, the learning rate's schedule and the precision of a training step."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from beartype import beartype
from torch import nn

from palm_rlhf.ops.devices import computes_bfloat16

Precision = Literal["auto", "bf16", "float32"]


@beartype
def adamw(
    model: nn.Module,
    learning_rate: float | int,
    betas: tuple[float | int, float | int],
    eps: float | int,
    weight_decay: float | int,
) -> torch.optim.AdamW:
    """Return AdamW (arXiv:1711.05101) for the trainable parameters, with weight decay on matrices alone."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return adamw_groups([(trainable, learning_rate)], betas, eps, weight_decay)


@beartype
def adamw_groups(
    groups: Iterable[tuple[Sequence[nn.Parameter], float | int]],
    betas: tuple[float | int, float | int],
    eps: float | int,
    weight_decay: float | int,
) -> torch.optim.AdamW:
    """Return AdamW for groups of parameters, each with its own learning rate; fused on CPU and CUDA."""
    split = nonempty(
        [
            {"params": [p for p in parameters if (p.ndim >= 2) == decays], "lr": rate, "weight_decay": decay}
            for parameters, rate in groups
            for decays, decay in ((True, weight_decay), (False, 0.0))
        ]
    )
    fused = {parameter.device.type for group in split for parameter in group["params"]} <= {"cpu", "cuda"}
    return torch.optim.AdamW(split, betas=betas, eps=eps, fused=fused)


def nonempty(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of an optimiser that hold parameters. Raises ValueError where none does."""
    filled = [group for group in groups if group["params"]]
    if not filled:
        raise ValueError("all weights are frozen; expected some to train: call requires_grad_(), or train an adapter")
    return filled


@beartype
def warmup_cosine(step: int, progress: float | int, warmup_steps: int, min_ratio: float | int) -> float:
    """Return the factor of the peak learning rate: linear warm-up times a cosine (arXiv:1608.03983, equation 5).

    Args:
        step: steps that are done.
        progress: the share of the run that is done, from 0 to 1.
        warmup_steps: steps over which the factor rises.
        min_ratio: the end of the cosine.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return warmup * (min_ratio + (1.0 - min_ratio) * cosine)


@beartype
def forward_precision(precision: Precision, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a function that makes the context of a forward: bfloat16 autocast, or none."""
    if precision == "bf16" or (precision == "auto" and computes_bfloat16(device)):
        return partial(torch.autocast, device.type, torch.bfloat16)
    return nullcontext


@beartype
def computes_below_float32(precision: Precision, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether products are rounded to less than float32: by autocast, by the weights' type, or by TF32."""
    if forward_precision(precision, device) is not nullcontext or torch.finfo(dtype).bits < 32:
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # raised where a precision was set for a single backend
        return True
