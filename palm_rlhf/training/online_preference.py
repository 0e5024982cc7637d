"""The trainer on preferences between the policy's own responses: a reward says which is the better one."""

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
from palm_rlhf.training.rlhf.metrics import SampleTable
from palm_rlhf.training.rlhf.prompts import Prompt, Prompts, read_prompts
from palm_rlhf.training.rlhf.scoring import OF_ROLLOUT, OF_RUN, run_keywords
from palm_rlhf.training.rollout_config import RolloutConfig
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.optimizer import warmup_cosine

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
    """Trains a PaLM by DPO, or another loss of pairs, on its own responses (online DPO: Guo et al. 2024).

    A step draws `rollouts.num_samples` responses to each of batch_size * grad_accum prompts of every process, scores
    them, makes a pair of the best and the worst response to a prompt, and takes one optimiser step on the pairs.
    Rewards and prompts come in the forms that `RLHFTrainer` takes. The reference is `palm` as it is given, frozen in a
    copy, or with `lora_r` the base below the adapters, or another model. With `valid_prompts` (texts, 1-d tensors or
    rows), evaluations score responses to prompts that are not learnt from. All that is saved goes to
    `output_dir`; `resume=True` goes on from the newest checkpoint there, to the bit.
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
        self.run.load_newest(self._read_checkpoint)
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
        """Runs what is left of the schedule with a progress bar on standard error; returns what `finish` returns."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """The metrics of one step after another until the schedule ends; evaluates and saves when due.

        `score`, of the responses by the reward, and `score/NAME` by each of several; `score_margin`, of the best over
        the worst in a pair; `pair_rate`, the share of prompts whose responses score differently, for the others make
        no pair; `response_length` in tokens; `eos_rate`, the share of responses that ended by themselves; and over the
        pairs, where there is one, those of `PreferenceTrainer.steps`. After evaluations those of `evaluate` are there
        too, as `valid_score` and so on.
        FloatingPointError where a loss, a gradient or a reward is not finite, RuntimeError where the reward raises.
        """
        self.palm.train()
        return self.run.drive(
            self._step,
            lambda: self.step >= self.num_steps,
            self.save,
            num_steps=lambda: self.num_steps,
            show=lambda metrics: {key: metrics[key] for key in SHOWN if key in metrics},
            progress_bar=progress_bar,
        )

    def finish(self) -> Result:
        """Evaluates on the held-out prompts, logs that, draws the curves and closes the trackers.

        Returns what `evaluate` does as `valid_score` and so on, `steps`, `seconds` with this evaluation included, and
        `stopped_early` where `max_seconds` ended the run before its last step.
        """
        return self.run.finish(self._validation)

    def _step(self) -> Metrics:
        started = time.perf_counter()
        rollout = self.collect()
        scores = self.score(rollout)
        pairs, margins = self.pair(rollout, scores)
        metrics = self.update(pairs)
        metrics |= self._measured(rollout, scores)
        metrics |= {"pair_rate": len(pairs) / self.learner.items_per_step, "step": self.step}
        metrics["epoch"] = self.sampler.num_drawn / self.sampler.num_items
        metrics["tokens_per_second"] = metrics.pop("num_tokens") / (time.perf_counter() - started)
        if margins:
            metrics["score_margin"] = sum(margins) / len(margins)
        if self.run.is_due(self.rollouts.sample_every):
            self.samples.write(rollout, scores, self.rollouts.eos_token)
        if "valid" in self.prompts and self.run.is_due(self.config.eval_every):
            metrics |= {**self._validation(), "log": True}
        return metrics

    def collect(self) -> Rollout:
        """Draw this process's share of a step's responses to the next prompts."""
        return self._drawn(self.prompts["train"], self.sampler.draw(self.learner.items_per_step))

    def _drawn(self, prompts: Prompts, places: Sequence[int], generator: torch.Generator | None = None) -> Rollout:
        """Responses to this process's share of the prompts in some places."""
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
        """What the rewards say of the responses, before any penalty."""
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
        """The best against the worst response to each prompt, and how far their scores are apart, of all processes.

        Prompts whose responses score the same, or say the same, make no pair.
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
        """One optimiser step on the pairs; none where there is no pair."""
        factor = warmup_cosine(
            self.step, self.step / self.num_steps, self.config.warmup_steps, self.config.min_lr_ratio
        )
        if not pairs:
            self.run.step += 1
            return {"learning_rate": self.config.learning_rate * factor}
        reference = self.learner.reference
        ref_logprobs = None if reference is None else self.learner.logprobs(reference, pairs, as_in_steps=True)
        return self.learner.optimizer_step(pairs, ref_logprobs, factor)

    def _measured(self, rollout: Rollout, scores: Scores) -> Metrics:
        """Means over the responses of all processes, and the number of their tokens."""
        kinds = {"score": scores, **{f"score/{name}": part for name, part in scores.by_name.items()}}
        sums = [rollout.sequences.num_actions, len(rollout.sequences), rollout.truncated.sum()]
        for part in kinds.values():
            sums += [masked_sum(part.scores.double(), part.valid), part.valid.sum()]
        totals = torch.tensor([float(total) for total in sums], dtype=torch.float64, device=self.run.device)
        num_tokens, count, truncated, *scored = self.accelerator.reduce(totals, "sum").tolist()
        means = {kind: total / number for kind, total, number in zip(kinds, scored[::2], scored[1::2]) if number}
        metrics = {**means, "response_length": num_tokens / count, "num_tokens": num_tokens}
        return metrics if self.rollouts.eos_token is None else {**metrics, "eos_rate": 1 - truncated / count}

    @beartype
    def evaluate(self, prompts: Sequence[Prompt] | None = None) -> Metrics:
        """`score`, `response_length` and `eos_rate` of responses to the held-out prompts or others, and the `kl` of the
        policy to the reference, where there is one, in nats per response.

        The responses are drawn from the same random numbers each time.
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
        """Writes the checkpoint of this step, whole or not at all, and removes all but the newest `keep_checkpoints`.

        OSError where the disk is full; what was saved before stays.
        """
        self.run.save(self.learner.write_models, {"sampler": self.sampler.state_dict()})

    def _read_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.learner.read_models(folder)
