"""The argument types that the commands of `palm-rlhf evaluate` share, and the end of each command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from beartype import beartype
from tyro.conf import Positional, arg

from palm_rlhf.evaluation.reports.report import Report, Table, as_text, finite, write_report

File = Annotated[Positional[Path], arg(metavar="FILE")]
Files = Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE ...")]
Model = Annotated[Positional[str], arg(metavar="MODEL")]
NamedFile = Annotated[Path, arg(metavar="FILE")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE")]
OptionalModel = Annotated[str | None, arg(metavar="MODEL")]
Page = Annotated[Path | None, arg(metavar="PAGE.html")]
Name = Annotated[str | None, arg(metavar="NAME")]
Integer = Annotated[int | None, arg(metavar="INT")]
Number = Annotated[float, arg(metavar="NUMBER")]
TwoFiles = Annotated[tuple[Path, Path], arg(metavar="A B")]
TwoNames = Annotated[tuple[str, str] | None, arg(metavar="A B")]
Preset = Annotated[Literal["default", "oasst", "vicuna", "openchat"] | None, arg(metavar="PRESET")]

MAX_ROWS = 40


@beartype
def finish(report: Report, page: Path | None, summary: dict[str, Any]) -> None:
    """Print the tables, write the page if there is a path for it, and print the summary as one line of JSON."""
    for section in report.sections:
        if isinstance(section, Table) and len(section.rows) <= MAX_ROWS:
            print(as_text(section), end="\n\n")
        elif isinstance(section, Table):
            print(f"{section.title}: {len(section.rows)} rows; --report writes them to a page\n")
    if page is not None:
        print(f"wrote {page} and {write_report(report, page)}\n")
    print(json.dumps(finite(summary)))


@beartype
def require_files(files: Sequence[Path]) -> None:
    """Raise ValueError if there are no files."""
    if not files:
        raise ValueError("got no files, expected at least one: name them after the command")


@beartype
def different_names(first: str, second: str) -> tuple[str, str]:
    """Return the names of two models. Raises ValueError if they are equal."""
    if first == second:
        raise ValueError(f"got two models called {first!r}, expected different names: set them by --models")
    return first, second
