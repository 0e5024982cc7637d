"""Reports: one self-contained HTML page with tables and plots, and the same as JSON beside it."""

import dataclasses
import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beartype import beartype

from palm_rlhf.evaluation.reports.plots import BarPlot, Line, LinePlot, Plot, draw
from palm_rlhf.model.files import read_text, write_text

Cell = str | int | float | bool | None

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #fff; --faint: #d8dde2; --quiet: #5c6670; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8eb; --paper: #15191d; --faint: #384049; --quiet: #9aa5af; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; } p.note { color: var(--quiet); max-width: 45rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: pre-wrap; }
svg { max-width: 42rem; width: 100%; } svg text { font-size: 11px; fill: var(--ink); }
svg .grid { stroke: var(--faint); } svg .whisker { stroke: var(--ink); stroke-width: 1.5; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Table:
    """A table of numbers and texts; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Report:
    """Tables and plots under a title; `results` are the figures for programs."""

    title: str
    sections: tuple[Table | Plot, ...]
    results: dict[str, Any]


@beartype
def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the page to `path` and the JSON beside it, each atomically, and return the path of the JSON.

    An earlier report is overwritten. Raises ValueError if `path` ends in .json, or if one of the two files exists and
    is no report.
    """
    page = Path(path)
    beside = page.with_suffix(".json")
    if page == beside:
        raise ValueError(f"got the page {page}, expected a name that does not end in .json, such as report.html")
    if beside.exists():
        try:
            read_report(beside)
        except ValueError as error:
            raise ValueError(
                f"{beside} exists and is no report, which writing {page} would overwrite: choose another name"
            ) from error
    elif page.is_file():
        raise ValueError(f"{page} exists and is no report (it has no {beside.name} beside it): choose another name")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(beside, json.dumps(_as_json(report), ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    write_text(page, render(report))
    return beside


@beartype
def read_report(path: str | os.PathLike[str]) -> Report:
    """Read the JSON of a report. Raises ValueError for another file."""
    try:
        record = json.loads(read_text(Path(path)))
        report = Report(record["title"], tuple(map(_section, record["sections"])), record["results"])
        render(report)  # fails on a malformed section
        return report
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path} is no report ({type(error).__name__}: {error}); expected the JSON file beside the page of a report"
        ) from error


@beartype
def merge_reports(title: str, reports: Sequence[Report]) -> Report:
    """Merge reports into one, in their order, with the results of each under its title. Titles must differ."""
    titles = [report.title for report in reports]
    if len({*titles}) < len(titles):
        raise ValueError(f"got reports with the titles {titles}, expected different titles: leave out copies")
    sections = [
        dataclasses.replace(section, title=f"{report.title}: {section.title}")
        for report in reports
        for section in report.sections
    ]
    return Report(title, tuple(sections), {report.title: report.results for report in reports})


@beartype
def render(report: Report) -> str:
    """Return the page as HTML."""
    parts = [f"<h1>{html.escape(report.title)}</h1>"]
    for section in report.sections:
        parts.append(f"<section><h2>{html.escape(section.title)}</h2>")
        parts.append(_render_table(section) if isinstance(section, Table) else draw(section))
        parts.append("</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def shown(value: Cell) -> str:
    """Return a cell for people: four significant digits, thousands separators, and a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == round(value) and abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return value


@beartype
def as_text(table: Table) -> str:
    """Return the table as text for a terminal."""
    rows = [table.columns, *(tuple(map(shown, row)) for row in table.rows)]
    rows = [tuple(cell.replace("\n", " ")[:60] for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    return "\n".join([table.title, *(f"  {line}" for line in lines), *([table.note] if table.note else [])])


def _render_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_kind(cell)}>{html.escape(shown(cell))}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _kind(cell: Cell) -> str:
    return ' class="text"' if isinstance(cell, str) else ""


def _as_json(report: Report) -> dict[str, Any]:
    return finite(
        {
            "title": report.title,
            "results": report.results,
            "sections": [dataclasses.asdict(section) for section in report.sections],
        }
    )


@beartype
def finite(value: Any) -> Any:
    """Replace numbers that JSON lacks (NaN and infinities) by None, at any depth."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _section(record: dict[str, Any]) -> Table | Plot:
    fields = {name: _tuples(value) for name, value in record.items() if name != "kind"}
    if record["kind"] == "line":
        return LinePlot(**fields | {"lines": tuple(Line(**_line(line)) for line in record["lines"])})
    return {"table": Table, "bar": BarPlot}[record["kind"]](**fields)


def _line(record: dict[str, Any]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in record.items()}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
