"""Files that are written whole or not at all, and texts, which are UTF-8 with or without a byte order mark.

A new file takes the place of the old one once its bytes are on the disk. Errors for other encodings name them.
"""

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beartype import beartype

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 in little-endian order starts with the first as well
HOW_TO_CONVERT = "it looks like UTF-16 or UTF-32; convert it to UTF-8, as by iconv -f UTF-16 -t UTF-8"


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


@beartype
def is_utf16(start: bytes) -> bool:
    """Return whether a text starts like UTF-16 or UTF-32: with their byte order mark, or with a zero byte."""
    return start.startswith(UTF16) or b"\0" in start[:4]


@beartype
def read_text(path: Path) -> str:
    """Return the text of a file without its byte order mark; line ends stay. Raises ValueError if it is not UTF-8."""
    content = path.read_bytes()
    if is_utf16(content[:4]):
        raise ValueError(f"{path} is not UTF-8: {HOW_TO_CONVERT}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it first") from error
