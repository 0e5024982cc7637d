"""An iteration of PPO - rollouts, scores, update - beside one of the PyPI package palm-rlhf-pytorch's trainer.

python benchmarks/ppo_step.py                 # 64 prompts, 64 new tokens, minutes; needs the extra palm-rlhf[bench]
python benchmarks/ppo_step.py --gpu           # on a GPU, ours alone: PPO and GRPO of 139M parameters, 128 rollouts of
                                              # 128 tokens in bfloat16, one epoch: the time of each part of a step

On a CPU both have models of one size, and answer each prompt once, at full length, with the same epochs and
minibatches. That package trains adapters by default, and with an option all of policy and critic, as ours does here;
with AdamW here, and its own optimiser there. Ours also asks a reference.
"""

import copy
import io
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from side_by_side import alternate, report, speedup, surroundings
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from training_models import SIZES

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.model.config import PaLMConfig

Iteration = Callable[[], None]
OURS = {
    "palm-rlhf, float32": {"precision": "float32", "shared_trunk": False},
    "palm-rlhf, bfloat16": {"precision": "bf16", "shared_trunk": False},
    "palm-rlhf, bfloat16, shared trunk": {"precision": "bf16", "shared_trunk": True},
}
THEIRS = {"palm-rlhf-pytorch": True, "palm-rlhf-pytorch without adapters": False}  # adapters are its default


@dataclass(frozen=True)
class Task:
    """What an iteration has to do."""

    prompts: list[Tensor]
    new_tokens: int
    epochs: int
    minibatch: int


def make_prompts(number: int, shortest: int, longest: int) -> list[Tensor]:
    """Prompts of random bytes without 0, which is padding there, their lengths spread evenly."""
    lengths = torch.linspace(shortest, longest, number).round().int().tolist()
    return [torch.randint(1, 256, (length,)) for length in lengths]


def check_parity(theirs: nn.Module, their_reward: nn.Module, prompts: list[Tensor]) -> None:
    """Raise AssertionError unless both compute the same logits, and the same scores, of the same weights."""
    ours = PaLM.from_palm_rlhf_pytorch(theirs.state_dict()).eval()
    reward = RewardModel.from_palm_rlhf_pytorch(their_reward.state_dict()).eval()
    for prompt in prompts[:4]:
        tokens = prompt.unsqueeze(0)
        prompt_mask = torch.arange(tokens.shape[1]).unsqueeze(0) < 8
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-4)
            scores = [model(tokens, prompt_mask=prompt_mask) for model in (reward, their_reward)]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    print("parity: the logits and the scores of prompts agree to 1e-4 in float32")


def our_iteration(palm: PaLM, reward: RewardModel, task: Task, precision: str, shared_trunk: bool) -> Iteration:
    """A step of our trainer."""
    config = PPOConfig(
        num_steps=1_000_000,
        rollouts_per_step=len(task.prompts),
        rollout_batch_size=len(task.prompts),
        max_new_tokens=task.new_tokens,
        minibatch_size=task.minibatch,
        epochs=task.epochs,
        shared_trunk=shared_trunk,
        precision=precision,
    )
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=task.prompts, config=config)
    steps = trainer.steps()

    def iteration() -> None:
        metrics = next(steps)
        assert metrics["response_length"] == task.new_tokens, metrics
        assert metrics["optimizer_steps"] == task.epochs * -(-len(task.prompts) // task.minibatch), metrics

    return iteration


def their_iteration(palm: nn.Module, reward: nn.Module, task: Task, lora: bool) -> Iteration:
    """An episode of that package's trainer with one update at its end.

    It draws prompts with replacement and gives all one length with their response; here it takes them in turn, and each
    response has the tokens that ours has.
    """
    from palm_rlhf_pytorch import RLHFTrainer as TheirTrainer
    from palm_rlhf_pytorch import ppo

    number = len(task.prompts)
    trainer = TheirTrainer(
        palm=palm,
        reward_model=reward,
        prompt_token_ids=pad_sequence(task.prompts, batch_first=True),
        actor_lora=lora,
        critic_lora=lora,
        epochs=task.epochs,
        minibatch_size=task.minibatch,
    )
    turns = itertools.cycle(range(number))
    ppo.randrange = lambda *_: next(turns)
    generate, lengths = trainer.actor_critic_generate, []

    def respond(state: Tensor, max_seq_len: int, **options) -> tuple:
        out = generate(state, state.shape[-1] + task.new_tokens, **options)
        lengths.append((state.shape[-1], out.actions.shape[-1]))
        return out

    trainer.actor_critic_generate = respond

    def iteration() -> None:
        lengths.clear()
        with silence():
            trainer.train(num_episodes=1, max_timesteps=number, update_timesteps=number)
        assert lengths == [(len(prompt), task.new_tokens) for prompt in task.prompts], lengths

    return iteration


@contextmanager
def silence() -> Iterator[None]:
    """Keeps losses and progress bars, one for each prompt, from the terminal."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


PARTS = ("rollouts", "scores", "advantages", "update", "step")


def seconds_of_parts(
    algorithm: str, model: PaLMConfig, prompts: list[Tensor], new_tokens: int, minibatch: int, rounds: int
) -> dict[str, float]:
    """The median seconds of each part of a step, and of the whole, after one that compiles and captures what it needs.

    Between the parts Python waits for the GPU, which an ordinary step does not.
    """
    num_samples = 1 if algorithm == "ppo" else 4
    config = PPOConfig(
        algorithm=algorithm,
        num_steps=1_000_000,
        num_samples=num_samples,
        rollouts_per_step=len(prompts),
        rollout_batch_size=len(prompts),
        max_new_tokens=new_tokens,
        minibatch_size=minibatch,
        epochs=1,
        precision="bf16",
    )
    trainer = RLHFTrainer(
        palm=PaLM.from_config(model),
        reward_model=lambda prompts, completions: [index % 7 / 7 for index in range(len(completions))],
        prompt_token_ids=prompts,
        config=config,
    )
    wait = torch.cuda.synchronize if trainer.run.device.type == "cuda" else lambda: None

    def timed(part: Callable, *args: object) -> tuple[float, Any]:
        wait()
        started = time.perf_counter()
        result = part(*args)
        wait()
        return time.perf_counter() - started, result

    times: list[dict[str, float]] = []
    for _ in range(1 + rounds):
        seconds = [0.0] * 4
        seconds[0], rollout = timed(trainer.collect)
        seconds[1], scores = timed(trainer.score, rollout)
        seconds[2], experience = timed(trainer.estimate_advantages, rollout, scores)
        seconds[3], _ = timed(trainer.update, experience)
        times.append(dict(zip(PARTS, [*seconds, sum(seconds)], strict=True)))
    return {name: statistics.median(part[name] for part in times[1:]) for name in PARTS}


def on_gpu(model: PaLMConfig, num_prompts: int, new_tokens: int, minibatch: int, rounds: int) -> None:
    """Print the parts of a step of PPO and of GRPO, and a last line of JSON."""
    title = f"steps of RLHF, {num_prompts} rollouts of {new_tokens} tokens, bfloat16, one epoch"
    print(f"{title}\n{'':8}{''.join(f'{name:>12}' for name in PARTS)}  seconds")
    prompts = [torch.randint(model.num_tokens, (64,)) for _ in range(num_prompts)]
    found = {}
    for algorithm in ("ppo", "grpo"):
        found[algorithm] = seconds_of_parts(algorithm, model, prompts, new_tokens, minibatch, rounds)
        print(f"{algorithm:8}{''.join(f'{found[algorithm][name]:12.3f}' for name in PARTS)}", flush=True)
    print(json.dumps({"benchmark": title, **surroundings(), "seconds": found}))


def main(
    gpu: bool = False,
    dim: int = 256,
    depth: int = 4,
    num_prompts: int = 64,
    shortest: int = 16,
    longest: int = 48,
    new_tokens: int = 64,
    epochs: int = 1,
    minibatch: int = 16,
    rounds: int = 3,
) -> None:
    """Time an iteration of ours in float32 and bfloat16, with a shared trunk too, and of palm-rlhf-pytorch in float32.

    Args:
        gpu: Time the parts of a step of ours on a GPU instead; of the options below, rounds alone counts then.
        dim: Width of the model.
        depth: Blocks.
        num_prompts: Prompts answered in an iteration, once each.
        shortest: Tokens of the shortest prompt.
        longest: Tokens of the longest prompt.
        new_tokens: Tokens of every response.
        epochs: Times that the update goes through the responses; 1 is the default there.
        minibatch: Responses behind an optimiser step.
        rounds: Timed rounds.
    """
    if gpu:
        if not torch.cuda.is_available():
            print(f"no GPU: torch {torch.__version__} sees none, so nothing was timed")
            sys.exit(3)
        on_gpu(SIZES["139M"].config, num_prompts=128, new_tokens=128, minibatch=32, rounds=rounds)
        return

    from palm_rlhf_pytorch import PaLM as TheirPaLM
    from palm_rlhf_pytorch import RewardModel as TheirRewardModel

    warnings.filterwarnings("ignore", category=FutureWarning)  # their use of torch.backends.cuda.sdp_kernel
    torch.manual_seed(0)
    prompts = make_prompts(num_prompts, shortest, longest)
    theirs = TheirPaLM(num_tokens=256, dim=dim, depth=depth)
    their_reward = TheirRewardModel(theirs, use_lora=False).eval()
    check_parity(theirs, their_reward, prompts)

    def iterations(some: list[Tensor]) -> dict[str, Iteration]:
        task, made = Task(some, new_tokens, epochs, minibatch), {}
        for name, options in OURS.items():
            palm = PaLM(num_tokens=256, dim=dim, depth=depth)
            made[name] = our_iteration(palm, RewardModel(palm), task, **options)
        for name, lora in THEIRS.items():
            made[name] = their_iteration(copy.deepcopy(theirs), their_reward, task, lora)
        return made

    alternate(iterations(prompts[:2]), rounds=1, warmup=0)  # a whole iteration would be a long warm-up
    seconds = alternate(iterations(prompts), rounds=rounds, warmup=0)
    ratios = {f"{name}, than {other}": speedup(seconds[name], seconds[other]) for name in OURS for other in THEIRS}
    title = (
        f"PPO iteration, dim {dim}, depth {depth}, {num_prompts} prompts of {shortest} to {longest} tokens, "
        f"{new_tokens} new tokens, epochs {epochs}, minibatches of {minibatch}"
    )
    report(title, seconds, ratios, "palm-rlhf-pytorch")


if __name__ == "__main__":
    tyro.cli(main)
