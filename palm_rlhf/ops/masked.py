"""The only place where a mask reduces a tensor and a loss is normalised. True means keep."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor | None = None, *, dim: int | None = None) -> Tensor:
    """The sum of the kept entries; what the others hold, NaN included, does not matter.

    x and mask: `...` -> scalar, or `...` without `dim`
    """
    return (x if mask is None else torch.where(mask, x, 0.0)).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor | None = None, *, denominator: Tensor | int | float | None = None) -> Tensor:
    """The sum of the kept entries over their number, or over a given denominator; 0 where nothing is kept.

    A denominator that counts a whole optimiser step makes micro-batches and processes add up to one large batch; one
    with axes, broadcastable to `...`, divides entry by entry, as where each row has its own.

    x and mask: `...` -> scalar
    """
    if denominator is None:
        denominator = x.numel() if mask is None else mask.sum()
    if not isinstance(denominator, Tensor):
        return masked_sum(x, mask) / max(denominator, 1)
    if denominator.ndim == 0:
        return masked_sum(x, mask) / denominator.clamp(min=1)
    return masked_sum(x / denominator.clamp(min=1), mask)


def weighted_mean(x: Tensor, weights: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """The sum of the weighted entries over the sum of the weights, or over a given sum, as of a whole optimiser step.

    What stands where a weight is 0, NaN included, does not matter.

    x and weights: `...` -> scalar
    """
    return masked_sum(x * weights, weights != 0) / (weights.sum() if denominator is None else denominator)


def shares(
    shape: torch.Size,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    denominator: Tensor | int | float | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What each entry counts in `masked_mean`, or with weights in `weighted_mean`: `...` of `shape`."""
    ones = torch.ones(shape, dtype=dtype, device=device)
    if weights is not None:
        return ones * weights / (weights.sum() if denominator is None else denominator)
    kept = ones if mask is None else mask.to(dtype)
    denominator = kept.sum() if denominator is None else torch.as_tensor(denominator, dtype=dtype, device=device)
    return kept / denominator.clamp(min=1)
