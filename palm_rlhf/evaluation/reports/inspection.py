"""The page of `palm-rlhf inspect`: the tokens of an RLHF run with their advantages, ratios, KL and values."""

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

from beartype import beartype

from palm_rlhf.model.files import write_text
from palm_rlhf.training.rlhf.metrics import CURVES
from palm_rlhf.training.rlhf.token_table import TOKENS_FILE
from palm_rlhf.training.run.checkpoints import METRICS_FILE
from palm_rlhf.training.run.log import read_metrics

PAGE = Path(__file__).with_name("page")
LISTS = ("tokens", "logprob", "new_logprob", "advantage", "ratio", "clipped", "in_loss")
OPTIONAL_LISTS = ("pieces", "ref_logprob", "value", "return")


@beartype
def read_inspected(folder: Path) -> dict[str, Any]:
    """Read the metrics of a run and its kept tokens for the page.

    Raises FileNotFoundError if the run kept no tokens, and ValueError if a line lacks a field of the page.
    """
    metrics, path = read_metrics(folder / METRICS_FILE), folder / TOKENS_FILE
    rows = read_metrics(path)
    if not metrics or not rows:
        missing = path if metrics else folder / METRICS_FILE
        raise FileNotFoundError(
            f"{missing} is missing or empty; expected the output folder of an RLHFTrainer after sample_every steps: "
            "train longer, or with a smaller sample_every"
        )
    for place, row in enumerate(rows, start=1):
        _check(row, f"{path}, line {place}")
    return {"metrics": metrics, "rows": rows, "curves": list(CURVES)}


def _check(row: dict[str, Any], place: str) -> None:
    if not isinstance(row.get("step"), int) or not isinstance(row.get("prompt"), str | list) or "score" not in row:
        raise ValueError(f"{place}: got the keys {sorted(row)[:8]}, expected step, score, prompt and {list(LISTS)}")
    lists = {name: row.get(name) for name in LISTS} | {name: row[name] for name in OPTIONAL_LISTS if name in row}
    lengths = {name: len(entries) if isinstance(entries, list) else None for name, entries in lists.items()}
    if None in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"{place}: got lists of the lengths {lengths}, expected one entry for each token in each list")


@beartype
def inspection_page(folder: Path) -> str:
    """Return the page as HTML that needs no other file and no network."""
    script = (PAGE / "inspect.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    numbers = json.loads(json.dumps(read_inspected(folder)), parse_constant=lambda _: None)  # JSON has no NaN
    parts = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": html.escape(f"Inside {folder.resolve().name}"),
        "style": (PAGE / "inspect.css").read_text(encoding="utf-8"),
        "data": json.dumps(numbers, ensure_ascii=False).replace("<", "\\u003c"),  # a token may be "</script>"
        "script": script,
    }
    return Template((PAGE / "inspect.html").read_text(encoding="utf-8")).substitute(parts)


@beartype
def write_inspection(folder: Path, output: Path | None = None) -> Path:
    """Write the page atomically, by default into the run's folder, and return its path."""
    path = folder / "inspect.html" if output is None else output
    write_text(path, inspection_page(folder))
    return path
