"""The checkpoints of a run: a folder for each, complete or absent; safetensors and JSON, no pickles."""

import base64
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beartype import beartype
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from palm_rlhf.model.weights_folder import sync
from palm_rlhf.training.run.config import RunConfig
from palm_rlhf.training.run.sharding import full_tensor, sharded_like

METRICS_FILE, STATE_FILE, BEST_FILE = "metrics.jsonl", "state.json", "best.json"


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


@beartype
def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first; half-written ones have other names and are not seen."""
    folders = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((path for path in folders if (path / STATE_FILE).is_file()), key=lambda path: int(path.name[5:]))


@beartype
def require_unused(output_dir: Path) -> None:
    """FileExistsError where a run has left something in `output_dir`, which a new run would write over."""
    for left in [*complete_checkpoints(output_dir / "checkpoints")[-1:], output_dir / METRICS_FILE]:
        if left.exists():
            raise FileExistsError(
                f"{left} is of an earlier run: pass resume=True to go on with it, or choose another output_dir"
            )


@contextmanager
@beartype
def writing(what: str) -> Iterator[None]:
    """Turns what a full disk raises into one OSError that says what was not written and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{what} could not be written: {error.__cause__ or error}. What was saved before is intact: make room on "
            f"the disk (fewer keep_checkpoints take less), then resume"
        ) from error


@beartype
def best_checkpoint(root: Path) -> Path | None:
    """The checkpoint under `root` that best.json names, where there is one."""
    path = root / BEST_FILE
    folder = root / json.loads(path.read_text(encoding="utf-8"))["checkpoint"] if path.is_file() else None
    return folder if folder is not None and (folder / STATE_FILE).is_file() else None


@contextmanager
@beartype
def new_checkpoint(root: Path, step: int, keep: int, best: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes the checkpoint of `step` when the block ends; then all but the newest `keep` go.

    The best one stays, which best.json names from then on: that of `best["step"]`, or if None the one of before. The
    folder has a temporary name until everything in it is on the disk. OSError where it cannot be written.
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
    """Renames a checkpoint before its removal, so that a kill half-way leaves nothing that looks complete."""
    os.replace(checkpoint, checkpoint.with_name(f".{checkpoint.name}.retired"))


def _remove_leftovers(root: Path) -> None:
    for leftover in [*root.glob(".step_*.partial"), *root.glob(".step_*.retired")]:
        shutil.rmtree(leftover)


@beartype
def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Writes all that is not a tensor, as JSON."""
    write_text(checkpoint / STATE_FILE, json.dumps(state) + "\n")


@beartype
def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


@beartype
def require_same(checkpoint: Path, there: Mapping[str, Any], config: RunConfig) -> None:
    """ValueError where a run would go on from a checkpoint with other values of the fixed fields of its config.

    A field that the checkpoint is older than had its default.
    """
    here = {name: getattr(config, name) for name in config.fixed}
    there = {**{field.name: field.default for field in fields(config)}, **there}
    if changed := [name for name in config.fixed if there[name] != here[name]]:
        got, expected = ([f"{name}={values[name]}" for name in changed] for values in (here, there))
        raise ValueError(f"this run has {got}, {checkpoint} has {expected}: resume with what the run keeps")


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once: a reader, or a kill, finds the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
    sync(partial)
    os.replace(partial, path)


@contextmanager
@beartype
def reading(checkpoint: Path) -> Iterator[None]:
    """Turns what a damaged checkpoint raises into one ValueError that names the folder and the way out."""
    try:
        yield
    except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}): "
            f"remove that folder to resume from the one before it"
        ) from error


@beartype
def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """What an optimiser keeps for each parameter, by the parameters' names, with all shards: all processes ask."""
    return {
        f"{names[parameter]}/{key}": full_tensor(value.detach()).cpu().contiguous()
        for parameter in _parameters(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


@beartype
def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Puts back what `optimizer_tensors` gave; parameters without gradients have nothing there."""
    kept: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(path).items():
        parameter, _, key = name.rpartition("/")
        kept.setdefault(parameter, {})[key] = value
    state = {
        index: {key: sharded_like(parameter, value) for key, value in kept[names[parameter]].items()}
        for index, parameter in enumerate(_parameters(optimizer))
        if names[parameter] in kept
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@beartype
def rng_state() -> dict[str, Any]:
    """The states of this process's random generators - Python's, NumPy's, PyTorch's - as JSON."""
    version, internal, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


@beartype
def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts the generators back where `rng_state` found them."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
