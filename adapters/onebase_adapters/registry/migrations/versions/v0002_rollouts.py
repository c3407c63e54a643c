"""Rollouts of versions: their shares and ends, the sums over their requests, and answers for feedback."""

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
    op.create_table(
        "rollouts",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("adapter_id", _ID, sa.ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False),
        sa.Column("candidate", sa.String(), nullable=False),
        sa.Column("baseline", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("percent", sa.Double(), nullable=False),
        sa.Column("shadow", sa.Double(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.Column("ended_by", sa.String()),
        sa.Column("reason", sa.Text()),
        sa.Column("figures", sa.JSON()),
        sa.Index(None, "adapter_id", "state"),
    )
    op.create_table(
        "rollout_figures",
        sa.Column("rollout", _ID, _of_rollout(), primary_key=True, autoincrement=False),
        sa.Column("side", sa.String(), primary_key=True),
        sa.Column("figure", sa.String(), primary_key=True),
        sa.Column("value", sa.Double(), nullable=False),
    )
    op.create_table(
        "rollout_answers",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("rollout", _ID, _of_rollout(), nullable=False, index=True),
        sa.Column("side", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False, index=True),
        sa.Column("score", sa.Double()),
    )


def _of_rollout() -> sa.ForeignKey:
    """Return a reference to the rollout that a row is deleted with."""
    return sa.ForeignKey("rollouts.number", ondelete="CASCADE")
