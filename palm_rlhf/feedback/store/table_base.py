"""The base of all tables: ids, times and references."""

import uuid
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, ForeignKey, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, mapped_column

JSON_OR_NULL = JSON(none_as_null=True)  # None is the NULL that `is_(None)` finds, and not the text null


def new_id() -> str:
    """Return a new random id."""
    return str(uuid.uuid4())


def utc_now() -> datetime:
    """Return the current time, in UTC."""
    return datetime.now(timezone.utc)


class UtcTime(TypeDecorator):
    """A time in UTC, aware of its zone in every database."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time as the database keeps it, without a zone; ValueError for a time without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"got the time {value} without a zone, expected one in UTC: use utc_now")
        return value.astimezone(timezone.utc).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time with its zone."""
        return None if value is None else value.replace(tzinfo=timezone.utc)


class Base(DeclarativeBase):
    """The base of all tables."""

    type_annotation_map = {str: Text, datetime: UtcTime, dict[str, Any]: JSON_OR_NULL, list[Any]: JSON_OR_NULL}  # noqa: RUF012


def id_column() -> Any:
    """Return the column of a row's id."""
    return mapped_column(String(36), primary_key=True, default=new_id)


def reference(column: str, *, nullable: bool = False) -> Any:
    """Return a column that refers to another table's, such as people.id."""
    return mapped_column(ForeignKey(column), nullable=nullable, index=True)
