"""The API keys of a server: the name of the owner of each, from a file that may change while the server runs."""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from palm_rlhf.model.files import read_text

KEYS_VARIABLE = "PALM_RLHF_API_KEYS"
NAMED = re.compile(r"([^:]+):\s+(\S+)")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@+-]{0,63}")
logger = logging.getLogger(__name__)


class KeyOwner(NamedTuple):
    """The owner of a key: the `name` for the log, and an `id` from which the key cannot be found."""

    name: str
    id: str


class ApiKeys:
    """The keys that clients have to send, in memory as salted hashes.

    The keys of a file are read again when it changes. Where the file cannot be read then, or has no key, the former
    keys stay valid and the log says so: nobody is let in by a broken file, and nobody is shut out by half of one.
    """

    def __init__(self, keys: Iterable[tuple[str, str]] = (), file: Path | None = None):
        self._salt = secrets.token_bytes(16)
        self._fixed = self._hashed(keys)
        self._file, self._signature = file, None if file is None else signature(file)
        self._read = {} if file is None else self._hashed(read_keys(file))

    @property
    def secured(self) -> bool:
        """Whether a key is required."""
        return bool(self._fixed or self._file)

    def owner(self, key: bytes) -> KeyOwner | None:
        """Return the owner of a key; None for a key that is not valid."""
        self._reload_if_changed()
        found = self._hash(key)  # hashes with a secret salt are compared: their time tells nothing of the keys
        name = self._fixed.get(found) or self._read.get(found)
        return None if name is None else KeyOwner(name, found.hex()[:16])

    def _reload_if_changed(self) -> None:
        if self._file is None or (found := signature(self._file)) == self._signature:
            return
        self._signature = found
        try:
            self._read = self._hashed(read_keys(self._file))
            logger.info("%s has changed: %d keys are valid now", self._file, len({**self._fixed, **self._read}))
        except (OSError, ValueError) as error:
            logger.error("the changed keys cannot be read, and the former keys stay valid: %s", error)

    def _hashed(self, keys: Iterable[tuple[str, str]]) -> dict[bytes, str]:
        return {self._hash(key.encode()): name for name, key in keys}

    def _hash(self, key: bytes) -> bytes:
        return hmac.digest(self._salt, key, hashlib.sha256)


def signature(file: Path) -> tuple[int, ...] | None:
    """Return numbers that tell one version of a file from the next; None where there is no file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_keys(file: Path) -> list[tuple[str, str]]:
    """Return the names and keys of a file, which has lines of `name: key`, or of a key alone, named by its line.

    Blank lines and lines that begin with # are skipped. Raises ValueError for a file without any key, or for a name
    that would not fit a line of the log.
    """
    found = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        named = NAMED.fullmatch(line)
        name, key = named.groups() if named else (f"line {number}", line)
        if not NAME.fullmatch(name):
            raise ValueError(
                f"line {number} of {file} names a key {name!a:.80}; expected up to 64 letters, digits, blanks and "
                "any of . _ @ + -"
            )
        found.append((name, key))
    if not found:
        raise ValueError(f"{file} has no API key; expected lines of a name and a key, such as alice: KEY")
    return found


def keys_of_environment(value: str) -> list[tuple[str, str]]:
    """Return the names and keys of a list that is separated by commas."""
    keys = filter(None, (key.strip() for key in value.split(",")))
    return [(f"environment {number}", key) for number, key in enumerate(keys, start=1)]
