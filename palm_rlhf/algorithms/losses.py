"""The clipped losses of the policy and the critic, and the denominator of an optimiser step's loss."""

from functools import partial
from typing import Literal, NamedTuple

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms import Denominator, Number, kept
from palm_rlhf.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from palm_rlhf.algorithms.ratios import RatioLevel, log_ratio
from palm_rlhf.ops.masked import masked_mean


class PolicyLoss(NamedTuple):
    """The policy's loss and its metrics, scalars; the metrics have no gradient."""

    loss: Tensor
    clip_fraction: Tensor  # share of actions whose gradient the clip removes; for CISPO, whose weight it limits
    approx_kl: Tensor  # k3 estimate of KL(old, new), in nats an action
    ratio_min: Tensor  # smallest new / old probability of an action; 1 if there is no action
    ratio_max: Tensor


class ValueLoss(NamedTuple):
    """The critic's loss and its clipped fraction, scalars; the fraction has no gradient."""

    loss: Tensor
    clip_fraction: Tensor  # share of actions whose loss the clip raises


@beartype
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_eps: Number,
    clip_eps_high: Number | None = None,
    ratio_level: RatioLevel = "token",
    denominator: Denominator = None,
    num_tokens: Denominator = None,
) -> PolicyLoss:
    """Return the mean of `max(-A * r, -A * clip(r, 1 - clip_eps, 1 + clip_eps_high))`.

    This is PPO's clipped loss (Schulman et al. 2017, equation 7). r is the ratio of the action's probabilities under
    the new and the old policy, A its advantage. Log-ratios beyond MAX_LOG_RATIO are clamped and have no gradient.

    Args:
        clip_eps_high: an upper bound of its own, clip_eps if None; a higher one lets unlikely actions grow (DAPO: Yu et
            al. 2025, section 3.1).
        ratio_level: see `log_ratio`. The ratio of a whole response counts at each of its actions. With the denominator
            "sequence" of `step_denominator` a response is then one action, as in RLOO ("sequence") and GSPO
            ("geometric": Zheng et al. 2025, equation 5).
        denominator: divides the summed loss, instead of the number of actions.
        num_tokens: divides the summed metrics, instead of the number of actions. With both, the parts of an optimiser
            step add up, and metrics are means over tokens whatever the loss is divided by.

    Shapes: all tensors `b t`; returns scalars.
    """
    logprobs, old_logprobs, advantages = kept(
        action_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    ratio = _ratio(logprobs, old_logprobs, action_mask, ratio_level)
    high = clip_eps if clip_eps_high is None else clip_eps_high
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_eps, 1 + high)
    loss = masked_mean(torch.maximum(free, clipped), action_mask, denominator=denominator)
    return _reported(loss, clipped > free, ratio, logprobs, old_logprobs, action_mask, num_tokens)


@beartype
def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_eps: Number,
    clip_eps_high: Number | None = None,
    ratio_level: RatioLevel = "token",
    denominator: Denominator = None,
    num_tokens: Denominator = None,
) -> PolicyLoss:
    """Return the mean of `-w * A * logprob`, w the ratio clipped as in `policy_loss`.

    This is CISPO's loss (MiniMax 2025, equations 4 and 5). The weight w has no gradient, so clipping bounds the step of
    an action and never removes its gradient. A clip_eps of 1 is no lower bound, as in the paper. Arguments and shapes
    are those of `policy_loss`.
    """
    logprobs, old_logprobs, advantages = kept(
        action_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    ratio = _ratio(logprobs.detach(), old_logprobs, action_mask, ratio_level)
    weight = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high))
    loss = masked_mean(-weight * advantages * logprobs, action_mask, denominator=denominator)
    return _reported(loss, weight != ratio, ratio, logprobs, old_logprobs, action_mask, num_tokens)


def _ratio(logprobs: Tensor, old_logprobs: Tensor, action_mask: Tensor, level: RatioLevel) -> Tensor:
    """Return the ratio of new to old probabilities, its logarithm clamped to MAX_LOG_RATIO."""
    return log_ratio(logprobs, old_logprobs, action_mask, level=level).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _reported(
    loss: Tensor,
    is_clipped: Tensor,
    ratio: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    action_mask: Tensor,
    num_tokens: Denominator,
) -> PolicyLoss:
    """Return the loss with its metrics."""
    token_mean = partial(masked_mean, mask=action_mask, denominator=num_tokens)
    clip_fraction = token_mean(is_clipped.to(ratio.dtype))
    approx_kl = token_mean(kl_estimate(old_logprobs, logprobs, kind="k3")).detach()
    is_any, ratio = action_mask.any(), ratio.detach()
    low, high = torch.where(action_mask, ratio, torch.inf).amin(), torch.where(action_mask, ratio, -torch.inf).amax()
    return PolicyLoss(loss, clip_fraction, approx_kl, *(torch.where(is_any, end, 1.0) for end in (low, high)))


@beartype
def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor,
    *,
    value_clip_eps: Number | None,
    denominator: Denominator = None,
) -> ValueLoss:
    """Return the mean of `0.5 * max((V - R)^2, (clip(V, V_old ± value_clip_eps) - R)^2)` (OpenAI's baselines, ppo2).

    V is the value of an action and R its return. Without value_clip_eps no value is clipped. `denominator` is that of
    `policy_loss`.

    Shapes: all tensors `b t`; returns scalars.
    """
    values, old_values, returns = kept(action_mask, values=values, old_values=old_values, returns=returns)
    mean = partial(masked_mean, mask=action_mask, denominator=denominator)
    limit = torch.inf if value_clip_eps is None else value_clip_eps
    near = values.clamp(old_values - limit, old_values + limit)
    free, clipped = (values - returns).square(), (near - returns).square()
    return ValueLoss(mean(0.5 * torch.maximum(free, clipped)), mean((clipped > free).to(values.dtype)))


@beartype
def step_denominator(
    action_mask: Tensor,
    *,
    aggregation: Literal["token", "sequence", "constant"],
    num_tokens: Tensor | Number,
    num_sequences: Tensor | Number,
    max_length: int,
) -> Tensor:
    """Return the denominator of one part of an optimiser step: the losses of all parts add up to the step's mean.

    Args:
        aggregation: "token" divides by the step's actions (PPO; DAPO: Yu et al. 2025, section 3.3). "sequence" divides
            each row by its own actions, and by the step's sequences (GRPO: Shao et al. 2024, equation 3). "constant"
            divides by the step's sequences times the longest response allowed (Dr. GRPO: Liu et al. 2025, section 3.2).
        num_tokens: actions of the whole step, over all processes.
        num_sequences: responses of the whole step, over all processes.
        max_length: the longest response allowed, in tokens.

    Shapes: action_mask of the part `b t`; returns a scalar, or `b 1` for "sequence".
    """
    if aggregation == "sequence":
        return action_mask.sum(dim=-1, keepdim=True) * num_sequences
    return torch.as_tensor(num_tokens if aggregation == "token" else num_sequences * max_length)
