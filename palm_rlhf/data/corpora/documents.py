"""Documents of text in files, folders and globs: text, JSON lines and tables, plain or packed with gzip."""

import codecs
import csv
import glob
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from palm_rlhf.data.files.records import read_records
from palm_rlhf.data.files.tabular import is_csv
from palm_rlhf.model.files import HOW_TO_CONVERT, UTF16, is_utf16

CHUNK = 1 << 20

# The name of a document, to show in errors, and its text in chunks.
SourceDocument = tuple[str, Iterable[bytes]]


def find_files(spec: str, cache: Path) -> list[Path]:
    """Return a file, the files in a folder and below, or the files that a glob matches, in sorted order.

    Hidden files and folders (their names start with a dot) are left out unless they are named. So are the folders of
    the `cache` if they lie in the folder. Raises FileNotFoundError if there is no file.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(_walk(path, cache))
    elif path.exists():
        if not path.is_file():
            raise ValueError(
                f"got {spec}, which is a pipe or device, expected a regular file: write its content to a file first"
            )
        files = [path]
    else:
        files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
    if not files:
        got = "the folder has no files" if path.is_dir() else f"no file, folder or glob matches {os.path.abspath(path)}"
        raise FileNotFoundError(
            f"no data at {spec!r}: {got}, expected files, or one of auto, enwik8 and python-docs: mend the name (a "
            "weight "
            "is a positive number after the last colon)"
        )
    return files


def _walk(folder: Path, cache: Path) -> Iterator[Path]:
    left_out = {cache.resolve(), *(cache.resolve() / name for name in ("text", "tokens"))}
    for root, folders, names in os.walk(folder):
        below = Path(root).resolve()
        folders[:] = [name for name in folders if not name.startswith(".") and below / name not in left_out]
        files = (Path(root, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def is_plain(file: Path) -> bool:
    """Return whether the bytes of a file are its text, so that the file can be memory-mapped as it is."""
    if file.name.endswith((".gz", ".jsonl", ".parquet")) or is_csv(file.name):
        return False
    with open(file, "rb") as stream:
        return not stream.read(3).startswith((codecs.BOM_UTF8, *UTF16))


def documents_of_files(files: Iterable[Path], text_key: str) -> Iterator[SourceDocument]:
    """Yield the documents of files, each with its name and its text in chunks of bytes.

    Each line of `.jsonl` is a document (its string under `text_key`), and each row of parquet, or of CSV that has a
    column of that name. Every other file is one document. `.gz` is unpacked.
    """
    for file in files:
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            for text in _read_jsonl(file, text_key):
                yield str(file), (text,)
        elif file.name.endswith(".parquet") or (is_csv(file.name) and text_key in _header(file)):
            for text in _read_rows(file, text_key):
                yield str(file), (text,)
        else:
            yield str(file), _read_chunks(file)


def python_docs() -> list[SourceDocument]:
    """Return the language reference inside this Python (`pydoc_data.topics`), one document for each topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            f"this Python ({sys.executable}) lacks the module pydoc_data, expected it for "
            "python-docs: name a file or folder of text"
        ) from error
    return [(f"python-docs, {name}", (text.encode(),)) for name, text in sorted(topics.items())]


def _read_chunks(file: Path) -> Iterator[bytes]:
    with _open(file) as stream:
        for place, chunk in enumerate(_guarded(file, stream, iter(lambda: stream.read(CHUNK), b""))):
            if place == 0 and chunk.startswith(UTF16):
                raise ValueError(f"{file} is not UTF-8: {HOW_TO_CONVERT}")
            yield chunk if place else chunk.removeprefix(codecs.BOM_UTF8)


def _read_jsonl(file: Path, text_key: str) -> Iterator[bytes]:
    with _open(file) as stream:
        for number, line in enumerate(_guarded(file, stream, stream), start=1):
            if number == 1 and is_utf16(line[:4]):
                raise ValueError(f"{file} is not UTF-8: {HOW_TO_CONVERT}")
            if not line.isspace():
                try:
                    yield _text(json.loads(line), text_key)
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{file}, line {number}: {error}; expected one JSON object on every line, with its text under "
                        f"{text_key!r}: mend or delete the line, or name another text_key"
                    ) from error


def _read_rows(file: Path, text_key: str) -> Iterator[bytes]:
    for number, record in read_records(file):
        if record.get(text_key, "") is None:
            continue  # a cell without a text
        try:
            yield _text(record, text_key)
        except ValueError as error:
            raise ValueError(
                f"{file}, row {number}: {error}; mend or delete the row, or name another text_key"
            ) from error


def _header(file: Path) -> list[str]:
    """Return the names of the columns of CSV, whatever delimiter separates them."""
    with _open(file) as stream:
        line = next(iter(_guarded(file, stream, iter(stream.readline, b""))), b"")
    text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").rstrip("\r\n")
    try:
        return [name.strip() for delimiter in ",;\t" for name in next(csv.reader([text], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _text(record: Any, text_key: str) -> bytes:
    if not isinstance(record, dict):
        raise ValueError(f"got a {type(record).__name__}, expected an object")
    if not isinstance(record.get(text_key), str):
        got = f"a {type(record[text_key]).__name__}" if text_key in record else f"only the keys {sorted(record)}"
        raise ValueError(f"got {got}, expected a string under {text_key!r}")
    return record[text_key].encode()


def _open(file: Path) -> BufferedIOBase:
    return gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb")


def _guarded(file: Path, stream: BufferedIOBase, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the pieces that are read from a stream; ValueError if its gzip file is damaged."""
    try:
        yield from pieces
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is not a whole gzip file: it ends early or is damaged after {stream.tell():,} bytes of text "
            f"({error}); copy or compress it again"
        ) from error
