"""Passwords, kept as hashes by Argon2id."""

import threading
import unicodedata
from dataclasses import dataclass
from functools import cached_property

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from palm_rlhf.feedback.refusals import FeedbackError

FEWEST, MOST = 10, 200  # characters
AT_ONCE = threading.Semaphore(2)  # hashes that are computed at once, since each takes its memory


@dataclass(frozen=True)
class Passwords:
    """The cost of a password's hash, and the work with it.

    The defaults are the second recommended option of RFC 9106, section 4. A hash of another cost is replaced when its
    owner logs in.

    Args:
        time_cost: Passes over the memory.
        memory_kib: KiB of memory.
        parallelism: Threads.
    """

    time_cost: int = 3
    memory_kib: int = 65536
    parallelism: int = 4

    @cached_property
    def _hasher(self) -> PasswordHasher:
        return PasswordHasher(self.time_cost, self.memory_kib, self.parallelism)

    @cached_property
    def _nobodys(self) -> str:
        """A hash of no password that anybody could have, of this cost."""
        return self._hasher.hash("\0")

    def hash(self, password: str) -> str:
        """Return the hash of a password; its salt is random, and a part of it."""
        with AT_ONCE:
            return self._hasher.hash(_normalized(password))

    def verify(self, password: str, hashed: str | None) -> bool:
        """Return whether a password is that of a hash; it takes as long where there is no hash (None)."""
        if len(password) > MOST:
            password, hashed = "", None
        with AT_ONCE:
            try:
                return self._hasher.verify(hashed or self._nobodys, _normalized(password)) and hashed is not None
            except (VerificationError, InvalidHashError):
                return False

    def is_outdated(self, hashed: str) -> bool:
        """Return whether a hash was made at another cost."""
        return self._hasher.check_needs_rehash(hashed)


def check_password(password: str, again: str, name: str) -> None:
    """Check a new password, which was typed twice.

    Raises FeedbackError for one that is too short or too long, that is easily guessed, or that was mistyped.
    """
    length = len(_normalized(password))
    if not FEWEST <= length <= MOST:
        raise FeedbackError(
            "got a password of {length} characters, expected {fewest} to {most}",
            422,
            length=length,
            fewest=FEWEST,
            most=MOST,
        )
    if password.casefold() == name.strip().casefold() or len(set(password)) < 3:
        raise FeedbackError("this password is easily guessed: choose another one", 422)
    if password != again:
        raise FeedbackError("the two passwords differ: type the same one twice", 422)


def _normalized(password: str) -> str:
    """Return the password in one form, whichever keyboard has composed its characters."""
    return unicodedata.normalize("NFKC", password)
