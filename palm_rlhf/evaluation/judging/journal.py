"""A journal: a file of JSON lines that grows by one synced line at a time and survives a kill at any moment."""

import fcntl
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from beartype import beartype

from palm_rlhf.model.files import sync

Entry = dict[str, Any]
START = b'{"key": "'

log = logging.getLogger(__name__)


class Journal:
    """Entries by their "key", the oldest first. An entry is on disk when `add` returns, and never changes.

    An incomplete last line is cut off, and a damaged line elsewhere is skipped with a warning. Only one process at a
    time may open the file. Use it in a `with` statement.

    Raises ValueError if the file holds other content, and BlockingIOError if another process has it open.
    """

    @beartype
    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self._writing = threading.Lock()
        is_new = not self.path.exists()
        self._file = open(self.path, "a+b")
        try:
            self._lock()
            self._read()
            if is_new:
                sync(self.path.parent)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    @beartype
    def add(self, entry: Entry) -> None:
        """Store an entry under its key. If the key is known, the older entry stays."""
        entry = {"key": entry["key"], **entry}  # the key comes first, so that an incomplete line is recognised
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        with self._writing:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.entries.setdefault(entry["key"], entry)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "another process has the file open: wait for it, or name another file", str(self.path)
            ) from error

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        *lines, last = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            entry = _parsed(line)
            if isinstance(entry, dict) and not isinstance(entry.get("key"), str):
                raise ValueError(
                    f"{self.path}, line {number}: got an object without a key, expected a journal: name a new file, or "
                    "the journal of an earlier run"
                )
            if entry is not None:
                self.entries.setdefault(entry["key"], entry)
            elif line.strip():
                log.warning("%s, line %d is damaged and left out", self.path, number)
        if last:
            self._mend(last, len(content))

    def _mend(self, last: bytes, size: int) -> None:
        """Repair a last line without a line break: complete a whole entry, cut off an incomplete one."""
        entry = _parsed(last)
        if entry is not None and isinstance(entry.get("key"), str):
            self._file.write(b"\n")
            self.entries.setdefault(entry["key"], entry)
        elif not self.entries and not (last.startswith(START) or START.startswith(last)):
            raise ValueError(f"{self.path} holds {last[:40]!r}, expected lines of JSON with a key: name another file")
        else:
            log.warning("%s: the last line is incomplete and removed", self.path)
            self._file.truncate(size - len(last))
        self._file.flush()


def _parsed(line: bytes) -> Entry | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
