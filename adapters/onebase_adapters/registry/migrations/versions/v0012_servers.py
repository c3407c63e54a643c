"""Servers that share a registry: their leases, what they let in of quotas, what jobs go on from elsewhere.

Servers that run on an older release go on: they have no lease, so that nobody takes over what they run. Where
they share a store they would delete from it what jobs go on from elsewhere, which then begin again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "servers",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("base_id", sa.String(), nullable=False),
        sa.Column("runs", sa.Boolean(), nullable=False),
        sa.Column("room", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_servers"),
    )
    op.create_index("ix_servers_server", "servers", ["server"])
    op.create_table(
        "quota_use",
        sa.Column("process", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("use", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("process", "kind", "name", name="pk_quota_use"),
    )
    op.create_index("ix_quota_use_at", "quota_use", ["at"])
    op.create_table(
        "job_files",
        sa.Column("job", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job"], ["training_jobs.number"], name="fk_job_files_job", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job", "path", name="pk_job_files"),
    )
    op.create_index("ix_job_files_sha256", "job_files", ["sha256"])
    op.add_column("training_jobs", sa.Column("kept_step", sa.Integer(), nullable=False, server_default="0"))
    op.add_column(
        "training_jobs", sa.Column("kept_adapter", sa.Boolean(), nullable=False, server_default=sa.false())
    )


def downgrade() -> None:
    op.drop_column("training_jobs", "kept_adapter")
    op.drop_column("training_jobs", "kept_step")
    op.drop_table("job_files")
    op.drop_table("quota_use")
    op.drop_table("servers")
