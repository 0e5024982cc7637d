"""The clock of a run: it counts out the steps, logs them, tells when to save, and ends the run when time is over."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from beartype import beartype
from tqdm import tqdm

from palm_rlhf.training.run.readings import DeferredMetrics
from palm_rlhf.training.run.run import Run

BAR = "{percentage:3.0f}% |{bar:12}| {n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} left, {rate_fmt}{postfix}"


class Loop:
    """The steps that a run has left, for a `with` block in a trainer's `steps`.

    Args:
        run: the run; the trainer counts its `step` up in each step.
        num_steps: steps of the whole run; None where it is not known yet. A trainer that learns it on the way sets it
            again after each step.
        shown: names of the metrics behind the progress bar.
        progress_bar: whether the main process draws one on standard error.
    """

    @beartype
    def __init__(self, run: Run, num_steps: int | None, shown: Sequence[str], progress_bar: bool):
        self.run, self.num_steps, self.shown = run, num_steps, shown
        self.elapsed_before = run.elapsed
        self.started = time.perf_counter() - run.elapsed
        self.bar = tqdm(
            total=num_steps,
            initial=run.step,
            unit="step",
            bar_format=BAR,
            smoothing=0.05,  # of about twenty steps: evaluations and a busy machine make single ones slow
            mininterval=0.5 if sys.stderr.isatty() else 30,
            file=sys.stderr,
            disable=not (progress_bar and run.is_main),
        )
        run.ending = {}

    def __enter__(self) -> "Loop":
        """Begin the loop."""
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Close the progress bar, and say why the run ends where time was over before its steps."""
        self.bar.close()
        if error is None and self.run.ending and self.run.is_main:
            self._say_why_it_ends()

    @property
    def goes_on(self) -> bool:
        """Whether a step is left, and time for it."""
        return not self._is_done and not self.run.ending

    @property
    def _is_done(self) -> bool:
        return self.num_steps is not None and self.run.step >= self.num_steps

    @beartype
    def finish_step(self, metrics: dict[str, Any], *, must_log: bool = False, must_save: bool = False) -> bool:
        """Add the run's `elapsed` seconds to the metrics of a step, log them when due, and move the progress bar.

        Returns whether a checkpoint is due: every `save_every` steps, at the end, and with `must_save`, for the best
        step so far. With `must_log`, for a step with an evaluation, the metrics are logged and drawn in any case.
        Metrics whose reading is deferred are read if they are logged, or before a checkpoint.
        """
        run, limit = self.run, self.run.config.max_seconds
        logs = must_log or run.is_due(run.config.log_every)
        saves = must_save or run.is_due(run.config.save_every) or self._is_done
        is_read = logs or saves or not isinstance(metrics, DeferredMetrics)
        if isinstance(metrics, DeferredMetrics) and is_read:
            metrics.read()
        elapsed = time.perf_counter() - self.started
        if run.num_processes > 1 and (limit is not None or is_read):
            # by the main process's clock, so that all processes decide the same
            elapsed = broadcast_object_list([elapsed])[0]
        run.elapsed = metrics["elapsed"] = elapsed
        if limit is not None and elapsed - self.elapsed_before >= limit and not self._is_done:
            run.ending = {"stopped_early": "max_seconds"}
        if logs:
            run.log.write(metrics, draw=must_log)
        self.bar.total = self.num_steps
        if is_read:
            shown = {name.replace("_per_second", "/s"): metrics[name] for name in self.shown if name in metrics}
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        return saves or not self.goes_on

    def _say_why_it_ends(self) -> None:
        run = self.run
        of_steps = "" if self.num_steps is None else f" of {self.num_steps}"
        saved = "nothing is saved, for there is no output_dir"
        if run.output_dir is not None:
            saved = f"what was learnt is saved in {run.checkpoints}, and a run that resumes goes on from there"
        text = f"stopped early, after step {run.step}{of_steps}: max_seconds is {run.config.max_seconds:g}; {saved}"
        tqdm.write(text, file=sys.stderr)
