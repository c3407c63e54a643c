"""Training: files, jobs, their events and their checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# SQLite counts rows up by itself only for a key declared INTEGER.
_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _files()
    _jobs()
    _events()
    _checkpoints()


def downgrade() -> None:
    for table in ("training_checkpoints", "training_events", "training_jobs", "training_files"):
        op.drop_table(table)


def _files() -> None:
    op.create_table(
        "training_files",
        sa.Column("number", _ID, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_training_files"),
        sa.UniqueConstraint("id", name="uq_training_files_id"),
    )
    op.create_index("ix_training_files_server", "training_files", ["server"])


def _jobs() -> None:
    op.create_table(
        "training_jobs",
        sa.Column("number", _ID, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("base_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("training_file", sa.String(), nullable=False),
        sa.Column("validation_file", sa.String(), nullable=True),
        sa.Column("activate", sa.String(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("plan", sa.JSON(), nullable=True),
        sa.Column("progress", sa.JSON(), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_param", sa.String(), nullable=True),
        sa.Column("saved_step", sa.Integer(), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("death_step", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(), nullable=True),
        sa.Column("activated", sa.Boolean(), nullable=True),
        sa.Column("result_file", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_training_jobs"),
        sa.UniqueConstraint("id", name="uq_training_jobs_id"),
    )
    op.create_index("ix_training_jobs_server_state", "training_jobs", ["server", "state"])
    for column in ("training_file", "validation_file"):
        op.create_index(f"ix_training_jobs_{column}", "training_jobs", [column])


def _events() -> None:
    op.create_table(
        "training_events",
        sa.Column("number", _ID, nullable=False),
        sa.Column("job", _ID, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_training_events"),
        sa.ForeignKeyConstraint(
            ["job"], ["training_jobs.number"], name="fk_training_events_job", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_training_events_job_number", "training_events", ["job", "number"])


def _checkpoints() -> None:
    op.create_table(
        "training_checkpoints",
        sa.Column("number", _ID, nullable=False),
        sa.Column("job", _ID, nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("train_loss", sa.Double(), nullable=True),
        sa.Column("valid_loss", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_training_checkpoints"),
        sa.ForeignKeyConstraint(
            ["job"], ["training_jobs.number"], name="fk_training_checkpoints_job", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("job", "step", name="uq_training_checkpoints_job_step"),
    )
