"""Who proves a version, and with which kernels it was proved besides those of its first proof.

Servers that run on an older release go on: they prove without saying so, and serve what was proved with other
kernels. They would sweep a packed adapter that only a proof with other kernels has; it is made again then.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    number = sa.Integer() if on_sqlite else sa.BigInteger()
    op.create_table(
        "proofs",
        sa.Column("number", number, nullable=False),
        sa.Column("version_id", number, nullable=False),
        sa.Column("kernels", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("until", sa.Double(), nullable=True),
        sa.Column("prepared_sha256", sa.String(), nullable=True),
        sa.Column("prepared_size", sa.BigInteger(), nullable=True),
        sa.Column("report", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name="fk_proofs_version_id_versions", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("number", name="pk_proofs"),
        sa.UniqueConstraint("version_id", "kernels", name="uq_proofs_version_id_kernels"),
    )
    op.create_index("ix_proofs_prepared_sha256", "proofs", ["prepared_sha256"])


def downgrade() -> None:
    op.drop_table("proofs")
