"""Probability ratios: of the policy to the policy that drew the responses, and of that policy to its sampler."""

from typing import Literal

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms import Number, kept
from palm_rlhf.algorithms.kl import MAX_LOG_RATIO

RatioLevel = Literal["token", "sequence", "geometric"]


@beartype
def log_ratio(logprobs: Tensor, old_logprobs: Tensor, action_mask: Tensor, *, level: RatioLevel) -> Tensor:
    """Return the log-ratio of new to old probabilities that counts at each action.

    Args:
        level: "token" is the ratio of the action itself (PPO: Schulman et al. 2017, section 3). "sequence" is that of
            the whole response, the sum over its actions (RLOO: Ahmadian et al. 2024, section 3). "geometric" is the
            mean over its actions, which does not grow with the length (GSPO: Zheng et al. 2025, equation 7).

    Shapes: all `b t`; returns `b t`, 0 at padding for "token", else the same number in a whole row.
    """
    logprobs, old_logprobs = kept(action_mask, logprobs=logprobs, old_logprobs=old_logprobs)
    of_tokens = logprobs - old_logprobs
    if level == "token":
        return of_tokens
    of_rows = of_tokens.sum(dim=-1, keepdim=True)
    if level == "geometric":
        of_rows = of_rows / action_mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return of_rows.expand_as(of_tokens)


@torch.no_grad()
@beartype
def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, action_mask: Tensor, *, cap: Number) -> Tensor:
    """Return `min(p / q, cap)` for each action: the weights of truncated importance sampling.

    p is the probability under the policy that drew the responses, computed by the trainer; q is the probability that
    the sampler recorded. They differ where the sampler's arithmetic is not the trainer's (Ionides 2008; for rollouts:
    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"). A weight multiplies the
    loss of an action. It is positive, so multiplying the advantage is the same: the clipped loss of w * A is w times
    the loss of A.

    Shapes: all `b t`; returns `b t`, 1 where action_mask is False and cap is at least 1.
    """
    if cap <= 0:
        raise ValueError(f"got cap={cap}; expected a number above 0")
    moved = log_ratio(logprobs, sampler_logprobs, action_mask, level="token")
    return moved.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
