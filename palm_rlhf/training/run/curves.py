"""The picture of a run's curves."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from beartype import beartype


def has_matplotlib() -> bool:
    """Return whether curves can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


@beartype
def plot_curves(lines: Sequence[Mapping[str, float | int]], path: Path, panels: dict[str, str]) -> None:
    """Draw metrics over the steps as a PNG, with a panel for each: metric -> title."""
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
    for axes in list(all_axes):  # empty places of the grid
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
