"""From the scores of responses to the rewards of their tokens, and to advantages that need no critic."""

from collections.abc import Callable
from typing import Literal

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms import Number, kept
from palm_rlhf.algorithms.kl import kl_estimate
from palm_rlhf.ops.masked import masked_sum

AdvantageScale = Literal["group", "batch", "none"]
EPS = 1e-8  # added to variances
ROUNDING = 1e-6  # of the largest score of a group, in magnitude: what differs by less is taken to be equal


@torch.no_grad()
@beartype
def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, action_mask: Tensor, *, kl_coef: Number
) -> Tensor:
    """The KL penalty (k1) of every action, and the score at the last one (Ziegler et al. 2019, equation 2).

    scores: `b`, the others: `b t` -> `b t`, 0 at pads
    """
    (scores,) = kept(action_mask.any(dim=-1), scores=scores)
    is_last = action_mask & (action_mask.flip(-1).cumsum(dim=-1).flip(-1) == 1)
    kl = kl_estimate(logprobs, ref_logprobs, kind="k1", action_mask=action_mask)
    return torch.where(is_last, scores.unsqueeze(-1), 0.0) - kl_coef * kl


@torch.no_grad()
@beartype
def whiten(
    advantages: Tensor, action_mask: Tensor, *, reduce: Callable[[Tensor], Tensor] = lambda total: total
) -> Tensor:
    """Advantages of mean 0 and deviation 1 over the actions of all processes; 0 at pads, and where all are equal.

    `reduce` gives the sum of a tensor over the processes.

    advantages and action_mask: `b t` -> `b t`
    """
    (centred,) = kept(action_mask, advantages=advantages)
    count = reduce(action_mask.sum()).clamp(min=1)
    for _ in range(2):  # the second mean is what rounding left of the first
        centred = torch.where(action_mask, centred - reduce(masked_sum(centred, action_mask)) / count, 0.0)
    variance = reduce(masked_sum(centred.square(), action_mask)) / count
    return centred * torch.rsqrt(variance + EPS)


@torch.no_grad()
@beartype
def overlong_penalty(lengths: Tensor, max_lengths: Tensor | Number, *, buffer: Number) -> Tensor:
    """From 0 to -1 over the last `buffer` tokens of the room for a response (DAPO: Yu et al. 2025, equation 13).

    lengths and max_lengths (or one for all): tokens of the responses, and that they may have, `b` -> `b`
    """
    if buffer <= 0:
        raise ValueError(f"got buffer={buffer}; expected a number of tokens above 0")
    return -((lengths - (max_lengths - buffer)) / buffer).clamp(0, 1)


@torch.no_grad()
@beartype
def group_advantages(
    scores: Tensor,
    num_samples: int,
    *,
    scale: AdvantageScale = "group",
    valid: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> Tensor:
    """Scores minus their group's mean, over a sample deviation (GRPO: Shao et al. 2024, section 4.1.2).

    A group is a prompt's num_samples consecutive rows. The deviation is that of the "group"; that of the "batch", all
    valid scores of all processes (Liu et al. 2025, "Tricks or Traps?", arXiv:2508.08221; TRL's scale_rewards="batch");
    or "none", which does not divide (Dr. GRPO: Liu et al. 2025, section 3.2). Rows that are not valid, and groups whose
    valid scores differ by no more than rounding, get 0. `reduce` returns the sum of a tensor over the processes.

    scores and valid: `b` -> `b`
    """
    scores, valid, varied = _groups(scores, num_samples, valid)
    count = valid.sum(dim=-1, keepdim=True)
    centred = torch.where(varied & valid, scores - scores.sum(dim=-1, keepdim=True) / count.clamp(min=1), 0.0)
    if scale == "none":
        return centred.flatten()
    if scale == "group":
        variance = centred.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    else:
        total = reduce(valid.sum())
        mean = reduce(masked_sum(scores, valid)) / total.clamp(min=1)
        variance = reduce(masked_sum((scores - mean).square(), valid)) / (total - 1).clamp(min=1)
    return (centred * torch.rsqrt(variance + EPS)).flatten()


@torch.no_grad()
@beartype
def rloo_advantages(scores: Tensor, num_samples: int, *, valid: Tensor | None = None) -> Tensor:
    """Scores minus the mean of the others in their group (Ahmadian et al. 2024), 0 as in `group_advantages`.

    scores and valid: `b` -> `b`
    """
    scores, valid, varied = _groups(scores, num_samples, valid)
    others = scores.sum(dim=-1, keepdim=True) - scores
    baseline = others / (valid.sum(dim=-1, keepdim=True) - 1).clamp(min=1)
    return torch.where(varied & valid, scores - baseline, 0.0).flatten()


@beartype
def varied_groups(scores: Tensor, num_samples: int, *, valid: Tensor | None = None) -> Tensor:
    """All rows of the groups whose valid scores differ; the others teach nothing (DAPO: Yu et al. 2025, section 3.2).

    scores and valid: `b` -> `b` bool
    """
    return _groups(scores, num_samples, valid)[2].expand(-1, num_samples).flatten()


@beartype
def best_and_worst(scores: Tensor, num_samples: int, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows of the best and of the worst response in each of the `g` groups of `varied_groups`, the first of equals.

    scores and valid: `b` -> `g` and `g`
    """
    scores, valid, varied = _groups(scores, num_samples, valid)
    first, varied = torch.arange(len(scores), device=scores.device) * num_samples, varied.squeeze(-1)
    best = scores.masked_fill(~valid, -torch.inf).argmax(dim=-1)
    worst = scores.masked_fill(~valid, torch.inf).argmin(dim=-1)
    return (first + best)[varied], (first + worst)[varied]


def _groups(scores: Tensor, num_samples: int, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and which are valid, `g s`, and whose valid scores differ, `g 1`."""
    if scores.ndim != 1 or num_samples < 1 or len(scores) % num_samples:
        raise ValueError(
            f"got scores of shape {tuple(scores.shape)} for groups of {num_samples}; expected one score a row, and "
            "the rows of a prompt next to each other, none missing"
        )
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    (scores,) = kept(valid, scores=scores)
    scores, valid = scores.view(-1, num_samples), valid.view(-1, num_samples)
    highest = scores.masked_fill(~valid, -torch.inf).amax(dim=-1, keepdim=True)
    lowest = scores.masked_fill(~valid, torch.inf).amin(dim=-1, keepdim=True)
    magnitude = scores.abs().amax(dim=-1, keepdim=True)
    return scores, valid, ~(highest - lowest <= ROUNDING * magnitude)  # True for NaN, which must show
