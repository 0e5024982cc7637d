"""The metrics of a run: a JSON line for each logged step, experiment trackers, and a picture of the curves."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from beartype import beartype

from palm_rlhf.training.state import METRICS_FILE, write_text, writing

Metrics = dict[str, float | int]


class RunLog:
    """Writes a run's metrics to `output_dir` (None: nowhere) and to the accelerator's trackers, from one process.

    Lines of steps after `last_step`, left by a run that was cut off, are dropped.
    """

    @beartype
    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path | None,
        settings: dict[str, Any],
        *,
        last_step: int,
        plot: bool | None,
    ):
        if plot and not has_matplotlib():
            raise ImportError("plot=True draws with matplotlib, which is missing: pip install palm-rlhf[plot]")
        self.accelerator = accelerator
        self.folder = output_dir if accelerator.is_main_process else None
        self.plot = has_matplotlib() if plot is None else plot
        self.lines: list[Metrics] = []
        if self.folder is not None:
            self.lines = [line for line in read_metrics(self.folder / METRICS_FILE) if line["step"] <= last_step]
            with writing(f"the metrics in {self.folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in self.lines))
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
        accelerator.init_trackers("palm-rlhf", config=plain)

    @beartype
    def write(self, metrics: Metrics) -> None:
        """Adds a line; the curves are drawn again where it has an evaluation."""
        self.accelerator.log({key: value for key, value in metrics.items() if key != "step"}, step=metrics["step"])
        if self.folder is not None:
            self.lines.append(metrics)
            with writing(f"the metrics in {self.folder}"):
                with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as file:
                    file.write(json.dumps(metrics) + "\n")
                if "bits_per_byte" in metrics:
                    self._draw()

    def close(self) -> None:
        """Draws the curves a last time, and closes the trackers."""
        for tracker in self.accelerator.trackers:  # end_training would end the processes' communication as well
            tracker.finish()
        self.accelerator.trackers.clear()
        if self.folder is not None:
            with writing(f"the curves in {self.folder}"):
                self._draw()

    def _draw(self) -> None:
        if self.plot and self.lines:
            plot_curves(self.lines, self.folder / "curves.png")


@beartype
def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics file, without a last one that was cut off; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def has_matplotlib() -> bool:
    """Whether curves can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


@beartype
def plot_curves(lines: list[Metrics], path: Path) -> None:
    """Draws the training loss, the validation's bits per byte and the learning rate over the steps as a PNG."""
    from matplotlib.figure import Figure

    panels = {"loss": "training loss (nats per token)", "bits_per_byte": "validation (bits per byte)",
              "learning_rate": "learning rate"}  # fmt: skip
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
