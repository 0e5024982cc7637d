"""How far a policy has moved from its reference, in nats, and the controller of what that costs."""

from typing import Literal

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms import Number, kept

# As in verl (core_algos.py: compute_policy_loss, kl_penalty), the second in OpenRLHF (compute_approx_kl) as well: one
# token far from where it was makes neither infinities nor, times an advantage of 0, NaN.
MAX_LOG_RATIO = 20.0  # nats; beyond it on either side a log-ratio is taken to be this, before its exponential
MAX_K3 = 10.0  # nats; what a token's estimate is at most


@beartype
def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, *, kind: Literal["k1", "k2", "k3"] = "k1", action_mask: Tensor | None = None
) -> Tensor:
    """Estimates of KL(policy, reference) from the policy's actions (Schulman 2020, "Approximating KL divergence").

    With d = logprob - ref_logprob: k1 is d, unbiased, but its gradient is 0 in the mean, so it is no loss; k2 is d^2/2,
    biased, with the gradient of the KL in the mean; k3 is exp(-d) - 1 + d, unbiased and never negative.
    k3 is bounded by MAX_K3, and above that bound has no gradient; k1 and k2 do not grow exponentially and are not.

    all: `b t` -> `b t`, 0 where action_mask is False
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
    """The coefficient that draws the KL to its target (Ziegler et al. 2019, section 2.2).

    kl and target: nats a sequence; horizon: sequences; num_samples: sequences seen since the last change
    """
    if target <= 0 or horizon <= num_samples / 5:
        raise ValueError(
            f"got target={target}, horizon={horizon}, num_samples={num_samples}; expected a target above 0 and a "
            "horizon above num_samples / 5, where one change may take the coefficient to 0: raise the horizon"
        )
    error = min(max(kl / target - 1, -0.2), 0.2)
    return float(kl_coef * (1 + error * num_samples / horizon))
