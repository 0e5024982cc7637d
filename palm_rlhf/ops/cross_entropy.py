"""Cross-entropy with PaLM's auxiliary z-loss: of given logits, and fused with the output layer.

The fused form works in chunks of tokens, so that the logits of a whole batch are never in memory. It computes the
gradients together with the loss, so that each logit is computed once (Hsu et al. 2024, "Liger Kernel", section 3.2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.ops.devices import why_not_triton
from palm_rlhf.ops.masked import masked_mean, shares, weighted_mean

CHUNK = 1 << 23  # logits in memory at once


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    denominator: Tensor | int | float | None = None,
) -> Tensor:
    """Return the mean of `-log p(target) + z_loss * log(Z)^2` over the kept targets, in nats.

    The second term draws the softmax normaliser Z towards 1 (Chowdhery et al. 2022, section 5).

    Args:
        logits: `... v`.
        targets: `...`, token ids.
        mask: `...`, True for the targets to keep.
        weights: `...`, replaces the mask: the mean is weighted.
        z_loss: the weight of the second term.
        denominator: replaces the number of kept targets, or the sum of the weights.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_z = logits.logsumexp(dim=-1)
    losses = log_z - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if z_loss:
        losses = losses + z_loss * log_z.square()
    if weights is not None:
        return weighted_mean(losses, weights, denominator=denominator)
    return masked_mean(losses, mask, denominator=denominator)


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, **options: Any
) -> Tensor:
    """Return the `cross_entropy` of the logits `x @ weight.T * scale`, with all of them in memory.

    Args:
        x: `... e`.
        weight: `v e`.
        targets: `...`, token ids.
        mask: `...`, True for the targets to keep.
        scale: the factor of the logits.
        options: the keywords of `cross_entropy`.
    """
    return cross_entropy(F.linear(x, weight) * scale, targets, mask, **options)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    denominator: Tensor | int | float | None = None,
) -> Tensor:
    """Return what `linear_cross_entropy_reference` returns, computed in chunks of tokens.

    `torch.compile` gets the reference, which it fuses itself, except where the Triton kernels can run.

    x: `... e`, weight: `v e`, targets, mask and weights: `...` -> scalar
    """
    use_triton = why_not_triton(x, weight) is None
    if torch.compiler.is_compiling() and not use_triton:
        options = {"weights": weights, "z_loss": z_loss, "denominator": denominator}
        return linear_cross_entropy_reference(x, weight, targets, mask, scale=scale, **options)
    wide, device = torch.promote_types(x.dtype, torch.float32), x.device
    counts = shares(targets.shape, mask, weights=weights, denominator=denominator, dtype=wide, device=device)
    dtype = product_dtype(x, weight)
    rows = x.flatten(0, -2), weight, targets.flatten(), counts.flatten()
    if use_triton:
        from palm_rlhf.ops.triton.fused_cross_entropy import linear_cross_entropy_triton

        return linear_cross_entropy_triton(*rows, scale, z_loss, dtype)
    return _LinearCrossEntropy.apply(*rows, scale, z_loss, dtype, torch.is_grad_enabled())


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of `x @ weight.T`, which autocast decides where it is on."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, weight.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses, each times its weight in `counts`; x: `n e`, weight: `v e`, targets and counts: `n`.

    `with_gradients` is the grad mode of the caller, which autograd switches off inside of `forward`.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, counts, scale, z_loss, dtype, with_gradients):
        needs_x, needs_weight = (needs and with_gradients for needs in ctx.needs_input_grad[:2])
        total, size = counts.new_zeros(()), max(CHUNK // len(weight), 1)
        d_x = torch.empty_like(x) if needs_x else None
        d_weight = torch.zeros_like(weight) if needs_weight else None
        with torch.autocast(x.device.type, enabled=False):
            matrix = weight.to(dtype)
            for first in range(0, len(x), size):
                part, target, count = (t[first : first + size] for t in (x, targets, counts))
                part, target = part.to(dtype), target.unsqueeze(-1)
                logits = (part @ matrix.mT).to(counts.dtype).mul_(scale)
                log_z = logits.logsumexp(dim=-1, keepdim=True)
                losses = (log_z - logits.gather(-1, target) + z_loss * log_z.square()).squeeze(-1)
                total += torch.where(count != 0, losses * count, 0.0).sum()
                if d_x is None and d_weight is None:
                    continue
                # d loss / d logit = p (1 + 2 z_loss log Z) - [is the target]
                count = count.unsqueeze(-1) * scale
                d_logits = logits.sub_(log_z).exp_().mul_(count * (1 + 2 * z_loss * log_z))
                d_logits = d_logits.scatter_add_(-1, target, -count).to(dtype)
                if d_x is not None:
                    d_x[first : first + size] = d_logits @ matrix
                if d_weight is not None:
                    d_weight += d_logits.mT @ part
        ctx.save_for_backward(d_x, d_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total):
        gradients = (None if d is None else d * d_total.to(d.dtype) for d in ctx.saved_tensors)
        return *gradients, None, None, None, None, None, None
