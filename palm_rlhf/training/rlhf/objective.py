"""The loss of an optimiser step: that of the policy, of the critic, the entropy bonus, and a KL to the reference."""

from typing import NamedTuple

from torch import Tensor

from palm_rlhf.algorithms.kl import kl_estimate
from palm_rlhf.algorithms.losses import cispo_loss, policy_loss, step_denominator, value_loss
from palm_rlhf.ops.masked import masked_mean
from palm_rlhf.policy.actor_critic import PolicyOutput
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.experience import Experience


class Objective(NamedTuple):
    """A part's share of the loss, a scalar, and what is reported of it: means that add up over a step, and extremes."""

    loss: Tensor
    parts: dict[str, Tensor]
    ratio_min: Tensor
    ratio_max: Tensor


def objective(
    config: PPOConfig,
    part: Experience,
    output: PolicyOutput,
    *,
    kl_coef: float | None,
    num_tokens: Tensor,
    num_sequences: Tensor,
    max_length: int,
) -> Objective:
    """The share of a part of an optimiser step in the step's loss.

    `output` is what the policy (and critic) now say of the part. `kl_coef` weighs a KL to the reference in the loss;
    None: there is no such term. `num_tokens` and `num_sequences` are those of the whole step, over all processes, and
    `max_length` is the longest response that there is room for.
    """
    c, variant, mask = config, config.variant, part.action_mask
    denominator = step_denominator(
        mask,
        aggregation=variant.loss_aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        max_length=max_length,
    )
    loss_of = cispo_loss if c.grpo_variant == "cispo" else policy_loss
    policy = loss_of(
        output.logprobs,
        part.logprobs,
        part.advantages,
        mask,
        clip_eps=variant.clip_eps,
        clip_eps_high=variant.clip_eps_high,
        ratio_level=variant.ratio_level,
        denominator=denominator,
        num_tokens=num_tokens,
    )
    entropy = masked_mean(output.entropy, mask, denominator=num_tokens)
    loss = policy.loss - c.entropy_coef * entropy
    parts = {"policy_loss": policy.loss, "entropy": entropy, "clip_fraction": policy.clip_fraction,
             "approx_kl": policy.approx_kl}  # fmt: skip
    if kl_coef is not None:
        kl = kl_estimate(output.logprobs, part.ref_logprobs, kind=c.kl_estimator, action_mask=mask)
        parts["kl_loss"] = masked_mean(kl, mask, denominator=denominator)
        loss = loss + kl_coef * parts["kl_loss"]
    if output.values is not None:
        value = value_loss(
            output.values, part.values, part.returns, mask, value_clip_eps=c.value_clip_eps, denominator=num_tokens
        )
        parts |= {"value_loss": value.loss, "value_clip_fraction": value.clip_fraction}
        loss = loss + c.value_coef * value.loss
    return Objective(loss, parts, policy.ratio_min, policy.ratio_max)
