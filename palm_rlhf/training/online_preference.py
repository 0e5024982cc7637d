"""The trainer on preferences between the policy's own responses, of which a reward prefers one: online DPO."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms.advantages import best_and_worst
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rewards import Rewards, Scores, check_rewards, named, score
from palm_rlhf.policy.rollout import Rollout, collect
from palm_rlhf.policy.sequences import spoken
from palm_rlhf.training.epoch_sampler import EpochSampler
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_data import Preference, UnpairedPreference
from palm_rlhf.training.preference_learner import PreferenceLearner
from palm_rlhf.training.rlhf.prompts import Prompt, Prompts, read_prompts
from palm_rlhf.training.rlhf.reward_keywords import OF_ROLLOUT, OF_RUN, run_keywords
from palm_rlhf.training.rlhf.sample_table import SampleTable
from palm_rlhf.training.rollout_config import RolloutConfig
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.loop import Loop

CURVES = {
    "score": "score",
    "valid_score": "held-out prompts: score",
    "valid_kl": "held-out prompts: KL to the reference (nats per response)",
    "loss": "loss",
    "accuracy": "accuracy",
    "response_length": "tokens of a response",
}
SHOWN = ("score", "loss", "accuracy")  # behind the progress bar


class OnlinePreferenceTrainer:
    """The trainer of a PaLM by DPO, or another loss of pairs, on its own responses (Guo et al. 2024).

    A step draws `rollouts.num_samples` responses to each of batch_size * grad_accum prompts of every process, scores
    them, makes a pair of the best and the worst response to a prompt, and takes one optimiser step on the pairs.

    Args:
        palm: the policy, trained in place; with `config.lora_r` its adapters "policy" are.
        reward_model: rewards in the forms of `RLHFTrainer`.
        prompt_token_ids, prompt_lengths, prompts, prompts_path: prompts in one of the forms of `read_prompts`.
        valid_prompts: texts, 1-d tensors or rows, whose responses are scored in evaluations and not learnt from.
        tokenizer: anything with `encode` and `decode`.
        reference: the model that the policy is held to; None: a frozen copy of the palm, or with `config.lora_r` the
            base below the adapters.
        config: the loss and the settings of the optimiser.
        rollouts: the settings of sampling and scoring.
        output_dir: the folder of all that is saved.
        resume: go on from the newest checkpoint in that folder, to the bit.
    """

    @beartype
    def __init__(
        self,
        palm: PaLM,
        *,
        reward_model: Rewards,
        prompt_token_ids: Tensor | Sequence[Tensor] | None = None,
        prompt_lengths: Tensor | None = None,
        prompts: Sequence[Prompt] | None = None,
        prompts_path: str | Path | None = None,
        valid_prompts: Sequence[Prompt] | None = None,
        tokenizer: Any = None,
        reference: PaLM | None = None,
        config: PreferenceConfig = PreferenceConfig(),  # noqa: B008 (it is frozen)
        rollouts: RolloutConfig = RolloutConfig(),  # noqa: B008
        output_dir: str | Path | None = None,
        resume: bool = False,
    ):
        self.palm, self.reward_model, self.tokenizer = palm, reward_model, tokenizer
        self.config, self.rollouts = config, rollouts
        rollouts.check_end()
        if not config.is_paired:
            raise ValueError(f"got the loss {config.loss}, expected one of pairs: the best against the worst response")
        given = (prompt_token_ids, prompt_lengths, prompts, prompts_path)
        train = self._cut(read_prompts(palm.num_tokens, *given, tokenizer))
        names = (*train.columns, *OF_ROLLOUT, *OF_RUN)
        check_rewards(reward_model, num_tokens=palm.num_tokens, keywords=names, weights=rollouts.reward_weights)
        self.sampler = EpochSampler(len(train.token_ids), config.seed)
        self.learner = PreferenceLearner(
            palm, reference, config, asks_reference=True, output_dir=output_dir, resume=resume
        )
        self.run, self.accelerator = self.learner.run, self.learner.run.accelerator
        self.prompts = {"train": train}
        if valid_prompts is not None:
            self.prompts["valid"] = self._held_out(valid_prompts)
        for reward in named(reward_model).values():
            if isinstance(reward, RewardModel):
                reward.to(self.run.device)
        self.sampling = rollouts.sampling.restricted_to(known_tokens(tokenizer, palm.num_tokens))
        self._resume()
        settings = (dataclasses.asdict(part) for part in (palm.config, config, rollouts))
        self.run.open_log({name: value for part in settings for name, value in part.items()}, CURVES)
        self.samples = SampleTable(self.run, rollouts.samples_kept, tokenizer)

    def _cut(self, prompts: Prompts) -> Prompts:
        room = self.config.max_seq_len - self.rollouts.max_new_tokens
        if room < 1:
            raise ValueError(
                f"got max_new_tokens={self.rollouts.max_new_tokens} with max_seq_len={self.config.max_seq_len}, "
                "expected room for a prompt before the longest response: raise max_seq_len"
            )
        return prompts._replace(token_ids=[prompt[-room:].cpu() for prompt in prompts.token_ids])

    def _held_out(self, prompts: Sequence[Prompt]) -> Prompts:
        if len(prompts) < self.run.num_processes:
            raise ValueError(
                f"got {len(prompts)} prompts to evaluate on, expected one or more for each of {self.run.num_processes} "
                "processes"
            )
        return self._cut(read_prompts(self.palm.num_tokens, prompts=prompts, tokenizer=self.tokenizer))

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return -(-self.config.num_epochs * self.sampler.num_items // self.learner.items_per_step)

    def train(self) -> Result:
        """Take the steps that are left, with a progress bar on standard error, and return the result of `finish`."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """Yield the metrics of one step after another until the schedule ends; evaluate and save when due.

        They are `score`, the mean of the responses by the reward, and `score/NAME` by each of several; `score_margin`,
        of the best over the worst response in a pair; `pair_rate`, the share of prompts whose responses differ in
        score, since the others make no pair; `response_length` in tokens; `eos_rate`, the share of responses that ended
        with an EOS; and, if there is a pair, the metrics of `PreferenceTrainer.steps`. Steps with an evaluation have
        the metrics of `evaluate` as `valid_score` and so on. Raises FloatingPointError where a loss, a gradient or a
        reward is not finite, RuntimeError where the reward raises.
        """
        self.palm.train()
        run = self.run
        with Loop(run, self.num_steps, SHOWN, progress_bar) as loop:
            while loop.goes_on:
                started = time.perf_counter()
                rollout = self.collect()
                scores = self.score(rollout)
                pairs, margins = self.pair(rollout, scores)
                metrics = self.update(pairs) | self._measured(rollout, scores)
                metrics["pair_rate"] = len(pairs) / self.learner.items_per_step
                metrics["epoch"] = self.sampler.num_drawn / self.sampler.num_items
                metrics["tokens_per_second"] = metrics.pop("num_tokens") / (time.perf_counter() - started)
                if margins:
                    metrics["score_margin"] = sum(margins) / len(margins)
                if run.is_due(self.rollouts.sample_every):
                    self.samples.write(rollout, scores, self.rollouts.eos_token)
                evaluates = "valid" in self.prompts and run.is_due(self.config.eval_every)
                if evaluates:
                    metrics |= self._validation()
                if loop.finish_step(metrics, must_log=evaluates):
                    self.save()
                yield metrics

    def finish(self) -> Result:
        """Evaluate on the held-out prompts, log the result, draw the curves and close the trackers.

        Returns the metrics of `evaluate` as `valid_score` and so on, `steps`, `seconds` with this evaluation included,
        and `stopped_early` where `max_seconds` ended the run before its last step.
        """
        started = time.perf_counter()
        return self.run.finish(self._validation(), started=started)

    def collect(self) -> Rollout:
        """Draw this process's share of a step's responses to the next prompts."""
        return self._drawn(self.prompts["train"], self.sampler.draw(self.learner.items_per_step))

    def _drawn(self, prompts: Prompts, places: Sequence[int], generator: torch.Generator | None = None) -> Rollout:
        """Draw responses to this process's share of the prompts with these numbers."""
        mine = places[self.run.rank :: self.run.num_processes]
        with self.run.autocast():
            return collect(
                self.palm,
                [prompts.token_ids[place] for place in mine],
                self.sampling,
                columns={name: [values[place] for place in mine] for name, values in prompts.columns.items()},
                num_samples=self.rollouts.num_samples,
                batch_size=self.rollouts.rollout_batch_size,
                finetune_scope=self.learner.policy.scope,
                generator=generator,
            )

    @beartype
    def score(self, rollout: Rollout) -> Scores:
        """Return the scores of the responses by the rewards, before any penalty."""
        with self.run.autocast():
            scores = score(
                self.reward_model,
                rollout.sequences,
                tokenizer=self.tokenizer,
                eos_token=self.rollouts.eos_token,
                batch_size=2 * self.config.batch_size,  # the rows of a forward with gradients
                weights=self.rollouts.reward_weights,
                timeout=self.rollouts.reward_timeout,
                keywords={**rollout.keywords, **run_keywords(self.step, self.num_steps)},
            )
        if not self.accelerator.reduce(scores.valid.sum(), "sum"):
            raise ValueError(f"the reward returned None for all responses of step {self.step + 1}; expected numbers")
        return scores

    @beartype
    def pair(self, rollout: Rollout, scores: Scores) -> tuple[list[Preference], list[float]]:
        """Return the best against the worst response to each prompt, and their differences in score, of all processes.

        Prompts whose responses have the same score, or are the same, make no pair.
        """
        shaped = scores.scores - self.rollouts.missing_eos_penalty * rollout.truncated.float()
        best, worst = best_and_worst(shaped, self.rollouts.num_samples, valid=scores.valid)
        margins = (shaped[best] - shaped[worst]).tolist()
        prompts, responses = spoken(rollout.sequences.to("cpu"))
        mine = [
            (Preference(prompts[better], responses[better], responses[worse]), margin)
            for better, worse, margin in zip(best.tolist(), worst.tolist(), margins, strict=True)
            if not torch.equal(responses[better], responses[worse])
        ]
        everyone = gather_object(mine)
        return [pair for pair, _ in everyone], [margin for _, margin in everyone]

    @beartype
    def update(self, pairs: list[Preference]) -> Metrics:
        """Take one optimiser step on the pairs; none where there is no pair."""
        reference, ref_logprobs = self.learner.reference, None
        if pairs and reference is not None:
            ref_logprobs = self.learner.logprobs(reference, pairs, as_in_steps=True)
        return self.learner.update(pairs, ref_logprobs, num_steps=self.num_steps)

    def _measured(self, rollout: Rollout, scores: Scores) -> Metrics:
        """Return means over the responses of all processes, and the number of their tokens."""
        kinds = {"score": scores, **{f"score/{name}": part for name, part in scores.by_name.items()}}
        sums: list[Tensor | int] = [rollout.sequences.num_actions, len(rollout.sequences), rollout.truncated.sum()]
        for part in kinds.values():
            sums += [masked_sum(part.scores.double(), part.valid), part.valid.sum()]
        totals = torch.tensor([float(total) for total in sums], dtype=torch.float64, device=self.run.device)
        num_tokens, count, truncated, *scored = self.accelerator.reduce(totals, "sum").tolist()
        means = {kind: total / number for kind, total, number in zip(kinds, scored[::2], scored[1::2]) if number}
        metrics = {**means, "response_length": num_tokens / count, "num_tokens": num_tokens}
        return metrics if self.rollouts.eos_token is None else {**metrics, "eos_rate": 1 - truncated / count}

    @beartype
    def evaluate(self, prompts: Sequence[Prompt] | None = None) -> Metrics:
        """Return `score`, `response_length`, `eos_rate` and `kl` of responses to the held-out prompts, or to others.

        The KL to the reference is in nats per response, and missing without a reference. The responses are drawn from
        the same random numbers each time.
        """
        if prompts is None and "valid" not in self.prompts:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_prompts, or evaluate(prompts)")
        held_out = self.prompts["valid"] if prompts is None else self._held_out(prompts)
        seed = self.config.seed + self.run.rank
        generator = torch.Generator(self.run.device).manual_seed(seed)
        rollout = self._drawn(held_out, range(len(held_out.token_ids)), generator)
        metrics = self._measured(rollout, self.score(rollout))
        del metrics["num_tokens"]
        if self.learner.reference is not None:
            responses = zip(*spoken(rollout.sequences.to("cpu")), strict=True)
            items = gather_object([UnpairedPreference(*pair, desirable=True) for pair in responses])
            logprobs, ref_logprobs = (
                self.learner.logprobs(model, items) for model in (self.learner.policy, self.learner.reference)
            )
            metrics["kl"] = float((logprobs - ref_logprobs).mean())
        return metrics

    def _validation(self) -> Metrics:
        return {f"valid_{key}": value for key, value in self.evaluate().items()} if "valid" in self.prompts else {}

    def save(self) -> None:
        """Write the checkpoint of this step, whole or not at all, and remove all but the newest `keep_checkpoints`.

        Raises OSError where the disk is full; the checkpoints before it stay.
        """
        with self.run.new_checkpoint({"sampler": self.sampler.state_dict()}) as folder:
            if folder is not None:
                self.learner.write_models(folder)

    def _resume(self) -> None:
        with self.run.newest_checkpoint() as saved:
            if saved is not None:
                self.sampler.load_state_dict(saved.state["sampler"])
                self.learner.read_models(saved.folder)
