"""JSON records in files of any size: lines or one array, plain or gzip, standard input and output."""

import codecs
import gzip
import hashlib
import json
import logging
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from beartype import BeartypeConf, beartype
from tqdm import tqdm

from palm_rlhf.data.disk import sync

Record = dict[str, Any]
MAX_RECORD_BYTES = 1 << 26
CHUNK = 1 << 20
STANDARD = "-"  # as a path: standard input or output

GZIP_MAGIC = b"\x1f"  # no JSON starts with this byte
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
BLANKS = re.compile(r"[ \t\n\r]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

log = logging.getLogger(__name__)


class _Broken(ValueError):
    """What is wrong with a record, and the reason that it is counted under."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@beartype
def read_records(
    path: str | os.PathLike[str],
    *,
    skip_broken: bool = False,
    rejected: Counter[str] | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[tuple[int, Record]]:
    """The JSON objects of a file one after the other, each with the number of the line on which it starts.

    The file has an object on each line (empty ones are passed over), or is one array of objects. Gzip is recognised
    by its content; ``-`` is standard input. Only one record, or a chunk of the file, is in memory at a time.

    A record is broken if it is no JSON object in valid Unicode, nested too deeply or longer than
    ``max_record_bytes``, and so is the rest of a gzip that ends early, or of an array after text that is no JSON. The
    first broken record raises a ``ValueError`` that names its line. With ``skip_broken`` it is logged as a warning
    instead and counted in ``rejected`` by its reason. Raises ``OSError`` for a file that cannot be read.
    """
    rejected = Counter() if rejected is None else rejected
    with _opened(os.fspath(path)) as (stream, bar, position):
        for line, record in _pieces(stream, max_record_bytes):
            bar.update(position() - bar.n)
            if not isinstance(record, _Broken):
                yield line, record
            elif skip_broken:
                log.warning("%s, line %d left out: %s", path, line, record)
                rejected[record.reason] += 1
            else:
                raise ValueError(
                    f"{path}, line {line}: {record}; expected one JSON object on each line, or one array of them: "
                    "mend or delete it, or ask to skip what is broken"
                ) from record


@beartype
def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Writes each record as a line of JSON, and returns how many there were.

    The file appears when it is whole: until then, and if reading the records fails, a file of that name stays as it
    was. ``-`` is standard output; a name that ends in ``.gz`` is packed. The same records make the same bytes.
    """
    if os.fspath(path) == STANDARD:
        return _write_lines(sys.stdout.buffer, records)
    target = Path(os.path.realpath(path))  # so that a link stays a link
    if target.exists() and not target.is_file():
        with open(target, "wb") as stream:  # a pipe or device cannot be replaced
            return _write_lines(stream, records)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with open(partial, "wb") as stream:
            if target.name.endswith(".gz"):
                with gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
                    num_records = _write_lines(packed, records)
            else:
                num_records = _write_lines(stream, records)
        sync(partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(target.parent)
    return num_records


@beartype(conf=BeartypeConf(is_pep484_tower=True))
def is_held_out(key: str, fraction: float, seed: int = 0) -> bool:
    """Whether what the key names is for validation, ``fraction`` of all: the same key is on the same side in any file.

    Whatever must stay together, like the messages of a tree, shares its key.
    """
    if not 0 <= fraction < 1:
        raise ValueError(
            f"got fraction={fraction:g}, expected at least 0 and below 1: something must be left to train on"
        )
    number = int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")
    return number < fraction * 2**64


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


def _pieces(stream: Any, limit: int) -> Iterator[tuple[int, Record | _Broken]]:
    try:
        start = stream.peek(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    except GZIP_ERRORS as error:  # now, since a stream that failed looks empty afterwards
        yield 1, _damaged(error)
        return
    yield from (_array if start.startswith(b"[") else _lines)(stream, limit)


def _lines(stream: Any, limit: int) -> Iterator[tuple[int, Record | _Broken]]:
    for number in count(1):
        try:
            line = stream.readline(limit + 1)
            if is_long := len(line) > limit and not line.endswith(b"\n"):
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = stream.readline(CHUNK)
        except GZIP_ERRORS as error:
            yield number, _damaged(error)
            return
        if not line:
            return
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if is_long:
            yield number, _too_long(limit)
        elif line and not line.isspace():
            yield number, _parsed_line(line)


def _parsed_line(line: bytes) -> Record | _Broken:
    try:
        text = line.decode()
        return _checked(DECODER.decode(text), text)
    except UnicodeDecodeError as error:
        return _Broken("invalid UTF-8", f"byte {line[error.start]:#04x} at {error.start + 1:,}")
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def _array(stream: Any, limit: int) -> Iterator[tuple[int, Record | _Broken]]:
    cursor = _Cursor(stream)
    mark = cursor.mark()
    cursor.step(1)
    if cursor.mark() == "]":
        mark = "]"
        cursor.step(1)
    while mark != "]":
        cursor.mark()
        yield cursor.line, (record := cursor.record(limit))
        mark = cursor.mark()
        if isinstance(record, _Broken) and cursor.lost:
            return
        if mark not in (",", "]"):
            yield cursor.line, cursor.broken(f"got {mark!r} after a record, expected a comma or ]")
            return
        cursor.step(1)
    if cursor.mark() or cursor.damage:
        yield cursor.line, cursor.broken("text after the end of the array")


class _Cursor:
    """A place in JSON text that is read piece by piece; invalid UTF-8 is kept as surrogates until its record comes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self.text, self.at, self.line = "", 0, 1
        self.ended = self.lost = False
        self.damage: _Broken | None = None

    def read(self) -> None:
        """Adds a chunk, or as much again as lies ahead, so that trying a long record anew stays linear."""
        pieces = [self.text[self.at :]]
        wanted = max(CHUNK, len(pieces[0]))
        while wanted > 0 and not self.ended:
            try:
                data = self.stream.read1(CHUNK)
            except GZIP_ERRORS as error:
                data, self.damage = b"", _damaged(error)
            self.ended = not data
            pieces.append(self.decode(data, self.ended))
            wanted -= len(data)
        self.text, self.at = "".join(pieces), 0

    def step(self, size: int) -> str:
        """Moves on, and returns what it passed."""
        passed = self.text[self.at : self.at + size]
        self.at += size
        self.line += passed.count("\n")
        return passed

    def mark(self) -> str:
        """The next character that is not blank, or nothing at the end."""
        while True:
            self.step(BLANKS.match(self.text, self.at).end() - self.at)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read()

    def record(self, limit: int) -> Record | _Broken:
        """The record that starts here, or why there is none; ``lost`` then tells that its end was not found."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                break
            except (ValueError, RecursionError) as error:
                is_long = len(self.text) - self.at > limit
                if self.ended or is_long or isinstance(error, RecursionError):
                    self.lost = True
                    return self.damage or (_too_long(limit) if is_long else _not_json(error))
                self.read()
        text = self.step(end - self.at)
        try:
            return _too_long(limit) if len(text.encode()) > limit else _checked(value, text)
        except UnicodeEncodeError as error:
            return _Broken("invalid UTF-8", f"byte {ord(text[error.start]) & 0xFF:#04x}")

    def broken(self, detail: str) -> _Broken:
        """Text between records that does not belong there, or that is missing."""
        return self.damage or _Broken("broken JSON", detail)


def _checked(value: Any, text: str) -> Record | _Broken:
    if not isinstance(value, dict):
        return _Broken("no object", f"got {text.strip()[:40]!r}")
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return _Broken("invalid Unicode", "half of a surrogate pair, written as an escape")
    return value


def _damaged(error: Exception) -> _Broken:
    return _Broken("damaged gzip", f"it ends early or is damaged ({error}); copy or compress it again")


def _too_long(limit: int) -> _Broken:
    return _Broken("too long", f"a record of more than {limit:,} bytes")


def _not_json(error: ValueError | RecursionError) -> _Broken:
    if isinstance(error, RecursionError):
        return _Broken("nested too deeply", "more levels than can be read")
    detail = f"{error.msg} at character {error.pos + 1:,}" if isinstance(error, json.JSONDecodeError) else str(error)
    return _Broken("broken JSON", detail)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)
