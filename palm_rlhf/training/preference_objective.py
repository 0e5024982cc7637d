"""From the log-probabilities of responses to the loss of a preference trainer, and to its metrics."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms.preferences import PreferenceLoss, dpo_loss, kto_loss, orpo_loss, simpo_loss
from palm_rlhf.ops.masked import masked_mean
from palm_rlhf.ops.pinned_copy import upload
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_data import Preferences, UnpairedPreference

PAIR_METRICS = (
    "accuracy",
    "reward_margin",
    "chosen_rewards",
    "rejected_rewards",
    "chosen_logprobs",
    "rejected_logprobs",
)


class Counts(NamedTuple):
    """The numbers of items that the means of a whole step, or of an evaluation, are taken over."""

    items: int
    desirable: int = 0  # of unpaired ones

    @classmethod
    def of(cls, items: Preferences) -> "Counts":
        """Count all items of a step, over all processes."""
        return cls(len(items), sum(getattr(item, "desirable", False) for item in items))


@beartype
def metric_names(config: PreferenceConfig, counts: Counts) -> tuple[str, ...]:
    """Return the names of the metrics that `objective` returns, in their order."""
    if not config.is_paired:
        chosen, rejected = counts.desirable > 0, counts.desirable < counts.items
        is_known = {"chosen": chosen, "rejected": rejected, "reward": chosen and rejected}
        return tuple(name for name in PAIR_METRICS if is_known.get(name.split("_")[0], True))
    return (*PAIR_METRICS, "nll") if config.has_nll else PAIR_METRICS


@beartype
def objective(
    config: PreferenceConfig,
    items: Preferences,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    counts: Counts,
    z_ref: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the share of some items in a step's loss and in its metrics: sums over them, over the counts of the step.

    Args:
        config: the loss and its settings.
        items: pairs, or unpaired items.
        logprobs: log-probabilities of whole responses under the policy: `2 b`, or `1 b` of unpaired items.
        ref_logprobs: the same under the reference; None for losses without one.
        counts: of the whole step.
        z_ref: the baseline of kto over the whole step.
    """
    if not config.is_paired:
        assert ref_logprobs is not None and z_ref is not None  # the loss kto has a reference
        unpaired = cast(Sequence[UnpairedPreference], items)
        return _unpaired(config, unpaired, logprobs[0], ref_logprobs[0], counts, z_ref)
    lengths = upload(
        torch.tensor([[len(response) for response in item.responses] for item in items]).T, logprobs.device
    )
    means = logprobs / lengths
    (loss, chosen, rejected), nll = _paired(config, logprobs, means, ref_logprobs, lengths, counts), -means[0]
    if config.nll_coef:
        loss = loss + config.nll_coef * masked_mean(nll, denominator=counts.items)
    values = [(chosen > rejected).float(), chosen - rejected, chosen, rejected, *logprobs]
    metrics = torch.stack([*values, nll] if config.has_nll else values)
    return loss, metrics.detach().sum(dim=-1) / counts.items


def _paired(
    config: PreferenceConfig,
    logprobs: Tensor,
    means: Tensor,
    ref_logprobs: Tensor | None,
    lengths: Tensor,
    counts: Counts,
) -> PreferenceLoss:
    if config.loss == "simpo":
        return simpo_loss(*means, beta=config.simpo_beta, gamma=config.simpo_gamma, denominator=counts.items)
    if config.loss == "orpo":
        return orpo_loss(*means, beta=config.beta, denominator=counts.items)
    assert ref_logprobs is not None  # all other losses have a reference
    by_length = config.loss == "ipo"
    taken, ref_taken = (means, ref_logprobs / lengths) if by_length else (logprobs, ref_logprobs)
    return dpo_loss(
        *taken,
        *ref_taken,
        beta=config.beta,
        kind="ipo" if by_length else "sigmoid",
        label_smoothing=config.label_smoothing,
        denominator=counts.items,
    )


def _unpaired(
    config: PreferenceConfig,
    items: Sequence[UnpairedPreference],
    logprobs: Tensor,
    ref_logprobs: Tensor,
    counts: Counts,
    z_ref: Tensor,
) -> tuple[Tensor, Tensor]:
    desirable = upload(torch.tensor([item.desirable for item in items]), logprobs.device)
    loss, rewards = kto_loss(
        logprobs,
        ref_logprobs,
        desirable,
        baseline=z_ref,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        denominator=counts.items,
    )
    logprobs, num_rejected = logprobs.detach(), counts.items - counts.desirable
    is_right = (rewards > config.beta * z_ref) == desirable
    chosen, rejected = (
        [masked_mean(values, side, denominator=count) for values in (rewards, logprobs)]
        for side, count in ((desirable, counts.desirable), (~desirable, num_rejected))
    )
    accuracy = is_right.float().sum() / counts.items
    parts = (accuracy, chosen[0] - rejected[0], chosen[0], rejected[0], chosen[1], rejected[1])
    values = dict(zip(PAIR_METRICS, parts, strict=True))
    return loss, torch.stack([values[name] for name in metric_names(config, counts)])
