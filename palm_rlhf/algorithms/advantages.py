"""From the scores of responses to rewards of their tokens, and to advantages, with a critic (GAE) or without one."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms import Number, kept
from palm_rlhf.algorithms.kl import kl_estimate
from palm_rlhf.ops.masked import masked_sum

AdvantageScale = Literal["group", "batch", "none"]
EPS = 1e-8  # added to variances
ROUNDING = 1e-6  # scores that differ by less than this part of their group's largest magnitude count as equal


@torch.no_grad()
@beartype
def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, action_mask: Tensor, *, kl_coef: Number
) -> Tensor:
    """Return the reward of each action: its KL penalty (k1), plus the score at the last action.

    This is equation 2 of Ziegler et al. 2019. Shapes: scores `b`, the others `b t`; returns `b t`, 0 at padding.
    """
    (scores,) = kept(action_mask.any(dim=-1), scores=scores)
    is_last = action_mask & (action_mask.flip(-1).cumsum(dim=-1).flip(-1) == 1)
    kl = kl_estimate(logprobs, ref_logprobs, kind="k1", action_mask=action_mask)
    return torch.where(is_last, scores.unsqueeze(-1), 0.0) - kl_coef * kl


class GAE(NamedTuple):
    """How much better each action was than its value, and the value it should have had: `b t` each."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
@beartype
def gae(rewards: Tensor, values: Tensor, action_mask: Tensor, *, gamma: Number, gae_lambda: Number) -> GAE:
    """Return generalised advantage estimates (Schulman et al. 2015, equation 16); a return is advantage + value.

    The value after the last action of a row is 0. Padding is skipped, wherever it stands in a row, and its results are
    0.

    Shapes: all `b t`; returns `b t` twice.
    """
    rewards, values = kept(action_mask, rewards=rewards, values=values)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        is_action, value = action_mask[:, t], values[:, t]
        advantage = rewards[:, t] + gamma * next_value - value + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(is_action, advantage, 0.0)
        next_advantage = torch.where(is_action, advantage, next_advantage)
        next_value = torch.where(is_action, value, next_value)
    return GAE(advantages, advantages + values)


@torch.no_grad()
@beartype
def whiten(
    advantages: Tensor, action_mask: Tensor, *, reduce: Callable[[Tensor], Tensor] = lambda total: total
) -> Tensor:
    """Return advantages of mean 0 and standard deviation 1 over the actions of all processes.

    They are 0 at padding, and everywhere if all are equal. `reduce` returns the sum of a tensor over the processes.

    Shapes: advantages and action_mask `b t`; returns `b t`.
    """
    (centred,) = kept(action_mask, advantages=advantages)
    count = reduce(action_mask.sum()).clamp(min=1)
    for _ in range(2):  # the second pass removes the rounding error of the first
        centred = torch.where(action_mask, centred - reduce(masked_sum(centred, action_mask)) / count, 0.0)
    variance = reduce(masked_sum(centred.square(), action_mask)) / count
    return centred * torch.rsqrt(variance + EPS)


@torch.no_grad()
@beartype
def overlong_penalty(lengths: Tensor, max_lengths: Tensor | Number, *, buffer: Number) -> Tensor:
    """Return a penalty from 0 to -1 over the last `buffer` tokens allowed (DAPO: Yu et al. 2025, equation 13).

    `max_lengths` are the longest responses allowed, in tokens, or one number for all.

    Shapes: lengths and max_lengths `b`; returns `b`.
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
    """Return scores minus the mean of their group, over a sample deviation (GRPO: Shao et al. 2024, section 4.1.2).

    A group is the num_samples consecutive rows of one prompt. Rows that are not valid get 0, and so do groups whose
    valid scores differ by no more than rounding.

    Args:
        scale: the deviation to divide by: of the group, or of the batch, which is all valid scores of all processes
            (Liu et al. 2025, "Tricks or Traps?", arXiv:2508.08221; TRL's scale_rewards="batch"). "none" does not divide
            (Dr. GRPO: Liu et al. 2025, section 3.2).
        reduce: returns the sum of a tensor over the processes.

    Shapes: scores and valid `b`; returns `b`.
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
    """Return scores minus the mean of the other scores in their group (RLOO: Ahmadian et al. 2024).

    Groups, valid rows and zeros are as in `group_advantages`. Shapes: scores and valid `b`; returns `b`.
    """
    scores, valid, varied = _groups(scores, num_samples, valid)
    others = scores.sum(dim=-1, keepdim=True) - scores
    baseline = others / (valid.sum(dim=-1, keepdim=True) - 1).clamp(min=1)
    return torch.where(varied & valid, scores - baseline, 0.0).flatten()


@beartype
def varied_groups(scores: Tensor, num_samples: int, *, valid: Tensor | None = None) -> Tensor:
    """Return which rows belong to groups whose valid scores differ (DAPO: Yu et al. 2025, section 3.2).

    Groups of equal scores have no advantages, so nothing is learnt from them. Shapes: scores and valid `b`; returns `b`
    bool.
    """
    return _groups(scores, num_samples, valid)[2].expand(-1, num_samples).flatten()


@beartype
def best_and_worst(scores: Tensor, num_samples: int, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the rows of the best and of the worst response of each varied group; of equal scores, the first row.

    Shapes: scores and valid `b`; returns `g` twice, for the `g` groups of `varied_groups`.
    """
    scores, valid, varied = _groups(scores, num_samples, valid)
    first, varied = torch.arange(len(scores), device=scores.device) * num_samples, varied.squeeze(-1)
    best = scores.masked_fill(~valid, -torch.inf).argmax(dim=-1)
    worst = scores.masked_fill(~valid, torch.inf).argmin(dim=-1)
    return (first + best)[varied], (first + worst)[varied]


def _groups(scores: Tensor, num_samples: int, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores `g s`, which of them are valid `g s`, and which groups have valid scores that differ `g 1`."""
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
    return scores, valid, ~(highest - lowest <= ROUNDING * magnitude)  # True for NaN, which must not be hidden
