"""One learner at a time on a database, and in a folder."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from beartype import beartype
from sqlalchemy import make_url, text

from palm_rlhf.feedback.store.database import Store

LEARNER_LOCK = 0x6C6561726E  # of PostgreSQL's advisory locks


@contextmanager
@beartype
def sole_learner(store: Store, output_dir: Path) -> Iterator[None]:
    """Let one process at a time learn from a database and write to a folder. A killed process frees its locks.

    Raises ValueError if another process learns from this database, or in this folder. On Windows a folder has no lock.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_locked(output_dir, f"in {output_dir}"))
        url = make_url(store.url)
        if url.get_backend_name() == "sqlite" and url.database:
            # A file beside the database: SQLite's own locks on it would end when this process closes it once.
            file = Path(f"{url.database}.learning")
            file.touch()
            stack.enter_context(_locked(file, f"from {url.database}"))
        elif url.get_backend_name() == "postgresql":
            connection = stack.enter_context(store.engine.connect())
            asked = text("SELECT pg_try_advisory_lock(:key)")
            if not connection.execute(asked, {"key": LEARNER_LOCK}).scalar():
                raise _refusal(f"from {url.render_as_string()}")
            connection.commit()
            stack.callback(connection.execute, text("SELECT pg_advisory_unlock(:key)"), {"key": LEARNER_LOCK})
        yield


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(name) from None
        yield
    finally:
        os.close(descriptor)


def _refusal(name: str) -> ValueError:
    return ValueError(f"another process learns {name} already: wait until it ends, or stop it; this one goes on then")
