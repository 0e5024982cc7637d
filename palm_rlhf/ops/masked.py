"""Sums and means under a mask: the only place where masks reduce tensors and losses are normalised. True means keep."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor | None = None, *, dim: int | None = None) -> Tensor:
    """Return the sum of the kept entries; the values of the others do not matter, not even NaN.

    x and mask: `...` -> scalar, or with `dim` a tensor without that axis
    """
    return (x if mask is None else torch.where(mask, x, 0.0)).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor | None = None, *, denominator: Tensor | int | float | None = None) -> Tensor:
    """Return the sum of the kept entries over their number, or over a given denominator; 0 if none is kept.

    Args:
        x: `...`.
        mask: `...`, True for the entries to keep.
        denominator: replaces the number of kept entries. With the number of a whole optimiser step, micro-batches and
            processes add up to the mean over one large batch. A tensor with axes, broadcastable to `...`, divides entry
            by entry, so that each row can have its own.
    """
    if denominator is None:
        denominator = x.numel() if mask is None else mask.sum()
    if not isinstance(denominator, Tensor):
        return masked_sum(x, mask) / max(denominator, 1)
    if denominator.ndim == 0:
        return masked_sum(x, mask) / denominator.clamp(min=1)
    return masked_sum(x / denominator.clamp(min=1), mask)


def weighted_mean(x: Tensor, weights: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """Return the sum of the weighted entries over the sum of the weights, or over a given denominator.

    Entries whose weight is 0 do not matter, not even NaN.

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
    """Return the weight of each entry in `masked_mean`, or with `weights` in `weighted_mean`: `...` of `shape`."""
    ones = torch.ones(shape, dtype=dtype, device=device)
    if weights is not None:
        return ones * weights / (weights.sum() if denominator is None else denominator)
    kept = ones if mask is None else mask.to(dtype)
    denominator = kept.sum() if denominator is None else torch.as_tensor(denominator, dtype=dtype, device=device)
    return kept / denominator.clamp(min=1)
