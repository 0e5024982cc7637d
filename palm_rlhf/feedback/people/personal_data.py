"""Everything that a database holds about one person."""

from datetime import datetime
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.store.people_tables import Invitation, LoginSession, Participant
from palm_rlhf.feedback.store.table_base import Base

SECRETS = {"password_hash", "secret_hash"}


def personal_data(session: Session, person: Participant) -> dict[str, Any]:
    """Return the rows of all tables that refer to a person, by table, as JSON can hold them.

    Hashes of secrets are left out, and the ids of sessions.
    """
    found: dict[str, Any] = {"people": [_plain(person)]}
    tables: list[Any] = [mapper.class_ for mapper in Base.registry.mappers]
    for table in sorted(tables, key=lambda table: table.__tablename__):
        columns = [key for key, column in inspect(table).columns.items() if refers_to_people(column)]
        for column in columns:
            query = select(table).where(getattr(table, column) == person.id)
            rows = [_plain(row) for row in session.scalars(query.order_by(table.id))]
            if rows:
                name = table.__tablename__
                found[name if column == "person_id" else f"{name} ({column})"] = rows
    return found


def refers_to_people(column: Any) -> bool:
    """Return whether a column holds the id of a person."""
    return any(key.column.table.name == Participant.__tablename__ for key in column.foreign_keys)


def _plain(row: Any) -> dict[str, Any]:
    left_out = SECRETS | ({"id"} if isinstance(row, (LoginSession, Invitation)) else set())
    values = {key: getattr(row, key) for key in inspect(type(row)).columns.keys() if key not in left_out}
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in values.items()}
