"""What a step of reinforcement learning begins with: responses to the next prompts, and their scores."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.policy.actor_critic import ActorCritic
from palm_rlhf.policy.best_of_n import best_of_n
from palm_rlhf.policy.rewards import Rewards, Scores, check_rewards, score
from palm_rlhf.policy.rollout import ResponseSampling, Rollout, collect
from palm_rlhf.policy.turns import Environment, Turns
from palm_rlhf.training.epoch_sampler import EpochSampler
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.config_checks import check_environment
from palm_rlhf.training.rlhf.prompts import Prompts
from palm_rlhf.training.rlhf.reward_keywords import keyword_names, run_keywords
from palm_rlhf.training.run.run import Run
from palm_rlhf.training.run.sharding import whole


class Collector:
    """The part of `RLHFTrainer` that draws responses of its policy, and asks its rewards for scores."""

    actor_critic: ActorCritic
    run: Run

    def __init__(
        self,
        palm: PaLM,
        reward_model: Rewards,
        prompts: Prompts,
        tokenizer: Any,
        environment: Environment | None,
        config: PPOConfig,
    ):
        self.palm, self.reward_model, self.tokenizer, self.config = palm, reward_model, tokenizer, config
        self.environment = environment
        self.prompts, self.columns = prompts
        check_environment(config, environment)
        self.sampler = EpochSampler(len(self.prompts), config.seed)
        self._known_tokens = known_tokens(tokenizer, palm.num_tokens)
        names = keyword_names(self.columns, environment)
        check_rewards(reward_model, num_tokens=palm.num_tokens, keywords=names, weights=config.reward_weights)

    def collect(self) -> Rollout:
        """Draw this process's share of a step's responses to the next prompts."""
        config, run = self.config, self.run
        drawn = self.sampler.draw(config.rollouts_per_step // config.num_samples)
        if len(drawn) % run.num_processes:
            raise ValueError(f"{len(drawn)} prompts a step for {run.num_processes} processes; expected a multiple")
        rollout = self.respond(drawn[run.rank :: run.num_processes])
        assert rollout is not None
        return rollout

    @beartype
    def respond(self, prompts: list[int]) -> Rollout | None:
        """Draw responses to prompts, by their numbers; None to none. All processes take part: others may have some."""
        config = self.config
        with self.run.autocast(), whole(self.actor_critic):
            if not prompts:
                return None
            return collect(
                self.palm,
                [self.prompts[index] for index in prompts],
                self.sampling,
                columns={name: [values[index] for index in prompts] for name, values in self.columns.items()},
                num_samples=config.num_samples,
                batch_size=config.rollout_batch_size,
                finetune_scope=self.actor_critic.actor_scope,
                turns=self.turns,
            )

    @beartype
    def score(self, rollout: Rollout) -> Scores:
        """Return the scores of the responses by the reward, before any shaping."""
        scores = self.ask(self.reward_model, rollout, self.config.reward_weights)
        if not self.run.accelerator.reduce(scores.valid.sum(), "sum"):
            raise ValueError(
                f"the reward returned None for all responses of step {self.run.step + 1}; expected numbers"
            )
        return scores

    @beartype
    def ask(self, rewards: Rewards, rollout: Rollout, weights: Mapping[str, float] | None = None) -> Scores:
        """Return the scores of the responses by any rewards, which get all names that they ask for."""
        config = self.config
        with self.run.autocast():
            return score(
                rewards,
                rollout.sequences,
                tokenizer=self.tokenizer,
                eos_token=config.eos_token,
                batch_size=self.forward_size,
                weights=weights,
                timeout=config.reward_timeout,
                keywords={**rollout.keywords, **run_keywords(self.run.step, config.num_steps)},
            )

    @torch.no_grad()
    @beartype
    def generate(
        self,
        max_seq_len: int | None = None,
        *,
        prompt: Tensor,
        num_samples: int = 4,
        max_new_tokens: int | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return the best of `num_samples` responses to a prompt by the reward, sampled as in training: `n -> t`.

        `columns` has the prompt's value of each column, for reward functions that ask for them.
        """
        if (max_seq_len is None) == (max_new_tokens is None):
            raise ValueError(f"got max_seq_len={max_seq_len} and max_new_tokens={max_new_tokens}; expected one of them")
        with whole(self.actor_critic):
            return best_of_n(
                self.palm,
                self.reward_model,
                prompt.to(self.run.device),
                dataclasses.replace(self.sampling, max_seq_len=max_seq_len, max_new_tokens=max_new_tokens),
                num_samples=num_samples,
                tokenizer=self.tokenizer,
                weights=self.config.reward_weights,
                timeout=self.config.reward_timeout,
                columns=columns,
                keywords=run_keywords(self.run.step, self.config.num_steps),
                finetune_scope=self.actor_critic.actor_scope,
                turns=self.turns,
            )

    @property
    def sampling(self) -> ResponseSampling:
        """The distribution that responses are drawn from: without ids that the tokenizer lacks, but for the EOS."""
        return self.config.sampling.restricted_to(self._known_tokens)

    @property
    def turns(self) -> Turns | None:
        """How the policy talks with the environment, or None where there is none."""
        config = self.config
        if self.environment is None:
            return None
        turn_tokens = config.max_turn_tokens
        return Turns(self.environment, config.max_turns, max_turn_tokens=turn_tokens, tokenizer=self.tokenizer)

    @property
    def minibatch_rows(self) -> int:
        """Responses of one process behind an optimiser step."""
        return max(min(self.config.minibatch_size, self.config.rollouts_per_step) // self.run.num_processes, 1)

    @property
    def forward_size(self) -> int:
        """Responses in one forward of one process, with gradients or without."""
        return self.config.micro_batch_size or self.minibatch_rows
