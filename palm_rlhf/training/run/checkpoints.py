"""The checkpoints of a run: a folder for each, complete or absent; safetensors and JSON, no pickles."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from beartype import beartype
from safetensors import SafetensorError

from palm_rlhf.model.files import sync, write_text
from palm_rlhf.training.run.config import RunConfig

METRICS_FILE, STATE_FILE, BEST_FILE = "metrics.jsonl", "state.json", "best.json"


def checkpoint_name(step: int) -> str:
    """Return the name of a step's checkpoint folder."""
    return f"step_{step:08d}"


@beartype
def complete_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints under `root`, oldest first; unfinished ones have other names."""
    folders = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((path for path in folders if (path / STATE_FILE).is_file()), key=lambda path: int(path.name[5:]))


@beartype
def require_unused(output_dir: Path) -> None:
    """Raise FileExistsError where `output_dir` holds an earlier run, which a new run would write over."""
    for left in [*complete_checkpoints(output_dir / "checkpoints")[-1:], output_dir / METRICS_FILE]:
        if left.exists():
            raise FileExistsError(
                f"{left} is of an earlier run: pass resume=True to go on with it, or choose another output_dir"
            )


@contextmanager
@beartype
def writing(name: str) -> Iterator[None]:
    """Turn the errors of a full disk into one OSError that names the file and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{name} could not be written: {error.__cause__ or error}. What was saved before is intact: make room on "
            f"the disk (fewer keep_checkpoints take less), then resume"
        ) from error


@beartype
def best_checkpoint(root: Path) -> Path | None:
    """Return the checkpoint under `root` that best.json names; None where there is none."""
    path = root / BEST_FILE
    folder = root / json.loads(path.read_text(encoding="utf-8"))["checkpoint"] if path.is_file() else None
    return folder if folder is not None and (folder / STATE_FILE).is_file() else None


@contextmanager
@beartype
def new_checkpoint(root: Path, step: int, keep: int, best: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield a folder to fill; at the end of the block it becomes the checkpoint of `step`, whole or not at all.

    Then all checkpoints but the newest `keep`, and the best one, are removed. Raises OSError where the disk is full.

    Args:
        root: the folder of the run's checkpoints.
        step: the step that the run is at.
        keep: how many of the newest checkpoints stay.
        best: the content of best.json, which names the best checkpoint by its "step"; None leaves the file as it is.
    """
    final = root / checkpoint_name(step)
    partial = root / f".{final.name}.partial"
    with writing(f"the checkpoint {final}"):
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        try:
            partial.mkdir()
            yield partial
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            if final.exists():
                _retire(final)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if best is not None:
            write_text(root / BEST_FILE, json.dumps({"checkpoint": checkpoint_name(best["step"]), **best}) + "\n")
        sync(root)
        kept = best_checkpoint(root)
        for old in complete_checkpoints(root)[:-keep]:
            if old != kept:
                _retire(old)
        _remove_leftovers(root)


def _retire(checkpoint: Path) -> None:
    """Rename a checkpoint before its removal, so that a kill half-way leaves nothing that looks complete."""
    os.replace(checkpoint, checkpoint.with_name(f".{checkpoint.name}.retired"))


def _remove_leftovers(root: Path) -> None:
    for leftover in [*root.glob(".step_*.partial"), *root.glob(".step_*.retired")]:
        shutil.rmtree(leftover)


@beartype
def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write the part of a run's state that is not a tensor, as JSON."""
    write_text(checkpoint / STATE_FILE, json.dumps(state) + "\n")


@beartype
def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state that `write_state` wrote."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


@beartype
def require_same(checkpoint: Path, there: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ValueError where a checkpoint is of a run with other values of the config's fixed fields.

    A field that is newer than the checkpoint had its default.
    """
    here = {name: getattr(config, name) for name in config.fixed}
    there = {name: tuple(value) if isinstance(value, list) else value for name, value in there.items()}  # from JSON
    there = {**{field.name: field.default for field in fields(config)}, **there}
    if changed := [name for name in config.fixed if there[name] != here[name]]:
        got, expected = ([f"{name}={values[name]}" for name in changed] for values in (here, there))
        raise ValueError(f"this run has {got}, {checkpoint} has {expected}: resume with the values of the checkpoint")


@contextmanager
@beartype
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn the errors of a damaged checkpoint into one ValueError that names the folder and the way out."""
    try:
        yield
    except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}): "
            f"remove that folder to resume from the one before it"
        ) from error
