"""From the scores of responses to the advantages of their tokens: the critic's, or those of a group of responses."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf.algorithms.advantages import group_advantages, rloo_advantages, token_rewards, varied_groups, whiten
from palm_rlhf.algorithms.gae import gae
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.training.rlhf.config import PPOConfig


class Credit(NamedTuple):
    """What the update learns from, `b t` each; values and returns are 0 where there is no critic."""

    action_mask: Tensor  # of the actions that count in the losses
    values: Tensor
    advantages: Tensor
    returns: Tensor


def shape_scores(config: PPOConfig, scores: Tensor, truncated: Tensor, *, deviation: float = 1.0) -> Tensor:
    """Scores as they are learnt from: over their deviation, clipped, and less where a response did not end.

    scores and truncated: `b` -> `b`
    """
    shaped = scores / deviation
    if config.score_clip is not None:
        shaped = shaped.clamp(-config.score_clip, config.score_clip)
    return shaped - config.missing_eos_penalty * truncated


@torch.no_grad()
def assign_credit(
    config: PPOConfig,
    scores: Tensor,
    valid: Tensor,
    *,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor | None,
    action_mask: Tensor,
    kl_coef: float,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> Credit:
    """How much better each action was than expected, by the critic or by the other responses to the prompt.

    `kl_coef` weighs the KL to the reference in the rewards, where `config.kl_in_loss` does not move it to the loss.
    `reduce` returns the sum of a tensor over the processes.

    scores (shaped) and valid: `b`, the others: `b t` -> `b t` each
    """
    kl_coef = 0.0 if config.kl_in_loss else kl_coef
    rewards = token_rewards(scores, logprobs, ref_logprobs, action_mask, kl_coef=kl_coef)
    if config.algorithm == "ppo":
        advantages, returns = gae(rewards, values, action_mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
        if config.whiten_advantages:
            advantages = whiten(advantages, action_mask, reduce=reduce)
        return Credit(action_mask, values, advantages, returns)
    totals = masked_sum(rewards, action_mask, dim=-1)
    if config.algorithm == "rloo":
        baselined = rloo_advantages(totals, config.num_samples, valid=valid)
    else:
        scale = config.grpo_variant != "dr_grpo"
        baselined = group_advantages(totals, config.num_samples, scale=scale, valid=valid)
    if config.grpo_variant == "dapo":
        action_mask = action_mask & varied_groups(scores, config.num_samples, valid=valid).unsqueeze(-1)
    zeros = torch.zeros_like(rewards)
    return Credit(action_mask, zeros, baselined.unsqueeze(-1) * action_mask, zeros)
