"""The trainer of language models: token arrays in; a PaLM, its metrics and its checkpoints out."""

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.palm import PaLM
from palm_rlhf.training.bits_per_byte import total_nats
from palm_rlhf.training.run.config import LMConfig
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.muon import muon
from palm_rlhf.training.run.optimizer import adamw, warmup_cosine
from palm_rlhf.training.run.run import Run
from palm_rlhf.training.token_windows import Tokens, WindowSampler, token_arrays

CURVES = {
    "loss": "training loss (nats per token)",
    "bits_per_byte": "validation (bits per byte)",
    "learning_rate": "learning rate",
}


class LanguageModelTrainer:
    """Trains a PaLM to predict the next token, on one process or on the processes of `accelerate launch`.

    `train_data` and `valid_data` are 1-d arrays of token ids (memory-mapped ones are read as needed), or several, mixed
    by `weights`; `valid_bytes` is how many bytes of text the validation tokens stand for, as many as tokens if None.
    All that is saved goes to `output_dir`; `resume=True` goes on from the newest checkpoint there, if there is one.
    Seeds the random generators of Python, NumPy and PyTorch. The user's loop over `steps()` is the callback.
    """

    @beartype
    def __init__(
        self,
        palm: PaLM,
        *,
        train_data: Tokens | Sequence[Tokens],
        valid_data: Tokens | Sequence[Tokens] | None = None,
        config: LMConfig = LMConfig(),  # noqa: B008 (it is frozen)
        output_dir: str | Path | None = None,
        weights: Sequence[float | int] | None = None,
        valid_bytes: int | Sequence[int] | None = None,
        resume: bool = False,
    ):
        self.palm, self.config = palm, config
        if not palm.config.causal:
            raise ValueError("got a PaLM with causal=False, which sees what it is to predict; expected causal=True")
        train_arrays = token_arrays(train_data, palm.num_tokens, "train_data")
        self.sampler = WindowSampler(train_arrays, config.seq_len, config.seed, weights)
        self.valid_arrays = None if valid_data is None else token_arrays(valid_data, palm.num_tokens, "valid_data", 1)
        self.valid_bytes = sum(valid_bytes) if isinstance(valid_bytes, Sequence) else valid_bytes

        self.run = Run(palm, self._make_optimizer, config, output_dir=output_dir, resume=resume)
        self.accelerator = self.run.accelerator
        self.averaged = copy.deepcopy(palm).requires_grad_(False) if config.ema_decay > 0 else None
        if config.compile:
            self.run.model = torch.compile(self.run.model)
        self.run.load_newest(self._read_models)
        self.run.open_log({**dataclasses.asdict(palm.config), **dataclasses.asdict(config)}, CURVES)

    def _make_optimizer(self, palm: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        make = {"adamw": adamw, "muon": muon}[c.optimizer]
        return make(palm, c.learning_rate, c.betas, c.eps, c.weight_decay)

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def elapsed(self) -> float:
        return self.run.elapsed

    def train(self) -> Result:
        """Runs what is left of the schedule with a progress bar on standard error; returns what `finish` returns."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """The metrics of one optimiser step after another until the schedule ends; evaluates and saves when due.

        `loss` is in nats per token (with the z-loss), `elapsed` in seconds; `bits_per_byte` is there after evaluations.
        FloatingPointError where the loss or the gradient is not finite.
        """
        self.palm.train()
        return self.run.drive(
            self._optimizer_step,
            lambda: self.progress >= 1,
            self.save,
            num_steps=lambda: self.config.num_steps,
            show=lambda metrics: {"loss": metrics["loss"], "tokens/s": metrics["tokens_per_second"]},
            progress_bar=progress_bar,
        )

    def finish(self) -> Result:
        """Evaluates on all validation data, logs that, draws the curves and closes the trackers.

        Returns `bits_per_byte` (where there is validation data), `steps`, `seconds` with this evaluation included, and
        `stopped_early` where `max_seconds` ended the run before its last step.
        """
        return self.run.finish(lambda: {"bits_per_byte": self.evaluate()} if self.valid_arrays else {})

    @property
    def progress(self) -> float:
        """The part of the schedule that is done, from 0 to 1."""
        return self.step / self.config.num_steps

    @property
    def trained(self) -> PaLM:
        """The model to evaluate, sample from and save: the running average of the weights where there is one."""
        return self.palm if self.averaged is None else self.averaged

    def _optimizer_step(self) -> Metrics:
        """One step on batch_size * grad_accum windows of every process, every loss divided by the targets of all."""
        config, run, started = self.config, self.run, time.perf_counter()
        factor = warmup_cosine(self.step, self.progress, config.warmup_steps, config.min_lr_ratio)
        windows = self.sampler.draw(config.batch_size * config.grad_accum * run.num_processes)
        num_targets = sum(window.num_targets for window in windows)
        denominator = torch.tensor(num_targets, device=run.device)

        def loss_of(tokens: Tensor, loss_mask: Tensor | None) -> Tensor:
            tokens, loss_mask = tokens.to(run.device), None if loss_mask is None else loss_mask.to(run.device)
            return run.model(tokens, return_loss=True, loss_mask=loss_mask, loss_denominator=denominator)

        mine = windows[run.rank :: run.num_processes]
        batches = [mine[first : first + config.batch_size] for first in range(0, len(mine), config.batch_size)]
        loss, (norm,) = run.optimizer_step(
            batches, lambda batch: loss_of(*self.sampler.read(batch)), rate_factor=factor
        )
        self._update_average()
        run.step += 1
        metrics = {
            "step": self.step,
            "loss": loss,
            "learning_rate": config.learning_rate * factor,
            "grad_norm": norm,
            "tokens_per_second": num_targets / (time.perf_counter() - started),
        }
        if self.valid_arrays and run.is_due(config.eval_every):
            metrics |= {"bits_per_byte": self.evaluate(max_tokens=config.eval_tokens), "log": True}
        return metrics

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.averaged is not None:
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))  # the first weights fade fast
            for average, parameter in zip(self.averaged.parameters(), self.palm.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)

    @beartype
    def evaluate(
        self,
        data: Tokens | Sequence[Tokens] | None = None,
        num_bytes: int | None = None,
        *,
        max_tokens: int | None = None,
    ) -> float:
        """Bits per byte of `trained` on the validation data, or other `data`, or on the first `max_tokens` or so of it.

        Each token is predicted once, with at least `eval_context` tokens before it where there are as many. `num_bytes`
        is what `data` stands for, as many as tokens if None.
        """
        if data is None and self.valid_arrays is None:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_data, or evaluate(data)")
        arrays = self.valid_arrays if data is None else token_arrays(data, self.palm.num_tokens, "data", 1)
        num_bytes = self.valid_bytes if data is None else num_bytes
        size = sum(map(len, arrays))
        if max_tokens is not None and max_tokens < size:
            arrays = [array[: math.ceil(len(array) * max_tokens / size)] for array in arrays]
        nats = total_nats(
            self.trained,
            arrays,
            seq_len=self.config.seq_len,
            context=self.config.eval_context,
            batch_size=self.config.batch_size,
            shard=(self.run.rank, self.run.num_processes),
            autocast=self.run.autocast,
        )
        bytes_per_token = 1.0 if num_bytes is None else num_bytes / size
        return sum(gather_object([nats])) / math.log(2) / (sum(map(len, arrays)) * bytes_per_token)

    def save(self) -> None:
        """Writes the checkpoint of this step, whole or not at all, and removes all but the newest `keep_checkpoints`.

        OSError where the disk is full; what was saved before stays.
        """

        def write_models(folder: Path) -> None:
            for name, palm in self._models().items():
                palm.save_pretrained(folder / name)

        self.run.save(write_models, {"sampler": self.sampler.state_dict()})

    def _read_models(self, folder: Path, state: dict[str, Any]) -> None:
        there, here = state["config"], dataclasses.asdict(self.config)
        if (there["ema_decay"] > 0) != (here["ema_decay"] > 0):
            got, expected = (f"ema_decay={c['ema_decay']}" for c in (here, there))
            raise ValueError(f"this run has {got}, {folder} has {expected}: an average starts with its run, or not")
        self.sampler.load_state_dict(state["sampler"])
        for name, palm in self._models().items():
            palm.load(folder / name)

    def _models(self) -> dict[str, PaLM]:
        return {"model": self.trained} if self.averaged is None else {"model": self.averaged, "unaveraged": self.palm}
