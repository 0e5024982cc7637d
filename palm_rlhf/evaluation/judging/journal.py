"""A file that answers are added to as they come and that survives a kill at any moment: lines of JSON, each synced."""

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
    """Entries by their "key", the oldest first; each is on the disk when `add` returns, and none is ever changed.

    A last line that a kill tore is cut off, a damaged line elsewhere is passed over with a warning. One process at a
    time may have the file open. To be used in `with`.

    Raises:
        ValueError: the file holds something else than such entries.
        BlockingIOError: another process has it open.
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
        """Stores an entry under its key, for good; the first of several with one key is the one that counts."""
        entry = {"key": entry["key"], **entry}  # first, so that even a torn line is known for one of ours
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
                error.errno, "another process is writing to it: wait for that one, or name another file", str(self.path)
            ) from error

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        *lines, last = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            entry = _parsed(line)
            if isinstance(entry, dict) and not isinstance(entry.get("key"), str):
                raise ValueError(
                    f"{self.path}, line {number}: got an object without a key, expected what was written here before: "
                    "name a new file, or the one that an earlier run wrote"
                )
            if entry is not None:
                self.entries.setdefault(entry["key"], entry)
            elif line.strip():
                log.warning("%s, line %d left out: it is damaged", self.path, number)
        if last:
            self._mend(last, len(content))

    def _mend(self, last: bytes, size: int) -> None:
        """A last line without its end: an entry that was written but for that, or the torn beginning of one."""
        entry = _parsed(last)
        if entry is not None and isinstance(entry.get("key"), str):
            self._file.write(b"\n")
            self.entries.setdefault(entry["key"], entry)
        elif not self.entries and not (last.startswith(START) or START.startswith(last)):
            raise ValueError(f"{self.path} holds {last[:40]!r}, expected lines of JSON with a key: name another file")
        else:
            log.warning("%s: its last line was cut off, and is written again", self.path)
            self._file.truncate(size - len(last))
        self._file.flush()


def _parsed(line: bytes) -> Entry | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
