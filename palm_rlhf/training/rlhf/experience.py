"""From scored rollouts to the experience that an update learns from: shaped scores, advantages and returns."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
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
from palm_rlhf.algorithms.ratios import importance_weights
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.ops.pinned_copy import upload
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.sequences import Sequences
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.running_moments import RunningMoments


@dataclasses.dataclass(frozen=True)
class Experience:
    """Responses, and the numbers of the rollout that the losses compare with: `b t` each."""

    sequences: Sequences
    action_mask: Tensor  # the actions that count in the losses
    logprobs: Tensor
    ref_logprobs: Tensor  # the policy's own where there is no reference
    values: Tensor  # 0 where there is no critic
    advantages: Tensor
    returns: Tensor  # 0 where there is no critic
    first_order: Tensor | None = None  # b: the rows as the first epoch takes them; None: in any order

    def order(self, epoch: int) -> Tensor:
        """Return the rows in the order in which an epoch, counted from 0, takes them: `b`."""
        return torch.randperm(len(self.sequences)) if epoch or self.first_order is None else self.first_order

    def counts(self, minibatches: Sequence[Tensor]) -> Tensor:
        """Return the numbers of actions and of responses that count in the losses of each minibatch: `m 2`."""
        of_rows = torch.stack([self.action_mask.sum(dim=-1), self.action_mask.any(dim=-1)], dim=-1)
        return torch.stack([of_rows[upload(rows, of_rows.device)].sum(dim=0) for rows in minibatches])

    def select(self, rows: Tensor) -> "Experience":
        """Return some of the rows, without the columns that only the others need."""
        sequences = self.sequences.select(rows)
        width = max(response for _, response in sequences.host_lengths)
        rows = upload(rows, self.action_mask.device)
        names = {field.name for field in dataclasses.fields(self)} - {"sequences", "first_order"}
        return Experience(sequences, **{name: getattr(self, name)[rows, :width] for name in names})


def in_row_order(results: Sequence[Tensor], batches: Sequence[Tensor]) -> Tensor:
    """Return the outputs of batches in the order of their rows, `b t`, padded with 0.

    Each row is in one of the batches.
    """
    width = max(result.shape[1] for result in results)
    padded = [F.pad(result, (0, width - result.shape[1])) for result in results]
    return torch.cat(padded)[upload(torch.cat(list(batches)).argsort(), padded[0].device)]


def shape_scores(
    config: PPOConfig,
    scores: Scores,
    rollout: Rollout,
    moments: RunningMoments,
    gather: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda tensors: tensors,
) -> Tensor:
    """Return the scores as they are learnt from, `b`: scaled, clipped, and less for long or truncated responses.

    Args:
        config: the settings of all of these.
        scores: the scores by the reward.
        rollout: the responses.
        moments: the moments of all scores of the run; from now on, these are among them.
        gather: returns tensors of all processes, from tensors of this one.
    """
    shaped = scores.scores
    if config.scale_scores:
        everyone, valid = gather((scores.scores, scores.valid))
        moments.update(everyone[valid])
        shaped = shaped / moments.deviation
    if config.score_clip is not None:
        shaped = shaped.clamp(-config.score_clip, config.score_clip)
    if config.overlong_buffer:
        sequences = rollout.sequences
        room = config.response_room(sequences.prompt_lengths)
        too_long = overlong_penalty(sequences.response_lengths, room, buffer=config.overlong_buffer)
        shaped = shaped + config.overlong_penalty * too_long
    return shaped - config.missing_eos_penalty * rollout.truncated


def counted_responses(config: PPOConfig, scores: Scores, rollout: Rollout) -> Tensor:
    """Return which responses count in the losses, `b`: those with a score, except the ones that the algorithm drops.

    Equal groups are told by the scores of the reward, before any penalty: a group that is right, or wrong, throughout
    has nothing to teach but its lengths (DAPO: Yu et al. 2025, equation 11).
    """
    counted = scores.valid
    if config.mask_truncated:
        counted = counted & ~rollout.truncated
    if config.variant.drops_equal_groups:
        counted = counted & varied_groups(scores.scores, config.num_samples, valid=scores.valid)
    return counted


@torch.no_grad()
def make_experience(
    config: PPOConfig,
    rollout: Rollout,
    scores: Scores,
    shaped_scores: Tensor,
    *,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor | None,
    kl_coef: float,
    first_order: Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> Experience:
    """Estimate how much better each action was than expected, by the critic or by the other responses to the prompt.

    Responses that do not count in the losses still count in the means and deviations of their groups.

    Args:
        config: the algorithm and its settings.
        rollout: the responses, with the log-probabilities that were recorded in sampling.
        scores: by the reward; responses without a score do not count anywhere.
        shaped_scores: the same, as they are learnt from: `b`.
        logprobs: log-probabilities that the losses compare with: `b t`.
        ref_logprobs: the same by the reference: `b t`.
        values: of the critic, None without one: `b t`.
        kl_coef: weight of the KL to the reference in the rewards, where it is not a term of the loss.
        first_order: the order of the first epoch: `b`.
        reduce: returns the sum of a tensor over the processes.
    """
    action_mask = rollout.sequences.action_mask & scores.valid.unsqueeze(-1)
    learnt_mask = action_mask & counted_responses(config, scores, rollout).unsqueeze(-1)
    kl_coef = 0.0 if config.kl_in_loss else kl_coef
    rewards = token_rewards(shaped_scores, logprobs, ref_logprobs, action_mask, kl_coef=kl_coef)
    if values is not None:
        advantages, returns = gae(rewards, values, action_mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
        if config.whiten_advantages:
            advantages = whiten(advantages, learnt_mask, reduce=reduce)
    else:
        totals = masked_sum(rewards, action_mask, dim=-1)
        if config.algorithm == "rloo":
            baselined = rloo_advantages(totals, config.num_samples, valid=scores.valid)
        else:
            scale = config.variant.advantage_scale
            baselined = group_advantages(totals, config.num_samples, scale=scale, valid=scores.valid, reduce=reduce)
        advantages = baselined.unsqueeze(-1) * learnt_mask
        values = returns = torch.zeros_like(rewards)
    if config.importance_cap is not None:
        weights = importance_weights(logprobs, rollout.logprobs, learnt_mask, cap=config.importance_cap)
        advantages = advantages * weights
    return Experience(
        rollout.sequences, learnt_mask, logprobs, ref_logprobs, values, advantages, returns, first_order=first_order
    )
