"""What every trainer needs around its loss: processes, precision, optimiser steps, metrics and checkpoints."""

import dataclasses
import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.quantised.quantised_model import check_frozen
from palm_rlhf.model.weights_writer import write_tensors
from palm_rlhf.ops.cpu.threads import adapt
from palm_rlhf.training.run.checkpoints import (
    complete_checkpoints,
    new_checkpoint,
    read_state,
    reading,
    require_same,
    require_unused,
    write_state,
)
from palm_rlhf.training.run.compilation import CompiledBlocks
from palm_rlhf.training.run.config import FineTuningConfig, RunConfig
from palm_rlhf.training.run.launch import build_accelerator
from palm_rlhf.training.run.log import Metrics, Result, RunLog
from palm_rlhf.training.run.optimizer import forward_precision
from palm_rlhf.training.run.optimizer_state import load_optimizer, optimizer_tensors
from palm_rlhf.training.run.random_state import rng_state, set_rng_state
from palm_rlhf.training.run.readings import Readings
from palm_rlhf.training.run.sharding import check_shared_bases

Batch = TypeVar("Batch")


class SavedRun(NamedTuple):
    """The newest checkpoint of a run that is resumed: its folder, and its state that is not a tensor."""

    folder: Path
    state: dict[str, Any]


class OptimizerStep:
    """One optimiser step in the making. At its end, `loss` and the gradient `norms` before clipping are known.

    They are tensors where the run defers its readings, and `skip` is 1.0 where the update is left out, else 0.0.
    """

    loss: float | Tensor
    norms: list[float | Tensor]
    skip: Tensor | None = None

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.accelerator, self.model = accelerator, model
        self.total = torch.zeros((), device=accelerator.device)

    def micro_batches(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the batches; the processes exchange their gradients in the backward of the last one alone."""
        for batch in batches[:-1]:
            with self.accelerator.no_sync(self.model):
                yield batch
        yield batches[-1]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's share of the loss, a scalar: the step's loss is the sum of the shares.

        A share is divided by a count over the whole step, over all processes and micro-batches.
        """
        # Several processes take the mean of their gradients, whereas the shares of the loss add up.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        self.total += loss.detach()


class Run:
    """One training run on one process, or on the processes of `accelerate launch`: tools for a trainer's own loop.

    A trainer makes the run, then its optimiser, and hands both to `prepare`. From then on `model` is the module ready
    for a training forward (wrapped where there are several processes), and `module` is the bare one. The trainer's
    `steps` are a `Loop` over one `optimizer_step` or several; it saves with `new_checkpoint` and resumes with
    `newest_checkpoint`.

    Args:
        config: precision, seed, intervals; `config.seed` seeds the random generators of Python, NumPy and PyTorch.
        output_dir: the folder of all that is saved; None saves nothing.
        resume: go on from the newest checkpoint in that folder, if there is one.
        may_shard: whether the weights may be in shards over the processes (FSDP2).
    """

    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    log: RunLog

    @beartype
    def __init__(self, config: RunConfig, *, output_dir: str | Path | None, resume: bool, may_shard: bool = False):
        self.config, self.resume = config, resume
        self.output_dir = None if output_dir is None else Path(output_dir)
        if resume and self.output_dir is None:
            raise ValueError("resume=True without output_dir: give the folder of the run to go on with")
        if self.output_dir is not None and not resume:
            require_unused(self.output_dir)
        self.accelerator = build_accelerator(self.output_dir, config.trackers, may_shard)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.num_processes = self.accelerator.process_index, self.accelerator.num_processes
        self.shard = self.rank, self.num_processes  # the part of the data that this process reads: the i-th of k
        self.autocast = forward_precision(config.precision, self.device)
        deferred = self.device.type == "cuda" and not self.accelerator.is_fsdp2
        fail = partial(Run._report_left_out, weakref.proxy(self))  # no cycle: a run ends with its last reference
        self.readings = Readings(self.device, deferred=deferred, fail=fail)
        set_seed(config.seed, device_specific=True)
        self.step, self.elapsed = 0, 0.0
        self.ending: dict[str, str] = {}  # {"stopped_early": "max_seconds"} where the time was over before the steps

    @beartype
    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer, num_forwards: int = 0) -> None:
        """Make a module, which is on `device`, and its optimiser ready for the processes of this run.

        `num_forwards` is about the number of forwards with gradients of one process in the whole run; 0, where it is
        not known or the model should not be compiled by itself.
        """
        check_frozen(module, is_sharded=self.accelerator.is_fsdp2)
        self.module = module
        recompute = isinstance(self.config, FineTuningConfig) and self.config.gradient_checkpointing
        for part in module.modules():
            if recompute and isinstance(part, PaLM):
                part.config = dataclasses.replace(part.config, gradient_checkpointing=True)
        check_shared_bases(module, shards=self.accelerator.is_fsdp2)
        self.compiled = CompiledBlocks(module, self.config.compile, self.device, num_forwards, speaks=self.is_main)
        self.model, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints, where there is an output_dir."""
        assert self.output_dir is not None
        return self.output_dir / "checkpoints"

    @beartype
    def open_log(self, settings: Mapping[str, Any], panels: Mapping[str, str]) -> None:
        """Start the metrics after the step that the run is at; `panels` are the curves: metric -> title."""
        self.log = RunLog(
            self.accelerator,
            self.output_dir,
            dict(settings),
            last_step=self.step,
            plot=self.config.plot,
            panels=dict(panels),
        )

    @contextmanager
    @beartype
    def optimizer_step(
        self, *, rate_factor: float = 1.0, clip: Sequence[Sequence[nn.Parameter]] | None = None
    ) -> Iterator[OptimizerStep]:
        """Take one optimiser step at the end of the block, on the gradients that the block's micro-batches add up.

        Raises FloatingPointError where the loss or a norm is not finite; the weights are then as they were. Where
        readings are deferred, the next reading raises it, and no update is made until then.

        Args:
            rate_factor: multiplies the learning rates of the optimiser.
            clip: groups of parameters; the gradients of each are clipped together. None: one group of all.
        """
        adapt(self.device.type)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * rate_factor
        self.optimizer.zero_grad()
        step = OptimizerStep(self.accelerator, self.model)
        with self.compiled():
            yield step
        loss, limit = self.accelerator.reduce(step.total, "sum"), self.config.grad_clip or math.inf
        groups = [list(self.module.parameters())] if clip is None else clip
        norms = [self.accelerator.clip_grad_norm_(group, limit).to(self.device) for group in groups]
        step.loss, step.norms, step.skip = self.readings.check(self.step + 1, loss, norms)
        if step.skip is not None:  # a fused optimiser leaves its update out where `found_inf` is 1.0
            cast(Any, self.optimizer).optimizer.found_inf = step.skip
        self.optimizer.step()

    def _report_left_out(self, step: int, numbers: Mapping[str, float]) -> NoReturn:
        """Raise FloatingPointError for a step that has a number which is NaN or infinite; go back to before it."""
        self.step = step - 1
        saved = [] if self.output_dir is None else complete_checkpoints(self.checkpoints)
        got = " and ".join(f"the {name} {value}" for name, value in numbers.items())
        raise FloatingPointError(
            f"step {step} has {got}, expected finite numbers; its update is left out. The last good "
            f"checkpoint is {saved[-1] if saved else 'none'}: go on from it with a lower learning_rate, "
            f"more warmup_steps, or precision float32"
        )

    @beartype
    def is_due(self, every: int) -> bool:
        """Return whether an event that comes every so many steps comes after this one."""
        return self.step % every == 0

    @contextmanager
    @beartype
    def new_checkpoint(self, state: Mapping[str, Any], best: Mapping[str, Any] | None = None) -> Iterator[Path | None]:
        """Yield the folder of this step's checkpoint, to write models to; None where there is nothing to write.

        Only the main process writes, and only to an output_dir, but all processes take part. The checkpoint is whole or
        absent; all but the newest `keep_checkpoints` are removed, and the curves are drawn. Raises OSError where the
        disk is full; the checkpoints before it stay.

        Args:
            state: the trainer's state that is not a tensor, as JSON.
            best: names, by its "step", the best checkpoint so far, for best.json; that checkpoint is kept.
        """
        self.readings.read()  # raises where the weights are those of an earlier step
        if self.output_dir is None:
            yield None
            return
        random_states = gather_object([rng_state()])
        moments = optimizer_tensors(self.optimizer, self._parameter_names())
        if self.is_main:
            with new_checkpoint(self.checkpoints, self.step, self.config.keep_checkpoints, best) as folder:
                yield folder
                write_tensors(moments, folder / "optimizer.safetensors")
                own = {"step": self.step, "elapsed": self.elapsed, "config": dataclasses.asdict(self.config)}
                write_state(folder, {**own, **state, "random_states": random_states})
        else:
            yield None
        self.accelerator.wait_for_everyone()
        self.log.draw()

    @contextmanager
    @beartype
    def newest_checkpoint(self) -> Iterator[SavedRun | None]:
        """Yield the checkpoint that the run goes on from, to read models from; None where it starts anew.

        After the block the optimiser, the step, the clock and the random generators go on from it as well. The block
        raises ValueError for a checkpoint of another run.
        """
        saved = complete_checkpoints(self.checkpoints) if self.resume else []
        if not saved:
            yield None
            return
        folder = saved[-1]
        with reading(folder):
            state = read_state(folder)
            require_same(folder, state["config"], self.config)
            yield SavedRun(folder, state)
            load_optimizer(folder / "optimizer.safetensors", self.optimizer, self._parameter_names())
            self.step, self.elapsed = state["step"], state["elapsed"]
            if self.rank < len(state["random_states"]):  # a process that the run did not have starts from its seed
                set_rng_state(state["random_states"][self.rank])

    @beartype
    def finish(self, metrics: Metrics, *, started: float) -> Result:
        """Log the metrics of the last evaluation, draw the curves, and close the trackers.

        Returns these metrics with `steps`, `seconds` and, where that is so, `stopped_early`. `seconds` includes the
        time since `started`, by `time.perf_counter`, when that evaluation began.
        """
        self.readings.read()
        if metrics:
            self.log.write({"step": self.step, **metrics})
        self.log.close()
        # After this no thread still sends: one that does would abort the process at its exit.
        self.accelerator.wait_for_everyone()
        seconds = self.elapsed + time.perf_counter() - started
        return {**metrics, "steps": self.step, "seconds": seconds, **self.ending}

    def _parameter_names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.module.named_parameters()}
