"""The metrics of a run: a JSON line for each logged step, experiment trackers, and a picture of the curves."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from beartype import beartype
from torch import Tensor

from palm_rlhf.model.files import write_text
from palm_rlhf.training.run.checkpoints import METRICS_FILE, writing
from palm_rlhf.training.run.curves import has_matplotlib, plot_curves

Metrics = dict[str, float | int]
Result = dict[str, float | int | str]  # the metrics at the end of a run, and why it ended early


@beartype
def keep_lines(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps after `last_step`, which a run that was cut off left in a file; return the others."""
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    with writing(f"the {path.stem} in {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(map(_as_line, kept)))
    return kept


@beartype
def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines of JSON, in which tensors become lists; raises OSError where the disk is full."""
    with writing(f"the {path.stem} in {path.parent}"), open(path, "a", encoding="utf-8") as file:
        file.write("".join(map(_as_line, lines)))


def _as_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=Tensor.tolist) + "\n"


class RunLog:
    """The metrics of a run, in `output_dir` (None: nowhere) and in the accelerator's trackers, from one process."""

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
        self.accelerator, self.panels = accelerator, panels
        self.plot = has_matplotlib() if plot is None else plot
        self.folder = output_dir if accelerator.is_main_process else None
        self.lines: list[Metrics] = []
        if self.folder is not None:
            self.lines = keep_lines(self.folder / METRICS_FILE, last_step)
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
        accelerator.init_trackers("palm-rlhf", config=plain)

    @beartype
    def write(self, metrics: Metrics, *, draw: bool = False) -> None:
        """Add a line, and draw the curves again if asked."""
        self.accelerator.log({key: value for key, value in metrics.items() if key != "step"}, step=metrics["step"])
        if self.folder is not None:
            self.lines.append(metrics)
            append_lines(self.folder / METRICS_FILE, [metrics])
        if draw:
            self.draw()

    def close(self) -> None:
        """Draw the curves a last time, and close the trackers."""
        for tracker in self.accelerator.trackers:  # end_training would end the processes' communication as well
            tracker.finish()
        self.accelerator.trackers.clear()
        self.draw()

    def draw(self) -> None:
        """Draw the curves of the metrics so far, where they are wanted."""
        if self.folder is not None and self.plot and self.lines:
            with writing(f"the curves in {self.folder}"):
                plot_curves(self.lines, self.folder / "curves.png", self.panels)


@beartype
def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, without a last line that was cut off; no lines where there is no file.

    Raises ValueError, with the number of the line, for a line that is no JSON object.
    """
    # in bytes: a text may hold other ends of lines, and the last line may end inside a character
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
