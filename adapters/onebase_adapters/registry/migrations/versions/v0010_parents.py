"""The version of an adapter that a job's training goes on from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("training_jobs", sa.Column("parent", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("training_jobs", "parent")
