"""From the scores of responses to the advantages of their tokens: the critic's, or those of a group of responses."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf.algorithms.advantages import (
    gae,
    group_advantages,
    overlong_penalty,
    rloo_advantages,
    token_rewards,
    varied_groups,
    whiten,
)
from palm_rlhf.algorithms.kl import adapt_kl_coef
from palm_rlhf.algorithms.ratios import importance_weights
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.training.rlhf.checkpoint import RunningMoments
from palm_rlhf.training.rlhf.config import PPOConfig


class Credit(NamedTuple):
    """What the update learns from, `b t` each; values and returns are 0 where there is no critic."""

    action_mask: Tensor  # of the actions that count in the losses
    values: Tensor
    advantages: Tensor
    returns: Tensor


def shape_scores(
    config: PPOConfig,
    scores: Scores,
    rollout: Rollout,
    moments: RunningMoments,
    gather: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda tensors: tensors,
) -> Tensor:
    """Scores as they are learnt from, `b`: over their deviation, clipped, less where a response is long or did not end.

    The deviation is that of `moments`, in which these scores count from now on; `gather` returns tensors of all
    processes for those of this one.
    """
    shaped = scores.scores
    if config.scale_scores:
        everyone, valid = gather((scores.scores, scores.valid))
        moments.update(everyone[valid])
        shaped = shaped / moments.deviation
    if config.score_clip is not None:
        shaped = shaped.clamp(-config.score_clip, config.score_clip)
    if config.overlong_buffer:
        sequences, room = rollout.sequences, config.max_new_tokens
        if config.max_seq_len is not None:
            room = config.max_seq_len - sequences.prompt_lengths
        too_long = overlong_penalty(sequences.response_lengths, room, buffer=config.overlong_buffer)
        shaped = shaped + config.overlong_penalty * too_long
    return shaped - config.missing_eos_penalty * rollout.truncated


def counted_responses(config: PPOConfig, scores: Scores, rollout: Rollout) -> Tensor:
    """The responses that the loss is of, `b`: all that have a score, but for what the algorithm leaves out.

    Groups are equal by the scores of the reward, before any penalty: a group that is right, or wrong, throughout has
    nothing to teach but its lengths (DAPO: Yu et al. 2025, equation 11).
    """
    counted = scores.valid
    if config.mask_truncated:
        counted = counted & ~rollout.truncated
    if config.variant.drops_equal_groups:
        counted = counted & varied_groups(scores.scores, config.num_samples, valid=scores.valid)
    return counted


def steered_kl_coef(config: PPOConfig, kl_coef: float, kl: float) -> float:
    """The next step's weight of the KL, after a step of so many nats per response, on its way to `config.kl_target`."""
    return adapt_kl_coef(
        kl_coef, kl, target=config.kl_target, horizon=config.kl_horizon, num_samples=config.rollouts_per_step
    )


@torch.no_grad()
def assign_credit(
    config: PPOConfig,
    scores: Tensor,
    valid: Tensor,
    *,
    logprobs: Tensor,
    sampler_logprobs: Tensor | None = None,
    ref_logprobs: Tensor,
    values: Tensor | None,
    action_mask: Tensor,
    kl_coef: float,
    counted: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> Credit:
    """How much better each action was than expected, by the critic or by the other responses to the prompt.

    `kl_coef` weighs the KL to the reference in the rewards, where `config.kl_in_loss` does not move it to the loss.
    The responses that are not `counted` (None: all are) still count in the means and deviations of their groups.
    `sampler_logprobs` are the recorded ones, which an `importance_cap` compares with. `reduce` returns the sum of a
    tensor over the processes.

    scores (shaped), valid and counted: `b`, the others: `b t` -> `b t` each
    """
    kl_coef = 0.0 if config.kl_in_loss else kl_coef
    rewards = token_rewards(scores, logprobs, ref_logprobs, action_mask, kl_coef=kl_coef)
    learnt_mask = action_mask if counted is None else action_mask & counted.unsqueeze(-1)
    if config.algorithm == "ppo":
        advantages, returns = gae(rewards, values, action_mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
        if config.whiten_advantages:
            advantages = whiten(advantages, learnt_mask, reduce=reduce)
    else:
        totals = masked_sum(rewards, action_mask, dim=-1)
        if config.algorithm == "rloo":
            baselined = rloo_advantages(totals, config.num_samples, valid=valid)
        else:
            scale = config.variant.advantage_scale
            baselined = group_advantages(totals, config.num_samples, scale=scale, valid=valid, reduce=reduce)
        advantages = baselined.unsqueeze(-1) * learnt_mask
        values = returns = torch.zeros_like(rewards)
    if config.importance_cap is not None:
        advantages = advantages * importance_weights(logprobs, sampler_logprobs, learnt_mask, cap=config.importance_cap)
    return Credit(learnt_mask, values, advantages, returns)
