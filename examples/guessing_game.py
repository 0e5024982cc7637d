"""A game of several turns: a policy that starts from nothing learns to find a number by asking.

An umpire thinks of a number. The policy guesses, the umpire answers "higher" or "lower", and so on, until the policy
finds the number or has no guess left. The reward is 1 if it finds the number, and 0 otherwise; nothing else tells the
policy how to play. Three guesses find every number up to 7 if each guess halves the remaining numbers (4, then 2 or 6,
...); three different random guesses win three games of seven. The policy reads the umpire's answers, but they are in no
loss.

python examples/guessing_game.py --seed 0
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from palm_rlhf.ops.cpu.threads import share_the_machine

share_the_machine()  # before torch is imported

import torch
import tyro

from palm_rlhf.cli import replace_unprintable_characters
from palm_rlhf.commands.run_folder import say
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.rollout import Rollout, collect
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.trainer import RLHFTrainer

OPENING = "guess"


class Words:
    """A tokenizer whose tokens are the words of the game."""

    def __init__(self, highest: int):
        self.words = [OPENING, "higher", "lower", *map(str, range(1, highest + 1))]

    def encode(self, text: str) -> list[int]:
        """Return the ids of words separated by spaces."""
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """Return the words of ids, separated by spaces."""
        return " ".join(self.words[index] for index in ids)


def umpire(messages: list[dict], secret: int) -> str | None:
    """The environment: return the answer to the last guess, or None at the end of the game."""
    guess = messages[-1]["content"]
    if not guess.isdigit() or int(guess) == secret:  # a guess that is no number loses
        return None
    return "higher" if int(guess) < secret else "lower"


def found(completions: list[str], secret: list[int]) -> list[float]:
    """The reward: 1 if the last word of a game is the number, else 0."""
    return [float(text.split()[-1] == str(number)) for text, number in zip(completions, secret, strict=True)]


def rows_of(highest: int) -> list[dict]:
    """Return a prompt for each number of the umpire; only the umpire and the reward see the number."""
    return [{"prompt": OPENING, "secret": secret} for secret in range(1, highest + 1)]


@dataclass(frozen=True)
class NewPolicy:
    """The size of the policy, which starts untrained."""

    dim: int = 64  # Width of the residual stream.
    depth: int = 2  # Blocks.
    heads: int = 4  # Attention heads.
    dim_head: int = 16  # Width of a head.


# The defaults: three guesses, each of them one token.
TRAINING = PPOConfig(
    algorithm="grpo",
    num_steps=100,
    rollouts_per_step=112,
    num_samples=16,
    rollout_batch_size=256,
    minibatch_size=56,
    epochs=4,
    learning_rate=2e-3,
    min_lr_ratio=0.0,
    kl_coef=0.0,
    max_turns=3,
    max_turn_tokens=1,
    plot=False,
)


def fresh_policy(fresh: NewPolicy, num_tokens: int) -> PaLM:
    """Return a PaLM with nearly equal probabilities for all words."""
    palm = PaLM(num_tokens=num_tokens, **vars(fresh), logit_scale=0.5)
    torch.nn.init.normal_(palm.token_emb.weight, std=0.02)
    return palm


def play(palm: PaLM, trainer: RLHFTrainer, games: int) -> tuple[float, Rollout]:
    """Play so many games about each number, with the same random numbers each time; return the share won, and all."""
    rollout = collect(
        palm,
        trainer.prompts,
        trainer.sampling,
        num_samples=games,
        batch_size=1024,
        columns=trainer.columns,
        turns=trainer.turns,
        generator=torch.Generator().manual_seed(0),
    )
    last = [talk[-1]["content"] for talk in rollout.messages]
    return sum(found(last, rollout.columns["secret"])) / len(last), rollout


def show(rollout: Rollout, games: int) -> None:
    """Print one game about each number."""
    for talk, secret in list(zip(rollout.messages, rollout.columns["secret"], strict=True))[::games]:
        say(f"  {secret}: " + ", ".join(message["content"] for message in talk[1:]))


def main(
    highest: int = 7,
    games: int = 200,
    output_dir: Path | None = None,
    fresh: NewPolicy = NewPolicy(),
    training: tyro.conf.OmitArgPrefixes[PPOConfig] = TRAINING,
) -> None:
    """Train a policy to find a number by guessing. The last line of standard output is JSON.

    Args:
        highest: The highest number, from 1; numbers up to 15 need --max-turns 4.
        games: Games about each number before and after the training, to measure the policy.
        output_dir: Folder of checkpoints, metrics and samples; by default nothing is saved.
        fresh: Size of the policy.
        training: Training settings; --max-turns is the number of guesses in a game.
    """
    started = time.perf_counter()
    tokenizer = Words(highest)
    torch.manual_seed(training.seed)
    palm = fresh_policy(fresh, len(tokenizer.words))
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=found,
        prompts=rows_of(highest),
        tokenizer=tokenizer,
        environment=umpire,
        config=training,
        output_dir=output_dir,
    )
    before, rollout = play(palm, trainer, games)
    say(f"before: {before:.1%} of the games are won; a game about each number:")
    show(rollout, games)
    for metrics in trainer.steps():
        if metrics["step"] % max(training.num_steps // 10, 1) == 0:
            say(f"step {metrics['step']}: {metrics['score']:.1%} won, {metrics['turns']:.2f} guesses a game")
    after, rollout = play(palm, trainer, games)
    best = min((2**training.max_turns - 1) / highest, 1.0)  # each guess halves the remaining numbers
    say(f"after: {after:.1%} of the games are won, {best:.0%} at best:")
    show(rollout, games)
    result = {
        "seed": training.seed,
        "won_before": before,
        "won_after": after,
        "stderr": (after * (1 - after) / len(rollout.messages)) ** 0.5,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    replace_unprintable_characters()
    try:
        tyro.cli(main)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"guessing_game.py: {error}")
