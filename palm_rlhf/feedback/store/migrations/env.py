"""Alembic's environment: migrations run on the connection that the store has opened."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import TypeDecorator

import palm_rlhf.feedback.store.answer_tables  # these four declare the tables
import palm_rlhf.feedback.store.learning_tables
import palm_rlhf.feedback.store.people_tables
import palm_rlhf.feedback.store.tree_tables  # noqa: F401
from palm_rlhf.feedback.store.migrating import VERSION_TABLE
from palm_rlhf.feedback.store.table_base import Base


def render_item(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """Return the type of a column as a migration writes it: our types by what the database keeps."""
    return f"sa.{type(item.impl_instance).__name__}()" if isinstance(item, TypeDecorator) else False


def run() -> None:
    """Run the migrations on the connection that the store has opened."""
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        render_item=render_item,
        render_as_batch=True,  # SQLite changes a table by copying it
        transactional_ddl=False,  # the store has begun the transaction, and commits it
    )
    context.run_migrations()


if hasattr(context, "config"):  # as it has while Alembic runs this file
    run()
