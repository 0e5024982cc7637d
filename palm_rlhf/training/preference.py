"""The trainer on preferences that people have given: no reward model, no sampling."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from safetensors.torch import load_file, save_file
from torch import Tensor

from palm_rlhf.model.palm import PaLM
from palm_rlhf.training.epoch_sampler import EpochSampler
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_data import Preferences, checked_preferences
from palm_rlhf.training.preference_learner import PreferenceLearner
from palm_rlhf.training.ranked_data import fingerprint
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.optimizer import computes_below_float32, warmup_cosine

CURVES = {"loss": "loss", "accuracy": "accuracy", "reward_margin": "reward of the chosen minus the rejected"}


class PreferenceTrainer:
    """Trains a PaLM on preferences: DPO, IPO, SimPO or ORPO on pairs, KTO on single responses (`config.loss`).

    The data is of `Preference`, for KTO of `UnpairedPreference`. The reference is `palm` as it is given, or another
    model; SimPO and ORPO have none. What it gives the responses is computed once, before the first step, and saved with
    the checkpoints: no second copy of the model is made, but for KTO, which asks the reference in every step about
    prompts with responses to others (with `lora_r` the base below the adapters answers, and there is no copy). With
    `lora_r` adapters named "policy" are trained: sample with `finetune_scope="policy"`, or merge them. Dropout is
    switched off in `palm` for good. All that is saved goes to `output_dir`; `resume=True` goes on from the newest
    checkpoint there, if there is one, with the reference that it has. Seeds the random generators of Python, NumPy and
    PyTorch. Runs on one process or those of `accelerate`. The user's loop over `steps()` is the callback.
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
        self.run.load_newest(self._read_checkpoint)
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
        """What the reference gives the responses of the data so called, before the first step.

        Below float32 what it says of a row depends on the batch. It reads the training data in those of the first
        epoch, so that a policy that starts as its reference has log-ratios of exactly 0.
        """
        items = self.items[name]
        start = self.learner.policy if self.reference is None else self.reference
        if name != "train" or not computes_below_float32(self.config.precision, self.palm.dtype, self.run.device):
            return self.learner.logprobs(start, items)
        num_steps = -(-len(items) // self.items_per_step)
        drawn = EpochSampler(len(items), self.config.seed).draw(num_steps * self.items_per_step)
        said = self.learner.logprobs(start, [items[index] for index in drawn], as_in_steps=True)
        places = torch.tensor(drawn[: len(items)]).argsort()
        return said[:, places]

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
        """Runs what is left of the schedule with a progress bar on standard error; returns what `finish` returns."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """The metrics of one optimiser step after another until the schedule ends; evaluates and saves when due.

        Means over the step's pairs, before its update: `loss`; `accuracy`, the share whose chosen response has the
        higher reward; `chosen_rewards` and `rejected_rewards`; `reward_margin`, their difference; `chosen_logprobs` and
        `rejected_logprobs`, in nats a response; for orpo, or with `nll_coef`, `nll` of the chosen in nats a token. A
        reward is beta * (logprob - ref_logprob), for ipo of the means over tokens, for simpo simpo_beta times the mean
        log-probability of a token, for orpo the log odds. Of kto the chosen are the desirable responses and the
        rejected the undesirable ones (a step without any does not report them), the accuracy is the share with a reward
        on its side of beta * `z_ref`, the estimated KL to the reference in nats a response.
        Then `epoch`, `learning_rate`, `grad_norm` before clipping and `tokens_per_second`. After evaluations the
        means over the validation data are there too, as `valid_loss` and so on. FloatingPointError where the loss or
        the gradient is not finite.
        """
        self.palm.train()
        return self.run.drive(
            self._optimizer_step,
            lambda: self.step >= self.num_steps,
            self.save,
            num_steps=lambda: self.num_steps,
            show=lambda metrics: {key: metrics[key] for key in ("loss", "accuracy")},
            progress_bar=progress_bar,
        )

    def finish(self) -> Result:
        """Evaluates on the validation data, logs that, draws the curves and closes the trackers.

        Returns what `evaluate` does as `valid_loss` and so on, `steps`, `seconds` with this evaluation included, and
        `stopped_early` where `max_seconds` ended the run before its last step.
        """
        return self.run.finish(self._validation)

    def _optimizer_step(self) -> Metrics:
        """One step on batch_size * grad_accum items of every process, every loss divided by the items of all."""
        factor = warmup_cosine(
            self.step, self.step / self.num_steps, self.config.warmup_steps, self.config.min_lr_ratio
        )
        items, drawn = self.items["train"], self.sampler.draw(self.items_per_step)
        ref_logprobs = self.ref_logprobs["train"][:, drawn] if self.config.has_reference else None
        metrics = self.learner.optimizer_step([items[index] for index in drawn], ref_logprobs, factor)
        metrics["epoch"] = self.sampler.num_drawn / self.sampler.num_items
        if "valid" in self.items and self.run.is_due(self.config.eval_every):
            metrics |= {**self._validation(), "log": True}
        return metrics

    @beartype
    def evaluate(self, data: Preferences | None = None) -> Metrics:
        """`loss`, `accuracy` and the other means that `steps` describes, over the validation data or other `data`.

        Other data needs a reference that is still there: one given to the trainer, the base below the adapters, or the
        copy that kto has. Losses without a reference need none.
        """
        if data is None and "valid" not in self.items:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_data, or evaluate(data)")
        if data is None:
            return self.learner.evaluate(self.items["valid"], self.ref_logprobs.get("valid"))
        if self.config.has_reference and self.reference is None:
            raise ValueError(
                "the model that training started from has changed: give the trainer a reference, or this as valid_data"
            )
        items = self._checked(data, "data")
        has_reference = self.reference is not None
        return self.learner.evaluate(items, self.learner.logprobs(self.reference, items) if has_reference else None)

    def _validation(self) -> Metrics:
        return {f"valid_{key}": value for key, value in self.evaluate().items()} if "valid" in self.items else {}

    def save(self) -> None:
        """Writes the checkpoint of this step, whole or not at all, and removes all but the newest `keep_checkpoints`.

        OSError where the disk is full; what was saved before stays.
        """

        def write_models(folder: Path) -> None:
            self.learner.write_models(folder)
            if self.config.has_reference:
                save_file(self.ref_logprobs, folder / "reference.safetensors")

        self.run.save(write_models, {"sampler": self.sampler.state_dict(), "data": self.fingerprints})

    def _read_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        for name, digest in self.fingerprints.items():
            if state["data"].get(name) != digest:
                raise ValueError(
                    f"{name}_data has changed since {folder}, or is cut to another max_seq_len, but what the reference "
                    f"gives it was computed before the run: resume with the same pairs"
                )
        self.learner.read_models(folder)
        if self.config.has_reference:
            self.ref_logprobs = load_file(folder / "reference.safetensors")
