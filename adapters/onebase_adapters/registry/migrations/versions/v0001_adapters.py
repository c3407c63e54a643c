"""Adapters, versions, what is active and what was."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# SQLite counts rows up by itself only for a key declared INTEGER.
_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _bases_and_counter()
    _adapters()
    _versions()
    _previous_versions()
    _history()


def downgrade() -> None:
    for table in ("history", "previous_versions", "versions", "adapters", "bases", "change_counter"):
        op.drop_table(table)


def _bases_and_counter() -> None:
    counter = op.create_table(
        "change_counter",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_change_counter"),
    )
    op.bulk_insert(counter, [{"id": 1, "value": 0}])
    op.create_table(
        "bases",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_bases"),
    )


def _adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", _ID, nullable=False),
        sa.Column("base_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("active", sa.String(), nullable=True),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("changed", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_adapters"),
        sa.UniqueConstraint("base_id", "tenant", "name", name="uq_adapters_base_id_tenant_name"),
    )


def _versions() -> None:
    op.create_table(
        "versions",
        sa.Column("id", _ID, nullable=False),
        sa.Column("adapter_id", _ID, nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("config_sha256", sa.String(), nullable=False),
        sa.Column("config_size", sa.BigInteger(), nullable=False),
        sa.Column("weights_sha256", sa.String(), nullable=False),
        sa.Column("weights_size", sa.BigInteger(), nullable=False),
        sa.Column("prepared_sha256", sa.String(), nullable=True),
        sa.Column("prepared_size", sa.BigInteger(), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("modules", sa.JSON(), nullable=True),
        sa.Column("source", sa.JSON(), nullable=False),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_versions"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_versions_adapter_id", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("adapter_id", "digest", name="uq_versions_adapter_id_digest"),
    )
    for column in ("state", "config_sha256", "weights_sha256", "prepared_sha256"):
        op.create_index(f"ix_versions_{column}", "versions", [column])


def _previous_versions() -> None:
    op.create_table(
        "previous_versions",
        sa.Column("id", _ID, nullable=False),
        sa.Column("adapter_id", _ID, nullable=False),
        sa.Column("version_id", _ID, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_previous_versions"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_previous_versions_adapter_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name="fk_previous_versions_version_id", ondelete="CASCADE"
        ),
    )
    for column in ("adapter_id", "version_id"):
        op.create_index(f"ix_previous_versions_{column}", "previous_versions", [column])


def _history() -> None:
    op.create_table(
        "history",
        sa.Column("id", _ID, nullable=False),
        sa.Column("adapter_id", _ID, nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=True),
        sa.Column("previous", sa.String(), nullable=True),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_history"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_history_adapter_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_history_adapter_id_id", "history", ["adapter_id", "id"])
