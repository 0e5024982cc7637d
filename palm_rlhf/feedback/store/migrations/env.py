"""Alembic's environment: migrations run on the connection that the store has opened."""

from alembic import context

import palm_rlhf.feedback.store.answer_tables  # these four declare the tables
import palm_rlhf.feedback.store.learning_tables
import palm_rlhf.feedback.store.people_tables
import palm_rlhf.feedback.store.tree_tables  # noqa: F401
from palm_rlhf.feedback.store.table_base import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
    transactional_ddl=False,  # the store has begun the transaction, and commits it
)
context.run_migrations()
