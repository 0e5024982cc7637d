"""Writing of a weights folder, as a whole: a process killed at any moment leaves the old weights or the new ones."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from palm_rlhf.model.files import sync
from palm_rlhf.model.weights_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, INDEX, WEIGHTS, WRITTEN, shards_of

SHARD = "model-{:05d}-of-{:05d}.safetensors"
ANY_SHARD = SHARD.format(0, 0).replace("0", "[0-9]")
# New files are written to this folder. Renaming it to WRITTEN makes them the contents of the weights folder; then they
# are moved there one by one. A reader looks for each file in WRITTEN before it looks in the weights folder.
WRITING = ".writing"


def write_folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write weights to a folder, in place of the weights that it holds; its other files stay.

    Raises OSError where the folder cannot be written to; the old weights are intact then.
    """

    def write(place: Path) -> None:
        write_files(place, config, tensors, max_shard_bytes)

    write_whole(path, write)


def write_adapter(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the settings and weights of an adapter to a folder, in the same way as `write_folder`."""

    def write(place: Path) -> None:
        here = {name: tensor.cpu() for name, tensor in tensors.items()}
        write_tensors(here, place / ADAPTER_WEIGHTS)
        write_json(place / ADAPTER_CONFIG, config)
        sync_all(place)

    write_whole(path, write)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let a function write files to an empty folder, and move them to a folder as one change."""
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with sole_writer(path):
            finish(path)
            try:
                shutil.rmtree(path / WRITING, ignore_errors=True)
                (path / WRITING).mkdir()
                write(path / WRITING)
                os.rename(path / WRITING, path / WRITTEN)
            finally:
                shutil.rmtree(path / WRITING, ignore_errors=True)
            sync(path)
            finish(path)
    except (OSError, SafetensorError) as error:
        if new:
            with suppress(OSError):
                path.rmdir()
        number = error.errno if isinstance(error, OSError) else None
        message = f"{path} could not be written: {error}. Make room there, or choose another folder; "
        message += "nothing is left of this attempt" if new else "what was saved there before is intact"
        raise (OSError(message) if number is None else OSError(number, message)) from error


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Let one process at a time write to a folder. A killed process frees the lock; Windows has no such locks."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks on folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_files(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write config.json and the weights to an empty folder, and wait until they are on the disk."""
    groups = shards(tensors, max_shard_bytes)
    names = [SHARD.format(i, len(groups)) for i in range(1, len(groups) + 1)] if len(groups) > 1 else [WEIGHTS]
    for name, group in zip(names, groups, strict=True):
        here = {key: tensors[key].detach().cpu().contiguous() for key in group}
        write_tensors(here, path / name)
    if len(groups) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(path / CONFIG, config)
    sync_all(path)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file of safetensors with the permissions of any new file; the library lets nobody but the owner read."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def sync_all(path: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk."""
    for file in [*path.iterdir(), path]:
        sync(file)


def shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Group the names of tensors, in their order: at most `max_bytes` in a group, or a single larger tensor."""
    groups: list[list[str]] = []
    size = 0
    for name, tensor in tensors.items():
        if not groups or size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return groups


def finish(path: Path) -> None:
    """Move the files of WRITTEN, if there are any, to their places, and remove the weights before them.

    The next writer calls it again after a process was killed on the way.
    """
    written = path / WRITTEN
    if not written.is_dir():
        return
    if (written / CONFIG).exists():  # config.json moves last: without it, no library opens a mixture of old and new
        (path / CONFIG).unlink(missing_ok=True)
        for shard in written.glob(ANY_SHARD):
            os.replace(shard, path / shard.name)
        for name, other in ((WEIGHTS, INDEX), (INDEX, WEIGHTS)):
            if (written / name).exists():
                (path / other).unlink(missing_ok=True)
                os.replace(written / name, path / name)
        kept = shards_of(path / INDEX) if (path / INDEX).exists() else ()
        for shard in path.glob(ANY_SHARD):
            if shard.name not in kept:
                shard.unlink()
        os.replace(written / CONFIG, path / CONFIG)
    if (written / ADAPTER_CONFIG).exists():
        (path / ADAPTER_CONFIG).unlink(missing_ok=True)
        if (written / ADAPTER_WEIGHTS).exists():
            os.replace(written / ADAPTER_WEIGHTS, path / ADAPTER_WEIGHTS)
        os.replace(written / ADAPTER_CONFIG, path / ADAPTER_CONFIG)
    written.rmdir()
    sync(path)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write an object as JSON, one field a line."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def parse_size(size: int | str) -> int:
    """Return the bytes of a size such as "5GB" or "200KB" (powers of 1000), "1GiB" (of 1024), or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", str(size))
    num_bytes = size if isinstance(size, int) else 0
    if match:
        number, unit, binary = match.groups()
        num_bytes = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1))
    if num_bytes < 1:
        raise ValueError(f'max_shard_size is {size!r}; expected a number of bytes, or a size such as "5GB"')
    return num_bytes
