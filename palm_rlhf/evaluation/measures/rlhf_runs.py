"""An RLHF run over its steps: KL to the reference, score, and the win rate against the reference."""

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
    """A prompt and its response at a step: token ids, or texts if the run kept no ids."""

    step: int
    prompt: Part
    completion: Part


@dataclass(frozen=True)
class StepResult:
    """The policy of a step against the reference, on the kept prompts of the step."""

    step: int
    wins: int
    losses: int
    ties: int

    @property
    def win_rate(self) -> float:
        """The share of wins; a tie counts a half."""
        return (self.wins + self.ties / 2) / (self.wins + self.losses + self.ties)

    @property
    def interval(self) -> Interval:
        """The exact interval of the win rate, with half of the ties rounded down at its lower end, up at its upper."""
        total = self.wins + self.losses + self.ties
        low, _ = exact_interval(self.wins + self.ties // 2, total)
        _, high = exact_interval(self.wins + math.ceil(self.ties / 2), total)
        return low, high

    def numbers(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {**vars(self), "win_rate": self.win_rate, "interval": list(self.interval)}


@beartype
def read_run(folder: Path) -> tuple[list[Metrics], list[Sample]]:
    """Read the metrics and samples of an `RLHFTrainer`; an incomplete last line is ignored.

    Raises FileNotFoundError without metrics, and ValueError for the metrics of another trainer.
    """
    lines = read_metrics(folder / METRICS_FILE)
    if not lines:
        raise FileNotFoundError(
            f"got no metrics in {folder / METRICS_FILE}, expected those of an RLHFTrainer: name its output folder"
        )
    if not any({"kl", "kl_coef"} & line.keys() for line in lines):
        raise ValueError(
            f"got metrics without kl and kl_coef in {folder / METRICS_FILE}, expected those of an RLHFTrainer: name "
            "its output folder"
        )
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
    """Return the fields of the PPOConfig in the newest checkpoint of a run; empty without a checkpoint."""
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
    """Score the policy's responses and the reference's responses to the same prompts.

    Text samples are encoded by `tokenizer`, with `eos_token` (if given) at the end of each response. Raises ValueError
    for a prompt or response without tokens, such as an empty text response without `eos_token`.

    Args:
        samples: The prompts and responses of the policy.
        reference: The model that the policy is compared with.
        reward_model: The model that scores both.
        tokenizer: The tokenizer of the reference.
        max_new_tokens: Longest response of the reference.
        temperature: Sampling temperature of the reference.
        eos_token: The token that ends a response; with a template by default the end of the assistant's turn.
        template: The chat template for text prompts, each of which becomes one message of a user.
        batch_size: Responses in one forward.
        seed: Of the reference's responses.
    """
    if template is not None and eos_token is None:
        eos_token = end_of_turn(tokenizer, template)

    def tensor(tokens: list[int]) -> Tensor:
        if not tokens:
            raise ValueError("got a sample without tokens, expected at least one in prompt and response: set eos_token")
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

    prompts, responses = [prompt_of(sample) for sample in samples], [response_of(sample) for sample in samples]
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
        for sequences in (join(prompts, responses), rollout.sequences)
    )
    return ours, theirs


@beartype
def wins_by_step(samples: Sequence[Sample], ours: Sequence[float], reference: Sequence[float]) -> list[StepResult]:
    """Count for each step how often the policy's response scores above the reference's."""
    steps: dict[int, list[int]] = {}
    for sample, own, other in zip(samples, ours, reference, strict=True):
        counts = steps.setdefault(sample.step, [0, 0, 0])
        counts[0 if own > other else 1 if own < other else 2] += 1
    return [StepResult(step, *counts) for step, counts in sorted(steps.items())]
