"""Cross-entropy with PaLM's auxiliary z-loss."""

import torch
from torch import Tensor

from palm_rlhf.ops.masked import masked_mean, weighted_mean


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    denominator: Tensor | int | float | None = None,
) -> Tensor:
    """Mean of `-log p(target) + z_loss * log(Z)^2` over the kept targets, in nats (Chowdhery et al. 2022, section 5).

    The second term draws the softmax normaliser Z towards 1. With `weights` in place of a mask the mean is weighted.
    `denominator` replaces the number of kept targets, or the sum of the weights.

    logits: `... v`, targets, mask and weights: `...` -> scalar
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_z = logits.logsumexp(dim=-1)
    losses = log_z - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if z_loss:
        losses = losses + z_loss * log_z.square()
    if weights is not None:
        return weighted_mean(losses, weights, denominator=denominator)
    return masked_mean(losses, mask, denominator=denominator)
