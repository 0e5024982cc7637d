"""Where a database is: a file of SQLite, or a server of PostgreSQL."""

import os
from pathlib import Path
from typing import Any

from beartype import beartype
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from palm_rlhf.feedback.store.store_errors import BUSY_SECONDS
from palm_rlhf.feedback.store.table_base import json_text

DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
EXPECTED = "a path, sqlite:///PATH, or postgresql://USER:PASSWORD@HOST/NAME"
FILE_START = b"SQLite format 3\x00"
POOL: dict[str, Any] = {"pool_size": 10, "max_overflow": 30, "pool_timeout": BUSY_SECONDS}  # as FastAPI has threads
CONNECT_SECONDS = 10


@beartype
def database_url(database: str | Path, *, must_exist: bool = False) -> URL:
    """Return the URL of a database, with its driver; the path of a file becomes absolute.

    Raises ValueError for a URL of another database, of no file, or of a file that is none of SQLite's, and with
    `must_exist`, of a file that is not there.
    """
    name = str(database)
    if "://" not in name:
        url = URL.create("sqlite", database=name)
    else:
        try:
            url = make_url(name)
        except (ArgumentError, ValueError):
            raise ValueError(f"got a database URL that cannot be read, expected {EXPECTED}") from None
    kind = url.drivername.partition("+")[0]
    if kind not in DRIVERS:
        raise ValueError(f"got the database {url}, expected {EXPECTED}")
    if kind == "sqlite":
        path = url.database or ""
        if not path or path == ":memory:" or path.startswith("file:"):
            raise ValueError(f"got the database {url} without a file, expected {EXPECTED}")
        url = url.set(database=os.path.abspath(path))
        _check_file(Path(url.database or ""), must_exist)
    return url.set(drivername=DRIVERS[kind])


def _check_file(path: Path, must_exist: bool) -> None:
    """Raise ValueError unless a path is SQLite's, empty, or free in a folder that exists."""
    if must_exist and not path.exists():
        raise ValueError(f"got the database {path}, which does not exist: mend the path")
    if not path.parent.is_dir():
        raise ValueError(f"got the database {path} in a folder that does not exist: make the folder, or mend the path")
    if path.is_dir():
        raise ValueError(f"got the folder {path} as a database, expected a file: add its name, such as feedback.db")
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(len(FILE_START))
        if start not in (b"", FILE_START):
            raise ValueError(f"got the file {path}, which is no SQLite database: give another name")


@beartype
def engine_of(url: URL) -> Engine:
    """Return the engine of a database; ValueError where the driver of PostgreSQL is not installed."""
    if url.get_backend_name() != "sqlite":
        options: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "application_name": "palm-rlhf"}
        try:
            return create_engine(
                url, connect_args={**options, **url.query}, pool_pre_ping=True, json_serializer=json_text, **POOL
            )
        except (ImportError, NoSuchModuleError) as error:
            raise ValueError(f"PostgreSQL needs a driver ({error}): pip install 'palm-rlhf[postgres]'") from error
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, json_serializer=json_text, **POOL)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction by itself: the store does
        connection.execute("PRAGMA synchronous=FULL")  # in WAL mode NORMAL may lose commits when power fails
        connection.execute("PRAGMA foreign_keys=ON")

    return engine
