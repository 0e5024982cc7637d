"""What is measured of a step of reinforcement learning, and tables of what the policy says.

step, elapsed       its number, from 1; seconds of the run so far, all times of a resumed one together
score, score_std    of the responses, by the reward, before any shaping; their standard deviation. Responses that
                    dynamic sampling replaced are among them: without them, the score would be of hard prompts alone
score/NAME, score_std/NAME  the same by each of several rewards, without its weight, over the responses that it could
                    judge; score is their weighted sum
redrawn_groups      prompts whose responses all scored the same and were replaced, where max_redraws is above 0
equal_groups        prompts of which that is so still, which count in no loss
kl                  to the reference, in nats per response: the mean sum of log-probability differences; not there
                    where kl_coef is 0 and no reference is given
kl_coef             weight of that KL in this step
learning_rate, critic_learning_rate  that the optimiser stepped with
response_length     tokens of a response, its EOS included; of a conversation, those that the policy said
turns               of the policy in a response; not there without an environment
eos_rate            share of the responses that ended by themselves; of conversations, that were not cut off
explained_variance  1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one
policy_loss, value_loss, kl_loss   terms of the loss, means over the step's optimiser steps, as all below
entropy             of the sampling distribution, in nats per token
clip_fraction       share of the tokens whose ratio was clipped
value_clip_fraction share of the tokens whose value was clipped
approx_kl           of the policy that spoke to the present one, in nats per token (the k3 estimate)
ratio_min, ratio_max  extremes of the ratio of their probabilities
grad_norm, critic_grad_norm  before clipping
optimizer_steps     made in this step; fewer where `early_stop_kl` ended it
tokens_per_second   response tokens over the time of the whole step

An evaluation, before which the step's optimisation is done, adds these of the responses to eval_prompts:

eval_score, eval_score/NAME  means of the score, and of each named reward, those of eval_reward among them
eval_kl, eval_response_length, eval_eos_rate  as above; KL by the training's temperature
eval_win_rate       share of wins over the reference's responses to the same prompts by the score, ties half; without a
                    reference, over those of the policy when the run began
eval_win_rate_low, eval_win_rate_high  ends of its interval of 95 percent (Wilson)
eval_overoptimized  1 where the score has risen and a held-out reward fallen, beyond chance
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from beartype import beartype
from torch import Tensor

from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.sequences import spoken
from palm_rlhf.training.run.checkpoints import write_text, writing
from palm_rlhf.training.run.log import Metrics, read_metrics
from palm_rlhf.training.run.run import Run

CURVES = {
    "score": "score",
    "kl": "KL to the reference (nats per response)",
    "entropy": "entropy (nats per token)",
    "response_length": "tokens of a response",
    "explained_variance": "explained variance of the critic",
    "clip_fraction": "clipped share of the tokens",
}
SHOWN = ("score", "kl", "tokens_per_second")  # behind the progress bar
SAMPLES_FILE = "samples.jsonl"


class UpdateStatistics:
    """Gathers what the losses of a step report, over micro-batches, processes and optimiser steps."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.finished: list[Metrics] = []
        self._clear()

    def _clear(self) -> None:
        self.parts: dict[str, Tensor] = {}
        self.ratios: list[Tensor] = []

    def add(self, parts: dict[str, Tensor], ratio_min: Tensor, ratio_max: Tensor) -> None:
        """Count a micro-batch: parts of means that add up over the whole optimiser step, and extremes."""
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + part.detach().float()
        self.ratios += [torch.stack([ratio_min, ratio_max]).detach().float()]

    def add_norms(self, norms: Metrics) -> None:
        """End an optimiser step."""
        names = list(self.parts)
        totals = self.accelerator.reduce(torch.stack([self.parts[name] for name in names]), "sum").tolist()
        ratios = self.accelerator.gather(torch.stack(self.ratios))
        extremes = {"ratio_min": float(ratios[:, 0].min()), "ratio_max": float(ratios[:, 1].max())}
        self.finished.append({**dict(zip(names, totals, strict=True)), **extremes, **norms})
        self._clear()

    def last(self, name: str) -> float:
        """A number of the latest optimiser step; 0 before the first."""
        return self.finished[-1][name] if self.finished else 0.0

    def means(self) -> Metrics:
        """Means over the optimiser steps, but the extremes of extremes."""
        if not self.finished:
            return {"optimizer_steps": 0}
        columns = {name: [step[name] for step in self.finished] for name in self.finished[0]}
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
    experience: Any,
    started: float,
    *,
    looks_for_eos: bool,
    measures_kl: bool,
) -> Metrics:
    """The metrics of what was said, over the responses of all processes; `started` by `time.perf_counter`."""
    mask, all_actions = experience.action_mask, rollout.sequences.action_mask
    residuals = experience.returns - experience.values
    sums = {
        "responses": torch.tensor(len(rollout.sequences)),
        "truncated": rollout.truncated.sum(),
        "turns": torch.tensor(sum(said["role"] == "assistant" for talk in rollout.messages or () for said in talk)),
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


class SampleTable:
    """Appends responses to samples.jsonl in the run's folder, a line each, for a person to read.

    Lines of steps after the one that the run is at, left by a run that was cut off, are dropped.
    """

    @beartype
    def __init__(self, run: Run, num_kept: int, tokenizer: Any):
        self.run, self.num_kept, self.tokenizer = run, num_kept, tokenizer
        self.path: Path | None = None
        if run.output_dir is not None and run.is_main:
            self.path = run.output_dir / SAMPLES_FILE
            kept = [line for line in read_metrics(self.path) if line["step"] <= run.step]
            with writing(f"the samples in {self.path}"):
                write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    @beartype
    def write(self, rollout: Rollout, scores: Scores, eos_token: int | None) -> None:
        """Add the first few responses of the main process: where there is a tokenizer, as texts without the EOS too.

        Those of conversations with an environment have their messages beside them.
        """
        if self.path is None:
            return
        rows = slice(0, self.num_kept)
        kept = rollout.sequences.select(rows)
        parts = dict(zip(("prompt", "completion"), spoken(kept, self.tokenizer, eos_token), strict=True))
        if self.tokenizer is not None:
            parts |= zip(("prompt_tokens", "completion_tokens"), spoken(kept), strict=True)
        if rollout.messages is not None:
            parts["messages"] = rollout.messages[rows]
        numbers = scores.numbers()[rows]
        named = {name: part.numbers()[rows] for name, part in scores.by_name.items()}
        with writing(f"the samples in {self.path}"), open(self.path, "a", encoding="utf-8") as file:
            for place, (score, *row) in enumerate(zip(numbers, *parts.values(), strict=True)):
                each = {"scores": {name: part[place] for name, part in named.items()}} if named else {}
                line = {"step": self.run.step, "score": score, **each, **dict(zip(parts, row))}
                file.write(json.dumps(line, ensure_ascii=False, default=Tensor.tolist) + "\n")
