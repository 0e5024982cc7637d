"""Opening a database: SQLite's WAL mode, and the migrations that bring older tables up to date."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect
from sqlalchemy.exc import OperationalError

from palm_rlhf.feedback.store.store_errors import BUSY_SECONDS
from palm_rlhf.feedback.store.transactions import begin_writing

MIGRATIONS = Path(__file__).parent / "migrations"
VERSION_TABLE = "palm_rlhf_version"
_ALEMBIC = threading.Lock()  # it keeps its state in globals


def migrate(engine: Engine, name: str, *, create: bool) -> None:
    """Bring a database up to date, or create its tables; processes that start at once take turns.

    Raises ValueError for the database of a newer version, or of another program, and for one without tables unless
    `create` is set.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            _use_wal(connection)
        found = _revision(connection, scripts, name)
        if found == scripts.get_current_head():
            return
        if found is None and not create:
            raise ValueError(f"got the database {name}, which holds no feedback: mend its address")
        connection.rollback()
        with _without_foreign_keys(connection), _ALEMBIC:
            begin_writing(connection)
            if _revision(connection, scripts, name) != scripts.get_current_head():
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                _check_references(connection)
            connection.commit()


def _revision(connection: Connection, scripts: ScriptDirectory, name: str) -> str | None:
    """Return the revision of a database; ValueError for one that this version does not know."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    found = context.get_current_revision()
    known = {script.revision for script in scripts.walk_revisions()}
    if found is not None and found not in known:
        raise ValueError(
            f"got the database {name} of a newer palm-rlhf (revision {found}), expected at most revision "
            f"{scripts.get_current_head()}: upgrade palm-rlhf"
        )
    if found is None and (tables := inspect(connection).get_table_names()):
        raise ValueError(
            f"got the database {name} of another program (it has the table {sorted(tables)[0]}), expected an empty "
            "one: give a name of its own"
        )
    return found


def _use_wal(connection: Connection) -> None:
    """Turn on WAL mode, in which readers and the writer do not wait for each other; the file stays in it."""
    deadline = time.monotonic() + BUSY_SECONDS
    while connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
        try:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except OperationalError as error:  # SQLite does not wait here while another process does the same
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextmanager
def _without_foreign_keys(connection: Connection) -> Iterator[None]:
    """Let SQLite copy a table that others refer to."""
    switch = "PRAGMA foreign_keys=" if connection.dialect.name == "sqlite" else None
    if switch:
        connection.exec_driver_sql(f"{switch}OFF")
    try:
        yield
    finally:
        connection.rollback()
        if switch:
            connection.exec_driver_sql(f"{switch}ON")


def _check_references(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        broken: Any = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        assert not broken, f"a migration has broken references: {broken[:3]}"
