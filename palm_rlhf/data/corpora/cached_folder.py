"""Folders in the cache that are whole or absent: locks, temporary names, and errors that help when the disk is full."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from palm_rlhf.model.files import sync

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
META = "meta.json"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, so that one process builds it while others wait; a killed process releases it."""
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
    """Make the error of a write to a full disk name the folder, and the bytes that are free and needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        got = f"{shutil.disk_usage(folder).free:,} bytes are free and about {num_bytes:,} are needed"
        mend = "make room, or set PALM_RLHF_CACHE to a folder on a larger disk"
        raise OSError(error.errno, f"the disk is full ({error.strerror}): {got}; {mend}", str(folder)) from error


@contextmanager
def stored(
    folder: Path, fingerprint: str, num_bytes: int, build: Callable[[Path], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield what `build` returned about the files it wrote; the folder stays locked against other processes.

    `build` runs only if `folder` is not whole or has another fingerprint. It writes to a temporary folder, which takes
    the place of `folder` at the end.

    Args:
        folder: Where the files are.
        fingerprint: A digest of everything that the files depend on.
        num_bytes: About how much `build` writes, for the error of a full disk.
        build: Writes the files into the folder that it is given, and returns values for JSON.
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
    # Each folder has one temporary name, so that the leftovers of a killed process are removed here and never pile up.
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
