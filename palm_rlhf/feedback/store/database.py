"""The database: opening it, bringing it up to date, and its transactions."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from beartype import beartype
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import Session

MIGRATIONS = Path(__file__).parent / "migrations"
WRITE_LOCK = 0x70616C6D  # of PostgreSQL's advisory locks: one writer at a time, as in SQLite
BUSY_SECONDS = 30.0  # to wait for another writer


class StoreError(RuntimeError):
    """The database cannot keep what it was given; nothing of the transaction was kept."""


@beartype
def database_url(database: str | Path) -> str:
    """Return the URL of a database: a URL as it is, and the path of a file as SQLite's."""
    name = str(database)
    if "://" in name:
        return name.replace("postgresql://", "postgresql+psycopg://", 1)
    return f"sqlite:///{name}"


class Store:
    """A database of feedback: SQLite in WAL mode, or PostgreSQL.

    A transaction of `writing` is on the disk when the context ends without an error. Writers take turns, so that what a
    transaction has read is still true when it writes.
    """

    @beartype
    def __init__(self, database: str | Path):
        """Open a database, create it where there is none, and migrate an older one.

        Raises ValueError for a URL that is not one of a database, and StoreError where it cannot be opened.
        """
        self.url = database_url(database)
        try:
            self.engine = _engine(self.url)
        except (ArgumentError, ImportError) as error:
            raise ValueError(
                f"got the database {database!r}, expected a path, sqlite:///PATH, or postgresql://USER@HOST/NAME with "
                f"palm-rlhf[postgres] installed ({error})"
            ) from error
        with _as_store_error():
            self._migrate()

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        with self.engine.connect() as connection:
            _lock(connection)
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Yield a session that sees one state of the database."""
        with _as_store_error(), Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Yield a session that alone may write; commit at the end, or keep nothing where an error is raised."""
        with _as_store_error(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            _lock(session)
            yield session

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()

    def __enter__(self) -> "Store":
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()


def _engine(url: str) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction by itself: `_lock` does
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # in WAL mode NORMAL may lose commits when power fails
        connection.execute("PRAGMA foreign_keys=ON")

    return engine


def _lock(executor: Any) -> None:
    """Begin a transaction that alone may write."""
    connection = executor.connection() if isinstance(executor, Session) else executor
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITE_LOCK})


@contextmanager
def _as_store_error() -> Iterator[None]:
    """Turn an error of the database or of its disk into a StoreError in words."""
    try:
        yield
    except OperationalError as error:
        raise StoreError(
            f"the database failed ({error.orig}): nothing of this was kept; look whether its disk is full, and whether "
            "it can be reached and written"
        ) from error
