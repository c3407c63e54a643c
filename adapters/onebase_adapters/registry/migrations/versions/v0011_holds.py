"""Jobs that wait after the check of their files, and jobs that end early.

Servers that run on an older release go on: the jobs that they make do neither.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("training_jobs", sa.Column("hold", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("training_jobs", sa.Column("stop", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("training_jobs", "stop")
    op.drop_column("training_jobs", "hold")
