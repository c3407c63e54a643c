"""Parts of the request logs that all servers of a registry share: the keys of the hashes, erasures, and for
how long a tenant's requests are kept."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from onebase_adapters.registry.audit import note
from onebase_adapters.registry.database import Database, plain
from onebase_adapters.registry.errors import ErasuresError
from onebase_adapters.registry.tables import LogErasureRow, LogKeyRow, TenantRow

MOST_ERASURES = 10_000
"""Largest number of a tenant's users whose erasures are kept one by one."""
_KEY_BYTES = 32


@dataclass(frozen=True)
class LogErasure:
    """An erasure that every server of the registry applies to its own log.

    number: the registry's change counter by then. user: the keyed hash of a user's name; None: everything
    of the tenant. at: Unix seconds.
    """

    number: int
    tenant: str
    user: str | None
    at: float


class RequestLogRecords:
    """Keys and erasures. All methods block, and may be called from any thread.

    Raises RegistryBusyError, RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def key(self, tenant: str) -> bytes:
        """Return the key of the tenant's hashes, which the first call makes."""
        tenant = plain(tenant)
        with self._database.read() as session:
            found = session.scalar(_key_of(tenant))
        if found is not None:
            return found
        with self._database.write_uncounted() as session:
            return _made_key(session, tenant)

    def days(self) -> dict[str, int]:
        """Return the days for which requests are kept of each tenant that has the quota `log_days`."""
        with self._database.read() as session:
            rows = session.execute(select(TenantRow.tenant, TenantRow.quotas)).all()
            return {tenant: quotas["log_days"] for tenant, quotas in rows if "log_days" in quotas}

    def erase(
        self, tenant: str, hashed: Callable[[bytes], str] | None, keep_seconds: float = math.inf
    ) -> LogErasure:
        """Have every server erase what its log has of a tenant, or of one of its users. With everything goes
        the key of the hashes. Raises ErasuresError.

        Args:
            hashed: returns the hash of the user's name with the tenant's key; None: everything is erased.
            keep_seconds: for which logs keep requests. Where a tenant has MOST_ERASURES, its older erasures
                are deleted: no log has anything of what they erase.
        """
        tenant = plain(tenant)
        with self._database.write() as (session, number):
            same, at, user = LogErasureRow.tenant == tenant, time.time(), None
            if hashed is None:
                session.execute(delete(LogKeyRow).where(LogKeyRow.tenant == tenant))
            else:
                user = hashed(_made_key(session, tenant))
                others = same & (LogErasureRow.user != user)
                if _count(session, others) >= MOST_ERASURES:
                    session.execute(delete(LogErasureRow).where(others, LogErasureRow.at < at - keep_seconds))
                    if _count(session, others) >= MOST_ERASURES:
                        raise ErasuresError(MOST_ERASURES)
                same &= LogErasureRow.user == user
            session.execute(delete(LogErasureRow).where(same))
            session.add(LogErasureRow(number=number, tenant=tenant, user=user, at=at))
            session.flush()
            note(session, "requests.erased", tenant, "all" if user is None else "user")
        return LogErasure(number, tenant, user, at)

    def erasures(self, after: int) -> list[LogErasure]:
        """Return the erasures with higher numbers, in their order; all, if the registry was restored from
        before that number."""
        with self._database.read() as session:
            after = after if after <= self._database.counter(session) else 0
            query = select(LogErasureRow).where(LogErasureRow.number > after).order_by(LogErasureRow.number)
            return [LogErasure(row.number, row.tenant, row.user, row.at) for row in session.scalars(query)]


def _key_of(tenant: str) -> Select[bytes]:
    return select(LogKeyRow.key).where(LogKeyRow.tenant == tenant)


def _made_key(session: Session, tenant: str) -> bytes:
    """Return the key of a tenant's hashes, in a writing transaction, which makes it if there is none."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    made = dialect.insert(LogKeyRow).values(tenant=tenant, key=secrets.token_bytes(_KEY_BYTES))
    session.execute(made.on_conflict_do_nothing())
    return session.execute(_key_of(tenant)).scalar_one()


def _count(session: Session, which: ColumnElement[bool]) -> int:
    return session.execute(select(func.count()).select_from(LogErasureRow).where(which)).scalar_one()
