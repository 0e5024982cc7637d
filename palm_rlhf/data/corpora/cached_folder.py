"""Writes that are whole or absent: locks, temporary names, and an error that helps when the disk is full."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
META = "meta.json"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of `path`: of several processes one builds it and the others wait; a killed one lets go."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{path}.lock", "ab")
    except OSError as error:
        mend = "set PALM_RLHF_CACHE, or pass cache_dir, to a folder you can write to"
        message = f"the cache cannot be written ({error.strerror}); {mend}"
        raise OSError(error.errno, message, str(path.parent)) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def room_for(num_bytes: int, folder: Path) -> Iterator[None]:
    """Makes the error of a write that found no room name the folder, and the bytes free and needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        got = f"{shutil.disk_usage(folder).free:,} bytes are free and about {num_bytes:,} are needed"
        mend = "make room, or set PALM_RLHF_CACHE to a folder on a larger disk"
        raise OSError(error.errno, f"the disk is full ({error.strerror}): {got}; {mend}", str(folder)) from error


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def stored(
    folder: Path, fingerprint: str, num_bytes: int, build: Callable[[Path], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yields what `build` returned about the files it wrote, with the folder locked against other processes.

    `build` runs, in a temporary folder that is renamed at the end, only if `folder` is not whole or its
    fingerprint is another. `num_bytes` bounds what it writes, for the error of a full disk.
    """
    with locked(folder):
        meta = _read_meta(folder, fingerprint)
        if meta is None:
            with room_for(num_bytes, folder.parent):
                meta = _build(folder, fingerprint, build)
        yield meta["content"]


def _read_meta(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in meta["files"].items())
        return meta if whole and meta["fingerprint"] == fingerprint else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _build(folder: Path, fingerprint: str, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    # One temporary name for each store, so that what a killed process left is cleared here and never piles up.
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        content = build(temporary)
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        meta = {"fingerprint": fingerprint, "files": sizes, "content": content}
        (temporary / META).write_text(json.dumps(meta), encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)
    return meta
