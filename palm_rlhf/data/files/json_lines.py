"""JSON objects in lines: one on each line, one over several lines, or several on one line."""

import codecs
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from palm_rlhf.data.files.json_record import (
    CHUNK,
    GZIP_ERRORS,
    BrokenRecord,
    Record,
    damaged_gzip,
    parsed_line,
    too_long,
)

BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)


def json_lines(stream: Any, limit: int) -> Iterator[tuple[int, Record | BrokenRecord]]:
    """Yield each object of at most `limit` bytes, or why it is broken, with the line on which it starts."""
    spread = _Spread(limit)
    for number in count(1):
        try:
            line = stream.readline(limit + 1)
            if is_long := len(line) > limit and not line.endswith(b"\n"):
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = stream.readline(CHUNK)
        except GZIP_ERRORS as error:
            yield number, damaged_gzip(error)
            return
        if not line:
            yield from spread.end()
            return
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        yield from spread.leave_out(number) if is_long else spread.add(number, line)


class _Spread:
    """The objects of lines that come one by one: an object that does not end on its line continues on the next."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.parts: list[bytes] = []  # of the object that has not ended yet
        self.starts: list[int] = []  # the lines on which it, and objects before it that were cut short, start
        self.depth = self.size = 0
        self.lost = False  # whether lines belong to an object that was too long

    def add(self, number: int, line: bytes) -> Iterator[tuple[int, Record | BrokenRecord]]:
        """Yield the objects that end on a line."""
        while line and not line.isspace():
            if self.parts and self._starts_anew(line):
                yield from self.end()
            if not self.parts:
                if self.lost and not line.startswith(b"{"):
                    return
                self.lost = False
                record = parsed_line(line)
                if not isinstance(record, BrokenRecord):
                    yield number, record
                    return
                self.depth = 0
            self.depth, end, is_cut = _scan(line, self.depth)
            goes_on = end is None and self.depth > 0 and not is_cut
            if not self.parts and not goes_on and (end is None or not line[end:].lstrip().startswith(b"{")):
                yield number, record
                return
            if not self.parts or line.startswith(b"{"):
                self.starts.append(number)
            self.parts.append(line[:end])
            self.size += len(self.parts[-1])
            if self.size > self.limit:
                yield from self.leave_out(number)
                return
            if goes_on:
                return
            yield from self.end()
            line = b"" if end is None else line[end:]

    def end(self) -> Iterator[tuple[int, Record | BrokenRecord]]:
        """Yield the object that was begun, whole or broken; if each of its lines was cut short, each line is one."""
        if self.parts:
            record = parsed_line(b"".join(self.parts))
            for start in self.starts if isinstance(record, BrokenRecord) else self.starts[:1]:
                yield start, record
        self._clear()

    def leave_out(self, number: int) -> Iterator[tuple[int, Record | BrokenRecord]]:
        """Leave out the object that a line belongs to, since it is too long."""
        yield self.starts[0] if self.parts else number, too_long(self.limit)
        self.lost = bool(self.parts)
        self._clear()

    def _clear(self) -> None:
        self.parts, self.starts, self.size, self.depth = [], [], 0, 0

    def _starts_anew(self, line: bytes) -> bool:
        """Return whether a line starts another object, so that the one before it was cut short."""
        if not line.startswith(b"{"):
            return False
        is_indented = self.parts[1:] and self.parts[1][:1].isspace()
        return bool(is_indented) or (len(line.strip()) > 2 and not isinstance(parsed_line(line), BrokenRecord))


def _scan(line: bytes, depth: int) -> tuple[int, int | None, bool]:
    """Return the depth of open brackets after a line, the end of its first object, and whether a string is cut."""
    end = None
    for mark in BRACKETS.finditer(line):
        if mark[0] == b'"':
            return depth, end, True
        if mark[0] in b"{[":
            depth += 1
        elif mark[0] in b"}]":
            depth -= 1
            if depth <= 0:
                return 0, mark.end(), False
    return depth, end, False
