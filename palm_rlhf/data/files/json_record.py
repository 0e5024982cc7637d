"""One JSON object: read, or found to be broken for a reason that it is counted under."""

import gzip
import json
import re
import zlib
from typing import Any

Record = dict[str, Any]
CHUNK = 1 << 20
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Broken(ValueError):
    """What is wrong with a record, the reason that it is counted under, and its number in an array (from 1)."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.number: int | None = None


def parsed_line(line: bytes) -> Record | Broken:
    """The object that is written in some bytes."""
    try:
        text = line.decode()
        return checked(DECODER.decode(text), text)
    except UnicodeDecodeError as error:
        return Broken("invalid UTF-8", f"byte {line[error.start]:#04x} at {error.start + 1:,}")
    except (ValueError, RecursionError) as error:
        return not_json(error)


def checked(value: Any, text: str) -> Record | Broken:
    """A value that was read from a text, if it is an object in valid Unicode."""
    if not isinstance(value, dict):
        return Broken("no object", f"got {text.strip()[:40]!r}")
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Broken("invalid Unicode", "half of a surrogate pair, written as an escape")
    return value


def damaged_gzip(error: Exception) -> Broken:
    """The rest of a file that cannot be unpacked."""
    return Broken("damaged gzip", f"it ends early or is damaged ({error}); copy or compress it again")


def too_long(limit: int) -> Broken:
    """A record above the limit, in bytes."""
    return Broken("too long", f"a record of more than {limit:,} bytes")


def not_json(error: ValueError | RecursionError, start: int = 0) -> Broken:
    """Text that is no JSON, from the character `start` on."""
    if isinstance(error, RecursionError):
        return Broken("nested too deeply", "more levels than can be read")
    if isinstance(error, json.JSONDecodeError):
        return Broken("broken JSON", f"{error.msg} at character {error.pos - start + 1:,}")
    return Broken("broken JSON", error)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)
