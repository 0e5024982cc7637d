"""The database: opening it, and its transactions."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beartype import beartype
from sqlalchemy.orm import Session

from palm_rlhf.feedback.store.database_address import database_url, engine_of
from palm_rlhf.feedback.store.migrating import MIGRATIONS, migrate
from palm_rlhf.feedback.store.store_errors import BUSY, BUSY_SECONDS, StoreError, as_store_error
from palm_rlhf.feedback.store.transactions import READ_ONLY, begin_reading, begin_writing

__all__ = ["MIGRATIONS", "Store", "StoreError"]


class Store:
    """A database of feedback: SQLite in WAL mode, or PostgreSQL.

    A transaction of `writing` is on the disk when the context ends without an error. Writers take turns, so that what a
    transaction has read is still true when it writes.
    """

    @beartype
    def __init__(self, database: str | Path, *, create: bool = True):
        """Open a database, and migrate an older one.

        Raises ValueError for anything but a database of ours or a place for one, and StoreError where it cannot be
        opened.

        Args:
            database: A path, or a URL of SQLite or PostgreSQL.
            create: Whether to create the tables, and for SQLite the file, where there are none; else ValueError.
        """
        url = database_url(database, must_exist=not create)
        self.url = url.render_as_string(hide_password=False)
        is_file = url.get_backend_name() == "sqlite"
        self.name = str(url.database if is_file else url)  # for messages: without the password
        self.engine = engine_of(url)
        self._turn = threading.Lock()  # threads take turns in the order in which they came; processes wait for a lock
        self._writer: int | None = None
        self._reading_options = {} if is_file else READ_ONLY
        try:
            with as_store_error(self.name):
                migrate(self.engine, self.name, create=create)
        except BaseException:
            self.engine.dispose()
            raise

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Yield a session that sees one state of the database, and can change nothing."""
        with as_store_error(self.name), Session(self.engine, expire_on_commit=False) as session:
            begin_reading(session.connection(execution_options=self._reading_options))
            yield session
            if session.new or session.dirty or session.deleted:
                raise RuntimeError("rows were changed while reading, and would be lost: change them in Store.writing")

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Yield a session that alone may write; commit at the end, or keep nothing where an error is raised."""
        if self._writer == threading.get_ident():
            raise RuntimeError("Store.writing within Store.writing would wait for itself: pass the session on")
        if not self._turn.acquire(timeout=BUSY_SECONDS):
            raise StoreError(f"the database {self.name} failed: {BUSY}")
        try:
            self._writer = threading.get_ident()
            with as_store_error(self.name), Session(self.engine, expire_on_commit=False) as session, session.begin():
                begin_writing(session.connection())
                yield session
        finally:
            self._writer = None
            self._turn.release()

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()

    def __enter__(self) -> "Store":
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()
