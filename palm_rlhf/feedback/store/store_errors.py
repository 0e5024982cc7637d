"""The error of a database that cannot keep or give what it was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DatabaseError, DBAPIError, InterfaceError, InternalError, OperationalError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

UNAVAILABLE, FULL = 503, 507  # HTTP statuses: later it may work again, and no storage left
BUSY_SECONDS = 30.0  # to wait for another writer
BUSY = f"others have been writing to it for {BUSY_SECONDS:g} seconds: try again"
UNREACHABLE = "look whether it is running, whether its address is right, and whether you may read and write it"
# What a message of SQLite, or a code of PostgreSQL, says, and how to mend it.
CAUSES = {
    "database or disk is full": (FULL, "its disk is full: make room on it"),
    "53100": (FULL, "the disk of PostgreSQL is full: make room on it"),
    "disk I/O error": (FULL, "its disk is full or damaged: look at it"),
    "database is locked": (UNAVAILABLE, BUSY),
    "55P03": (UNAVAILABLE, BUSY),
    "unable to open database file": (UNAVAILABLE, "look whether its folder exists, and whether you may write there"),
    "attempt to write a readonly database": (UNAVAILABLE, "its file or its folder may not be written: change that"),
    "file is not a database": (UNAVAILABLE, "its file is no SQLite database: give another name"),
    "database disk image is malformed": (UNAVAILABLE, "its file is damaged: put back a copy of it"),
}


class StoreError(OSError):
    """The database failed; nothing of the transaction was kept. `status` is its HTTP status, 503 or 507."""

    def __init__(self, message: str, status: int = UNAVAILABLE):
        super().__init__(message)
        self.status = status


@contextmanager
def as_store_error(name: str) -> Iterator[None]:
    """Turn an error of the database `name`, or of its disk, into a StoreError in words.

    An error that is raised before a value reaches the database, such as a FeedbackError, is raised as it was.
    """
    try:
        yield
    except PoolTimeout as error:
        raise StoreError(f"the database {name} failed: {BUSY}") from error
    except DBAPIError as error:
        is_its_own = (
            isinstance(error, OperationalError | InternalError | InterfaceError) or type(error) is DatabaseError
        )
        if not is_its_own:
            raise  # a law of the tables is broken, which the code should have seen before
        raise _in_words(name, error.orig) from error
    except StatementError as error:
        if isinstance(error.orig, ValueError):
            raise error.orig from None
        raise


def _in_words(name: str, error: object) -> StoreError:
    words = " ".join(str(error).split())
    code = getattr(error, "sqlstate", None)
    status, advice = next(
        (cause for known, cause in CAUSES.items() if known in words or known == code), (UNAVAILABLE, UNREACHABLE)
    )
    return StoreError(f"the database {name} failed ({words}), and kept nothing of this; {advice}", status)
