"""Estimates of the KL divergence of a policy from its reference, in nats, and the controller of the KL's weight."""

from typing import Literal

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms import Number, kept

# Bounds as in verl (core_algos.py: compute_policy_loss, kl_penalty); OpenRLHF's compute_approx_kl has the second, too.
# Without them a token whose probability has changed by far makes an infinity, or NaN if its advantage is 0.
MAX_LOG_RATIO = 20.0  # nats; log-ratios are clamped to this on either side before their exponential is taken
MAX_K3 = 10.0  # nats, the largest estimate of a token


@beartype
def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, *, kind: Literal["k1", "k2", "k3"] = "k1", action_mask: Tensor | None = None
) -> Tensor:
    """Return estimates of KL(policy, reference) from the policy's actions.

    They are those of Schulman 2020, "Approximating KL divergence". With d = logprob - ref_logprob: k1 is d; it is
    unbiased, but its gradient is 0 on average, so it is no loss. k2 is d^2/2; it is biased, but its gradient is that of
    the KL on average. k3 is exp(-d) - 1 + d; it is unbiased and never negative. k3 is at most MAX_K3 and has no
    gradient beyond that; k1 and k2 do not grow exponentially and have no bound.

    Shapes: all `b t`; returns `b t`, 0 where action_mask is False.
    """
    logprobs, ref_logprobs = kept(action_mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.expm1(-d) + d).clamp(max=MAX_K3)


@beartype
def adapt_kl_coef(kl_coef: Number, kl: Number, *, target: Number, horizon: Number, num_samples: int) -> float:
    """Return the next weight of the KL, which steers the KL to its target (Ziegler et al. 2019, section 2.2).

    Args:
        kl: nats a response.
        target: nats a response.
        horizon: responses over which the weight can change by a fifth.
        num_samples: responses since the last change.
    """
    if target <= 0 or horizon <= num_samples / 5:
        raise ValueError(
            f"got target={target}, horizon={horizon}, num_samples={num_samples}; expected a target above 0 and a "
            "horizon above num_samples / 5, where one change may take the coefficient to 0: raise the horizon"
        )
    error = min(max(kl / target - 1, -0.2), 0.2)
    return float(kl_coef * (1 + error * num_samples / horizon))
