"""Losses on comparisons and rankings: of a reward model, and of a policy trained on preferences directly."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms import Denominator, Number, kept
from palm_rlhf.ops.masked import masked_mean, masked_sum, weighted_mean


class PreferenceLoss(NamedTuple):
    """The loss, a scalar, and the policy's implicit rewards, `b` each, without gradients."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class UnpairedLoss(NamedTuple):
    """The loss, a scalar, and the policy's implicit rewards, `b`, without gradients."""

    loss: Tensor
    rewards: Tensor


@beartype
def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    centering: Number = 0.0,
    weights: Tensor | None = None,
    denominator: Denominator = None,
) -> Tensor:
    """Return the mean of `-log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2`, in nats.

    Equal scores cost ln 2. Margins are from Llama 2 (Touvron et al. 2023, section 3.2.2). Centering holds the mean
    score at 0 (Eisenstein et al. 2023). A pair of weight 2 counts as two pairs. `denominator` replaces the number of
    pairs, or with `weights` their sum.

    Shapes: all `b`; returns a scalar.
    """
    margin = torch.zeros_like(chosen) if margin is None else margin
    chosen, rejected, margin = kept(chosen=chosen, rejected=rejected, margin=margin)
    losses = -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected).square()
    if weights is not None:
        return weighted_mean(*kept(losses=losses, weights=weights), denominator=denominator)
    return masked_mean(losses, denominator=denominator)


@beartype
def ranking_loss(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    centering: Number = 0.0,
    weights: Tensor | None = None,
    denominator: Denominator = None,
) -> Tensor:
    """Return the Bradley-Terry loss of the K(K-1)/2 pairs of each ranking (Ouyang et al. 2022, equation 1), in nats.

    It is the mean over the pairs of a row, then over rows. Rows of fewer than two completions do not count, and a row
    of weight 2 counts as two rows. `denominator` replaces the number of rows that count, or with `weights` their sum.

    Shapes: scores, best completion first, and the mask of completions `b k`, weights `b`; returns a scalar.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    (scores,) = kept(mask, scores=scores)
    better, worse = scores.unsqueeze(-1), scores.unsqueeze(-2)
    pairs = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1)
    num_pairs = pairs.sum(dim=(-2, -1), keepdim=True)
    losses = -F.logsigmoid(better - worse) + centering * (better + worse).square()
    if weights is not None:
        row_losses = masked_sum((losses / num_pairs.clamp(min=1)).flatten(1), pairs.flatten(1), dim=-1)
        return weighted_mean(row_losses, weights * (num_pairs.flatten() > 0), denominator=denominator)
    num_rows = (num_pairs > 0).sum() if denominator is None else denominator
    return masked_mean(losses, pairs, denominator=num_pairs * num_rows)


@beartype
def plackett_luce_loss(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    denominator: Denominator = None,
) -> Tensor:
    """Return the mean of -log p of each ranking, drawn place by place from the completions left.

    This is the Plackett-Luce model (Luce 1959; Plackett 1975). Rows of fewer than two completions do not count, and a
    row of weight 2 counts as two rows. `denominator` replaces the number of rows that count, or with `weights` their
    sum.

    Shapes: scores, best completion first, and the mask of completions `b k`, weights `b`; returns a scalar, in nats.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    (scores,) = kept(mask, scores=scores)
    # At padding only the padding itself is left, since the logarithm of an empty sum has no gradient.
    left = (mask.unsqueeze(-2) | torch.eye(scores.shape[-1], dtype=torch.bool, device=mask.device)).triu()
    losses = torch.where(left, scores.unsqueeze(-2), -torch.inf).logsumexp(dim=-1) - scores
    counts = mask.sum(dim=-1) > 1
    if weights is not None:
        return weighted_mean(masked_sum(losses, mask, dim=-1), weights * counts, denominator=denominator)
    return masked_mean(losses, mask, denominator=counts.sum() if denominator is None else denominator)


@beartype
def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Number,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    label_smoothing: Number = 0.0,
    denominator: Denominator = None,
) -> PreferenceLoss:
    """Return the Bradley-Terry loss of the rewards `beta * (logprob - ref_logprob)`.

    This is DPO (Rafailov et al. 2023, equation 7).

    Args:
        kind: "ipo" draws the difference of the log-ratios to 1 / (2 beta) instead (Azar et al. 2023, equation 17).
        label_smoothing: the probability that a label is wrong (conservative DPO: Mitchell 2023), for "sigmoid" only.
        denominator: replaces the number of pairs.

    Shapes: all `b`, log-probabilities of responses, summed over tokens, or for "ipo" their means; returns a scalar, and
    `b` twice.
    """
    if beta <= 0 or not 0 <= label_smoothing <= 0.5 or (kind == "ipo" and label_smoothing):
        raise ValueError(
            f"got beta={beta}, label_smoothing={label_smoothing}, kind={kind!r}; expected a beta above 0, and a "
            "label_smoothing of 0 to 0.5, and of 0 for 'ipo'"
        )
    chosen, rejected, ref_chosen, ref_rejected = kept(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = rewards[0] - rewards[1]
    if kind == "ipo":
        losses = (margin / beta - 1 / (2 * beta)).square()
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return PreferenceLoss(masked_mean(losses, denominator=denominator), *(reward.detach() for reward in rewards))


@beartype
def kto_baseline(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the KL to the reference that KTO's rewards are measured from, at least 0 and without a gradient.

    It is estimated on prompts with the responses to other prompts (Ethayarajh et al. 2024, section 4.1).

    Shapes: both `b`, log-probabilities summed over tokens; returns a scalar, in nats.
    """
    logprobs, ref_logprobs = kept(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return masked_mean(logprobs - ref_logprobs).clamp(min=0).detach()


@beartype
def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    baseline: Tensor,
    beta: Number,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    denominator: Denominator = None,
) -> UnpairedLoss:
    """Return the mean of `weight * (1 - sigmoid(reward - beta * baseline))` (KTO: Ethayarajh et al. 2024, section 4.1).

    The sign of the sigmoid's argument is the other for undesirable responses. The reward is `beta * (logprob -
    ref_logprob)`, the baseline that of `kto_baseline` over the whole optimiser step. Where the policy is the reference,
    each response costs half of its weight.

    Shapes: log-probabilities of responses, summed over tokens, and desirable (bool) `b`, baseline a scalar; returns a
    scalar, and `b`.
    """
    if beta <= 0 or desirable.dtype != torch.bool or baseline.ndim:
        raise ValueError(
            f"got beta={beta}, desirable of {desirable.dtype} and a baseline of shape {tuple(baseline.shape)}; "
            "expected a beta above 0, bool, and a scalar"
        )
    logprobs, ref_logprobs, label = kept(logprobs=logprobs, ref_logprobs=ref_logprobs, desirable=desirable)
    rewards = beta * (logprobs - ref_logprobs)
    losses = torch.sigmoid((1 - 2 * label) * (rewards - beta * baseline.detach()))
    losses = torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)
    return UnpairedLoss(masked_mean(losses, denominator=denominator), rewards.detach())


@beartype
def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: Number, gamma: Number, denominator: Denominator = None
) -> PreferenceLoss:
    """Return the Bradley-Terry loss with the margin `gamma` of the rewards `beta * logprob`.

    This is SimPO (Meng et al. 2024, equation 6). There is no reference. Shapes: both `b`, log-probabilities of
    responses, means over tokens; returns a scalar, and `b` twice.
    """
    if beta <= 0:
        raise ValueError(f"got beta={beta}; expected a number above 0")
    chosen, rejected = (beta * logprobs for logprobs in kept(chosen=chosen, rejected=rejected))
    losses = -F.logsigmoid(chosen - rejected - gamma)
    return PreferenceLoss(masked_mean(losses, denominator=denominator), chosen.detach(), rejected.detach())


@beartype
def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: Number, denominator: Denominator = None) -> PreferenceLoss:
    """Return the mean of `-chosen - beta * log sigmoid(log odds of chosen - log odds of rejected)`.

    This is ORPO (Hong et al. 2024, equations 4 to 7; beta is its lambda), which has no reference. The first term is the
    loss of fine-tuning. The odds are `p / (1 - p)`, p the geometric mean of the probabilities of a response's tokens.
    The rewards are the log odds.

    Shapes: both `b`, log-probabilities of responses, means over tokens; returns a scalar, and `b` twice.
    """
    if beta <= 0:
        raise ValueError(f"got beta={beta}; expected a number above 0")
    chosen, rejected = kept(chosen=chosen, rejected=rejected)
    odds = _log_odds(chosen), _log_odds(rejected)
    losses = -chosen - beta * F.logsigmoid(odds[0] - odds[1])
    return PreferenceLoss(masked_mean(losses, denominator=denominator), *(side.detach() for side in odds))


def _log_odds(logprobs: Tensor) -> Tensor:
    """Return log(p / (1 - p)); a p that rounds to 1 counts as the largest number below 1, for finite gradients."""
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    return logprobs - (-torch.expm1(logprobs)).log()
