"""A registry has an identity, by which a data folder tells the jobs of one registry from those of another.

It is a table that servers of release 0.1 do not look at: those that run go on.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    identity = op.create_table(
        "identity",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_identity"),
    )
    op.bulk_insert(identity, [{"id": 1, "value": f"registry-{secrets.token_hex(8)}"}])


def downgrade() -> None:
    op.drop_table("identity")
