"""JSON objects in one array, read in chunks: a broken object does not cost any other."""

import codecs
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from palm_rlhf.data.files.json_record import (
    CHUNK,
    DECODER,
    GZIP_ERRORS,
    BrokenRecord,
    Record,
    checked_record,
    damaged_gzip,
    not_json,
    too_long,
)

BLANKS = re.compile(r"[ \t\n\r]*")
MARKS = re.compile(r'[\[\]{},"]')
QUOTED = re.compile(r'(?:[^"\\]+|\\.)*', re.DOTALL)


def json_array(stream: Any, limit: int) -> Iterator[tuple[int, Record | BrokenRecord]]:
    """Yield each object of at most `limit` bytes, or why it is broken, with the line on which it starts."""
    cursor = _Cursor(stream)
    cursor.mark()
    cursor.step(1)
    is_over = cursor.mark() == "]"
    for number in count(1):
        if is_over:
            break
        cursor.mark()
        line, record = cursor.line, cursor.record(limit)
        if not isinstance(record, BrokenRecord) and (mark := cursor.mark()) not in (",", "]"):
            yield line, record
            # The text between a record and the next comma can only be left out.
            line, record = cursor.line, cursor.broken(f"got {mark!r} after a record, expected a comma or ]")
            cursor.skip(_Extent())
        if isinstance(record, BrokenRecord):
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


def _end_of_match(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Return where the match of a pattern that begins at `at` ends; the pattern also matches an empty string."""
    match = pattern.match(text, at)
    assert match is not None
    return match.end()


class _Extent:
    """The length of an element of an array: up to the next comma or bracket that is not inside it.

    It is also found for text that is not quite JSON, as long as its quotation marks and brackets are closed.
    """

    def __init__(self) -> None:
        self.size, self.is_quoted, self.open = 0, False, bytearray()

    def ends_in(self, text: str, start: int) -> bool:
        """Return whether the element that begins at `start` ends in `text`, and set `size` to its length so far.

        Another call with more text continues where the last one stopped.
        """
        at = start + self.size
        while True:
            if self.is_quoted:
                at = _end_of_match(QUOTED, text, at)
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
            # Closes its opening bracket, and with it the brackets inside that were never closed.
            del self.open[max(self.open.rfind(b"[" if mark == "]" else b"{"), 0) :]


class _Cursor:
    """A place in JSON text that is read in chunks; invalid UTF-8 stays as surrogates until its record is read."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self.text, self.at, self.line = "", 0, 1
        self.ended = self.lost = False
        self.damage: BrokenRecord | None = None

    def read(self) -> None:
        """Read a chunk, or as much as already lies ahead, so that parsing a long record again stays linear."""
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
        """Move on by `size` characters, and return them."""
        passed = self.text[self.at : self.at + size]
        self.at += size
        self.line += passed.count("\n")
        return passed

    def mark(self) -> str:
        """Return the next character that is not blank, or an empty string at the end."""
        while True:
            self.step(_end_of_match(BLANKS, self.text, self.at) - self.at)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read()

    def record(self, limit: int) -> Record | BrokenRecord:
        """Return the record that starts here, or why there is none; `lost` is set if its end was not found."""
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
            return too_long(limit) if len(text.encode()) > limit else checked_record(value, text)
        except UnicodeEncodeError as error:
            return BrokenRecord("invalid UTF-8", f"byte {ord(text[error.start]) & 0xFF:#04x}")

    def skip(self, extent: _Extent) -> None:
        """Move to the end of an element of any length; `lost` is set if it has no end."""
        while not extent.ends_in(self.text, self.at):
            self.step(extent.size)
            extent.size = 0
            if self.ended:
                self.lost = True
                return
            self.read()
        self.step(extent.size)

    def broken(self, detail: str) -> BrokenRecord:
        """Return the reason for text between records that does not belong there, or for text that is missing."""
        return self.damage or BrokenRecord("broken JSON", detail)
