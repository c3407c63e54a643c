"""What was asked for with a version is called `options` in its source, not `wishes`.

Tables stay as they are, so servers of release 0.1 that run go on. Until they end they add versions with
`wishes`, which the registry reads as `options`. One that starts on this revision refuses.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_VERSIONS = sa.table("versions", sa.column("id", sa.BigInteger()), sa.column("source", sa.JSON()))


def upgrade() -> None:
    _rename("wishes", "options")


def downgrade() -> None:
    _rename("options", "wishes")


def _rename(old: str, new: str) -> None:
    connection = op.get_bind()
    # Like every write: it waits for those of servers that run, and they wait for it.
    connection.execute(sa.text("UPDATE change_counter SET value = value + 1"))
    for number, source in connection.execute(sa.select(_VERSIONS.c.id, _VERSIONS.c.source)).all():
        if old in source:
            renamed = {new if key == old else key: value for key, value in source.items()}
            connection.execute(sa.update(_VERSIONS).where(_VERSIONS.c.id == number).values(source=renamed))
