"""How transactions begin: readers see one state of the database, and writers take turns."""

from sqlalchemy import Connection, text

from palm_rlhf.feedback.store.store_errors import BUSY_SECONDS

WRITE_LOCK = 0x70616C6D  # of PostgreSQL's advisory locks: one writer at a time, as in SQLite
READ_ONLY = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}  # of PostgreSQL


def begin_reading(connection: Connection) -> None:
    """Begin a transaction that sees one state of the database, and can change nothing."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA query_only=ON")
        connection.exec_driver_sql("BEGIN")


def begin_writing(connection: Connection) -> None:
    """Begin a transaction that alone may write; it waits for others, at most `BUSY_SECONDS`."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA query_only=OFF")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_SECONDS:g}s'")
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITE_LOCK})
