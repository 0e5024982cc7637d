"""JSON objects in one array, read piece by piece: a broken one costs no other."""

import codecs
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from palm_rlhf.data.files.json_record import (
    CHUNK,
    DECODER,
    GZIP_ERRORS,
    Broken,
    Record,
    checked,
    damaged_gzip,
    not_json,
    too_long,
)

BLANKS = re.compile(r"[ \t\n\r]*")
MARKS = re.compile(r'[\[\]{},"]')
QUOTED = re.compile(r'(?:[^"\\]+|\\.)*', re.DOTALL)


def json_array(stream: Any, limit: int) -> Iterator[tuple[int, Record | Broken]]:
    """Each object of at most `limit` bytes, or why it is broken, with the line on which it starts."""
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
        """Looks on from where it last stopped, `size` characters after the start; whether the end is there."""
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
                data, self.damage = b"", damaged_gzip(error)
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
        """The record that starts here, or why there is none; `lost` then tells that its end was not found."""
        extent = _Extent()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if isinstance(value, dict) or end < len(self.text) or self.ended:
                    break
                problem = None  # a number may go on in the next chunk
            except (ValueError, RecursionError) as error:
                problem = not_json(error, self.at)
            if extent.ends_in(self.text, self.at) or self.ended:
                self.skip(extent)
                return (self.lost and self.damage) or problem or too_long(limit)
            if len(self.text) - self.at > limit:
                self.skip(extent)
                return (self.lost and self.damage) or too_long(limit)
            self.read()
        text = self.step(end - self.at)
        try:
            return too_long(limit) if len(text.encode()) > limit else checked(value, text)
        except UnicodeEncodeError as error:
            return Broken("invalid UTF-8", f"byte {ord(text[error.start]) & 0xFF:#04x}")

    def skip(self, extent: _Extent) -> None:
        """Moves to the end of an element whatever its length; all that follows is `lost` where it has none."""
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
