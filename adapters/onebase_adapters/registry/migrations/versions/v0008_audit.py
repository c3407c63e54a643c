"""The audit log, which the database itself keeps append-only; and the API key that a job was made with.

Servers that run on an older release go on, and write no entries. Their jobs have no key.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_REFUSAL = "the audit log is append-only"


def upgrade() -> None:
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer() if on_sqlite else sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=True),
        sa.Column("base_id", sa.String(), nullable=True),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("request", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_audit"),
    )
    op.create_index("ix_audit_tenant_number", "audit", ["tenant", "number"])
    op.create_index("ix_audit_target_number", "audit", ["target", "number"])
    op.add_column("training_jobs", sa.Column("key", sa.String(), nullable=True))
    for statement in _SQLITE if on_sqlite else _POSTGRESQL:
        op.execute(statement)


def downgrade() -> None:
    op.drop_column("training_jobs", "key")
    op.drop_table("audit")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_is_append_only()")


# REPLACE deletes the row in its way without a DELETE trigger: hence the one on INSERT.
_SQLITE = [
    f"CREATE TRIGGER audit_append_only_{name} BEFORE {name} ON audit {when} "
    f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
    for name, when in (
        ("UPDATE", ""),
        ("DELETE", ""),
        ("INSERT", "WHEN EXISTS (SELECT 1 FROM audit WHERE number = NEW.number)"),
    )
]
_POSTGRESQL = [
    "CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
    "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
    "FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()",
]
