"""The checkpoints of a run: one folder each, complete or absent; safetensors and JSON, no pickles."""

import base64
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE_FILE = "state.json"
_COMPLETE = re.compile(r"step_(\d{8,})")


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first; half-written ones have other names and are not seen."""
    if not root.is_dir():
        return []
    found = {int(m[1]): path for path in root.iterdir() if (m := _COMPLETE.fullmatch(path.name)) and path.is_dir()}
    return [found[step] for step in sorted(found) if (found[step] / STATE_FILE).is_file()]


@contextmanager
def new_checkpoint(root: Path, step: int, keep: int) -> Iterator[Path]:
    """A folder to fill, which becomes the checkpoint `step` when the block ends; then all but the newest `keep` go.

    The folder has a temporary name until everything in it is on the disk. Where writing fails, it is removed, what was
    saved before stays as it was, and the OSError says so.
    """
    final = root / f"step_{step:08d}"
    partial = root / f".{final.name}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        partial.mkdir()
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _fsync(path)
        if final.exists():
            _retire(final)
        os.replace(partial, final)
        _fsync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        intact = complete_checkpoints(root)
        raise OSError(
            f"the checkpoint of step {step} could not be written to {root}: {error}. "
            + (f"Earlier checkpoints are intact, the newest is {intact[-1].name}. " if intact else "")
            + "Make room on the disk (or lower keep_checkpoints, or choose another output_dir), then resume"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in complete_checkpoints(root)[:-keep]:
        _retire(old)
    _remove_leftovers(root)


def _retire(checkpoint: Path) -> None:
    """Renames a checkpoint before its removal, so that a kill half-way leaves nothing that looks complete."""
    os.replace(checkpoint, checkpoint.with_name(f".{checkpoint.name}.retired"))


def _remove_leftovers(root: Path) -> None:
    for pattern in (".step_*.partial", ".step_*.retired"):
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover)


def _fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk (Windows can wait for neither this way)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Replaces `path` with `content` as JSON, at once."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_text(path: Path, text: str) -> None:
    """Replaces `path` with `text`, at once: a reader, or a kill, sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turns whatever goes wrong in reading a checkpoint into one ValueError that names the folder and the way out."""
    try:
        yield
    except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"the checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}): "
            f"remove that folder to resume from the one before it"
        ) from error


def save_training_tensors(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Writes the parameters and buffers of the modules, and the optimiser's state of each parameter, as safetensors."""
    tensors = dict(_module_tensors(modules))
    names = {tensor: name for name, tensor in tensors.items()}
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{names[parameter]}/{key}"] = value
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


@torch.no_grad()
def load_training_tensors(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Puts back in place what `save_training_tensors` wrote; ValueError where names or shapes are not those of the file."""
    stored = load_file(path)
    tensors = dict(_module_tensors(modules))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items() if not name.startswith("optimizer/")}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if differing := sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name)):
        name = differing[0]
        raise ValueError(
            f"{path} is of another model: {name} is {shapes.get(name, 'missing')} there, "
            f"{expected.get(name, 'missing')} here ({len(differing)} such): resume with the model of the run"
        )
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
    names = {tensor: name for name, tensor in tensors.items()}
    moments = {
        index: {
            key.rpartition("/")[2]: value
            for key, value in stored.items()
            if key.rpartition("/")[0] == f"optimizer/{names[parameter]}"
        }
        for index, parameter in enumerate(_parameters(optimizer))
    }
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _module_tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in modules.items():
        persistent = module.state_dict().keys()
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in persistent:
                yield f"{prefix}/{name}", tensor


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def rng_state() -> dict[str, Any]:
    """The states of this process's random generators - python, numpy, torch, and the present CUDA device - as JSON."""
    version, internal, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts the generators back where `rng_state` found them."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_to_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_to_bytes(state["cuda"]))


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _to_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
