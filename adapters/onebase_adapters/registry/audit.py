"""Audit log: who changed what, and when. Entries are never changed or deleted.

An entry is written in the transaction of the change itself, so that neither exists without the other. The
context (`acting`) holds on whose behalf a change is made: tasks and threads that a request starts, even if
they outlive it, act for its caller. Refused attempts are not recorded, or anyone could fill the disk; of
adapters that are refused because of their signature a few a minute are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, select, text
from sqlalchemy.orm import Session

from onebase_adapters.registry.database import SERVER, Database, plain, plain_json
from onebase_adapters.registry.records import AUDIT_KINDS, AuditAction, AuditRecord, record_of
from onebase_adapters.registry.tables import AuditRow, BaseRow
from onebase_protocol.access import audit_chain

_TURN = 0x6175_6469_74  # "audit", for pg_advisory_xact_lock
_MOST_TEXT = 512


@dataclass(frozen=True)
class Origin:
    """Caller or actor on whose behalf something is changed.

    key: the id of an API key; "" where none is needed. request: an id that came with the request.
    actor: the actor if it is not a request: `job ftjob-...`, `startup`, `onebase keys of ann@host`.
    owned: the id of the job or batch that is delivered and the server that delivers it, which must own it.
    """

    key: str = ""
    request: str = ""
    actor: str = ""
    owned: tuple[str, str] | None = None


_NOBODY = Origin()
_ORIGIN: ContextVar[Origin] = ContextVar("onebase_origin", default=_NOBODY)


@contextmanager
def acting(origin: Origin) -> Iterator[None]:
    """Attribute changes in this block, and by tasks that it starts, to `origin`."""
    before = _ORIGIN.set(origin)
    try:
        yield
    finally:
        _ORIGIN.reset(before)


def current() -> Origin:
    """Return the origin on whose behalf this code runs."""
    return _ORIGIN.get()


def note(
    session: Session,
    action: AuditAction,
    tenant: str,
    name: str,
    *,
    version: str | None = None,
    base_id: str | None = None,
    origin: Origin | None = None,
    actor: str = "",
    details: Mapping[str, Any] | None = None,
) -> None:
    """Add an entry to a write transaction, as the last statement there that waits for a lock.

    Args:
        name: of the adapter, or the id of the file, job or key.
        origin: instead of the context's. actor: the actor, if `origin` has none.
        details: further facts; never a secret.
    """
    found = origin or current()
    if actor and not found.actor and actor != found.key:
        found = replace(found, actor=actor)
    if session.get_bind().dialect.name == "postgresql":
        # Numbers then follow the order of commits, and who reads on from one misses nothing.
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _TURN})
    before = session.scalar(select(AuditRow.chain).order_by(AuditRow.number.desc()).limit(1))
    entry: dict[str, Any] = {
        "at": time.time(),
        "tenant": tenant,
        "key": _text(found.key),
        "actor": _text(found.actor),
        "action": action,
        "target": _text(name),
        "version": version,
        "base_id": base_id,
        "server": session.info.get(SERVER, ""),
        "request": _text(found.request),
        "details": plain_json(details) if details else {},
    }
    chain = audit_chain(before or "", **entry)
    session.add(AuditRow(**{**entry, "details": entry["details"] or None}, chain=chain))
    session.flush()


def _text(value: str) -> str:
    return plain(value)[:_MOST_TEXT]


class AuditLog:
    """Reads the log, of every base. Blocks. Raises RegistryBusyError and RegistryError like Registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def entries(
        self,
        *,
        tenant: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since: float | None = None,
        after: int | None = None,
        limit: int,
        oldest_first: bool = False,
    ) -> list[AuditRecord]:
        """Return entries, newest first unless `oldest_first`.

        Args:
            tenant: the owner of the adapters, files, jobs and keys; None: of all tenants.
            action: one of AuditAction, or a kind of them (`job`). target: a name or an id.
            since: Unix seconds. after: the number of the last entry of the page before.
        """
        number = AuditRow.number
        conditions: list[ColumnElement[bool]] = []
        if tenant is not None:
            conditions.append(AuditRow.tenant == plain(tenant))
        if action is not None:
            exact = AuditRow.action == plain(action)
            conditions.append(AuditRow.action.startswith(f"{action}.") if action in AUDIT_KINDS else exact)
        if target is not None:
            conditions.append(AuditRow.target == plain(target))
        if since is not None:
            conditions.append(AuditRow.at >= since)
        if after is not None:
            conditions.append(number > after if oldest_first else number < after)
        with self._database.read() as session:
            rows = session.execute(
                select(AuditRow, BaseRow.name)
                .outerjoin(BaseRow, BaseRow.id == AuditRow.base_id)
                .where(*conditions)
                .order_by(number if oldest_first else number.desc())
                .limit(limit)
            )
            return [_entry(row, base) for row, base in rows]


def _entry(row: AuditRow, base: str | None) -> AuditRecord:
    return record_of(AuditRecord, row, base=base, details=row.details or {})
