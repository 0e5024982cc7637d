"""The metrics of a step of reinforcement learning.

step, elapsed       number of the step, from 1; seconds of the run so far, of all its sessions together
score, score_std    mean and standard deviation of the responses' scores by the reward, before any shaping, with the
                    responses that dynamic sampling replaced: without them, hard prompts alone would be left
score/NAME, score_std/NAME  the same for each of several rewards, without its weight, over the responses that it judged;
                    score is their weighted sum
redrawn_groups      prompts that were replaced because all their responses had the same score, with max_redraws
equal_groups        prompts whose responses still have the same score; they count in no loss
kl                  to the reference, in nats per response: the mean sum of log-probability differences; missing where
                    kl_coef is 0 and no reference is given
kl_coef             weight of that KL in this step
learning_rate, critic_learning_rate  of the optimiser in this step
response_length     tokens of a response, its EOS included; in a conversation, the tokens of the policy
turns               of the policy in a response; missing without an environment
eos_rate            share of the responses that ended with an EOS; of conversations, that were not cut off
explained_variance  1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one
policy_loss, value_loss, kl_loss   terms of the loss, means over the step's optimiser steps, as all below
entropy             of the sampling distribution, in nats per token
clip_fraction       share of the tokens whose ratio was clipped
value_clip_fraction share of the tokens whose value was clipped
approx_kl           of the policy that sampled to the present one, in nats per token (the k3 estimate)
ratio_min, ratio_max  extremes of the ratio of probabilities, over all optimiser steps
grad_norm, critic_grad_norm  gradient norms before clipping
optimizer_steps     optimiser steps of this step; fewer where `early_stop_kl` ended it
tokens_per_second   response tokens over the time of the whole step

An evaluation, which comes after the step's optimisation, adds metrics of the responses to eval_prompts:

eval_score, eval_score/NAME  mean of the score, and of each named reward, with those of eval_reward
eval_kl, eval_response_length, eval_eos_rate  as above; the KL at the temperature of the training
eval_win_rate       share of wins by the score over the reference's responses to the same prompts, ties count half;
                    without a reference, over the responses of the policy when the run began
eval_win_rate_low, eval_win_rate_high  ends of its 95 percent interval (Wilson)
eval_overoptimized  1 where the score has risen and a held-out reward has fallen, beyond chance
"""

import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from beartype import beartype
from torch import Tensor

from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.training.rlhf.experience import Experience
from palm_rlhf.training.run.log import Metrics
from palm_rlhf.training.run.readings import Readings

CURVES = {
    "score": "score",
    "kl": "KL to the reference (nats per response)",
    "entropy": "entropy (nats per token)",
    "response_length": "tokens of a response",
    "explained_variance": "explained variance of the critic",
    "clip_fraction": "clipped share of the tokens",
}
SHOWN = ("score", "kl", "tokens_per_second")  # behind the progress bar


class UpdateStatistics:
    """The metrics of a step's losses, gathered over micro-batches, processes and optimiser steps."""

    def __init__(self, accelerator: Accelerator, readings: Readings):
        self.accelerator, self.readings = accelerator, readings
        self.finished: list[dict[str, float | Tensor]] = []
        self._clear()

    def _clear(self) -> None:
        self.parts: dict[str, Tensor] = {}
        self.ratios: list[Tensor] = []

    def add(self, parts: dict[str, Tensor], ratio_min: Tensor, ratio_max: Tensor) -> None:
        """Add a micro-batch: its shares of means over the whole optimiser step, and extremes."""
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + part.detach().float()
        self.ratios += [torch.stack([ratio_min, ratio_max]).detach().float()]

    def finish_step(self, norms: Sequence[float | Tensor]) -> None:
        """End an optimiser step, whose micro-batches were added; `norms` are of the gradients: policy, critic."""
        totals = self.accelerator.reduce(torch.stack([*self.parts.values()]), "sum").unbind()
        ratios = self.accelerator.gather(torch.stack(self.ratios))
        numbers = dict(zip(self.parts, totals, strict=True))
        numbers |= {"ratio_min": ratios[:, 0].min(), "ratio_max": ratios[:, 1].max()}
        read = {name: self.readings.number(number) for name, number in numbers.items()}
        self.finished.append({**read, **dict(zip(("grad_norm", "critic_grad_norm"), norms, strict=False))})
        self._clear()

    def last(self, name: str) -> float:
        """Return a metric of the latest optimiser step; 0 before the first."""
        return float(self.finished[-1][name]) if self.finished else 0.0

    def means(self) -> Metrics:
        """Return means over the optimiser steps, and the extremes of extremes; all are read in one transfer."""
        if not self.finished:
            return {"optimizer_steps": 0}
        flat = self.readings.read([number for step in self.finished for number in step.values()])
        width = len(self.finished[0])
        columns = {name: flat[place::width] for place, name in enumerate(self.finished[0])}
        summaries = {"ratio_min": min, "ratio_max": max}
        metrics = {
            name: summaries[name](column) if name in summaries else sum(column) / len(column)
            for name, column in columns.items()
        }
        return {**metrics, "optimizer_steps": len(self.finished)}


@beartype
def rollout_metrics(
    accelerator: Accelerator,
    rollout: Rollout,
    scores: Scores,
    experience: Experience,
    *,
    started: float,
    looks_for_eos: bool,
    measures_kl: bool,
) -> Metrics:
    """Return the metrics of the responses of all processes; `started` by `time.perf_counter`."""
    mask, all_actions = experience.action_mask, rollout.sequences.action_mask
    residuals = experience.returns - experience.values
    sums = {
        "responses": torch.tensor(len(rollout.sequences)),
        "truncated": rollout.truncated.sum(),
        "turns": torch.tensor(sum(m["role"] == "assistant" for messages in rollout.messages or () for m in messages)),
        "tokens": all_actions.sum(),
        "kl": masked_sum(experience.logprobs - experience.ref_logprobs, all_actions),
        "actions": mask.sum(),
        "returns": masked_sum(experience.returns.double(), mask),
        "returns_squared": masked_sum(experience.returns.double().square(), mask),
        "residuals": masked_sum(residuals.double(), mask),
        "residuals_squared": masked_sum(residuals.double().square(), mask),
    }
    kinds = {"": scores, **{f"/{name}": part for name, part in scores.by_name.items()}}
    for kind, part in kinds.items():
        numbers = part.scores.double()
        sums[f"scored{kind}"] = part.valid.sum()
        sums[f"score{kind}"] = masked_sum(numbers, part.valid)
        sums[f"score{kind}_squared"] = masked_sum(numbers.square(), part.valid)
    stacked = torch.stack([total.to(accelerator.device, torch.float64) for total in sums.values()])
    total = dict(zip(sums, accelerator.reduce(stacked, "sum").tolist(), strict=True))

    def variance(name: str, count: str) -> float:
        return max(total[f"{name}_squared"] / total[count] - (total[name] / total[count]) ** 2, 0.0)

    metrics = {}
    for kind in kinds:
        if total[f"scored{kind}"]:
            metrics[f"score{kind}"] = total[f"score{kind}"] / total[f"scored{kind}"]
            metrics[f"score_std{kind}"] = variance(f"score{kind}", f"scored{kind}") ** 0.5
    metrics |= {
        "response_length": total["tokens"] / total["responses"],
        "tokens_per_second": total["tokens"] / (time.perf_counter() - started),
    }
    if rollout.messages is not None:
        metrics["turns"] = total["turns"] / total["responses"]
    if measures_kl:
        metrics["kl"] = total["kl"] / total["responses"]
    if looks_for_eos:
        metrics["eos_rate"] = 1 - total["truncated"] / total["responses"]
    if total["actions"] and (spread := variance("returns", "actions")) > 0:
        metrics["explained_variance"] = 1 - variance("residuals", "actions") / spread
    return metrics
