"""Run by Alembic: migrations on the connection, and in the transaction, that it was handed."""

from alembic import context

from ringfence.store.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    # SQLite can roll back DDL; Alembic thinks of old Python drivers that could not
    transactional_ddl=True,
)
context.run_migrations()
