"""The trainer on preferences of people, without a reward model and without sampling: DPO and its kin."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from beartype import beartype
from safetensors.torch import load_file
from torch import Tensor

from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.weights_writer import write_tensors
from palm_rlhf.training.epoch_sampler import EpochSampler
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_data import Preferences, checked_preferences
from palm_rlhf.training.preference_learner import PreferenceLearner
from palm_rlhf.training.ranked_data import fingerprint
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.loop import Loop
from palm_rlhf.training.run.optimizer import computes_below_float32

CURVES = {"loss": "loss", "accuracy": "accuracy", "reward_margin": "reward of the chosen minus the rejected"}
SHOWN = ("loss", "accuracy")  # behind the progress bar


class PreferenceTrainer:
    """The trainer of a PaLM on preferences: DPO, IPO, SimPO or ORPO on pairs, KTO on single responses.

    The reference's log-probabilities of the responses are computed once, before the first step, and saved with the
    checkpoints, so that no second copy of the model is needed. KTO alone asks the reference in every step, about
    prompts with responses to others; with `config.lora_r` the base below the adapters answers, without a copy. With
    `config.lora_r` adapters "policy" are trained: sample with `finetune_scope="policy"`, or merge them. Dropout is
    switched off in `palm` for good. Runs on one process, or on those of `accelerate launch`. Seeds the random
    generators of Python, NumPy and PyTorch. Loop over `steps` to act between steps, or call `train`.

    Args:
        palm: the policy, trained in place.
        train_data: items to learn from, each a `Preference`, for KTO an `UnpairedPreference`.
        valid_data: items for evaluations.
        reference: the model that the policy is held to; None: the palm as it is given. SimPO and ORPO have none.
        config: all settings that are numbers.
        output_dir: the folder of all that is saved.
        resume: go on from the newest checkpoint in `output_dir`, if there is one, with its reference.
    """

    @beartype
    def __init__(
        self,
        palm: PaLM,
        *,
        train_data: Preferences,
        valid_data: Preferences | None = None,
        reference: PaLM | None = None,
        config: PreferenceConfig = PreferenceConfig(),  # noqa: B008 (it is frozen)
        output_dir: str | Path | None = None,
        resume: bool = False,
    ):
        self.palm, self.config = palm, config
        data = {"train": train_data} | ({} if valid_data is None else {"valid": valid_data})
        self.items = {name: self._checked(items, f"{name}_data") for name, items in data.items()}
        self.fingerprints = {name: fingerprint([i.comparison for i in items]) for name, items in self.items.items()}
        self.sampler = EpochSampler(len(train_data), config.seed)

        self.learner = PreferenceLearner(
            palm, reference, config, asks_reference=not config.is_paired, output_dir=output_dir, resume=resume
        )
        self.run, self.reference = self.learner.run, self.learner.reference
        self.accelerator = self.run.accelerator
        if not config.is_paired and self.items_per_step < 2:
            raise ValueError("a step has one response, expected two or more for the loss kto: raise batch_size")
        self.ref_logprobs: dict[str, Tensor] = {}
        self._resume()
        if config.has_reference and not self.ref_logprobs:
            self.ref_logprobs = {name: self._reference_logprobs(name) for name in self.items}
        panels = {
            key if name == "train" else f"valid_{key}": f"{name}: {CURVES[key]}" for name in data for key in CURVES
        }
        self.run.open_log({**dataclasses.asdict(palm.config), **dataclasses.asdict(config)}, panels)

    def _checked(self, items: Preferences, name: str) -> Preferences:
        limits = {"num_tokens": self.palm.num_tokens, "max_seq_len": self.config.max_seq_len}
        return checked_preferences(items, name, paired=self.config.is_paired, **limits)

    def _reference_logprobs(self, name: str) -> Tensor:
        """Return the reference's log-probabilities of the responses in "train" or "valid", before the first step.

        Below float32 they depend on how rows are batched. The training data is read in the batches of the first epoch,
        so that a policy that starts as its reference has log-ratios of exactly 0.
        """
        items = self.items[name]
        start = self.learner.policy if self.reference is None else self.reference
        if name != "train" or not computes_below_float32(self.config.precision, self.palm.dtype, self.run.device):
            return self.learner.logprobs(start, items)
        num_steps = -(-len(items) // self.items_per_step)
        drawn = EpochSampler(len(items), self.config.seed).draw(num_steps * self.items_per_step)
        logprobs = self.learner.logprobs(start, [items[index] for index in drawn], as_in_steps=True)
        places = torch.tensor(drawn[: len(items)]).argsort()
        return logprobs[:, places]

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.config.num_epochs * self.sampler.num_items // self.items_per_step)

    @property
    def items_per_step(self) -> int:
        """Pairs, or single responses, of one optimiser step, over all micro-batches and processes."""
        return self.learner.items_per_step

    def train(self) -> Result:
        """Take the steps that are left, with a progress bar on standard error, and return the result of `finish`."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """Yield the metrics of one optimiser step after another until the schedule ends; evaluate and save when due.

        Means over the step's pairs, before its update: `loss`; `accuracy`, the share whose chosen response has the
        higher reward; `chosen_rewards` and `rejected_rewards`; `reward_margin`, their difference; `chosen_logprobs` and
        `rejected_logprobs`, in nats per response; for orpo, or with `nll_coef`, `nll` of the chosen in nats per token.
        A reward is beta * (logprob - ref_logprob); for ipo, of the means over tokens; for simpo, simpo_beta times the
        mean log-probability of a token; for orpo, the log odds. With kto the chosen are the desirable responses, and
        the rejected the undesirable ones (a step without any has no metrics of them). Its accuracy is the share of
        desirable responses with a reward above beta * `z_ref` and of others with one below; `z_ref` is the estimated
        KL to the reference, in nats per response.
        The others are `epoch`, `learning_rate`, `grad_norm` before clipping and `tokens_per_second`. Steps with an
        evaluation have the means over the validation data as `valid_loss` and so on. Raises FloatingPointError where
        the loss or the gradient is not finite.
        """
        self.palm.train()
        with Loop(self.run, self.num_steps, SHOWN, progress_bar) as loop:
            while loop.goes_on:
                metrics = self.update()
                evaluates = "valid" in self.items and self.run.is_due(self.config.eval_every)
                if evaluates:
                    metrics |= self._validation()
                if loop.finish_step(metrics, must_log=evaluates):
                    self.save()
                yield metrics

    def finish(self) -> Result:
        """Evaluate on the validation data, log the result, draw the curves and close the trackers.

        Returns the metrics of `evaluate` as `valid_loss` and so on, `steps`, `seconds` with this evaluation included,
        and `stopped_early` where `max_seconds` ended the run before its last step.
        """
        started = time.perf_counter()
        return self.run.finish(self._validation(), started=started)

    def update(self) -> Metrics:
        """Take one optimiser step on the next batch_size * grad_accum items of every process."""
        items, drawn = self.items["train"], self.sampler.draw(self.items_per_step)
        ref_logprobs = self.ref_logprobs["train"][:, drawn] if self.config.has_reference else None
        metrics = self.learner.update([items[index] for index in drawn], ref_logprobs, num_steps=self.num_steps)
        metrics["epoch"] = self.sampler.num_drawn / self.sampler.num_items
        return metrics

    @beartype
    def evaluate(self, data: Preferences | None = None) -> Metrics:
        """Return `loss`, `accuracy` and the other means of `steps` over the validation data or other `data`.

        Other data needs a reference that training has not changed: a model given to the trainer, the base below the
        adapters, or the copy of kto. Losses without a reference need none.
        """
        if data is None and "valid" not in self.items:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_data, or evaluate(data)")
        if data is None:
            return self.learner.evaluate(self.items["valid"], self.ref_logprobs.get("valid"))
        if self.config.has_reference and self.reference is None:
            raise ValueError(
                "the model that training started from has changed: give the trainer a reference, or this as valid_data"
            )
        items, reference = self._checked(data, "data"), self.reference
        return self.learner.evaluate(items, None if reference is None else self.learner.logprobs(reference, items))

    def _validation(self) -> Metrics:
        return {f"valid_{key}": value for key, value in self.evaluate().items()} if "valid" in self.items else {}

    def save(self) -> None:
        """Write the checkpoint of this step, whole or not at all, and remove all but the newest `keep_checkpoints`.

        Raises OSError where the disk is full; the checkpoints before it stay.
        """
        state = {"sampler": self.sampler.state_dict(), "data": self.fingerprints}
        with self.run.new_checkpoint(state) as folder:
            if folder is not None:
                self.learner.write_models(folder)
                if self.config.has_reference:
                    write_tensors(self.ref_logprobs, folder / "reference.safetensors")

    def _resume(self) -> None:
        with self.run.newest_checkpoint() as saved:
            if saved is None:
                return
            self.sampler.load_state_dict(saved.state["sampler"])
            for name, digest in self.fingerprints.items():
                if saved.state["data"].get(name) != digest:
                    raise ValueError(
                        f"{name}_data has changed since {saved.folder}, or is cut to another max_seq_len, but the "
                        f"reference's log-probabilities of it were computed before the run: resume with the same pairs"
                    )
            self.learner.read_models(saved.folder)
            if self.config.has_reference:
                self.ref_logprobs = load_file(saved.folder / "reference.safetensors")
