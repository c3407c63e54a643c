"""Configure Alembic. `Registry.migrate` hands over a connection that is in a transaction already."""

from __future__ import annotations

from alembic import context

from onebase_adapters.registry.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
