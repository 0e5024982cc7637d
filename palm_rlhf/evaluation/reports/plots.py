"""Plots as SVG inside the HTML page: lines with intervals, and bars."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from beartype import beartype

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 44
COLOURS = ("#2f6fb3", "#c2543c", "#3b8a5a", "#8a5fb0", "#a87b1d", "#4a8f99")

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Points from left to right; `band` has the lower and upper end of the interval at each point."""

    name: str
    points: tuple[Point, ...]
    band: tuple[Point, ...] = ()


@dataclass(frozen=True)
class LinePlot:
    """A plot of lines over a common x axis."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    kind: str = field(default="line", init=False)


@dataclass(frozen=True)
class BarPlot:
    """A plot with a bar for each name, with optional intervals."""

    title: str
    y_label: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    intervals: tuple[Point | None, ...] = ()
    kind: str = field(default="bar", init=False)


Plot = LinePlot | BarPlot


@beartype
def draw(plot: Plot) -> str:
    """Return the plot as an SVG element, with the title as its label for screen readers."""
    body = _draw_lines(plot) if isinstance(plot, LinePlot) else _draw_bars(plot)
    label = html.escape(plot.title)
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(body)}</svg>'


@beartype
def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that cover `low` to `high` in about `count` steps."""
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"got the range {low} to {high}, expected finite numbers")
    if high <= low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


class _Scale:
    """A linear map from numbers to positions in the picture."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.high, self.start, self.stop = low, high, start, stop

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 2)


def _frame(y: Sequence[float], y_label: str, x_label: str) -> tuple[list[str], _Scale]:
    """Return the grid with the labels of the axes, and the scale of the y axis."""
    up = _Scale(y[0], y[-1], HEIGHT - BOTTOM, TOP)
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts = []
    for tick in y:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick)}" y2="{up(tick)}"/>')
        parts.append(_text(LEFT - 6, up(tick) + 4, f"{tick:.6g}", "end"))
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(_text(14, middle, y_label, "middle", turned))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    return parts, up


def _text(x: float, y: float, text: str, anchor: str, extra: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {extra}>{html.escape(text)}</text>'


def _draw_lines(plot: LinePlot) -> list[str]:
    xs = [x for line in plot.lines for x, _ in line.points]
    ys = [y for line in plot.lines for _, y in line.points]
    ys += [end for line in plot.lines for ends in line.band for end in ends]
    if not xs:
        return [_text(WIDTH / 2, HEIGHT / 2, "no data", "middle")]
    x_ticks = nice_ticks(min(xs), max(xs))
    parts, up = _frame(nice_ticks(min(ys), max(ys)), plot.y_label, plot.x_label)
    across = _Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    parts += [_text(across(tick), HEIGHT - BOTTOM + 16, f"{tick:.6g}", "middle") for tick in x_ticks]
    for place, line in enumerate(plot.lines):
        colour = COLOURS[place % len(COLOURS)]
        if line.band:
            there = [f"{across(x)},{up(low)}" for (x, _), (low, _) in zip(line.points, line.band)]
            back = [f"{across(x)},{up(high)}" for (x, _), (_, high) in zip(line.points, line.band)]
            parts.append(f'<polygon points="{" ".join(there + back[::-1])}" fill="{colour}" opacity="0.15"/>')
        points = " ".join(f"{across(x)},{up(y)}" for x, y in line.points)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(line.points) < 40:
            parts += [f'<circle cx="{across(x)}" cy="{up(y)}" r="2.5" fill="{colour}"/>' for x, y in line.points]
        if len(plot.lines) > 1:
            parts.append(f'<rect x="{LEFT + 8}" y="{TOP + 6 + 16 * place}" width="10" height="10" fill="{colour}"/>')
            parts.append(_text(LEFT + 24, TOP + 15 + 16 * place, line.name, "start"))
    return parts


def _draw_bars(plot: BarPlot) -> list[str]:
    if not plot.names:
        return [_text(WIDTH / 2, HEIGHT / 2, "no data", "middle")]
    intervals = plot.intervals or (None,) * len(plot.names)
    extremes = [end for interval in intervals if interval for end in interval]
    low, high = min(*plot.values, *extremes, 0.0), max(*plot.values, *extremes, 0.0)
    parts, up = _frame(nice_ticks(low, high), plot.y_label, "")
    room = (WIDTH - LEFT - RIGHT) / len(plot.names)
    letters = max(int(room / 6.5), 3)
    for place, (name, value, interval) in enumerate(zip(plot.names, plot.values, intervals)):
        middle = round(LEFT + room * (place + 0.5), 2)
        top, bottom = sorted((up(value), up(0.0)))
        shown = name if len(name) <= letters else name[: letters - 1] + "…"
        parts.append(
            f'<rect x="{middle - room * 0.35:.2f}" y="{top}" width="{room * 0.7:.2f}" height="{bottom - top:.2f}" '
            f'fill="{COLOURS[0]}"><title>{html.escape(name)}: {value:.4g}</title></rect>'
        )
        parts.append(_text(middle, HEIGHT - BOTTOM + 16, shown, "middle"))
        if interval:
            ends = f'y1="{up(interval[0])}" y2="{up(interval[1])}"'
            parts.append(f'<line class="whisker" x1="{middle}" x2="{middle}" {ends}/>')
    return parts
