"""A run of reinforcement learning over its steps: KL to the reference, score, and how often it beats the reference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.conversation import Template, encode_prompt, end_of_turn
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.evaluation.intervals import Interval, exact_interval
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.policy.sequences import join
from palm_rlhf.training.rlhf.sample_table import SAMPLES_FILE
from palm_rlhf.training.run.checkpoints import METRICS_FILE, complete_checkpoints, read_state
from palm_rlhf.training.run.log import Metrics, read_metrics

Part = str | tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """What the policy said at a step: token ids, or texts where the run has kept nothing else."""

    step: int
    prompt: Part
    completion: Part


@dataclass(frozen=True)
class StepResult:
    """The policy of a step against the reference, on the prompts that were kept of it."""

    step: int
    wins: int
    losses: int
    ties: int

    @property
    def win_rate(self) -> float:
        """A tie counts a half."""
        return (self.wins + self.ties / 2) / (self.wins + self.losses + self.ties)

    @property
    def interval(self) -> Interval:
        """Exact, of wins among all, with ties as half wins rounded down and up at its ends."""
        total = self.wins + self.losses + self.ties
        low, _ = exact_interval(self.wins + self.ties // 2, total)
        _, high = exact_interval(self.wins + math.ceil(self.ties / 2), total)
        return low, high

    def numbers(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {**vars(self), "win_rate": self.win_rate, "interval": list(self.interval)}


@beartype
def read_run(folder: Path) -> tuple[list[Metrics], list[Sample]]:
    """The metrics and the samples that a run of `RLHFTrainer` has written; a last line that was cut off is not read.

    FileNotFoundError where there are no metrics, ValueError where they are of another kind of training.
    """
    lines = read_metrics(folder / METRICS_FILE)
    if not lines:
        raise FileNotFoundError(f"{folder / METRICS_FILE} has no metrics: expected the output_dir of an RLHFTrainer")
    if not any({"kl", "kl_coef"} & line.keys() for line in lines):
        raise ValueError(f"{folder / METRICS_FILE} has no KL and no kl_coef, expected the metrics of an RLHFTrainer")
    path = folder / SAMPLES_FILE
    return lines, [_sample(line, f"{path}, line {place}") for place, line in enumerate(read_metrics(path), start=1)]


def _sample(line: Mapping[str, Any], place: str) -> Sample:
    parts = [
        tuple(part) if isinstance(part, list) and all(type(token) is int for token in part) else part
        for part in (line.get(f"{name}_tokens", line.get(name)) for name in ("prompt", "completion"))
    ]
    if type(line.get("step")) is not int or not all(isinstance(part, str | tuple) for part in parts):
        raise ValueError(
            f"{place}: got the keys {sorted(line)[:8]}, expected step, and prompt and completion as texts or token ids"
        )
    return Sample(line["step"], *parts)


@beartype
def read_settings(folder: Path) -> dict[str, Any]:
    """The fields of the PPOConfig that a run had at its newest checkpoint; nothing where it has none."""
    checkpoints = complete_checkpoints(folder / "checkpoints")
    return read_state(checkpoints[-1])["config"] if checkpoints else {}


@beartype
def reference_scores(
    samples: Sequence[Sample],
    reference: PaLM,
    reward_model: RewardModel,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int = 256,
    temperature: float | int = 1.0,
    eos_token: int | None = None,
    template: Template | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> tuple[list[float], list[float]]:
    """The reward model's scores of what the policy said, and of what the reference says to the same prompts.

    Texts become tokens by `tokenizer`, with the end of a response put back where `eos_token` is given. With a
    `template`, texts of prompts are what a user said, and `eos_token` is the end of the assistant's turn.

    Raises:
        ValueError: a part has no token, as a response that ended at once where no `eos_token` is given.
    """
    if template is not None and eos_token is None:
        eos_token = end_of_turn(tokenizer, template)

    def tensor(tokens: list[int]) -> Tensor:
        if not tokens:
            raise ValueError("a sample has an empty part, expected at least one token: give the eos_token")
        return torch.tensor(tokens, device=reference.device)

    def prompt_of(sample: Sample) -> Tensor:
        if not isinstance(sample.prompt, str):
            return tensor(list(sample.prompt))
        if template is None:
            return tensor(tokenizer.encode(sample.prompt))
        return encode_prompt([{"role": "user", "content": sample.prompt}], tokenizer, template).to(reference.device)

    def response_of(sample: Sample) -> Tensor:
        if not isinstance(sample.completion, str):
            return tensor(list(sample.completion))
        return tensor(tokenizer.encode(sample.completion) + ([] if eos_token is None else [eos_token]))

    prompts, said = [prompt_of(sample) for sample in samples], [response_of(sample) for sample in samples]
    generator = torch.Generator(reference.device).manual_seed(seed)
    sampling = ResponseSampling(
        max_new_tokens=max_new_tokens,
        temperature=float(temperature),
        eos_token=eos_token,
        allowed_tokens=known_tokens(tokenizer, reference.num_tokens),
    )
    rollout = collect(reference, prompts, sampling, batch_size=batch_size, generator=generator)
    ours, theirs = (
        reward_model.score(sequences, batch_size=batch_size).double().tolist()
        for sequences in (join(prompts, said), rollout.sequences)
    )
    return ours, theirs


@beartype
def wins_by_step(samples: Sequence[Sample], ours: Sequence[float], reference: Sequence[float]) -> list[StepResult]:
    """How often the policy's responses score above the reference's, step by step."""
    steps: dict[int, list[int]] = {}
    for sample, own, other in zip(samples, ours, reference, strict=True):
        counts = steps.setdefault(sample.step, [0, 0, 0])
        counts[0 if own > other else 1 if own < other else 2] += 1
    return [StepResult(step, *counts) for step, counts in sorted(steps.items())]
