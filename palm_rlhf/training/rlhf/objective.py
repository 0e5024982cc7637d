"""The loss of an optimiser step: of the policy and the critic, an entropy bonus, and a KL to the reference."""

from typing import NamedTuple

from torch import Tensor

from palm_rlhf.algorithms.kl import kl_estimate
from palm_rlhf.algorithms.losses import cispo_loss, policy_loss, step_denominator, value_loss
from palm_rlhf.ops.masked import masked_mean
from palm_rlhf.policy.actor_critic import PolicyOutput
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.experience import Experience


class Objective(NamedTuple):
    """A micro-batch's share of the loss, a scalar, and its metrics: means that add up over a step, and extremes."""

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
    """Return a micro-batch's share in the loss of an optimiser step.

    Args:
        config: the algorithm and its settings.
        part: the rows of the micro-batch.
        output: the present outputs of policy and critic for these rows.
        kl_coef: weight of a KL to the reference in the loss; None: no such term.
        num_tokens, num_sequences: actions and responses of the whole step that count, over all processes.
        max_length: the longest response that there is room for.
    """
    c, variant, mask = config, config.variant, part.action_mask
    assert output.logprobs is not None and output.entropy is not None
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
