"""Training files are blobs of the store.

Files without `sha256` lie on the disk of their server, which moves them into the store when it starts. The
rows by which release 0.1 knew a registry again go: a server sweeps only the folders of its own registry.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("training_files", sa.Column("sha256", sa.String(), nullable=True))
    op.create_index("ix_training_files_sha256", "training_files", ["sha256"])
    op.execute("DELETE FROM training_files WHERE tenant = 'registry'")


def downgrade() -> None:
    op.drop_index("ix_training_files_sha256", "training_files")
    op.drop_column("training_files", "sha256")
