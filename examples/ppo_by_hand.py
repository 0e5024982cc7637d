"""PPO for a language model on one page, from top to bottom, and the same learning by `RLHFTrainer`.

The steps are numbered as they follow each other in Ziegler et al. 2019 (arXiv:1909.08593, section 2), whose code is
OpenAI's lm-human-preferences, and in Ouyang et al. 2022 (arXiv:2203.02155, appendix C.4). Each step calls the library's
function that holds its formula; the loop around them is written out. It is for one process, computes in float32 and
saves nothing. `RLHFTrainer` adds all that, and ends with the same weights.

A small PaLM first learns dialogues (the English ones of the package chatterbot-corpus). Then it is rewarded for each
answer that is a question, and PPO teaches it to ask back.

    pip install "palm-rlhf[examples]" && python examples/ppo_by_hand.py
"""

import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from palm_rlhf.ops.cpu.threads import share_the_machine

share_the_machine()  # before torch is imported

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf import ActorCritic, PaLM, PPOConfig, RLHFTrainer
from palm_rlhf.algorithms.advantages import gae, token_rewards, whiten
from palm_rlhf.algorithms.kl import adapt_kl_coef
from palm_rlhf.algorithms.losses import policy_loss, value_loss
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.actor_critic import Reference
from palm_rlhf.policy.sequences import join, spoken
from palm_rlhf.training import LanguageModelTrainer, LMConfig

try:
    import chatterbot_corpus
    import yaml
except ImportError as error:
    sys.exit(f"ppo_by_hand.py: {error}; the dialogues come with: pip install palm-rlhf[examples]")

Reward = Callable[[list[str], list[str]], list[float]]  # prompts and responses, as texts -> a score for each
LONGEST_PROMPT = 80  # bytes


@dataclass(frozen=True)
class Settings:
    """The numbers of PPO. `PPOConfig` has the same names, and more of them."""

    num_steps: int = 10
    """Updates, each on responses of the newest policy."""

    rollouts_per_step: int = 64
    """Responses behind an update, one to each prompt."""

    minibatch_size: int = 16
    """Responses behind one optimiser step."""

    epochs: int = 4
    """Times that an update goes through its responses."""

    max_new_tokens: int = 40
    """Longest response, in tokens."""

    temperature: float = 0.7
    """Divides the logits, in sampling and wherever probabilities are compared."""

    missing_eos_penalty: float = 0.5
    """Taken from the score of a response that did not end within max_new_tokens."""

    learning_rate: float = 3e-4
    """Of AdamW, for policy and critic."""

    kl_coef: float = 0.05
    """Weight of the KL to the reference in the rewards, in the first step."""

    kl_target: float = 6.0
    """The KL, in nats a response, that this weight is steered to."""

    kl_horizon: int = 10_000
    """Responses over which the weight can grow or shrink by a fifth."""

    gamma: float = 1.0
    """Discount of later rewards."""

    gae_lambda: float = 0.95
    """Weight of long returns against the critic's values."""

    clip_eps: float = 0.2
    """Ratios of probabilities beyond 1 - clip_eps and 1 + clip_eps earn nothing more."""

    value_clip_eps: float = 0.2
    """How far a value may move in an update before it earns nothing more."""

    value_coef: float = 0.1
    """Weight of the critic's loss."""

    grad_clip: float = 1.0
    """Largest norm of the gradients of the policy, and of those of the critic."""

    seed: int = 0
    """Of everything that is drawn at random."""


def shuffled(num_prompts: int, seed: int) -> Iterator[int]:
    """Yield the numbers of prompts for ever: each once an epoch, in a new order."""
    for epoch in itertools.count():
        yield from np.random.default_rng([seed, epoch]).permutation(num_prompts).tolist()


def ppo(
    palm: PaLM, prompts: list[Tensor], reward: Reward, tokenizer: ByteTokenizer, s: Settings
) -> Iterator[dict[str, float]]:
    """Improve `palm` in place by a reward; yield the metrics of each update.

    Shapes: `b` rows, `n` tokens of prompt and response together, `t` tokens of a response, the actions.
    """
    # 1. Policy, critic and reference are the same model at the start. The critic is a copy of the policy with a head
    #    that gives each action a value (0 at first); the reference is a frozen copy. Dropout is off in all of them.
    model = ActorCritic(palm)
    reference = Reference(model)
    actor, critic = model.actor_parameters(), model.critic_parameters()
    fused = palm.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW([*actor, *critic], s.learning_rate, eps=1e-5, weight_decay=0.0, fused=fused)
    numbers, kl_coef = shuffled(len(prompts), s.seed), s.kl_coef
    torch.manual_seed(s.seed)

    for step in range(1, s.num_steps + 1):
        # 2. Draw responses to the next prompts. The probability that each token was drawn with is kept: it is the
        #    probability under the old policy, which the ratios of step 8 are relative to.
        chosen = [prompts[next(numbers)] for _ in range(s.rollouts_per_step)]
        responses, recorded = palm.generate(
            prompt=chosen,
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            eos_token=tokenizer.eos_token,
            return_logprobs=True,
        )
        sequences = join(chosen, responses)  # prompt and response in one row, padding at its end
        mask = sequences.action_mask  # b t, False for padding
        old_logprobs = pad_sequence(recorded, batch_first=True)  # b t

        # 3. Score each response as a whole. One that was cut off before its end-of-sequence token scores less.
        scores = torch.tensor(reward(*spoken(sequences, tokenizer, tokenizer.eos_token)), dtype=torch.float32)
        was_cut = torch.tensor([int(response[-1]) != tokenizer.eos_token for response in responses])
        shaped = scores - s.missing_eos_penalty * was_cut  # b

        # 4. The reference's log-probability and the critic's value of each action, rows of like length together.
        first_order = torch.randperm(len(sequences))
        ref_logprobs, values = torch.zeros_like(old_logprobs), torch.zeros_like(old_logprobs)
        with torch.no_grad():
            for rows in sequences.lengths.argsort(stable=True).split(s.minibatch_size):
                part = sequences.select(rows)
                width = part.action_mask.shape[1]
                ref_logprobs[rows, :width] = reference.logprobs(part, temperature=s.temperature).logprobs
                values[rows, :width] = model(part, policy=False).values

        # 5. The reward of an action is its part of -kl_coef * KL(policy, reference), and at the last action the score
        #    (Ziegler et al. 2019, equation 2).
        rewards = token_rewards(shaped, old_logprobs, ref_logprobs, mask, kl_coef=kl_coef)

        # 6. Generalised advantage estimation: how much better each action was than its value, and what that value
        #    should have been (Schulman et al. 2015, arXiv:1506.02438, equation 16).
        advantages, returns = gae(rewards, values, mask, gamma=s.gamma, gae_lambda=s.gae_lambda)

        # 7. Advantages of mean 0 and deviation 1 over all actions of the update.
        advantages = whiten(advantages, mask)

        # 8. Several epochs over the responses, in minibatches. (Schulman et al. 2017, arXiv:1707.06347, equations 7, 9)
        losses = []
        for epoch in range(s.epochs):
            order = torch.randperm(len(sequences)) if epoch else first_order
            for rows in order.split(s.minibatch_size):
                part = sequences.select(rows)
                part_mask = part.action_mask
                width = part_mask.shape[1]  # the columns that only longer responses of other rows need are left out
                now = model(part, temperature=s.temperature)
                of_policy = policy_loss(
                    now.logprobs,
                    old_logprobs[rows, :width],
                    advantages[rows, :width],
                    part_mask,
                    clip_eps=s.clip_eps,
                )
                of_critic = value_loss(
                    now.values,
                    values[rows, :width],
                    returns[rows, :width],
                    part_mask,
                    value_clip_eps=s.value_clip_eps,
                )
                loss = of_policy.loss + s.value_coef * of_critic.loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(actor, s.grad_clip)
                torch.nn.utils.clip_grad_norm_(critic, s.grad_clip)
                optimizer.step()
                losses.append(torch.stack([of_policy.loss, of_critic.loss, of_policy.clip_fraction]).detach())

        # 9. Steer the weight of the KL to its target (Ziegler et al. 2019, section 2.2).
        kl = masked_sum(old_logprobs - ref_logprobs, mask, dim=-1).mean().item()  # nats a response
        means = zip(("policy_loss", "value_loss", "clip_fraction"), torch.stack(losses).mean(dim=0).tolist())
        yield {"step": step, "score": scores.mean().item(), "kl": kl, "kl_coef": kl_coef, **dict(means)}
        kl_coef = adapt_kl_coef(kl_coef, kl, target=s.kl_target, horizon=s.kl_horizon, num_samples=s.rollouts_per_step)


def trainer_of(palm: PaLM, prompts: list[Tensor], reward: Reward, tokenizer: ByteTokenizer, s: Settings) -> RLHFTrainer:
    """Return the library's trainer with the same settings."""
    config = PPOConfig(**vars(s), eos_token=tokenizer.eos_token)
    return RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=prompts, tokenizer=tokenizer, config=config)


def read_dialogues() -> list[list[str]]:
    """Return the English dialogues of chatterbot-corpus, a text for each turn."""
    paths = sorted((Path(chatterbot_corpus.__file__).parent / "data/english").glob("*.yml"))
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]
    return [[" ".join(turn.split()) for turn in turns] for file in files for turns in file["conversations"]]


def asks_back(prompts: list[str], responses: list[str]) -> list[float]:
    """Return 1 for each response that is a question, and 0 for the others."""
    return [float(response.rstrip().endswith("?")) for response in responses]


def show(title: str, metrics: dict[str, float]) -> None:
    """Print one line of the learning curve."""
    numbers = "   ".join(f"{name} {metrics[name]:7.3f}" for name in ("score", "kl", "value_loss", "clip_fraction"))
    print(f"{title} step {metrics['step']:2d}   {numbers}", flush=True)


def main(settings: Settings = Settings(), pretraining_steps: int = 400) -> None:
    """PPO written out, then the same by RLHFTrainer: both print their learning, and their weights are compared."""
    started = time.perf_counter()
    tokenizer, dialogues = ByteTokenizer(), read_dialogues()
    turns = [[*tokenizer.encode(turn), tokenizer.eos_token] for dialogue in dialogues for turn in dialogue]
    firsts = dict.fromkeys(dialogue[0] for dialogue in dialogues)  # each once
    prompts = [torch.tensor([*tokenizer.encode(turn), tokenizer.eos_token]) for turn in firsts]
    prompts = [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT]
    print(f"pretraining on {len(dialogues)} dialogues; then PPO on {len(prompts)} prompts", flush=True)
    torch.manual_seed(settings.seed)
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=128, depth=3, heads=4, ff_mult=2)
    lm = LMConfig(seq_len=128, num_steps=pretraining_steps, optimizer="muon", learning_rate=1e-2, warmup_steps=20)
    text = np.array([token for turn in turns for token in turn], dtype=np.uint16)
    LanguageModelTrainer(palm, train_data=text, config=lm).train()

    copies = {"by hand": copy.deepcopy(palm), "RLHFTrainer": copy.deepcopy(palm)}
    for metrics in ppo(copies["by hand"], prompts, asks_back, tokenizer, settings):
        show("by hand    ", metrics)
    for metrics in trainer_of(copies["RLHFTrainer"], prompts, asks_back, tokenizer, settings).steps():
        show("RLHFTrainer", metrics)
    before, by_hand, by_trainer = (parameters_to_vector(model.parameters()) for model in (palm, *copies.values()))
    print(f"the weights moved by up to {(by_hand - before).abs().max():.2g}", end="; ")
    print(f"RLHFTrainer's differ from these by up to {(by_hand - by_trainer).abs().max():.2g}", end="; ")
    print(f"{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    tyro.cli(main)
