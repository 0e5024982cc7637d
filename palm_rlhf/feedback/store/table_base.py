"""The base of all tables: ids, times, texts, JSON and references, which both databases keep alike."""

import json
import uuid
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, ForeignKey, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, mapped_column

from palm_rlhf.feedback.refusals import FeedbackError


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


class CleanText(TypeDecorator):
    """Text of characters that both databases and UTF-8 files keep."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return the text; FeedbackError for one with the character U+0000 or half of a surrogate pair."""
        if value is not None:
            _check_characters(value)
        return value


class CleanJson(TypeDecorator):
    """Values of JSON, with texts that are clean too; None is the NULL that `is_(None)` finds, not the text null."""

    impl = JSON
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(none_as_null=True)

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Return the value; FeedbackError for unclean text in it, ValueError for a number that is not finite."""
        if value is not None:
            text = json_text(value)
            _check_characters(text.replace("\\\\", "").replace("\\u0000", "\0"))
        return value

    def coerce_compared_value(self, op: Any, value: Any) -> Any:
        """Return the type of a part of the value, in a query."""
        return self.impl_instance.coerce_compared_value(op, value)


def json_text(value: Any) -> str:
    """Return JSON as the databases keep it; ValueError for NaN and infinities, which PostgreSQL refuses."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _check_characters(text: str) -> None:
    if "\0" in text:
        raise FeedbackError("got a text with the character U+0000, which no database keeps: remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FeedbackError(
            f"got a text with the character {error.object[error.start]!a}, half of a surrogate pair: remove it"
        ) from None


class Base(DeclarativeBase):
    """The base of all tables."""

    type_annotation_map = {str: CleanText, datetime: UtcTime, dict[str, Any]: CleanJson, list[Any]: CleanJson}  # noqa: RUF012


def id_column() -> Any:
    """Return the column of a row's id."""
    return mapped_column(String(36), primary_key=True, default=new_id)


def reference(column: str, *, nullable: bool = False) -> Any:
    """Return a column that refers to another table's, such as people.id."""
    return mapped_column(ForeignKey(column), nullable=nullable, index=True)
