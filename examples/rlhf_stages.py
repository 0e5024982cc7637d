"""The stages that the recipes of RLHF share: sampling and ranking answers, the reward model, PPO, and measurements."""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rlhf_report import Measurement, say
from torch import Tensor

from palm_rlhf.model.files import write_text
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rollout import ResponseSampling, Rollout, collect
from palm_rlhf.policy.sequences import response_logprobs, spoken
from palm_rlhf.training.ranked_data import Ranking
from palm_rlhf.training.reward import RewardModelTrainer
from palm_rlhf.training.reward_config import RewardConfig
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from palm_rlhf.training.run.log import Result

# Gold scores from answers, those to one prompt as neighbours, and whether each ended by itself.
Gold = Callable[[list[str], list[bool]], list[float]]


class OutOfTime(Exception):
    """max_seconds ended the named stage before its last step."""


def folder_of_run(output_dir: Path | None, resume: bool) -> Path:
    """Return the named folder of a run, or a new one in runs/. Raises ValueError where resuming names none."""
    if resume and output_dir is None:
        raise ValueError("got --resume without --output-dir, expected the folder of the run: name it by --output-dir")
    return output_dir or Path("runs") / time.strftime("rlhf-%Y%m%d-%H%M%S")


def check_complete(stage: str, result: Result) -> None:
    """Raise OutOfTime if the stage ended early."""
    if "stopped_early" in result:
        raise OutOfTime(stage)


def ask(
    palm: PaLM, prompts: Sequence[Tensor], sampling: ResponseSampling, tokenizer: Any, num_samples: int, **options: Any
) -> tuple[Rollout, list[str]]:
    """Sample answers to each prompt; return them as tokens and as texts. `options` are those of `collect`."""
    rollout = collect(palm, prompts, sampling, num_samples=num_samples, batch_size=512, **options)
    return rollout, spoken(rollout.sequences, tokenizer, sampling.eos_token)[1]


def ended(rollout: Rollout) -> list[bool]:
    """Return whether each answer ended by itself."""
    return (~rollout.truncated).tolist()


def rank(prompts: Sequence[Tensor], rollout: Rollout, texts: list[str], scores: list[float]) -> list[Ranking]:
    """Rank the answers to each prompt by their scores, best first.

    A ranking has no ties: of answers with equal scores, each is in another ranking of the prompt. A prompt has no
    ranking if all of its answers have the same score.
    """
    _, tokens = spoken(rollout.sequences)
    num_samples, rankings = len(texts) // len(prompts), []
    for prompt, first in zip(prompts, range(0, len(texts), num_samples), strict=True):
        these = slice(first, first + num_samples)
        distinct = dict(zip(texts[these], zip(scores[these], tokens[these], strict=True), strict=True))
        alike = defaultdict(list)  # the answers of each score
        for score, answer in distinct.values():
            alike[score].append(answer)
        best_first = [alike[score] for score in sorted(alike, reverse=True)]
        for row in itertools.zip_longest(*best_first):
            responses = [answer for answer in row if answer is not None]
            if len(responses) > 1:
                rankings.append(Ranking(prompt, responses))
    return rankings


def write_rankings(path: Path, rankings: list[Ranking]) -> None:
    """Write one ranking on each line, as token ids, best first."""
    rows = [[ranking.prompt.tolist(), *(answer.tolist() for answer in ranking.responses)] for ranking in rankings]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rankings(path: Path) -> list[Ranking]:
    """Read the rankings of `write_rankings`."""
    rows = [[torch.tensor(tokens) for tokens in json.loads(line)] for line in path.read_text().splitlines()]
    return [Ranking(prompt, responses) for prompt, *responses in rows]


def split(rankings: list[Ranking]) -> tuple[list[Ranking], list[Ranking]]:
    """Split off a tenth of the rankings for validation; training rankings with the same prompts are dropped."""
    valid = rankings[: len(rankings) // 10]
    asked = {tuple(ranking.prompt.tolist()) for ranking in valid}
    return [ranking for ranking in rankings if tuple(ranking.prompt.tolist()) not in asked], valid


def learn_reward(model: RewardModel, rankings: list[Ranking], config: RewardConfig, folder: Path, resume: bool) -> None:
    """Train a reward model and normalise its scores. Raises OutOfTime if the training ended early."""
    train, valid = split(rankings)
    say(f"training the reward model on {len(train)} rankings")
    trainer = RewardModelTrainer(
        model, train_data=train, valid_data=valid, config=config, output_dir=folder, resume=resume
    )
    check_complete("reward model", trainer.train())
    trainer.normalise(train)
    say(f"held-out rankings: {trainer.evaluate()}")


@dataclass(frozen=True)
class Bench:
    """The measurement of policies on held-out prompts, from the same random numbers each time."""

    prompts: list[Tensor]
    tokenizer: Any
    sampling: ResponseSampling
    num_samples: int  # answers to each prompt
    gold: Gold
    reward_model: RewardModel
    reference: PaLM

    @torch.no_grad()
    def measure(self, palm: PaLM, finetune_scope: str | None = None) -> Measurement:
        """Sample answers to the held-out prompts, and score them."""
        options = {"generator": torch.Generator(palm.device).manual_seed(0), "finetune_scope": finetune_scope}
        rollout, texts = ask(palm, self.prompts, self.sampling, self.tokenizer, self.num_samples, **options)
        theirs = response_logprobs(self.reference, rollout.sequences, **self.sampling.truncation).logprobs
        kl = masked_sum(rollout.logprobs - theirs, rollout.sequences.action_mask, dim=-1)
        return Measurement(
            [texts[first : first + self.num_samples] for first in range(0, len(texts), self.num_samples)],
            torch.tensor(self.gold(texts, ended(rollout))).reshape(-1, self.num_samples),
            self.reward_model.score(rollout.sequences).cpu().reshape(-1, self.num_samples),
            kl.cpu().reshape(-1, self.num_samples),
        )


def improve(
    trainer: RLHFTrainer, before: Measurement, measured: Callable[[], Measurement], measure_every: int
) -> list[Measurement]:
    """Run PPO to its last step; measure the policy before, every `measure_every` steps, and at the end."""
    history = [before]
    say(f"before: {before}")
    for metrics in trainer.steps(progress_bar=True):
        if metrics["step"] % measure_every == 0 and metrics["step"] < trainer.config.num_steps:
            history.append(measured())
            say(f"step {metrics['step']}: {history[-1]}")
    return [*history, measured()]
