"""The whole recipe on real dialogues, offline: pretrain, fine-tune, rank answers, train a reward model, PPO.

The dialogues are the English ones of the package chatterbot-corpus. A program stands in for the people who rank:
VADER (Hutto and Gilbert 2014), which scores the sentiment of a text and so prefers friendly answers. Its score is the
gold score. The score of the reward model, which learns from VADER's rankings and which PPO maximises, is the proxy.

With --model the recipe begins with a pretrained chat model: rlhf_pretrained.py.

pip install "palm-rlhf[examples]" && python examples/rlhf.py --seed 0
"""

import copy
import importlib
import json
import sys
import time
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
    fine_tune,
    hold_out,
    pretrain,
    read_conversations,
    turn,
)
from rlhf_report import draw_curves, report, say
from rlhf_stages import (
    Bench,
    OutOfTime,
    ask,
    check_complete,
    folder_of_run,
    improve,
    learn_reward,
    rank,
    read_rankings,
    write_rankings,
)

from palm_rlhf.cli import replace_unprintable_characters
from palm_rlhf.commands.run_folder import quoted, show_next
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rollout import ResponseSampling
from palm_rlhf.training.language_model_config import LMConfig
from palm_rlhf.training.ranked_data import Ranking
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
        """Sample answers to each prompt and rank them, best first."""
        turns, generator = [turn(prompt) for prompt in prompts], torch.Generator().manual_seed(seed)
        rollout, answers = ask(palm, turns, sampling, TOKENIZER, num_samples, generator=generator)
        return rank(turns, rollout, answers, self.score(answers))


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

    With --model smollm2, or another chat model, the recipe begins with that model; --model smollm2 --help has its
    options.

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
    output_dir = folder_of_run(output_dir, resume)

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
        torch.manual_seed(seed)  # of the head, which is the same in a resumed run
        reward_model = RewardModel(palm, pooling="mean")  # every word of an answer counts, not only the last one
        say("4. learning the rankings")
        learn_reward(reward_model, rankings, timed(reward), output_dir / "reward", resume)
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
    unseen, gold = [turn(prompt) for prompt in data.held_out], lambda answers, _: annotator.score(answers)
    bench = Bench(unseen, TOKENIZER, ppo.sampling, num_samples, gold, reward_model, fine_tuned)
    history = improve(trainer, bench.measure(fine_tuned), lambda: bench.measure(palm), measure_every)
    palm.save_pretrained(output_dir / "policy")
    reward_model.save_pretrained(output_dir / "reward_model")
    draw_curves(output_dir / "rlhf.png", history)
    show_what_next(output_dir)
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({**report(data.held_out, history), **trainer.run.ending, "seconds": seconds}))


def recipe(arguments: list[str]) -> Callable[..., None]:
    """Return the recipe that the arguments ask for: that of a pretrained model if they name one by --model."""
    if any(argument.split("=")[0] == "--model" for argument in arguments):
        return importlib.import_module("rlhf_pretrained").main
    return main


if __name__ == "__main__":
    replace_unprintable_characters()
    try:
        tyro.cli(recipe(sys.argv[1:]))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"rlhf.py: {error}")
