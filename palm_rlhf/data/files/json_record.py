"""One JSON object of a file: a record, or the reason why it is broken."""

import gzip
import json
import re
import zlib
from typing import Any

Record = dict[str, Any]
CHUNK = 1 << 20  # bytes
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BrokenRecord(ValueError):
    """The reason why a record cannot be read, with details, and its number in an array (from 1)."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.number: int | None = None


def parsed_line(line: bytes) -> Record | BrokenRecord:
    """Return the record that these bytes hold, or why they hold none."""
    try:
        text = line.decode()
        return checked_record(DECODER.decode(text), text)
    except UnicodeDecodeError as error:
        return BrokenRecord("invalid UTF-8", f"byte {line[error.start]:#04x} at {error.start + 1:,}")
    except (ValueError, RecursionError) as error:
        return not_json(error)


def checked_record(value: Any, text: str) -> Record | BrokenRecord:
    """Return a value that was read from `text` if it is an object in valid Unicode, or why it is no record."""
    if not isinstance(value, dict):
        return BrokenRecord("no object", f"got {text.strip()[:40]!r}")
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return BrokenRecord("invalid Unicode", "half of a surrogate pair, written as an escape")
    return value


def damaged_gzip(error: Exception) -> BrokenRecord:
    """Return the reason for the rest of a gzip file that cannot be unpacked."""
    return BrokenRecord("damaged gzip", f"it ends early or is damaged ({error}); copy or compress it again")


def too_long(limit: int) -> BrokenRecord:
    """Return the reason for a record of more than `limit` bytes."""
    return BrokenRecord("too long", f"a record of more than {limit:,} bytes")


def not_json(error: ValueError | RecursionError, start: int = 0) -> BrokenRecord:
    """Return the reason for text that is not JSON from the character `start` on."""
    if isinstance(error, RecursionError):
        return BrokenRecord("nested too deeply", "more levels than can be read")
    if isinstance(error, json.JSONDecodeError):
        return BrokenRecord("broken JSON", f"{error.msg} at character {error.pos - start + 1:,}")
    return BrokenRecord("broken JSON", error)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)
