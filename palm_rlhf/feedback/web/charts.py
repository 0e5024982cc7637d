"""Curves and bars as the points of inline SVG; templates draw them without styles of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 320.0, 140.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 10.0, 20.0  # room for the numbers at the axes


@dataclass(frozen=True)
class AxisTick:
    """A number at an axis, and how far along it is, in the units of the picture."""

    at: float
    label: str


@dataclass(frozen=True)
class CurveChart:
    """A curve over the steps of a run."""

    points: str
    """`x,y` of each point, as SVG's polyline takes them."""
    last: tuple[float, float]
    y_ticks: tuple[AxisTick, ...]
    x_ticks: tuple[AxisTick, ...]


@dataclass(frozen=True)
class Bar:
    """A bar over the baseline, with its number and its name."""

    x: float
    y: float
    width: float
    height: float
    number: int
    name: str


def curve_chart(steps: Sequence[int], values: Sequence[float | None]) -> CurveChart | None:
    """Return the curve of values at steps; None where there is no value. Steps without a value are left out."""
    found = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    if not found:
        return None
    numbers = [value for _, value in found]
    low, high = min(numbers), max(numbers)
    first, last = found[0][0], found[-1][0]

    def place_x(step: float) -> float:
        return LEFT + (step - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    points = [(round(place_x(step), 2), round(place_y(value), 2)) for step, value in found]
    heights = (low, (low + high) / 2, high) if high > low else (low,)
    return CurveChart(
        points=" ".join(f"{x},{y}" for x, y in points),
        last=points[-1],
        y_ticks=tuple(AxisTick(round(place_y(value), 2), _number(value, high - low)) for value in heights),
        x_ticks=tuple(AxisTick(round(place_x(step), 2), str(step)) for step in dict.fromkeys((first, last))),
    )


def _number(value: float, span: float) -> str:
    """Return a number as an axis shows it: one that is nothing beside the span of the axis is 0."""
    return f"{value:.3g}" if abs(value) > span / 1e6 else "0"


def bar_chart(numbers: Sequence[tuple[str, int]]) -> list[Bar]:
    """Return one bar for each name and number; the tallest fills the picture."""
    most = max((number for _, number in numbers), default=0) or 1
    step = WIDTH / max(len(numbers), 1)
    room = HEIGHT - TOP - BOTTOM
    return [
        Bar(
            x=round(place * step, 2),
            y=round(HEIGHT - BOTTOM - room * number / most, 2),
            width=round(step * 0.8, 2),
            height=round(room * number / most, 2),
            number=number,
            name=name,
        )
        for place, (name, number) in enumerate(numbers)
    ]
