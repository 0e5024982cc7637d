"""The metrics of a run: a JSON line for each logged step, experiment trackers, and a picture of the curves."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from beartype import beartype

from palm_rlhf.training.run.checkpoints import METRICS_FILE, write_text, writing

Metrics = dict[str, float | int]
Result = dict[str, float | int | str]  # the metrics that a run ends with, and why it ended where that was early


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
        panels: dict[str, str],
    ):
        if plot and not has_matplotlib():
            raise ImportError("plot=True draws with matplotlib, which is missing: pip install palm-rlhf[plot]")
        self.accelerator = accelerator
        self.folder = output_dir if accelerator.is_main_process else None
        self.plot, self.panels = has_matplotlib() if plot is None else plot, panels
        self.lines: list[Metrics] = []
        if self.folder is not None:
            self.lines = [line for line in read_metrics(self.folder / METRICS_FILE) if line["step"] <= last_step]
            with writing(f"the metrics in {self.folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in self.lines))
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
        accelerator.init_trackers("palm-rlhf", config=plain)

    @beartype
    def write(self, metrics: Metrics, *, draw: bool = False) -> None:
        """Adds a line, and draws the curves again if asked."""
        self.accelerator.log({key: value for key, value in metrics.items() if key != "step"}, step=metrics["step"])
        if self.folder is not None:
            self.lines.append(metrics)
            with writing(f"the metrics in {self.folder}"):
                with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as file:
                    file.write(json.dumps(metrics) + "\n")
                if draw:
                    self.draw()

    def close(self) -> None:
        """Draws the curves a last time, and closes the trackers."""
        for tracker in self.accelerator.trackers:  # end_training would end the processes' communication as well
            tracker.finish()
        self.accelerator.trackers.clear()
        if self.folder is not None:
            with writing(f"the curves in {self.folder}"):
                self.draw()

    def draw(self) -> None:
        """Draws the curves of what is logged so far, where they are wanted."""
        if self.plot and self.lines:
            plot_curves(self.lines, self.folder / "curves.png", self.panels)


@beartype
def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that was cut off; none where there is no file.

    ValueError, with the line, for what is no JSON object.
    """
    # of bytes: a text may hold other ends of lines, and a line may be cut off inside a character
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    found = []
    for place, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {place}: it is no JSON ({error}): mend or delete that line") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}, line {place}: got {line[:40]!r}, expected an object: mend or delete that line")
        found.append(values)
    return found


def has_matplotlib() -> bool:
    """Whether curves can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


@beartype
def plot_curves(lines: list[Metrics], path: Path, panels: dict[str, str]) -> None:
    """Draws the given metrics over the steps as a PNG, one panel each: metric -> title."""
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (key, title) in zip(all_axes, panels.items(), strict=False):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    for axes in list(all_axes):  # what is left of the grid
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
