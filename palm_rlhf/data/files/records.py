"""Files of records of any size: JSON, CSV or parquet, plain or packed with gzip; standard input and output."""

import gzip
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from beartype import beartype
from tqdm import tqdm

from palm_rlhf.data.files.json_record import GZIP_ERRORS, BrokenRecord, Record, damaged_gzip
from palm_rlhf.data.files.json_stream import json_objects
from palm_rlhf.data.files.tabular import PARQUET_MAGIC, is_csv, read_csv, read_parquet, write_csv, write_parquet
from palm_rlhf.model.files import replacing, sync

MAX_RECORD_BYTES = 1 << 26
STANDARD = "-"  # the path of standard input and output
GZIP_MAGIC = b"\x1f"  # no JSON starts with this byte

Parsed = TypeVar("Parsed")

log = logging.getLogger(__name__)


@beartype
def read_records(
    path: str | os.PathLike[str],
    *,
    skip_broken: bool = False,
    rejected: Counter[str] | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[tuple[int, Record]]:
    """Yield the records of a file one by one, each with the number of the line on which it starts.

    The file has a JSON object on each line (empty lines are skipped), objects over several lines, or one array of
    objects. A file is CSV or TSV by its name (see `read_csv`), and parquet by its content; there, a line is a row. Gzip
    is recognised by its content, too. Only one record, or one chunk of the file, is in memory at a time.

    A record is broken if it is no JSON object in valid Unicode, is nested too deeply or is too long. So is the rest of
    a gzip file that ends early, and the rest of an array after a bracket or quotation mark that is never closed.

    Raises ValueError at the first broken record, with its line, and OSError if the file cannot be read.

    Args:
        path: The file; `-` is standard input.
        skip_broken: Log broken records as warnings instead, and continue.
        rejected: Counts the broken records by their reasons.
        max_record_bytes: The longest record to read.
    """
    rejected = Counter() if rejected is None else rejected
    with _opened(os.fspath(path)) as (stream, bar, position):
        for line, record in _objects_or_rows(os.fspath(path), stream, max_record_bytes):
            bar.update(position() - bar.n)
            if not isinstance(record, BrokenRecord):
                yield line, record
                continue
            place = f"{path}, line {line}" + (f", record {record.number}" if record.number else "")
            if not skip_broken:
                expected = (
                    "a row of the table"
                    if is_csv(os.fspath(path))
                    else "one JSON object on each line, or one array of them"
                )
                raise ValueError(f"{place}: {record}; expected {expected}: mend or delete it") from record
            log.warning("%s left out: %s", place, record)
            rejected[record.reason] += 1


def parsed_records(
    path: str | os.PathLike[str],
    parse: Callable[[Record], Parsed],
    *,
    is_known: Callable[[Record], bool],
    expected: str,
    skip_broken: bool,
    rejected: Counter[str],
    max_record_bytes: int,
) -> Iterator[Parsed]:
    """Yield the result of `parse` for each record of a file; a record that it refuses is counted by its reason.

    Raises ValueError if the first record is not `is_known`, with the text `expected`.
    """
    records = read_records(path, skip_broken=skip_broken, rejected=rejected, max_record_bytes=max_record_bytes)
    for number, (line, record) in enumerate(records):
        if number == 0 and not is_known(record):
            raise unexpected_record(path, line, record, expected)
        try:
            parsed = parse(record)
        except ValueError as error:
            rejected[str(error)] += 1
        else:
            yield parsed


def unexpected_record(path: str | os.PathLike[str], line: int, record: Record, expected: str) -> ValueError:
    """Return the error for a file whose first record is in no expected format."""
    return ValueError(f"{path}, line {line}: got a record with the keys {sorted(record)[:8]}, expected {expected}")


@beartype
def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Write each record as a line of JSON, or as a row of CSV or parquet by the name's suffix; return their number.

    The file appears when it is whole. Until then, and if reading the records fails, an older file of that name stays as
    it was. The same records give the same bytes.

    Args:
        path: The file; `-` is standard output. A name that ends in `.gz` is packed.
        records: The records, which are read one by one.
    """
    if os.fspath(path) == STANDARD:
        return _write_lines(sys.stdout.buffer, records)
    target = Path(os.path.realpath(path))  # so that a link stays a link
    if target.exists() and not target.is_file():
        with open(target, "wb") as stream:  # a pipe or device cannot be replaced
            return _write(stream, target.name, records)
    with replacing(target) as partial, open(partial, "wb") as stream:
        if target.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
                num_records = _write(packed, target.name, records)
        else:
            num_records = _write(stream, target.name, records)
    sync(target.parent)
    return num_records


def _objects_or_rows(path: str, stream: Any, limit: int) -> Iterator[tuple[int, Record | BrokenRecord]]:
    """Yield the records of a file; its name or its first bytes tell the format."""
    try:
        start = stream.peek(len(PARQUET_MAGIC))
    except GZIP_ERRORS as error:  # here, since a stream that failed looks empty afterwards
        return iter([(1, damaged_gzip(error))])
    if start.startswith(PARQUET_MAGIC):
        return read_parquet(stream, path)
    return read_csv(stream, path, limit) if is_csv(path) else json_objects(stream, limit)


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
    """Yield the unpacked bytes of a file, a progress bar, and a function that tells how many bytes were read."""
    file: Any = sys.stdin.buffer if path == STANDARD else open(path, "rb")
    seekable = file.seekable()
    size = os.fstat(file.fileno()).st_size if seekable else None
    bar = tqdm(desc=f"reading {path}", total=size, unit="B", unit_scale=True, delay=1.0, disable=None)
    try:
        packed = file.peek(1)[:1] == GZIP_MAGIC
        if path.endswith(".gz") and not packed:
            raise ValueError(f"{path} is not a gzip file, expected one by its name: rename it, or copy it again")
        yield gzip.GzipFile(fileobj=file) if packed else file, bar, file.tell if seekable else lambda: 0
    finally:
        bar.close()
        if path != STANDARD:
            file.close()
