"""The trainer of language models: token arrays in; a PaLM, its metrics and its checkpoints out."""

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from beartype import beartype
from torch import Tensor

from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.pinned_copy import upload
from palm_rlhf.training.bits_per_byte import total_nats
from palm_rlhf.training.epoch_sampler import micro_batches
from palm_rlhf.training.language_model_config import LMConfig
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.loop import Loop
from palm_rlhf.training.run.muon import muon
from palm_rlhf.training.run.optimizer import adamw, warmup_cosine
from palm_rlhf.training.run.run import Run
from palm_rlhf.training.token_windows import Tokens, WindowSampler, token_arrays

CURVES = {
    "loss": "training loss (nats per token)",
    "bits_per_byte": "validation (bits per byte)",
    "learning_rate": "learning rate",
}
SHOWN = ("loss", "tokens_per_second")  # behind the progress bar


class LanguageModelTrainer:
    """The trainer of a PaLM that predicts the next token, on one process or those of `accelerate launch`.

    Seeds the random generators of Python, NumPy and PyTorch. Loop over `steps` to act between steps, or call `train`.

    Args:
        palm: the model, trained in place.
        train_data: a 1-d array of token ids, or several; memory-mapped ones are read as needed.
        valid_data: the same, for evaluations.
        config: all settings that are numbers.
        output_dir: the folder of all that is saved.
        weights: shares of the training arrays in the windows; None: by their lengths.
        valid_bytes: bytes of the text that the validation tokens encode; None: one for each token.
        resume: go on from the newest checkpoint in `output_dir`, if there is one.
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

        self.run = Run(config, output_dir=output_dir, resume=resume)
        self.accelerator = self.run.accelerator
        palm.to(self.run.device)
        make_optimizer = {"adamw": adamw, "muon": muon}[config.optimizer]
        optimizer = make_optimizer(palm, config.learning_rate, config.betas, config.eps, config.weight_decay)
        self.run.prepare(palm, optimizer, config.num_steps * config.grad_accum)
        self.averaged = copy.deepcopy(palm).requires_grad_(False) if config.ema_decay > 0 else None
        self._resume()
        self.run.open_log({**dataclasses.asdict(palm.config), **dataclasses.asdict(config)}, CURVES)

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def elapsed(self) -> float:
        return self.run.elapsed

    def train(self) -> Result:
        """Take the steps that are left, with a progress bar on standard error, and return the result of `finish`."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """Yield the metrics of one optimiser step after another until the schedule ends; evaluate and save when due.

        `loss` is in nats per token (with the z-loss), `elapsed` in seconds; steps with an evaluation have
        `bits_per_byte`. Raises FloatingPointError where the loss or the gradient is not finite.

        On a GPU the numbers of a step stay there until one of them is looked at or logged: looking at each step makes
        every one wait for the GPU. The error comes at that point too; until then no weight has changed.
        """
        self.palm.train()
        with Loop(self.run, self.config.num_steps, SHOWN, progress_bar) as loop:
            while loop.goes_on:
                metrics = self.update()
                evaluates = self.valid_arrays is not None and self.run.is_due(self.config.eval_every)
                if evaluates:
                    metrics["bits_per_byte"] = self.evaluate(max_tokens=self.config.eval_tokens)
                if loop.finish_step(metrics, must_log=evaluates):
                    self.save()
                yield metrics

    def finish(self) -> Result:
        """Evaluate on all validation data, log the result, draw the curves and close the trackers.

        Returns `bits_per_byte` (where there is validation data), `steps`, `seconds` with this evaluation included, and
        `stopped_early` where `max_seconds` ended the run before its last step.
        """
        started = time.perf_counter()
        metrics = {} if self.valid_arrays is None else {"bits_per_byte": self.evaluate()}
        return self.run.finish(metrics, started=started)

    @property
    def progress(self) -> float:
        """The share of the schedule that is done, from 0 to 1."""
        return self.step / self.config.num_steps

    @property
    def trained(self) -> PaLM:
        """The model to evaluate, to save and to sample from: the running average of the weights, if there is one."""
        return self.palm if self.averaged is None else self.averaged

    def update(self) -> Metrics:
        """Take one optimiser step on the next batch_size * grad_accum windows of every process.

        The loss is the mean over the targets of all of them.
        """
        config, run, readings = self.config, self.run, self.run.readings
        started = readings.mark()
        factor = warmup_cosine(self.step, self.progress, config.warmup_steps, config.min_lr_ratio)
        windows = self.sampler.draw(config.batch_size * config.grad_accum * run.num_processes)
        num_targets = sum(window.num_targets for window in windows)
        denominator = torch.full((), num_targets, device=run.device)
        with run.optimizer_step(rate_factor=factor) as step:
            for batch in step.micro_batches(micro_batches(windows, config.batch_size, run.shard)):
                tokens, loss_mask = self.sampler.read(batch)
                tokens = upload(tokens, run.device)
                loss_mask = None if loss_mask is None else upload(loss_mask, run.device)
                with run.autocast():
                    loss = run.model(tokens, return_loss=True, loss_mask=loss_mask, loss_denominator=denominator)
                step.backward(loss)
        self._update_average(step.skip)
        run.step += 1
        return readings.metrics(
            {
                "step": self.step,
                "loss": step.loss,
                "learning_rate": config.learning_rate * factor,
                "grad_norm": step.norms[0],
                "tokens_per_second": readings.rate(num_targets, started),
            }
        )

    @torch.no_grad()
    def _update_average(self, skip: Tensor | None) -> None:
        if self.averaged is not None:
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))  # the first weights fade fast
            averages: list[Tensor] = [*self.averaged.parameters()]
            parameters: list[Tensor] = [*self.palm.parameters()]
            if skip is None:
                torch._foreach_lerp_(averages, parameters, 1 - decay)
            else:
                weights: list[Tensor] = [(1 - decay) * (1 - skip)] * len(averages)
                torch._foreach_lerp_(averages, parameters, weights)

    @beartype
    def evaluate(
        self,
        data: Tokens | Sequence[Tokens] | None = None,
        num_bytes: int | None = None,
        *,
        max_tokens: int | None = None,
    ) -> float:
        """Return the bits per byte of `trained`, by which each token is predicted once.

        Args:
            data: 1-d arrays of token ids; None: the validation data.
            num_bytes: bytes of the text that `data` encodes; None: one for each token.
            max_tokens: evaluate on about so many tokens, the first of each array; None: on all.
        """
        arrays = self.valid_arrays if data is None else token_arrays(data, self.palm.num_tokens, "data", 1)
        if arrays is None:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_data, or evaluate(data)")
        num_bytes = self.valid_bytes if data is None else num_bytes
        size = sum(len(array) for array in arrays)
        if max_tokens is not None and max_tokens < size:
            arrays = [array[: math.ceil(len(array) * max_tokens / size)] for array in arrays]
        nats = total_nats(
            self.trained,
            arrays,
            seq_len=self.config.seq_len,
            context=self.config.eval_context,
            batch_size=self.config.batch_size,
            shard=self.run.shard,
            autocast=self.run.autocast,
        )
        bytes_per_token = 1.0 if num_bytes is None else num_bytes / size
        return sum(gather_object([nats])) / math.log(2) / (sum(len(array) for array in arrays) * bytes_per_token)

    def save(self) -> None:
        """Write the checkpoint of this step, whole or not at all, and remove all but the newest `keep_checkpoints`.

        Raises OSError where the disk is full; the checkpoints before it stay.
        """
        with self.run.new_checkpoint({"sampler": self.sampler.state_dict()}) as folder:
            if folder is not None:
                for name, palm in self._models().items():
                    palm.save_pretrained(folder / name)

    def _resume(self) -> None:
        with self.run.newest_checkpoint() as saved:
            if saved is None:
                return
            there, here = saved.state["config"], dataclasses.asdict(self.config)
            if (there["ema_decay"] > 0) != (here["ema_decay"] > 0):
                got, expected = (f"ema_decay={c['ema_decay']}" for c in (here, there))
                raise ValueError(
                    f"this run has {got}, {saved.folder} has {expected}: an average starts with its run, or not"
                )
            self.sampler.load_state_dict(saved.state["sampler"])
            for name, palm in self._models().items():
                palm.load(saved.folder / name)

    def _models(self) -> dict[str, PaLM]:
        return {"model": self.trained} if self.averaged is None else {"model": self.averaged, "unaveraged": self.palm}
