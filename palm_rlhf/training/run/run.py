"""What every trainer needs around its loss: processes, precision, the optimiser step, metrics and checkpoints."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from beartype import beartype
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from palm_rlhf.ops.cpu.threads import adapt
from palm_rlhf.training.run.checkpoints import (
    complete_checkpoints,
    load_optimizer,
    new_checkpoint,
    optimizer_tensors,
    read_state,
    reading,
    require_same,
    require_unused,
    rng_state,
    set_rng_state,
    write_state,
)
from palm_rlhf.training.run.config import RunConfig
from palm_rlhf.training.run.launch import build_accelerator
from palm_rlhf.training.run.log import Metrics, Result, RunLog
from palm_rlhf.training.run.optimizer import forward_precision
from palm_rlhf.training.run.sharding import prepare_shards

Batch = TypeVar("Batch")
BAR = "{percentage:3.0f}% |{bar:12}| {n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} left, {rate_fmt}{postfix}"


class Run:
    """One training run: a module with its optimiser, on one process or on those of `accelerate launch`.

    `model` is the module ready for a training forward (wrapped where there are several processes), `module` the same
    one bare; with `may_shard` the weights may be in shards (FSDP2). Seeds the random generators of Python, NumPy and
    PyTorch. All that is saved goes to `output_dir`.
    """

    @beartype
    def __init__(
        self,
        module: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: RunConfig,
        *,
        output_dir: str | Path | None,
        resume: bool,
        may_shard: bool = False,
    ):
        self.module, self.config, self.resume = module, config, resume
        self.output_dir = None if output_dir is None else Path(output_dir)
        if resume and output_dir is None:
            raise ValueError("resume=True without output_dir: give the folder of the run to go on with")
        if output_dir is not None and not resume:
            require_unused(self.output_dir)
        self.accelerator = build_accelerator(self.output_dir, config.trackers, may_shard)
        self.autocast = forward_precision(config.precision, self.device)
        set_seed(config.seed, device_specific=True)
        module.to(self.device)
        self.model, self.optimizer = self.accelerator.prepare(module, make_optimizer(module))
        prepare_shards(module)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.elapsed = 0, 0.0
        self.ending: dict[str, str] = {}  # {"stopped_early": "max_seconds"} where the time was over before the steps
        self.log: RunLog | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    @beartype
    def open_log(self, settings: Mapping[str, Any], panels: Mapping[str, str]) -> None:
        """Starts the metrics after the step that the run is at; `panels` are the curves: metric -> title."""
        self.log = RunLog(
            self.accelerator,
            self.output_dir,
            dict(settings),
            last_step=self.step,
            plot=self.config.plot,
            panels=dict(panels),
        )

    def optimizer_step(
        self,
        batches: Sequence[Batch],
        loss_of: Callable[[Batch], Tensor],
        *,
        rate_factor: float = 1.0,
        clip: Sequence[Sequence[nn.Parameter]] | None = None,
    ) -> tuple[float, list[float]]:
        """One optimiser step on the sum of `loss_of(batch)` over this process's batches and all processes.

        Each loss is its part of one mean: it is divided by what the batches of all processes hold together. `clip`
        lists the groups of parameters whose gradients are clipped together, all at once if None.

        Returns the loss, and the gradient norm of each group before clipping. FloatingPointError where one is not
        finite; the weights are as they were then.
        """
        adapt(self.device.type)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * rate_factor
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                with self.autocast():
                    loss = loss_of(batch)
                # processes average their gradients, but each loss is already its part of one mean over them all
                self.accelerator.backward(loss * self.num_processes)
            total += loss.detach()
        loss = float(self.accelerator.reduce(total, "sum"))
        limit = self.config.grad_clip or math.inf
        groups = [list(self.module.parameters())] if clip is None else clip
        norms = [float(self.accelerator.clip_grad_norm_(group, limit)) for group in groups]
        self.check_finite({"loss": loss, "gradient norm": sum(norms)})
        self.optimizer.step()
        return loss, norms

    @beartype
    def check_finite(self, values: Mapping[str, float]) -> None:
        """FloatingPointError where one of the named numbers of the step in hand is NaN or infinite."""
        if all(math.isfinite(value) for value in values.values()):
            return
        saved = [] if self.output_dir is None else complete_checkpoints(self.checkpoints)
        got = " and ".join(f"the {name} {value}" for name, value in values.items())
        raise FloatingPointError(
            f"step {self.step + 1} has {got}, expected finite numbers; its update is left out. The last good "
            f"checkpoint is {saved[-1] if saved else 'none'}: go on from it with a lower learning_rate, "
            f"more warmup_steps, or precision float32"
        )

    @beartype
    def save(
        self,
        write_models: Callable[[Path], None],
        state: Mapping[str, Any],
        best: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the checkpoint of this step, whole or not at all, and removes all but the newest `keep_checkpoints`.

        `state` is what else the trainer has to find again, as JSON. `best` says, by its "step", which checkpoint is the
        best so far: best.json has it, and that checkpoint is kept. OSError where the disk is full; what was saved
        before stays.
        """
        if self.output_dir is None:
            return
        random_states = gather_object([rng_state()])
        moments = optimizer_tensors(self.optimizer, self._parameter_names())
        if self.is_main:
            with new_checkpoint(self.checkpoints, self.step, self.config.keep_checkpoints, best) as folder:
                write_models(folder)
                save_file(moments, folder / "optimizer.safetensors")
                own = {"step": self.step, "elapsed": self.elapsed, "config": dataclasses.asdict(self.config)}
                write_state(folder, {**own, **state, "random_states": random_states})
        self.accelerator.wait_for_everyone()

    @beartype
    def load_newest(self, read_models: Callable[[Path, dict[str, Any]], None]) -> None:
        """Goes on from the newest checkpoint, where the run is to be resumed and has one.

        `read_models` gets its folder and its state, and refuses by ValueError what does not belong to this run.
        """
        if not self.resume or not (saved := complete_checkpoints(self.checkpoints)):
            return
        folder = saved[-1]
        with reading(folder):
            state = read_state(folder)
            require_same(folder, state["config"], self.config)
            read_models(folder, state)
            load_optimizer(folder / "optimizer.safetensors", self.optimizer, self._parameter_names())
            self.step, self.elapsed = state["step"], state["elapsed"]
            if self.rank < len(state["random_states"]):  # a process that the run did not have starts from its seed
                set_rng_state(state["random_states"][self.rank])

    @beartype
    def is_due(self, every: int) -> bool:
        """Whether what comes every so many steps comes after this one."""
        return self.step % every == 0

    @beartype
    def progress_bar(self, total: int | None, wanted: bool, unit: str = "step") -> tqdm:
        """A bar on standard error with the time that is left, drawn by the main process alone."""
        return tqdm(
            total=total,
            initial=self.step,
            unit=unit,
            bar_format=BAR,
            smoothing=0.05,  # of about twenty steps: evaluations and a busy machine make single ones slow
            mininterval=0.5 if sys.stderr.isatty() else 30,
            file=sys.stderr,
            disable=not (wanted and self.is_main),
        )

    @beartype
    def drive(
        self,
        one_step: Callable[[], Metrics],
        is_done: Callable[[], bool],
        save: Callable[[], None],
        *,
        num_steps: Callable[[], int | None],
        show: Callable[[Metrics], dict[str, Any]],
        progress_bar: bool,
    ) -> Iterator[Metrics]:
        """Yields the metrics of one step after another until `is_done`, or for `max_seconds`; logs and saves when due.

        A step that evaluates or wants to be logged for another reason has `"log"` among its metrics, one that wants to
        be saved `"save"`. `num_steps` is
        how many the run has, or seems to have (None: unknown), `show` makes what stands behind the progress bar.
        """
        limit, before, started = self.config.max_seconds, self.elapsed, time.perf_counter() - self.elapsed
        self.ending = {}
        with self.progress_bar(num_steps(), progress_bar) as bar:
            while not is_done() and not self.ending:
                metrics = one_step()
                must_log, must_save = bool(metrics.pop("log", False)), bool(metrics.pop("save", False))
                self.elapsed = metrics["elapsed"] = self._agreed(time.perf_counter() - started)
                if limit is not None and self.elapsed - before >= limit and not is_done():
                    self.ending = {"stopped_early": "max_seconds"}
                if must_log or self.is_due(self.config.log_every):
                    self.log.write(metrics, draw=must_log)
                if must_save or self.is_due(self.config.save_every) or is_done() or self.ending:
                    save()
                    self.log.draw()
                bar.total = num_steps()
                bar.set_postfix(show(metrics), refresh=False)
                bar.update()
                yield metrics
        if self.ending and self.is_main:
            self._say_why_it_ends(num_steps())

    def _say_why_it_ends(self, num_steps: int | None) -> None:
        of_steps = "" if num_steps is None else f" of {num_steps}"
        saved = "nothing is saved, for there is no output_dir"
        if self.output_dir is not None:
            saved = f"what was learnt is saved in {self.checkpoints}, and a run that resumes goes on from there"
        text = f"stopped early, after step {self.step}{of_steps}: max_seconds is {self.config.max_seconds:g}; {saved}"
        tqdm.write(text, file=sys.stderr)

    @beartype
    def finish(self, validate: Callable[[], Metrics]) -> Result:
        """Logs what `validate` finds out, draws the curves, and closes the trackers.

        Returns that with `steps` and `seconds`, those of `validate` included, and `stopped_early` where that is so.
        """
        started = time.perf_counter()
        result = validate()
        if result:
            self.log.write({"step": self.step, **result})
        self.log.close()
        # The thread that sent what was gathered last lets go of it before this: at the exit of Python it would abort.
        self.accelerator.wait_for_everyone()
        seconds = self.elapsed + time.perf_counter() - started
        return {**result, "steps": self.step, "seconds": seconds, **self.ending}

    def _agreed(self, elapsed: float) -> float:
        """The main process's clock, so that all processes log and decide the same."""
        return elapsed if self.num_processes == 1 else broadcast_object_list([elapsed])[0]

    def _parameter_names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.module.named_parameters()}
