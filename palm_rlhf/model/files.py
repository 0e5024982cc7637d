"""Writes that are whole or absent: a new file takes the place of the old one once its bytes are on the disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beartype import beartype


@beartype
def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk (not on Windows, for folders)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
@beartype
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written to it replaces `path` at the end of the block.

    A reader, or a kill at any moment, finds the old file or the new one. An error in the block leaves the old one, and
    nothing else.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@beartype
def write_text(path: Path, text: str) -> None:
    """Write a file of text (UTF-8) in one piece: a reader, or a kill at any moment, finds the old text or the new."""
    with replacing(path) as partial:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
