"""The records that are held out for validation: chosen by a hash, so that they are the same in every run."""

import hashlib

from beartype import beartype


@beartype
def is_held_out(digest: bytes, fraction: int | float) -> bool:
    """Return whether the record with this digest is held out, as `fraction` of all records are.

    Records with the same digest are on the same side, in any file. A record that is held out stays so when the
    fraction grows. Raises ValueError if the fraction is below 0, or 1 and above.

    Args:
        digest: A uniform hash of at least 8 bytes, such as that of `key_digest` or `conversation_digest`.
        fraction: The share of records to hold out.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"got fraction={fraction:g}, expected at least 0 and below 1: leave some records to train on")
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@beartype
def key_digest(key: str, seed: int = 0) -> bytes:
    """Return a hash of a key that is the same in every run; records that must stay together share their key."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()
