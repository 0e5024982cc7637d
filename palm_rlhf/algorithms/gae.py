"""Generalised advantage estimation."""

from typing import NamedTuple

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms import Number, kept


class GAE(NamedTuple):
    """How much better each action was than the value before it, and what that value should have been: `b t`."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
@beartype
def gae(rewards: Tensor, values: Tensor, action_mask: Tensor, *, gamma: Number, gae_lambda: Number) -> GAE:
    """Discounted sums of the errors of the values (Schulman et al. 2015, equation 16); returns are advantage + value.

    Nothing follows a row's last action: the value after it is 0. Pads, wherever they stand, are passed over as if they
    were not there, and come out as 0.

    all: `b t` -> both `b t`
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
