"""The trainer of language models: token arrays in; a PaLM, its metrics and its checkpoints out."""

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from beartype import beartype
from torch import Tensor
from tqdm import tqdm

from palm_rlhf.model.palm import PaLM
from palm_rlhf.training.bits_per_byte import total_nats
from palm_rlhf.training.config import LMConfig
from palm_rlhf.training.launch import build_accelerator
from palm_rlhf.training.metrics import Metrics, RunLog
from palm_rlhf.training.muon import muon
from palm_rlhf.training.optimization import adamw, forward_precision, warmup_cosine
from palm_rlhf.training.state import (
    complete_checkpoints,
    load_optimizer,
    new_checkpoint,
    read_state,
    reading,
    require_unused,
    rng_state,
    save_optimizer,
    set_rng_state,
    write_state,
)
from palm_rlhf.training.windows import Tokens, Window, WindowSampler, token_arrays


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
        self.output_dir = None if output_dir is None else Path(output_dir)
        if not palm.config.causal:
            raise ValueError("got a PaLM with causal=False, which sees what it is to predict; expected causal=True")
        if resume and output_dir is None:
            raise ValueError("resume=True without output_dir: give the folder of the run to go on with")
        if output_dir is not None and not resume:
            require_unused(self.output_dir)
        train_arrays = token_arrays(train_data, palm.num_tokens, "train_data")
        self.sampler = WindowSampler(train_arrays, config.seq_len, config.seed, weights)
        self.valid_arrays = None if valid_data is None else token_arrays(valid_data, palm.num_tokens, "valid_data", 1)
        self.valid_bytes = sum(valid_bytes) if isinstance(valid_bytes, Sequence) else valid_bytes

        self.accelerator = build_accelerator(self.output_dir, config.trackers)
        self.autocast = forward_precision(config.precision, self.accelerator.device)
        set_seed(config.seed, device_specific=True)
        palm.to(self.accelerator.device)
        self.averaged = copy.deepcopy(palm).requires_grad_(False) if config.ema_decay > 0 else None
        make_optimizer = {"adamw": adamw, "muon": muon}[config.optimizer]
        optimizer = make_optimizer(palm, config.learning_rate, config.betas, config.eps, config.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(palm, optimizer)
        if config.compile:
            self.model = torch.compile(self.model)

        self.step, self.elapsed = 0, 0.0
        if resume:
            self._load_newest()
        settings = {**dataclasses.asdict(palm.config), **dataclasses.asdict(config)}
        self.log = RunLog(self.accelerator, self.output_dir, settings, last_step=self.step, plot=config.plot)

    def train(self) -> Metrics:
        """Runs what is left of the schedule with a progress bar on standard error; returns what `finish` returns."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """Yields the metrics of one optimiser step after another until the schedule ends; evaluates and saves when due.

        `loss` is in nats per token (with the z-loss), `elapsed` in seconds; `bits_per_byte` is there after evaluations.
        FloatingPointError where the loss or the gradient is not finite.
        """
        config, started = self.config, time.perf_counter() - self.elapsed
        self.palm.train()
        with self._progress_bar(progress_bar) as bar:
            while self.progress < 1:
                metrics = self._optimizer_step()
                if self.valid_arrays and self.step % config.eval_every == 0:
                    metrics["bits_per_byte"] = self.evaluate(max_tokens=config.eval_tokens)
                self.elapsed = metrics["elapsed"] = self._agreed(time.perf_counter() - started)
                if self.step % config.log_every == 0 or "bits_per_byte" in metrics:
                    self.log.write(metrics)
                if self.step % config.save_every == 0 or self.progress >= 1:
                    self.save()
                bar.set_postfix(
                    {"done": f"{self.progress:.0%}", "loss": metrics["loss"], "tokens/s": metrics["tokens_per_second"]},
                    refresh=False,
                )
                bar.update()
                yield metrics

    def finish(self) -> Metrics:
        """Evaluates on all validation data, logs that, draws the curves and closes the trackers.

        Returns `bits_per_byte` (where there is validation data), `steps`, and `seconds` with this evaluation included.
        """
        started = time.perf_counter()
        result = {"bits_per_byte": self.evaluate()} if self.valid_arrays else {}
        if result:
            self.log.write({"step": self.step, **result})
        self.log.close()
        return {**result, "steps": self.step, "seconds": self.elapsed + time.perf_counter() - started}

    @property
    def progress(self) -> float:
        """The part of the schedule that is done, from 0 to 1: of its steps, or of its time where that is further."""
        by_clock = self.elapsed / self.config.max_seconds if self.config.max_seconds else 0.0
        return max(self.step / self.config.num_steps, by_clock)

    @property
    def trained(self) -> PaLM:
        """The model to evaluate, sample from and save: the running average of the weights where there is one."""
        return self.palm if self.averaged is None else self.averaged

    def _optimizer_step(self) -> Metrics:
        """One step on batch_size * grad_accum windows of every process, every loss divided by the targets of all."""
        config, started = self.config, time.perf_counter()
        rate = config.learning_rate * warmup_cosine(self.step, self.progress, config.warmup_steps, config.min_lr_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        num_processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        windows = self.sampler.draw(config.batch_size * config.grad_accum * num_processes)
        num_targets = sum(window.num_targets for window in windows)
        self.optimizer.zero_grad()
        loss = self._accumulate_gradients(windows[rank::num_processes], num_targets)
        loss = float(self.accelerator.reduce(loss, "sum"))
        norm = float(self.accelerator.clip_grad_norm_(self.palm.parameters(), config.grad_clip or math.inf))
        self._check_finite(loss, norm)

        self.optimizer.step()
        self._update_average()
        self.step += 1
        return {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": num_targets / (time.perf_counter() - started),
        }

    def _accumulate_gradients(self, windows: Sequence[Window], num_targets: int) -> Tensor:
        """Sums the gradients of this process's windows over micro-batches; returns its part of the step's mean loss."""
        device, batch_size = self.accelerator.device, self.config.batch_size
        denominator = torch.tensor(num_targets, device=device)
        total = torch.zeros((), device=device)
        for first in range(0, len(windows), batch_size):
            tokens, loss_mask = self.sampler.read(windows[first : first + batch_size])
            tokens, loss_mask = tokens.to(device), None if loss_mask is None else loss_mask.to(device)
            is_last = first + batch_size >= len(windows)
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                with self.autocast():
                    loss = self.model(tokens, return_loss=True, loss_mask=loss_mask, loss_denominator=denominator)
                # Processes average their gradients, but each loss is already its part of one mean over them all.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            total += loss.detach()
        return total

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
            shard=(self.accelerator.process_index, self.accelerator.num_processes),
            autocast=self.autocast,
        )
        bytes_per_token = 1.0 if num_bytes is None else num_bytes / size
        return sum(gather_object([nats])) / math.log(2) / (sum(map(len, arrays)) * bytes_per_token)

    def save(self) -> None:
        """Writes the checkpoint of this step, whole or not at all, and removes all but the newest `keep_checkpoints`.

        OSError where the disk is full; what was saved before stays.
        """
        if self.output_dir is None:
            return
        random_states = gather_object([rng_state()])
        if self.accelerator.is_main_process:
            with new_checkpoint(self.checkpoints, self.step, self.config.keep_checkpoints) as folder:
                for name, palm in self._models().items():
                    palm.save_pretrained(folder / name)
                save_optimizer(folder / "optimizer.safetensors", self.optimizer, self._parameter_names())
                state = {"step": self.step, "elapsed": self.elapsed, "config": dataclasses.asdict(self.config)}
                write_state(folder, {**state, "sampler": self.sampler.state_dict(), "random_states": random_states})
        self.accelerator.wait_for_everyone()

    def _load_newest(self) -> None:
        if not (saved := complete_checkpoints(self.checkpoints)):
            return
        folder, rank = saved[-1], self.accelerator.process_index
        with reading(folder):
            state = read_state(folder)
            there, here = state["config"], dataclasses.asdict(self.config)
            if there["optimizer"] != here["optimizer"] or (there["ema_decay"] > 0) != (here["ema_decay"] > 0):
                got, expected = ([f"{name}={c[name]}" for name in ("optimizer", "ema_decay")] for c in (here, there))
                raise ValueError(f"this run has {got}, {folder} has {expected}: resume with what the run keeps")
            self.sampler.load_state_dict(state["sampler"])
            for name, palm in self._models().items():
                palm.load(folder / name)
            load_optimizer(folder / "optimizer.safetensors", self.optimizer, self._parameter_names())
            self.step, self.elapsed = state["step"], state["elapsed"]
            if rank < len(state["random_states"]):  # a process that the run did not have before starts from its seed
                set_rng_state(state["random_states"][rank])

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.output_dir / "checkpoints"

    def _models(self) -> dict[str, PaLM]:
        return {"model": self.trained} if self.averaged is None else {"model": self.averaged, "unaveraged": self.palm}

    def _parameter_names(self) -> dict[torch.nn.Parameter, str]:
        return {parameter: name for name, parameter in self.palm.named_parameters()}

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        saved = [] if self.output_dir is None else complete_checkpoints(self.checkpoints)
        raise FloatingPointError(
            f"step {self.step + 1} has the loss {loss} and the gradient norm {norm}, expected finite numbers; its "
            f"update is left out. The last good checkpoint is {saved[-1] if saved else 'none'}: go on from it with a "
            f"lower learning_rate (now {self.config.learning_rate:g}), more warmup_steps, or precision float32"
        )

    def _agreed(self, elapsed: float) -> float:
        """The main process's clock where the clock rules, so that all processes end with the same step."""
        if self.config.max_seconds is None or self.accelerator.num_processes == 1:
            return elapsed
        return broadcast_object_list([elapsed])[0]

    def _progress_bar(self, wanted: bool) -> tqdm:
        return tqdm(
            total=self.config.num_steps if self.config.max_seconds is None else None,  # the clock may end it before
            initial=self.step,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30,
            file=sys.stderr,
            disable=not (wanted and self.accelerator.is_main_process),
        )
