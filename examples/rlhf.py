"""The whole recipe on real dialogues, offline: pretrain, fine-tune, rank answers, train a reward model, PPO.

The dialogues are the English ones of the package chatterbot-corpus. A program stands in for the people who rank:
VADER (Hutto and Gilbert 2014), which scores the sentiment of a text and so prefers friendly answers. Its score is the
gold score. The score of the reward model, which learns from VADER's rankings and which PPO maximises, is the proxy.

pip install "palm-rlhf[examples]" && python examples/rlhf.py --seed 0
"""

import copy
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from palm_rlhf.ops.cpu.threads import share_the_machine

share_the_machine()  # before torch is imported

import torch
import tyro
from dialogue_model import (
    END_OF_TURN,
    FINE_TUNING,
    MODEL,
    PRETRAINING,
    TOKENIZER,
    Dialogues,
    FineTuning,
    OutOfTime,
    check_complete,
    fine_tune,
    hold_out,
    pretrain,
    read_conversations,
    turn,
)
from rlhf_report import Measurement, draw_curves, report, say

from palm_rlhf.cli import replace_unprintable_characters
from palm_rlhf.commands.run_folder import quoted, show_next
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.files import write_text
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.policy.sequences import response_logprobs, spoken
from palm_rlhf.training.language_model_config import LMConfig
from palm_rlhf.training.ranked_data import Ranking
from palm_rlhf.training.reward import RewardModelTrainer
from palm_rlhf.training.reward_config import RewardConfig
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from palm_rlhf.training.run.config import RunConfig

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError as error:
    sys.exit(f"rlhf.py: {error}; the annotator comes with: pip install palm-rlhf[examples]")

RANKED_TEMPERATURE = 1.0  # above PPO's, so that the reward model sees words that the policy will use later
# The defaults take some eight minutes of one CPU core.
REWARD = RewardConfig(grad_accum=1, learning_rate=1e-3, max_seq_len=192)
PPO = PPOConfig(
    num_steps=20,
    max_new_tokens=48,
    temperature=0.7,
    eos_token=END_OF_TURN,
    missing_eos_penalty=0.5,
    epochs=2,
    learning_rate=2e-4,
    kl_coef=0.1,  # fixed: an adaptive coefficient falls while the KL is still small, and the policy then overshoots
)


class Annotator:
    """Ranks answers, and scores them at the end, from -1 (hostile) to 1 (friendly)."""

    def __init__(self):
        self.vader = SentimentIntensityAnalyzer()

    def score(self, answers: list[str]) -> list[float]:
        return [self.vader.polarity_scores(answer)["compound"] for answer in answers]

    def rank(
        self, palm: PaLM, prompts: list[str], sampling: ResponseSampling, num_samples: int, seed: int
    ) -> list[Ranking]:
        """Sample answers to each prompt and rank them, best first.

        A ranking has no ties: of answers with equal scores, each is in another ranking of the prompt. A prompt has no
        ranking if all of its answers have the same score.
        """
        turns, generator = [turn(prompt) for prompt in prompts], torch.Generator().manual_seed(seed)
        rollout = collect(palm, turns, sampling, num_samples=num_samples, batch_size=512, generator=generator)
        _, tokens = spoken(rollout.sequences)
        _, answers = spoken(rollout.sequences, TOKENIZER, END_OF_TURN)
        rankings = []
        for prompt, first in zip(turns, range(0, len(answers), num_samples), strict=True):
            these = slice(first, first + num_samples)
            distinct = dict(zip(answers[these], tokens[these], strict=True))
            alike = defaultdict(list)  # the answers of each score
            for score, answer in zip(self.score(list(distinct)), distinct.values(), strict=True):
                alike[score].append(answer)
            best_first = [alike[score] for score in sorted(alike, reverse=True)]
            for row in itertools.zip_longest(*best_first):
                responses = [answer for answer in row if answer is not None]
                if len(responses) > 1:
                    rankings.append(Ranking(prompt, responses))
        return rankings


@torch.no_grad()
def measure(
    palm: PaLM,
    reference: PaLM,
    reward_model: RewardModel,
    annotator: Annotator,
    prompts: list[str],
    sampling: ResponseSampling,
    num_samples: int,
) -> Measurement:
    """Sample answers to the held-out prompts, from the same random numbers each time, and score them."""
    generator = torch.Generator().manual_seed(0)
    turns = [turn(prompt) for prompt in prompts]
    rollout = collect(palm, turns, sampling, num_samples=num_samples, batch_size=512, generator=generator)
    _, answers = spoken(rollout.sequences, TOKENIZER, END_OF_TURN)
    ref_logprobs = response_logprobs(reference, rollout.sequences, **sampling.truncation).logprobs
    kl = masked_sum(rollout.logprobs - ref_logprobs, rollout.sequences.action_mask, dim=-1)
    return Measurement(
        [answers[first : first + num_samples] for first in range(0, len(answers), num_samples)],
        torch.tensor(annotator.score(answers)).reshape(-1, num_samples),
        reward_model.score(rollout.sequences).reshape(-1, num_samples),
        kl.reshape(-1, num_samples),
    )


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


def learn_reward(palm: PaLM, rankings: list[Ranking], config: RewardConfig, folder: Path, resume: bool) -> RewardModel:
    """Train the reward model and normalise its scores. Raises OutOfTime if the training ended early."""
    train, valid = split(rankings)
    say(f"4. training the reward model on {len(train)} rankings")
    torch.manual_seed(config.seed)  # of the head, which is the same in a resumed run
    model = RewardModel(palm, pooling="mean")  # every word of an answer counts, not only the last one
    trainer = RewardModelTrainer(
        model, train_data=train, valid_data=valid, config=config, output_dir=folder, resume=resume
    )
    check_complete("reward model", trainer.train())
    trainer.normalise(train)
    say(f"held-out rankings: {trainer.evaluate()}")
    return model


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


def answering(
    model: PaLMConfig, data: Dialogues, pretraining: LMConfig, fine_tuning: FineTuning, output_dir: Path, resume: bool
) -> PaLM:
    """Train a model to answer, by the first two stages. Raises OutOfTime if the first one ended early."""
    say(f"1. pretraining on {len(data.conversations)} conversations")
    palm = PaLM.from_config(model)
    check_complete("pretraining", pretrain(palm, data.conversations, pretraining, output_dir / "pretraining", resume))
    say(f"2. fine-tuning on {len(data.pairs)} answers")
    fine_tune(palm, [(turn(prompt), turn(answer)) for prompt, answer in data.pairs], fine_tuning, pretraining.seed)
    return palm


def show_what_next(output_dir: Path) -> None:
    """Print the commands that use the saved models."""
    say(f"saved to {output_dir}")
    policy, ppo_run, before, proxy = (
        quoted(output_dir / name) for name in ("policy", "ppo", "fine_tuned", "reward_model")
    )
    show_next(
        [
            ("ask it", f"palm-rlhf generate {policy} --max-new-tokens 48 --prompt $'How are you?\\n'"),
            ("measure the run", f"palm-rlhf evaluate run {ppo_run} --reference {before} --reward-model {proxy}"),
        ]
    )


def main(
    seed: int = 0,
    output_dir: Path | None = None,
    resume: bool = False,
    max_seconds: float | None = None,
    held_out: int = 64,
    num_samples: int = 4,
    num_ranked: int = 16,
    measure_every: int = 10,
    model: PaLMConfig = MODEL,
    pretraining: LMConfig = PRETRAINING,
    fine_tuning: FineTuning = FINE_TUNING,
    reward: RewardConfig = REWARD,
    ppo: PPOConfig = PPO,
) -> None:
    """The whole recipe of RLHF on real dialogues; the last line on standard output is JSON.

    Args:
        seed: Random seed of every stage.
        output_dir: Folder of models, metrics and curves; by default a new one in runs/.
        resume: Continue the run in output_dir, from the newest checkpoint of its last stage.
        max_seconds: Stop stage 1, 4 or 5 after this time; the run can be resumed. By default the stages end by steps.
        held_out: Prompts held out from all stages, for measurements.
        num_samples: Answers to each held-out prompt in a measurement.
        num_ranked: Answers to each other prompt that the annotator ranks.
        measure_every: Steps of PPO between measurements.
        model: Settings of the model.
        pretraining: Settings of the pretraining.
        fine_tuning: Settings of the fine-tuning.
        reward: Settings of the reward model's training.
        ppo: Settings of PPO.
    """
    started = time.perf_counter()
    if resume and output_dir is None:
        raise ValueError("got --resume without --output-dir, expected the folder of the run: name it by --output-dir")
    output_dir = output_dir or Path("runs") / time.strftime("rlhf-%Y%m%d-%H%M%S")

    def timed(config: RunConfig) -> RunConfig:
        left = None if max_seconds is None else max(max_seconds - (time.perf_counter() - started), 1e-3)
        return replace(config, seed=seed, max_seconds=left)

    torch.manual_seed(seed)
    data = hold_out(read_conversations(), held_out, seed)
    annotator, ranked, folder = Annotator(), output_dir / "rankings.jsonl", output_dir / "fine_tuned"
    try:
        if resume and ranked.is_file():
            palm, rankings = PaLM.from_pretrained(folder), read_rankings(ranked)
            say(f"1. to 3. are done: {len(rankings)} rankings in {ranked}")
        else:
            palm = answering(model, data, timed(pretraining), fine_tuning, output_dir, resume)
            say(f"3. ranking {num_ranked} answers to each of {len(data.prompts)} prompts")
            sampling = replace(ppo.sampling, temperature=RANKED_TEMPERATURE)
            rankings = annotator.rank(palm, data.prompts, sampling, num_ranked, seed)
            palm.save_pretrained(folder)
            write_rankings(ranked, rankings)
        fine_tuned = copy.deepcopy(palm).eval()
        reward_model = learn_reward(palm, rankings, timed(reward), output_dir / "reward", resume)
    except OutOfTime as ended:
        say(f"{ended} is not complete: continue with --resume --output-dir {output_dir}")
        return print(json.dumps({"stopped_early": "max_seconds", "stage": str(ended), "output_dir": str(output_dir)}))

    say("5. PPO")
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=reward_model,
        critic=reward_model,
        prompts=[f"{prompt}\n" for prompt in data.prompts],
        tokenizer=TOKENIZER,
        config=timed(ppo),
        output_dir=output_dir / "ppo",
        resume=resume,
    )
    judge = (fine_tuned, reward_model, annotator, data.held_out, ppo.sampling, num_samples)
    history = improve(trainer, measure(fine_tuned, *judge), lambda: measure(palm, *judge), measure_every)
    palm.save_pretrained(output_dir / "policy")
    reward_model.save_pretrained(output_dir / "reward_model")
    draw_curves(output_dir / "rlhf.png", history)
    show_what_next(output_dir)
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({**report(data.held_out, history), **trainer.run.ending, "seconds": seconds}))


if __name__ == "__main__":
    replace_unprintable_characters()
    try:
        tyro.cli(main)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"rlhf.py: {error}")
