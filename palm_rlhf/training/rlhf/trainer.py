"""Reinforcement learning from human feedback: prompts and a reward in; a better policy out."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.algorithms.kl import adapt_kl_coef
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rewards import Rewards, Scores, move, named
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.sequences import batches_by_length, join
from palm_rlhf.policy.turns import Environment
from palm_rlhf.training.rlhf.checkpoint import resume_from_checkpoint, save_checkpoint
from palm_rlhf.training.rlhf.collector import Collector
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.config_checks import check_first_step, check_sharing
from palm_rlhf.training.rlhf.dynamic_sampling import Sampled, replace_equal_groups
from palm_rlhf.training.rlhf.evaluation import PANELS, make_evaluator
from palm_rlhf.training.rlhf.experience import Experience, in_row_order, make_experience, shape_scores
from palm_rlhf.training.rlhf.metrics import CURVES, SHOWN, UpdateStatistics, rollout_metrics
from palm_rlhf.training.rlhf.objective import objective
from palm_rlhf.training.rlhf.prompts import Prompt, check_room, read_prompts
from palm_rlhf.training.rlhf.running_moments import RunningMoments
from palm_rlhf.training.rlhf.sample_table import SampleTable
from palm_rlhf.training.rlhf.token_table import TokenTable
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.loop import Loop
from palm_rlhf.training.run.optimizer import adamw_groups, computes_below_float32, warmup_cosine
from palm_rlhf.training.run.run import Run
from palm_rlhf.training.run.sharding import make_root, whole


class RLHFTrainer(Collector):
    """The trainer of a PaLM by a reward: PPO with a critic, or GRPO or RLOO without, on one process or several.

    Args:
        palm: the policy, trained in place; with `config.actor_lora_r` its adapters "actor" are.
        reward_model: a RewardModel, or a function of a list of prompts and a list of completions that returns a number
            for each, or None where it cannot judge; or several by name, weighted by `config.reward_weights`. A function
            gets texts where there is a tokenizer, else 1-d tensors; further parameters of its signature are passed by
            name: the prompts' other columns, `prompt_ids`, `completion_ids`, `truncated` (lists), `step` (from 1),
            `trainer_state` as TRL has it, and with an environment `messages`.
        prompt_token_ids, prompt_lengths, prompts, prompts_path: the prompts in one of the forms of `read_prompts`.
        tokenizer: anything with `encode` and `decode`.
        critic: the model that the critic starts from; None: the palm.
        reference: the model that the KL is measured against; None: the palm as it is given, or, with a `kl_coef` of 0,
            no reference.
        environment: answers between the policy's turns, see `Turns`; its replies are read, and not learnt.
        eval_prompts: prompts, or their file, for an evaluation every `config.eval_every` steps.
        eval_reward: rewards that judge in evaluations alone, and are not learnt from.
        config: all settings that are numbers.
        output_dir: the folder of all that is saved.
        resume: go on from the newest checkpoint in that folder.
    """

    @beartype
    def __init__(
        self,
        *,
        palm: PaLM,
        reward_model: Rewards,
        prompt_token_ids: Tensor | Sequence[Tensor] | None = None,
        prompt_lengths: Tensor | None = None,
        prompts: Sequence[Prompt] | None = None,
        prompts_path: str | Path | None = None,
        tokenizer: Any = None,
        critic: PaLM | RewardModel | None = None,
        reference: PaLM | None = None,
        environment: Environment | None = None,
        eval_prompts: Sequence[Prompt] | str | Path | None = None,
        eval_reward: Rewards | None = None,
        config: PPOConfig = PPOConfig(),  # noqa: B008 (it is frozen)
        output_dir: str | Path | None = None,
        resume: bool = False,
    ):
        given = (prompt_token_ids, prompt_lengths, prompts, prompts_path)
        read = read_prompts(palm.num_tokens, *given, tokenizer)
        super().__init__(palm, reward_model, read, tokenizer, environment, config)
        self._shortest_prompt = min(map(len, self.prompts))
        self.evaluator = make_evaluator(self, eval_prompts, eval_reward)
        check_sharing(config, palm, named(reward_model).values(), reference)
        torch.manual_seed(config.seed)  # for the adapters, which are drawn here: the run seeds all else
        value = "none" if config.algorithm != "ppo" else "shared" if config.shared_trunk else "separate"
        self.actor_critic = ActorCritic(
            palm,
            critic,
            value=value,
            actor_lora_r=config.actor_lora_r,
            critic_lora_r=config.critic_lora_r,
            lora_targets=config.lora_targets,
            share_base=config.share_base and value == "separate",
        )
        measures_kl = config.initial_kl_coef > 0 or reference is not None
        self.reference = Reference(self.actor_critic, reference) if measures_kl else None
        self.kl_coef, self.score_moments = config.initial_kl_coef, RunningMoments()

        self.run = Run(config, output_dir=output_dir, resume=resume, may_shard=True)
        self.accelerator = self.run.accelerator
        self.actor_critic.to(self.run.device)
        rates = (config.learning_rate, config.critic_learning_rate or config.learning_rate)
        groups = zip(self._parameter_groups(), rates, strict=True)
        self.run.prepare(self.actor_critic, adamw_groups(groups, config.betas, config.eps, config.weight_decay))
        token = torch.zeros(1, dtype=torch.long, device=self.run.device)
        make_root(self.actor_critic, join([token], [token]))
        if self.reference is not None:
            self.reference.palm.to(self.run.device)
        for rewards in (reward_model, eval_reward or {}):
            move(rewards, self.run.device)
        resume_from_checkpoint(self)
        panels = {**CURVES, **(PANELS if self.evaluator else {})}
        self.run.open_log({**dataclasses.asdict(palm.config), **dataclasses.asdict(config)}, panels)
        self.samples = SampleTable(self.run, config.samples_kept, tokenizer)
        self.tokens = TokenTable(self.run, self.actor_critic, self.reference, config.samples_kept, tokenizer)

    @beartype
    def train(
        self,
        num_episodes: int | None = None,
        max_timesteps: int = 500,
        update_timesteps: int | None = None,
        max_batch_size: int | None = None,
        max_seq_len: int | None = None,
        eos_token: int | None = None,
        temperature: float | int | None = None,
    ) -> Result:
        """Take the steps with a progress bar on standard error, and return the metrics of the last one.

        `stopped_early` is among them where `max_seconds` ended the run before its last step. The config has the
        settings that are not given here. An episode has `max_timesteps` rollouts, a step has `update_timesteps`, and
        `max_batch_size` are drawn at once; `max_seq_len` counts the tokens of a prompt and its response together.
        """
        given: dict[str, Any] = {"rollouts_per_step": update_timesteps, "rollout_batch_size": max_batch_size,
                 "max_seq_len": max_seq_len, "eos_token": eos_token, "temperature": temperature}  # fmt: skip
        config = dataclasses.replace(self.config, **{name: value for name, value in given.items() if value is not None})
        self.config = config if num_episodes is None else config.of_episodes(num_episodes, max_timesteps)
        self.run.config = self.config
        metrics: Metrics = {}
        for latest in self.steps(progress_bar=True):
            metrics = latest
        self.run.log.close()
        return {**metrics, **self.run.ending}

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """Yield the metrics of one step after another until the run ends; save, evaluate and show samples when due.

        Raises FloatingPointError where a loss, a gradient or a reward is not finite, RuntimeError where the reward
        raises.
        """
        config, run = self.config, self.run
        check_room(self.prompts, config.max_seq_len)
        check_first_step(config, below_float32=self._below_float32)
        if self.evaluator:
            self.evaluator.begin(self)
        self.actor_critic.train()  # in eval mode, gradient checkpointing would be off
        with Loop(run, config.num_steps, SHOWN, progress_bar) as loop:
            while loop.goes_on:
                started = time.perf_counter()
                rollout, scores, all_scores, redraws = self.sample()
                experience = self.estimate_advantages(rollout, scores)
                metrics = {"step": run.step + 1, **redraws, **self.update(experience)}
                metrics |= rollout_metrics(
                    self.accelerator, rollout, all_scores, experience, started=started,
                    looks_for_eos=config.eos_token is not None, measures_kl=self.reference is not None
                )  # fmt: skip
                metrics |= {"kl_coef": self.kl_coef, **self._learning_rates()}
                if config.kl_target is not None:
                    steering = {"target": config.kl_target, "horizon": config.kl_horizon}
                    kl, count = metrics["kl"], config.rollouts_per_step
                    self.kl_coef = adapt_kl_coef(self.kl_coef, kl, num_samples=count, **steering)
                run.step += 1
                if run.is_due(config.sample_every):
                    self.samples.write(rollout, scores, config.eos_token)
                    self.tokens.write(experience, scores, config, self.sampling.truncation)
                is_best = evaluates = False
                if self.evaluator and (run.is_due(config.eval_every) or run.step >= config.num_steps):
                    metrics |= self.evaluator.evaluate(self)
                    evaluates, is_best = True, self.evaluator.best_step == run.step
                if loop.finish_step(metrics, must_log=evaluates, must_save=is_best):
                    self.save()
                yield metrics

    def sample(self) -> Sampled:
        """Return a step's responses and scores; with `max_redraws`, without groups whose scores are all equal."""
        rollout = self.collect()
        scores = self.score(rollout)
        if self.config.variant.max_redraws:
            return replace_equal_groups(self, rollout, scores)
        return Sampled(rollout, scores, scores, {})

    @torch.no_grad()
    @beartype
    def estimate_advantages(self, rollout: Rollout, scores: Scores) -> Experience:
        """Estimate how much better each action was than expected, by the critic or by the other responses."""
        config, sequences, reference = self.config, rollout.sequences, self.reference
        if self.kl_coef and reference is None:
            raise ValueError(f"kl_coef is {self.kl_coef} in a run begun with 0, without a reference; give it one")
        order = torch.randperm(len(sequences))
        options = {**self.sampling.truncation, "entropy_needs_grad": config.entropy_coef > 0}
        batches = batches_by_length(torch.tensor([*map(sum, sequences.host_lengths)]), self.forward_size)
        # Below float32 the log-probabilities of a row depend on how it is read: token by token or at once, and in which
        # batch. It is read again in the batches of the first epoch, whose ratios are then 1 until the policy moves.
        if again := self._below_float32:
            minibatches = order.split(self.minibatch_rows)
            batches = [rows for minibatch in minibatches for rows in minibatch.split(self.forward_size)]
        ours, theirs = [], []
        with self.run.autocast(), whole(self.actor_critic):
            for part in map(sequences.select, batches):
                ours.append(self.actor_critic(part, policy=again, values=config.algorithm == "ppo", **options))
                if reference is not None:
                    theirs.append(reference.logprobs(part, **options).logprobs)
        logprobs = in_row_order([output.logprobs for output in ours], batches) if again else rollout.logprobs
        has_values = self.actor_critic.value_head is not None
        return make_experience(
            config,
            rollout,
            scores,
            shape_scores(config, scores, rollout, self.score_moments, self.accelerator.gather),
            logprobs=logprobs,
            ref_logprobs=in_row_order(theirs, batches) if theirs else logprobs,
            values=in_row_order([output.values for output in ours], batches) if has_values else None,
            kl_coef=self.kl_coef,
            first_order=order,
            reduce=lambda total: self.accelerator.reduce(total, "sum"),
        )

    @beartype
    def update(self, experience: Experience) -> Metrics:
        """Optimise on the responses, `epochs` times, in minibatches; return the means of the losses' metrics."""
        config, run, statistics = self.config, self.run, UpdateStatistics(self.accelerator, self.run.readings)
        factor = warmup_cosine(run.step, run.step / config.num_steps, config.warmup_steps, config.min_lr_ratio)
        options = {**self.sampling.truncation, "entropy_needs_grad": config.entropy_coef > 0}
        kl_coef = self.kl_coef if config.kl_in_loss and self.reference is not None else None
        room = config.response_room(self._shortest_prompt)
        clipped_together = [group for group in self._parameter_groups() if group]
        for epoch in range(config.epochs):
            minibatches = experience.order(epoch).split(self.minibatch_rows)
            counts = self.accelerator.reduce(experience.counts(minibatches), "sum")
            for rows, (num_tokens, num_sequences), counted in zip(minibatches, counts, counts.tolist(), strict=True):
                if not counted[0]:  # no response of this minibatch counts
                    continue
                minibatch = experience.select(rows)
                with run.optimizer_step(rate_factor=factor, clip=clipped_together) as step:
                    micro_batches = torch.arange(len(rows)).split(self.forward_size)
                    for part in map(minibatch.select, step.micro_batches(micro_batches)):
                        with run.autocast():
                            output = run.model(part.sequences, **options)
                            loss, parts, ratio_min, ratio_max = objective(
                                config, part, output, kl_coef=kl_coef, num_tokens=num_tokens,
                                num_sequences=num_sequences, max_length=room
                            )  # fmt: skip
                        step.backward(loss)
                        statistics.add(parts, ratio_min, ratio_max)
                statistics.finish_step(step.norms)
                if config.early_stop_kl is not None and statistics.last("approx_kl") > config.early_stop_kl:
                    return statistics.means()
        return statistics.means()

    def save(self) -> None:
        """Write the checkpoint of this step, whole or not at all; the policy in it is one that PaLM opens.

        Raises OSError where the disk is full; the checkpoints before it stay.
        """
        save_checkpoint(self)

    def _learning_rates(self) -> Metrics:
        groups = self.run.optimizer.param_groups  # first the policy's, then the critic's
        rates = {"learning_rate": groups[0]["lr"]}
        return rates if self.actor_critic.value_head is None else rates | {"critic_learning_rate": groups[-1]["lr"]}

    @property
    def _below_float32(self) -> bool:
        return computes_below_float32(self.config.precision, self.palm.dtype, self.run.device)

    def _parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return self.actor_critic.actor_parameters(), self.actor_critic.critic_parameters()
