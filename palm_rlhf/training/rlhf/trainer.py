"""Reinforcement learning from human feedback: prompts and a reward in; a better policy out."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rewards import Rewards, Scores, check_rewards, move
from palm_rlhf.policy.rollout import ResponseSampling, Rollout, best_of_n, collect
from palm_rlhf.policy.turns import Environment, Turns
from palm_rlhf.training.epoch_sampler import EpochSampler
from palm_rlhf.training.rlhf.checkpoint import RunningMoments, read_policy, write_policy
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.credit import assign_credit, counted_responses, shape_scores, steered_kl_coef
from palm_rlhf.training.rlhf.dynamic_sampling import Sampled, replace_equal_groups
from palm_rlhf.training.rlhf.evaluation import PANELS, make_evaluator
from palm_rlhf.training.rlhf.experience import Experience, by_length, first_forwards, in_batches
from palm_rlhf.training.rlhf.metrics import CURVES, SHOWN, SampleTable, UpdateStatistics, rollout_metrics
from palm_rlhf.training.rlhf.objective import objective
from palm_rlhf.training.rlhf.prompts import Prompt, check_room, read_prompts
from palm_rlhf.training.rlhf.scoring import keyword_names, run_keywords, score_rollout
from palm_rlhf.training.rlhf.token_table import TokenTable
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.optimizer import adamw_groups, computes_below_float32, warmup_cosine
from palm_rlhf.training.run.run import Run
from palm_rlhf.training.run.sharding import full_state, whole


class RLHFTrainer:
    """Improves a PaLM by a reward: PPO with a critic, or GRPO or RLOO without, on one process or several.

    `palm` is trained in place (with `config.actor_lora_r`, its adapters "actor" are). The reward is a RewardModel, or a
    function of a list of prompts and a list of completions that returns a number for each, or None where it cannot say,
    or several by name, weighted by `config.reward_weights`. A function gets texts where there is a `tokenizer`
    (anything with `encode` and `decode`), else 1-d tensors, and by name what else its signature asks for: the prompts'
    other columns, and `prompt_ids`, `completion_ids`, `truncated` (lists), `step` (from 1) and `trainer_state`, as TRL
    gives it, with an environment `messages` too. Prompts are ids, as a list of 1-d tensors or as `b n` with
    `prompt_lengths` where rows are padded on the right, or texts, or rows with other columns, or a file of one of these
    (`read_prompts`). `critic` is what the critic starts from, `reference` what the KL is measured against: both the
    given palm if None; with a `kl_coef` of 0 there is no reference unless one is given. `environment` answers between
    the policy's turns, see `palm_rlhf.policy.turns.Turns`; its replies are read, and not learnt. `eval_prompts`, in the
    forms of `prompts` or a file, are evaluated on every `config.eval_every` steps, also by `eval_reward`, which is not
    learnt from. All that is saved goes to `output_dir`; `resume=True` goes on from the newest checkpoint there.
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
        self.palm, self.reward_model, self.tokenizer, self.config = palm, reward_model, tokenizer, config
        self.environment = environment
        given = (prompt_token_ids, prompt_lengths, prompts, prompts_path)
        self.prompts, self.columns = read_prompts(palm.num_tokens, *given, tokenizer)
        config.check_environment(environment)
        self._shortest_prompt = min(map(len, self.prompts))
        self.sampler = EpochSampler(len(self.prompts), config.seed)
        self._known_tokens = known_tokens(tokenizer, palm.num_tokens)
        names = keyword_names(self.columns, environment)
        check_rewards(reward_model, num_tokens=palm.num_tokens, keywords=names, weights=config.reward_weights)
        self.evaluator = make_evaluator(self, eval_prompts, eval_reward)
        torch.manual_seed(config.seed)  # for the adapters, which are drawn here: the run seeds all else
        self.actor_critic = ActorCritic(
            palm,
            critic,
            value="none" if config.algorithm != "ppo" else "shared" if config.shared_trunk else "separate",
            actor_lora_r=config.actor_lora_r,
            critic_lora_r=config.critic_lora_r,
        )
        measures_kl = config.initial_kl_coef > 0 or reference is not None
        self.reference = Reference(self.actor_critic, reference) if measures_kl else None
        self.kl_coef, self.score_moments = config.initial_kl_coef, RunningMoments()

        self.run = Run(
            self.actor_critic, self._make_optimizer, config, output_dir=output_dir, resume=resume, may_shard=True
        )
        self.accelerator = self.run.accelerator
        if self.reference is not None:
            self.reference.palm.to(self.run.device)
        for rewards in (reward_model, eval_reward or {}):
            move(rewards, self.run.device)
        self.run.load_newest(self._read_checkpoint)
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
        """Runs the steps with a progress bar on standard error, and returns the metrics of the last.

        `stopped_early` is among them where `max_seconds` ended the run before its last step. Without arguments they are
        those of the config. An episode is `max_timesteps` rollouts, a step comes every `update_timesteps` of them
        (None: `rollouts_per_step`), `max_batch_size` are drawn at once, of prompts and responses of `max_seq_len`
        tokens together.
        """
        given = {
            "rollouts_per_step": update_timesteps,
            "rollout_batch_size": max_batch_size,
            "max_seq_len": max_seq_len,
            "eos_token": eos_token,
            "temperature": temperature,
        }
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
        """The metrics of one step after another until the run ends; saves and shows samples when due.

        FloatingPointError where a loss, a gradient or a reward is not finite, RuntimeError where the reward raises.
        """
        check_room(self.prompts, self.config.max_seq_len)
        self.config.check_end()
        below_float32 = computes_below_float32(self.config.precision, self.palm.dtype, self.run.device)
        self.config.check_arithmetic(below_float32=below_float32)
        if self.evaluator:
            self.evaluator.begin(self)
        return self.run.drive(
            self._step,
            lambda: self.run.step >= self.config.num_steps,
            self.save,
            num_steps=lambda: self.config.num_steps,
            show=lambda metrics: {name: metrics[name] for name in SHOWN if name in metrics},
            progress_bar=progress_bar,
        )

    def _step(self) -> Metrics:
        started = time.perf_counter()
        rollout, scores, all_scores, sampling_metrics = self.sample()
        experience = self.estimate_advantages(rollout, scores)
        metrics = {**sampling_metrics, **self.update(experience)}
        seen = {"looks_for_eos": self.config.eos_token is not None, "measures_kl": self.reference is not None}
        metrics |= rollout_metrics(self.accelerator, rollout, all_scores, experience, started, **seen)
        groups = self.run.optimizer.param_groups  # those of the policy, then those of the critic
        metrics |= {"kl_coef": self.kl_coef, "learning_rate": groups[0]["lr"]}
        if self.actor_critic.value_head is not None:
            metrics["critic_learning_rate"] = groups[-1]["lr"]
        if self.config.kl_target is not None:
            self.kl_coef = steered_kl_coef(self.config, self.kl_coef, metrics["kl"])
        self.run.step += 1
        if self.run.is_due(self.config.sample_every):
            self.samples.write(rollout, scores, self.config.eos_token)
            self.tokens.write(experience, scores, self.config, self.sampling.truncation)
        if self.evaluator and (self.run.is_due(self.config.eval_every) or self.run.step >= self.config.num_steps):
            metrics |= self.evaluator.evaluate(self)
        return {"step": self.run.step, **metrics}

    def sample(self) -> Sampled:
        """A step's responses with their scores; with `max_redraws`, without groups whose scores are all equal."""
        rollout = self.collect()
        return replace_equal_groups(
            self.config, self.run, rollout, self.score(rollout), self.sampler.draw, self._respond, self._score
        )

    def collect(self) -> Rollout:
        """Draw this process's share of a step's responses to the next prompts."""
        c, run = self.config, self.run
        drawn = self.sampler.draw(c.rollouts_per_step // c.num_samples)
        if len(drawn) % run.num_processes:
            raise ValueError(f"{len(drawn)} prompts a step for {run.num_processes} processes; expected a multiple")
        return self._respond(drawn[run.rank :: run.num_processes])

    def _respond(self, prompts: list[int]) -> Rollout | None:
        """The responses to prompts, by their numbers; None to none. Other processes may have some: all must call."""
        c = self.config
        with self.run.autocast(), whole(self.actor_critic):
            if not prompts:
                return None
            return collect(
                self.palm,
                [self.prompts[index] for index in prompts],
                self.sampling,
                columns={name: [values[index] for index in prompts] for name, values in self.columns.items()},
                num_samples=c.num_samples,
                batch_size=c.rollout_batch_size,
                finetune_scope=self.actor_critic.actor_scope,
                turns=self.turns,
            )

    @beartype
    def score(self, rollout: Rollout) -> Scores:
        """What the rewards say of the responses, before any shaping."""
        scores = self._score(rollout)
        if not self.accelerator.reduce(scores.valid.sum(), "sum"):
            raise ValueError(
                f"the reward returned None for all responses of step {self.run.step + 1}; expected numbers"
            )
        return scores

    def _score(self, rollout: Rollout) -> Scores:
        with self.run.autocast():
            return score_rollout(self, self.reward_model, rollout, self.config.reward_weights)

    @torch.no_grad()
    @beartype
    def estimate_advantages(self, rollout: Rollout, scores: Scores) -> Experience:
        """How much better each action was than expected, by the critic or by the other responses to the prompt."""
        c, sequences, reference = self.config, rollout.sequences, self.reference
        order = torch.randperm(len(sequences))
        options = {**self.sampling.truncation, "entropy_needs_grad": c.entropy_coef > 0}
        # Below float32 what is said of a row depends on how it is read, token by token or at once and in which batch.
        # It is read again in the batches of the first epoch, whose ratios are to be 1 until the policy moves.
        again = computes_below_float32(c.precision, self.palm.dtype, self.run.device)
        batches = by_length(sequences, self.forward_size)
        if again:
            batches = first_forwards(order.to(self.run.device), self._minibatch_rows, self.forward_size)
        with self.run.autocast(), whole(self.actor_critic):
            asked = {"policy": again, "values": c.algorithm == "ppo", **options}
            logprobs, _, values = in_batches(lambda part: self.actor_critic(part, **asked), sequences, batches)
            logprobs = ref_logprobs = rollout.logprobs if logprobs is None else logprobs
            if reference is not None:
                (ref_logprobs,) = in_batches(lambda part: reference.logprobs(part, **options)[:1], sequences, batches)
        if self.kl_coef and reference is None:
            raise ValueError(f"kl_coef is {self.kl_coef} in a run begun with 0, without a reference; give it one")
        credit = assign_credit(
            c,
            shape_scores(c, scores, rollout, self.score_moments, self.accelerator.gather),
            scores.valid,
            logprobs=logprobs,
            sampler_logprobs=rollout.logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            action_mask=sequences.action_mask & scores.valid.unsqueeze(-1),
            kl_coef=self.kl_coef,
            counted=counted_responses(c, scores, rollout),
            reduce=lambda total: self.accelerator.reduce(total, "sum"),
        )
        said = credit.action_mask, logprobs, ref_logprobs, credit.values, credit.advantages, credit.returns
        return Experience(sequences, *said, first_order=order)

    @beartype
    def update(self, experience: Experience) -> Metrics:
        """Optimise on the responses, `epochs` times, in minibatches; returns the means of what the losses report."""
        c, statistics = self.config, UpdateStatistics(self.accelerator)
        for epoch in range(c.epochs):
            for rows in experience.order(epoch).split(self._minibatch_rows):
                self._optimizer_step(experience.select(rows.to(self.run.device)), statistics)
                if c.early_stop_kl is not None and statistics.last("approx_kl") > c.early_stop_kl:
                    return statistics.means()
        return statistics.means()

    def _optimizer_step(self, batch: Experience, statistics: UpdateStatistics) -> None:
        """One optimiser step on a minibatch of every process, each loss divided by what all of them hold."""
        c, run, mask = self.config, self.run, batch.action_mask
        num_tokens, num_sequences = self.accelerator.reduce(torch.stack([mask.sum(), mask.any(dim=-1).sum()]), "sum")
        if not num_tokens:  # no response of this minibatch counts
            return

        def loss_of(rows: Tensor) -> Tensor:
            part = batch.select(rows)
            output = run.model(part.sequences, entropy_needs_grad=c.entropy_coef > 0, **self.sampling.truncation)
            loss, parts, *extremes = objective(
                c,
                part,
                output,
                kl_coef=self.kl_coef if c.kl_in_loss and self.reference is not None else None,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                max_length=c.max_new_tokens if c.max_seq_len is None else c.max_seq_len - self._shortest_prompt,
            )
            statistics.add(parts, *extremes)
            return loss

        progress = run.step / c.num_steps
        _, norms = run.optimizer_step(
            torch.arange(len(batch.sequences), device=run.device).split(self.forward_size),
            loss_of,
            rate_factor=warmup_cosine(run.step, progress, c.warmup_steps, c.min_lr_ratio),
            clip=[group for group in self._parameter_groups() if group],
        )
        statistics.add_norms(dict(zip(("grad_norm", "critic_grad_norm"), norms, strict=False)))

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
        """The best of `num_samples` responses by the reward: `n -> t`, the prompt left out; sampled as in training.

        `columns` are the prompt's, a value each, for reward functions that ask for them.
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

    def save(self) -> None:
        """Writes the checkpoint of this step, whole or not at all; the policy in it is one that PaLM opens.

        OSError where the disk is full; what was saved before stays.
        """
        state = {
            "sampler": self.sampler.state_dict(),
            "kl_coef": self.kl_coef,
            "score_moments": self.score_moments.state_dict(),
            "evaluation": self.evaluator and self.evaluator.state_dict(),
        }
        tensors = full_state(self.actor_critic)
        best = self.evaluator and self.evaluator.best
        self.run.save(lambda folder: write_policy(folder, self.actor_critic, self.reference, tensors), state, best)

    def _read_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        read_policy(folder, self.actor_critic, self.reference)
        if self.config.continues_kl_coef(state["config"]):
            self.kl_coef = state["kl_coef"]
        self.score_moments.load_state_dict(state["score_moments"])
        if self.evaluator and state.get("evaluation"):
            self.evaluator.load_state_dict(state["evaluation"])

    @property
    def sampling(self) -> ResponseSampling:
        """The distribution that responses are drawn from: without ids that the tokenizer lacks, but for the EOS."""
        return self.config.sampling.restricted_to(self._known_tokens)

    @property
    def turns(self) -> Turns | None:
        """How the policy talks with the environment, or None where there is none."""
        c = self.config
        if self.environment is None:
            return None
        return Turns(self.environment, c.max_turns, max_turn_tokens=c.max_turn_tokens, tokenizer=self.tokenizer)

    @property
    def _minibatch_rows(self) -> int:
        """Responses of one process behind an optimiser step."""
        return max(min(self.config.minibatch_size, self.config.rollouts_per_step) // self.run.num_processes, 1)

    @property
    def forward_size(self) -> int:
        """Responses in one forward of one process: what the update has room for with gradients, there is without."""
        return self.config.micro_batch_size or self._minibatch_rows

    def _parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return self.actor_critic.actor_parameters(), self.actor_critic.critic_parameters()

    def _make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        rates = (c.learning_rate, c.critic_learning_rate or c.learning_rate)
        return adamw_groups(zip(self._parameter_groups(), rates, strict=True), c.betas, c.eps, c.weight_decay)
