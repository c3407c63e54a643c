"""Parts of the request logs that all servers of a registry share: the keys of the hashes, and erasures."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from onebase_adapters.registry.audit import note
from onebase_adapters.registry.database import Database, plain
from onebase_adapters.registry.errors import ErasuresError
from onebase_adapters.registry.tables import LogErasureRow, LogKeyRow

MOST_ERASURES = 10_000
"""Largest number of a tenant's users whose erasures are kept one by one."""
_KEY_BYTES = 32


@dataclass(frozen=True)
class LogErasure:
    """An erasure that every server of the registry applies to its own log.

    number: the registry's change counter by then. user: the keyed hash of a user's name; None: everything
    of the tenant.
    """

    number: int
    tenant: str
    user: str | None


class RequestLogRecords:
    """Keys and erasures. All methods block, and may be called from any thread.

    Raises RegistryBusyError, RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def key(self, tenant: str) -> bytes:
        """Return the key of the tenant's hashes, which the first call makes."""
        tenant = plain(tenant)
        query = select(LogKeyRow.key).where(LogKeyRow.tenant == tenant)
        with self._database.read() as session:
            found = session.scalar(query)
        if found is not None:
            return found
        with self._database.write_uncounted() as session:
            dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
            made = dialect.insert(LogKeyRow).values(tenant=tenant, key=secrets.token_bytes(_KEY_BYTES))
            session.execute(made.on_conflict_do_nothing())
            return session.execute(query).scalar_one()

    def erase(self, tenant: str, user: str | None) -> LogErasure:
        """Have every server erase what its log has of a tenant, or of one of its users. With everything goes
        the key of the hashes. Raises ErasuresError."""
        tenant = plain(tenant)
        with self._database.write() as (session, number):
            same = LogErasureRow.tenant == tenant
            if user is None:
                session.execute(delete(LogKeyRow).where(LogKeyRow.tenant == tenant))
            else:
                count = select(func.count()).select_from(LogErasureRow).where(same)
                if session.execute(count).scalar_one() >= MOST_ERASURES:
                    raise ErasuresError(MOST_ERASURES)
                same &= LogErasureRow.user == user
            session.execute(delete(LogErasureRow).where(same))
            session.add(LogErasureRow(number=number, tenant=tenant, user=user, at=time.time()))
            session.flush()
            note(session, "requests.erased", tenant, "all" if user is None else "user")
        return LogErasure(number, tenant, user)

    def erasures(self, after: int) -> list[LogErasure]:
        """Return the erasures with higher numbers, in their order."""
        query = select(LogErasureRow).where(LogErasureRow.number > after).order_by(LogErasureRow.number)
        with self._database.read() as session:
            return [LogErasure(row.number, row.tenant, row.user) for row in session.scalars(query)]
