"""Quotas of tenants, and checks of what they store against them.

Limits on stored data are checked in the transaction that adds to it. It locks the tenant's row, so that of
two servers that add the last one, one is refused.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import fields

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from onebase_adapters.names import NAME_RULE, is_adapter_name
from onebase_adapters.registry import audit
from onebase_adapters.registry.database import Database
from onebase_adapters.registry.errors import InvalidKeyError, QuotaError
from onebase_adapters.registry.records import ENDED_STATES, RESUMABLE, Quotas, TenantRecord
from onebase_adapters.registry.tables import (
    AdapterRow,
    ApiKeyRow,
    TenantRow,
    TrainingFileRow,
    TrainingJobRow,
    UsageRow,
    VersionRow,
)

KEY_QUOTAS = ("requests", "tokens", "sequences")
"""Quotas that a key can have; the others limit what is stored, which belongs to the key's tenant."""
TENANT_QUOTAS = tuple(item.name for item in fields(Quotas))
MOST = 10**15
"""Largest limit of a quota."""
_ASK = "ask this server's operator for more (onebase tenants set)"


class Tenants:
    """The tenants of a registry. All methods block, and may be called from any thread.

    Raises RegistryBusyError, RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def set_quotas(self, tenant: str, changes: Mapping[str, int | None]) -> TenantRecord:
        """Change the quotas that `changes` names; None: no limit. The tenant need not exist yet.

        Raises InvalidKeyError.
        """
        check_tenant(tenant)
        with self._database.write() as (session, counter):
            row = session.get(TenantRow, tenant)
            if row is None:
                row = TenantRow(tenant=tenant, quotas={})
                session.add(row)
            row.quotas = changed_quotas(row.quotas, changes, TENANT_QUOTAS)
            row.changed = counter
            session.flush()
            audit.note(session, "tenant.changed", tenant, tenant, details={"quotas": row.quotas})
            return _record(session, tenant, row)

    def all(self) -> list[TenantRecord]:
        """Return the tenants that have a key, a quota, an adapter, a file or any usage, by name."""
        with self._database.read() as session:
            rows = {row.tenant: row for row in session.scalars(select(TenantRow))}
            names = set(rows)
            for table in (ApiKeyRow, AdapterRow, TrainingFileRow, UsageRow):
                names |= set(session.scalars(select(table.tenant).distinct()))
            return [_record(session, name, rows.get(name)) for name in sorted(names)]

    def one(self, tenant: str) -> TenantRecord:
        """Return a tenant's record, which is empty for an unknown tenant."""
        with self._database.read() as session:
            return _record(session, tenant, session.get(TenantRow, tenant))

    def check_bytes(self, tenant: str, more: int) -> None:
        """Raise QuotaError if so many bytes more would exceed the quota now."""
        with self._database.read() as session:
            check_bytes(session, tenant, more, lock=False)

    def check_training(self, tenant: str) -> None:
        """Raise QuotaError if the tenant has used up its training time of this month."""
        with self._database.read() as session:
            check_training(session, tenant)


def quotas_of(stored: Mapping[str, int] | None) -> Quotas:
    """Return the quotas that a row holds; names of a later release are left out."""
    return Quotas(**{name: limit for name, limit in (stored or {}).items() if name in TENANT_QUOTAS})


def changed_quotas(
    stored: Mapping[str, int], changes: Mapping[str, int | None], names: tuple[str, ...]
) -> dict[str, int]:
    """Return the stored quotas with `changes` applied. Raises InvalidKeyError."""
    for name, limit in changes.items():
        if name not in names:
            raise InvalidKeyError(f"quotas.{name[:80]}", _no_such_quota(name, names))
        if limit is not None and not 0 <= limit <= MOST:
            raise InvalidKeyError(f"quotas.{name}", f"use a whole number from 0 to {MOST}, or none.")
    new = {**stored, **changes}
    return {name: limit for name, limit in new.items() if limit is not None}


def _no_such_quota(name: str, names: tuple[str, ...]) -> str:
    if name in TENANT_QUOTAS:
        return (
            "what is kept belongs to a tenant, not to a key. Set it for the tenant (onebase tenants set, "
            "POST /v1/tenants/{tenant})."
        )
    return f"there is no such quota; choose among {', '.join(names)}."


def check_tenant(tenant: str) -> None:
    """Raise InvalidKeyError unless a tenant may have this name."""
    if not is_adapter_name(tenant):
        raise InvalidKeyError("tenant", f"{tenant[:80]!r} cannot be a tenant's name: use {NAME_RULE}.")


# ---- what is kept: to be called in the transaction that adds to it ----------------------------


def check_adapters(session: Session, tenant: str) -> None:
    """Raise QuotaError unless the tenant may have one more adapter."""
    limit = _limits(session, tenant).adapters
    if limit is not None and _adapters(session, tenant) >= limit:
        raise QuotaError(
            f"Tenant {tenant!r} has as many adapters as it may: {limit} (its quota `adapters`). Delete one, "
            f"or {_ASK}.",
            "adapters",
            limit,
        )


def check_bytes(session: Session, tenant: str, more: int, *, lock: bool = True) -> None:
    """Raise QuotaError unless the tenant may store so many bytes more."""
    limit = _limits(session, tenant, lock=lock).bytes
    if limit is None:
        return
    kept = _bytes(session, tenant)
    if kept + more > limit:
        raise QuotaError(
            f"Tenant {tenant!r} may keep {limit} bytes (its quota `bytes`): it keeps {kept}, and this is "
            f"{more} more. Delete versions or files, cancel jobs that have not ended, or {_ASK}.",
            "bytes",
            limit,
        )


def check_jobs(session: Session, tenant: str, files: Collection[str]) -> None:
    """Raise QuotaError unless the tenant may have one more unended job, and store the rows of its `files`
    (ids)."""
    limit = _limits(session, tenant).jobs
    if limit is not None and (jobs := _jobs(session, tenant)) >= limit:
        raise QuotaError(
            f"Tenant {tenant!r} may have {limit} jobs that have not ended (its quota `jobs`), and has "
            f"{jobs}. Held and paused jobs count, and failed ones that can be resumed: wait for one to "
            f"end, cancel one, or {_ASK}.",
            "jobs",
            limit,
        )
    rows = select(func.sum(TrainingFileRow.bytes)).where(TrainingFileRow.id.in_(files))
    check_bytes(session, tenant, int(session.scalar(rows) or 0))


def check_training(session: Session, tenant: str) -> None:
    """Raise QuotaError unless the tenant may train on in this month."""
    limit = _limits(session, tenant, lock=False).training_seconds
    if limit is not None and _trained(session, tenant) >= limit:
        raise QuotaError(
            f"Tenant {tenant!r} has trained for {limit} seconds in this calendar month (UTC), as long as it "
            f"may (its quota `training_seconds`). Train on next month, or {_ASK}.",
            "training_seconds",
            limit,
        )


def _limits(session: Session, tenant: str, *, lock: bool = True) -> Quotas:
    """Return the tenant's quotas. lock: lock them until this transaction has ended."""
    query = select(TenantRow).where(TenantRow.tenant == tenant)
    row = session.scalar(query.with_for_update() if lock else query)
    return quotas_of(None if row is None else row.quotas)


def _adapters(session: Session, tenant: str) -> int:
    found = select(func.count()).select_from(AdapterRow).where(AdapterRow.tenant == tenant)
    return session.scalar(found) or 0


def _jobs(session: Session, tenant: str) -> int:
    found = select(func.count()).select_from(TrainingJobRow).where(*_unended(tenant))
    return session.scalar(found) or 0


def _bytes(session: Session, tenant: str) -> int:
    """Return the bytes of versions as they were sent, of files, and of unended jobs' rows.

    An unended job stores the tokens of its files' rows on disk: 5 bytes for about 4 characters, counted as
    the size of the files.
    """
    versions = (
        select(func.sum(VersionRow.config_size + VersionRow.weights_size))
        .join(VersionRow.adapter)
        .where(AdapterRow.tenant == tenant)
    )
    # What the store has once counts once, under however many ids.
    once = select(func.max(TrainingFileRow.bytes).label("bytes")).where(TrainingFileRow.tenant == tenant)
    files = select(func.sum(once.group_by(TrainingFileRow.sha256).subquery().c.bytes))
    of_job = or_(
        TrainingFileRow.id == TrainingJobRow.training_file,
        TrainingFileRow.id == TrainingJobRow.validation_file,
    )
    rows = select(func.sum(TrainingFileRow.bytes)).join(TrainingJobRow, of_job).where(*_unended(tenant))
    return sum(int(session.scalar(query) or 0) for query in (versions, files, rows))


def _unended(tenant: str) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for the tenant's jobs that are open, held or paused, or failed and resumable."""
    resumable = and_(TrainingJobRow.state == "failed", TrainingJobRow.error_code.in_(RESUMABLE))
    return (
        TrainingJobRow.tenant == tenant,
        or_(TrainingJobRow.state.not_in(ENDED_STATES), resumable),
    )


def _trained(session: Session, tenant: str) -> float:
    month = time.strftime("%Y-%m-01", time.gmtime())
    found = select(func.sum(UsageRow.training_seconds))
    return session.scalar(found.where(UsageRow.tenant == tenant, UsageRow.day >= month)) or 0.0


def _record(session: Session, tenant: str, row: TenantRow | None) -> TenantRecord:
    return TenantRecord(
        tenant=tenant,
        quotas=quotas_of(None if row is None else row.quotas),
        adapters=_adapters(session, tenant),
        bytes=_bytes(session, tenant),
        jobs=_jobs(session, tenant),
        training_seconds=_trained(session, tenant),
    )
