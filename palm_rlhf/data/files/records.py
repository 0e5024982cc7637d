"""Records in files of any size: JSON in lines or an array, plain or gzip, standard input and output."""

import gzip
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from beartype import beartype
from tqdm import tqdm

from palm_rlhf.data.corpora.cached_folder import sync
from palm_rlhf.data.files.json_record import GZIP_ERRORS, Broken, Record, damaged_gzip
from palm_rlhf.data.files.json_stream import pieces
from palm_rlhf.data.files.tabular import PARQUET_MAGIC, is_csv, read_csv, read_parquet, write_csv, write_parquet

MAX_RECORD_BYTES = 1 << 26
STANDARD = "-"  # as a path: standard input or output
GZIP_MAGIC = b"\x1f"  # no JSON starts with this byte

log = logging.getLogger(__name__)


@beartype
def read_records(
    path: str | os.PathLike[str],
    *,
    skip_broken: bool = False,
    rejected: Counter[str] | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[tuple[int, Record]]:
    """The JSON objects of a file one after the other, each with the number of the line on which it starts.

    The file has an object on each line (empty ones are passed over), objects printed over several lines, or one array
    of objects. Gzip is recognised by its content; `-` is standard input. Only one record, or a chunk of the file, is
    in memory at a time. Names that end in `.csv` or `.tsv` say that the file is a table (`read_csv`), and parquet
    is recognised by its content; there, a line is a row.

    A record is broken if it is no JSON object in valid Unicode, nested too deeply or longer than
    `max_record_bytes`, and so is the rest of a gzip that ends early, or of an array after a bracket or quotation
    mark that is never closed. The first broken record raises a `ValueError` that names its line, and its number in
    an array. With `skip_broken` it is logged as a warning instead and counted in `rejected` by its reason. Raises
    `OSError` for a file that cannot be read.
    """
    rejected = Counter() if rejected is None else rejected
    with _opened(os.fspath(path)) as (stream, bar, position):
        for line, record in _found(os.fspath(path), stream, max_record_bytes):
            bar.update(position() - bar.n)
            if not isinstance(record, Broken):
                yield line, record
                continue
            place = f"{path}, line {line}" + (f", record {record.number}" if record.number else "")
            if not skip_broken:
                expected = (
                    "a row of its table"
                    if is_csv(os.fspath(path))
                    else "one JSON object on each line, or one array of them"
                )
                raise ValueError(f"{place}: {record}; expected {expected}: mend or delete it") from record
            log.warning("%s left out: %s", place, record)
            rejected[record.reason] += 1


@beartype
def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Writes each record as a line of JSON, or a row of CSV or parquet by the name's suffix; returns how many.

    The file appears when it is whole: until then, and if reading the records fails, a file of that name stays as it
    was. `-` is standard output; a name that ends in `.gz` is packed. The same records make the same bytes.
    """
    if os.fspath(path) == STANDARD:
        return _write_lines(sys.stdout.buffer, records)
    target = Path(os.path.realpath(path))  # so that a link stays a link
    if target.exists() and not target.is_file():
        with open(target, "wb") as stream:  # a pipe or device cannot be replaced
            return _write(stream, target.name, records)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with open(partial, "wb") as stream:
            if target.name.endswith(".gz"):
                with gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
                    num_records = _write(packed, target.name, records)
            else:
                num_records = _write(stream, target.name, records)
        sync(partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(target.parent)
    return num_records


def _found(path: str, stream: Any, limit: int) -> Iterator[tuple[int, Record | Broken]]:
    """The records of a file whose form is told by its name or its first bytes."""
    try:
        start = stream.peek(len(PARQUET_MAGIC))
    except GZIP_ERRORS as error:  # now, since a stream that failed looks empty afterwards
        return iter([(1, damaged_gzip(error))])
    if start.startswith(PARQUET_MAGIC):
        return read_parquet(stream, path)
    return read_csv(stream, path, limit) if is_csv(path) else pieces(stream, limit)


def _write(stream: Any, name: str, records: Iterable[Record]) -> int:
    if name.removesuffix(".gz").endswith(".parquet"):
        return write_parquet(stream, records)
    if is_csv(name):
        return write_csv(stream, records, name)
    return _write_lines(stream, records)


def _write_lines(stream: BinaryIO | gzip.GzipFile, records: Iterable[Record]) -> int:
    num_records = 0
    for record in records:
        stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        num_records += 1
    stream.flush()
    return num_records


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, tqdm, Callable[[], int]]]:
    """The unpacked bytes of a file, a bar for a terminal, and how many bytes of the file have been read."""
    file = sys.stdin.buffer if path == STANDARD else open(path, "rb")
    seekable = file.seekable()
    size = os.fstat(file.fileno()).st_size if seekable else None
    bar = tqdm(desc=f"reading {path}", total=size, unit="B", unit_scale=True, delay=1.0, disable=None)
    try:
        packed = file.peek(1)[:1] == GZIP_MAGIC
        if path.endswith(".gz") and not packed:
            raise ValueError(f"{path} is no gzip file, though its name says so: unpack it, or copy it again")
        yield gzip.GzipFile(fileobj=file) if packed else file, bar, file.tell if seekable else lambda: 0
    finally:
        bar.close()
        if path != STANDARD:
            file.close()
