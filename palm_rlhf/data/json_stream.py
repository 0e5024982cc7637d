"""The JSON objects in a stream of bytes, one at a time: on lines or in one array, each read or found to be broken."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import count
from typing import Any

from palm_rlhf.model.interop.text_file import HOW_TO_CONVERT, is_utf16

Record = dict[str, Any]
CHUNK = 1 << 20

GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
BLANKS = re.compile(r"[ \t\n\r]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MARKS = re.compile(r'[\[\]{},"]')
QUOTED = re.compile(r'(?:[^"\\]+|\\.)*', re.DOTALL)


class Broken(ValueError):
    """What is wrong with a record, the reason that it is counted under, and its number in an array (from 1)."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.number: int | None = None


def pieces(stream: Any, limit: int) -> Iterator[tuple[int, Record | Broken]]:
    """Each object of at most ``limit`` bytes, or why it is broken, with the line on which it starts."""
    try:
        start = stream.peek(CHUNK)
    except GZIP_ERRORS as error:  # now, since a stream that failed looks empty afterwards
        yield 1, _damaged(error)
        return
    if is_utf16(start[:4]):
        yield 1, Broken("no UTF-8", HOW_TO_CONVERT)
        return
    is_array = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    yield from (_array if is_array else _lines)(stream, limit)


def _lines(stream: Any, limit: int) -> Iterator[tuple[int, Record | Broken]]:
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


def _parsed_line(line: bytes) -> Record | Broken:
    try:
        text = line.decode()
        return _checked(DECODER.decode(text), text)
    except UnicodeDecodeError as error:
        return Broken("invalid UTF-8", f"byte {line[error.start]:#04x} at {error.start + 1:,}")
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def _array(stream: Any, limit: int) -> Iterator[tuple[int, Record | Broken]]:
    cursor = _Cursor(stream)
    cursor.mark()
    cursor.step(1)
    is_over = cursor.mark() == "]"
    for number in count(1):
        if is_over:
            break
        cursor.mark()
        line, record = cursor.line, cursor.record(limit)
        if not isinstance(record, Broken) and (mark := cursor.mark()) not in (",", "]"):
            yield line, record
            # What stands between a record and the next comma can only be left out.
            line, record = cursor.line, cursor.broken(f"got {mark!r} after a record, expected a comma or ]")
            cursor.skip(_Extent())
        if isinstance(record, Broken):
            record.number = number
        yield line, record
        if cursor.lost:
            return
        is_over = cursor.mark() == "]"
        if not is_over:
            cursor.step(1)
    cursor.step(1)
    if cursor.mark() or cursor.damage:
        yield cursor.line, cursor.broken("text after the end of the array")


class _Extent:
    """How far an element of an array reaches: to the next comma or bracket that is not inside it.

    It holds for text that is not quite JSON too, as long as its quotation marks and brackets are closed.
    """

    def __init__(self) -> None:
        self.size, self.is_quoted, self.open = 0, False, bytearray()

    def ends_in(self, text: str, start: int) -> bool:
        """Looks on from where it last stopped, ``size`` characters after the start; whether the end is there."""
        at = start + self.size
        while True:
            if self.is_quoted:
                at = QUOTED.match(text, at).end()
                if text[at : at + 1] != '"':
                    self.size = at - start
                    return False
                self.is_quoted = False
                at += 1
            found = MARKS.search(text, at)
            at = len(text) if found is None else found.start()
            if found is None or (not self.open and found[0] in ",]"):
                self.size = at - start
                return found is not None
            at += 1
            self._pass(found[0])

    def _pass(self, mark: str) -> None:
        if mark == '"':
            self.is_quoted = True
        elif mark in "[{":
            self.open += mark.encode()
        elif mark in "]}":
            # The opening bracket of its kind, and with it any that was forgotten inside.
            del self.open[max(self.open.rfind(b"[" if mark == "]" else b"{"), 0) :]


class _Cursor:
    """A place in JSON text that is read piece by piece; invalid UTF-8 is kept as surrogates until its record comes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self.text, self.at, self.line = "", 0, 1
        self.ended = self.lost = False
        self.damage: Broken | None = None

    def read(self) -> None:
        """Adds a chunk, or as much again as lies ahead, so that trying a long record anew stays linear."""
        parts = [self.text[self.at :]]
        wanted = max(CHUNK, len(parts[0]))
        while wanted > 0 and not self.ended:
            try:
                data = self.stream.read1(CHUNK)
            except GZIP_ERRORS as error:
                data, self.damage = b"", _damaged(error)
            self.ended = not data
            parts.append(self.decode(data, self.ended))
            wanted -= len(data)
        self.text, self.at = "".join(parts), 0

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

    def record(self, limit: int) -> Record | Broken:
        """The record that starts here, or why there is none; ``lost`` then tells that its end was not found."""
        extent = _Extent()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if isinstance(value, dict) or end < len(self.text) or self.ended:
                    break
                problem = None  # a number may go on in the next chunk
            except (ValueError, RecursionError) as error:
                problem = _not_json(error, self.at)
            if extent.ends_in(self.text, self.at) or self.ended:
                self.skip(extent)
                return (self.lost and self.damage) or problem or _too_long(limit)
            if len(self.text) - self.at > limit:
                self.skip(extent)
                return (self.lost and self.damage) or _too_long(limit)
            self.read()
        text = self.step(end - self.at)
        try:
            return _too_long(limit) if len(text.encode()) > limit else _checked(value, text)
        except UnicodeEncodeError as error:
            return Broken("invalid UTF-8", f"byte {ord(text[error.start]) & 0xFF:#04x}")

    def skip(self, extent: _Extent) -> None:
        """Moves to the end of an element whatever its length; all that follows is ``lost`` where it has none."""
        while not extent.ends_in(self.text, self.at):
            self.step(extent.size)
            extent.size = 0
            if self.ended:
                self.lost = True
                return
            self.read()
        self.step(extent.size)

    def broken(self, detail: str) -> Broken:
        """Text between records that does not belong there, or that is missing."""
        return self.damage or Broken("broken JSON", detail)


def _checked(value: Any, text: str) -> Record | Broken:
    if not isinstance(value, dict):
        return Broken("no object", f"got {text.strip()[:40]!r}")
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Broken("invalid Unicode", "half of a surrogate pair, written as an escape")
    return value


def _damaged(error: Exception) -> Broken:
    return Broken("damaged gzip", f"it ends early or is damaged ({error}); copy or compress it again")


def _too_long(limit: int) -> Broken:
    return Broken("too long", f"a record of more than {limit:,} bytes")


def _not_json(error: ValueError | RecursionError, start: int = 0) -> Broken:
    if isinstance(error, RecursionError):
        return Broken("nested too deeply", "more levels than can be read")
    if isinstance(error, json.JSONDecodeError):
        return Broken("broken JSON", f"{error.msg} at character {error.pos - start + 1:,}")
    return Broken("broken JSON", error)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)
