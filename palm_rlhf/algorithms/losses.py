"""The clipped losses of policy and critic, and what an optimiser step divides them by."""

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
    """Scalars; all but the loss have no gradient."""

    loss: Tensor
    clip_fraction: Tensor  # of the actions, those whose gradient the clip takes away; with CISPO, limits
    approx_kl: Tensor  # k3 estimate of KL(old, new), nats an action
    ratio_min: Tensor  # of new / old over the actions; 1 where there are none
    ratio_max: Tensor


class ValueLoss(NamedTuple):
    """Scalars; the fraction has no gradient."""

    loss: Tensor
    clip_fraction: Tensor  # of the actions, those whose loss the clip raises


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
    """The mean of `max(-A * r, -A * clip(r, 1 - clip_eps, 1 + clip_eps_high))` (Schulman et al. 2017, equation 7).

    Without clip_eps_high, clip_eps is on both sides; a higher one lets unlikely actions grow (DAPO: Yu et al. 2025,
    section 3.1). `denominator` replaces the number of actions in the loss, and `num_tokens` in the two metrics, so that
    parts of a step add up: metrics are means over tokens, whatever the loss is divided by. Log-ratios are bounded by
    MAX_LOG_RATIO on either side; beyond it they have no gradient.

    `ratio_level` is that of `log_ratio`. A ratio of a whole response counts at each of its actions: the denominator
    "sequence" of `step_denominator` then makes a response one action, as RLOO ("sequence") and GSPO ("geometric":
    Zheng et al. 2025, equation 5) have it.

    all: `b t` -> scalars
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
    """The mean of `-w * A * logprob`, w the ratio clipped as in `policy_loss` (CISPO: MiniMax 2025, equations 4, 5).

    The weight w has no gradient: clipping bounds what an action can do, and takes the gradient of none away. A clip_eps
    of 1 is no lower bound, as in the paper. The other arguments are those of `policy_loss`.

    all: `b t` -> scalars
    """
    logprobs, old_logprobs, advantages = kept(
        action_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    ratio = _ratio(logprobs.detach(), old_logprobs, action_mask, ratio_level)
    weight = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high))
    loss = masked_mean(-weight * advantages * logprobs, action_mask, denominator=denominator)
    return _reported(loss, weight != ratio, ratio, logprobs, old_logprobs, action_mask, num_tokens)


def _ratio(logprobs: Tensor, old_logprobs: Tensor, action_mask: Tensor, level: RatioLevel) -> Tensor:
    """Of new to old probabilities, bounded."""
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
    """The loss with its metrics."""
    token_mean = partial(masked_mean, mask=action_mask, denominator=num_tokens)
    clip_fraction = token_mean(is_clipped.to(ratio.dtype))
    approx_kl = token_mean(kl_estimate(old_logprobs, logprobs, kind="k3")).detach()
    extremes = (ratio.detach()[action_mask] if action_mask.any() else ratio.new_ones(1)).aminmax()
    return PolicyLoss(loss, clip_fraction, approx_kl, *extremes)


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
    """The mean of `0.5 * max((V - R)^2, (clip(V, V_old ± value_clip_eps) - R)^2)` (as in OpenAI's baselines, ppo2).

    Without value_clip_eps nothing is clipped; `denominator` as in `policy_loss`.

    all: `b t` -> scalars
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
    """What the losses of a part of an optimiser step are divided by, so that parts add up to the mean over the step.

    "token": the step's actions (PPO; DAPO: Yu et al. 2025, section 3.3). "sequence": each row's own, times the step's
    sequences (GRPO: Shao et al. 2024, equation 3). "constant": the step's sequences times the longest response allowed
    (Dr. GRPO: Liu et al. 2025, section 3.2).

    action_mask: `b t` of the part; the numbers: of the step, over all processes -> scalar, or `b 1` for "sequence"
    """
    if aggregation == "sequence":
        return action_mask.sum(dim=-1, keepdim=True) * num_sequences
    return torch.as_tensor(num_tokens if aggregation == "token" else num_sequences * max_length)
