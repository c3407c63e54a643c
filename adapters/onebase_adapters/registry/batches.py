"""Batches in the registry: their requests, their progress and their results."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

from msgspec import convert
from msgspec.structs import asdict
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from onebase_adapters.registry import audit
from onebase_adapters.registry.audit import Origin
from onebase_adapters.registry.database import Database, clock, plain, plain_json
from onebase_adapters.registry.errors import (
    BatchElsewhereError,
    BatchStateError,
    QuotaError,
    RegistryError,
    UnknownBatchError,
)
from onebase_adapters.registry.jobs import find_file
from onebase_adapters.registry.records import (
    BATCH_STATES,
    OPEN_BATCHES,
    AuditAction,
    BatchRecord,
    BatchState,
    NewBatch,
    record_of,
)
from onebase_adapters.registry.servers import leases_of
from onebase_adapters.registry.tables import BatchRow
from onebase_protocol.batches import BatchError

MOST_OPEN = 100
"""Largest number of unended batches of one tenant on one server and base, which looks at all of them every
second. Batches of a server or a base that is gone do not count."""
LOST_SECONDS = 600.0
"""Seconds after the end of its server's lease until a batch is restarted elsewhere: the server might
return."""
ENDED_SECONDS = 60.0
"""Seconds after the end of its server's lease until a cancelled batch is ended elsewhere."""
_FACTS = frozenset({"total", "completed", "failed", "usage", "output_file", "error_file"})
_AUDITED: Mapping[BatchState, AuditAction] = {
    "cancelling": "batch.cancelling",
    "completed": "batch.completed",
    "failed": "batch.failed",
    "expired": "batch.expired",
    "cancelled": "batch.cancelled",
}


class BatchRecords:
    """Batches of one base. All methods block, may be called from any thread, and are one transaction.

    A batch belongs to one server, which alone runs it: the one that made it, until another takes it over.
    Any server on the registry may cancel it; the owner follows the registry. The owner names itself in what
    it writes of its run, and is refused once it has lost the batch. Raises RegistryBusyError,
    RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database, base_id: str) -> None:
        self._database = database
        self._base_id = base_id

    def add(self, batch: NewBatch) -> BatchRecord:
        """Add a batch in state `validating`. Raises TrainingFileNotFoundError, QuotaError."""
        with self._database.write_uncounted() as session:
            mine = (
                select(func.count())
                .select_from(BatchRow)
                .where(*self._scope(batch.tenant), *_open_on(batch.server))
            )
            if (session.scalar(mine) or 0) >= MOST_OPEN:
                raise QuotaError(
                    f"Tenant {batch.tenant!r} has {MOST_OPEN} batches that have not ended on this server, "
                    "and may not have more. Wait for the end of one, or cancel one.",
                    "batches",
                    MOST_OPEN,
                )
            find_file(session, batch.tenant, batch.input_file, lock=True)
            row = BatchRow(
                id=batch.id,
                base_id=self._base_id,
                tenant=batch.tenant,
                key=audit.current().key,
                server=batch.server,
                state="validating",
                endpoint=batch.endpoint,
                input_file=batch.input_file,
                window=batch.window,
                labels=None if batch.labels is None else plain_json(batch.labels),
                created_at=batch.created_at,
                expires_at=batch.expires_at,
            )
            session.add(row)
            session.flush()
            asked = {"input_file": row.input_file, "endpoint": row.endpoint}
            audit.note(session, "batch.created", row.tenant, row.id, base_id=self._base_id, details=asked)
            return _record(row)

    def batch(self, tenant: str, batch_id: str) -> BatchRecord:
        """Return a batch. Raises UnknownBatchError."""
        with self._database.read() as session:
            return _record(self._row(session, batch_id, tenant))

    def batches(self, tenant: str, *, after: str | None = None, limit: int) -> list[BatchRecord]:
        """Return batches, newest first. Raises UnknownBatchError for `after`."""
        with self._database.read() as session:
            query = select(BatchRow).where(*self._scope(tenant))
            if after is not None:
                query = query.where(BatchRow.number < self._row(session, after, tenant).number)
            return [
                _record(row) for row in session.scalars(query.order_by(BatchRow.number.desc()).limit(limit))
            ]

    def open_batches(self, server: str) -> list[BatchRecord]:
        """Return a server's batches that have not ended, oldest first."""
        query = select(BatchRow).where(*self._scope(), *_open_on(server))
        with self._database.read() as session:
            return [_record(row) for row in session.scalars(query.order_by(BatchRow.number))]

    def open_ids(self, server: str) -> set[str]:
        """Return the ids of a server's batches that have not ended, on any base."""
        query = select(BatchRow.id).where(*_open_on(server))
        with self._database.read() as session:
            return set(session.scalars(query))

    def lost(self, server: str) -> list[BatchRecord]:
        """Return batches of servers that are gone, which this one may take over, oldest first."""
        with self._database.read() as session:
            now, leases = clock(session), leases_of(session, self._base_id)
            query = select(BatchRow).where(
                *self._scope(), BatchRow.server != server, BatchRow.state.in_(OPEN_BATCHES)
            )
            rows = session.scalars(query.order_by(BatchRow.number))
            # The limit counts what is lost: else older batches of servers that live would hide it.
            lost = islice((row for row in rows if _is_lost(row, leases, now)), MOST_OPEN)
            return [_record(row) for row in lost]

    def take_batch(self, batch_id: str, before: str, server: str) -> BatchRecord:
        """Transfer a batch from the server `before` to this one.

        It restarts with its file, or ends if it was cancelled, because its answers were on the disk of the
        other server. Raises UnknownBatchError; BatchElsewhereError: it cannot be taken over now.
        """
        with self._database.write_uncounted() as session:
            row = self._row(session, batch_id, lock=True)
            leases = leases_of(session, self._base_id)
            open_there = row.server == before and row.state in OPEN_BATCHES
            if not open_there or not _is_lost(row, leases, clock(session)):
                raise BatchElsewhereError(f"Batch {batch_id} cannot be taken over now.")
            row.server, row.completed, row.failed, row.usage = server, 0, 0, {}
            if row.state != "cancelling":
                row.state = "validating"
            session.flush()
            return _record(row)

    def counts(self) -> dict[str, int]:
        """Return the number of batches of this base in each state."""
        query = select(BatchRow.state, func.count()).where(*self._scope()).group_by(BatchRow.state)
        with self._database.read() as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def move(
        self,
        batch_id: str,
        state: BatchState,
        among: Collection[BatchState],
        *,
        tenant: str | None = None,
        server: str | None = None,
        errors: Sequence[BatchError] | None = None,
        **facts: Any,
    ) -> BatchRecord:
        """Change a batch's state, if it is one of `among`, and other fields of Batch with it.

        server: the one that runs the batch, if that is the caller.

        Raises UnknownBatchError, BatchElsewhereError; BatchStateError when it is in another state.
        """
        with self._database.write_uncounted() as session:
            row = self._row(session, batch_id, tenant, lock=True)
            _check_server(row, server)
            if row.state not in among or state not in BATCH_STATES:
                raise BatchStateError(f"Batch {batch_id} is {row.state}.", row.state)
            row.state = state
            row.times = {**row.times, state: time.time()}
            _set_facts(row, facts)
            if errors is not None:
                row.errors = [plain_json(asdict(error)) for error in errors]
            session.flush()
            if (action := _AUDITED.get(state)) is not None:
                self._note(session, action, row)
            return _record(row)

    def note(self, batch_id: str, *, server: str | None = None, **facts: Any) -> None:
        """Record a batch's progress; `facts`: fields of Batch.

        Raises UnknownBatchError, BatchElsewhereError; BatchStateError when it has ended.
        """
        with self._database.write_uncounted() as session:
            row = self._row(session, batch_id, lock=True)
            _check_server(row, server)
            if row.state not in OPEN_BATCHES:
                raise BatchStateError(f"Batch {batch_id} is {row.state}.", row.state)
            _set_facts(row, facts)

    def _note(self, session: Session, action: AuditAction, row: BatchRow) -> None:
        """Add an entry to the audit log. A server's own actions on a batch are attributed to its creator."""
        origin = audit.current()
        if origin == Origin():
            origin = Origin(row.key, actor=f"batch {row.id}")
        details: dict[str, Any] = {"completed": row.completed, "failed": row.failed, "total": row.total}
        if row.errors:
            details["code"] = row.errors[0]["code"]
        audit.note(session, action, row.tenant, row.id, base_id=row.base_id, origin=origin, details=details)

    def _scope(self, tenant: str | None = None) -> list[ColumnElement[bool]]:
        conditions = [BatchRow.base_id == self._base_id]
        return conditions if tenant is None else [*conditions, BatchRow.tenant == tenant]

    def _row(
        self, session: Session, batch_id: str, tenant: str | None = None, *, lock: bool = False
    ) -> BatchRow:
        query = select(BatchRow).where(*self._scope(tenant), BatchRow.id == plain(batch_id))
        row = session.scalar(query.with_for_update() if lock else query)
        if row is None:
            raise UnknownBatchError(f"There is no batch {batch_id[:80]!r} on this base.")
        return row


def _open_on(server: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return the conditions for a server's batches that have not ended."""
    return BatchRow.server == server, BatchRow.state.in_(OPEN_BATCHES)


def _is_lost(row: BatchRow, leases: Mapping[str, tuple[float, int]], now: float) -> bool:
    """Return True if its server has been gone long enough for another to restart or end the batch."""
    lease = leases.get(row.server)
    if lease is None:
        return False
    return lease[0] + (ENDED_SECONDS if row.state == "cancelling" else LOST_SECONDS) < now


def _check_server(row: BatchRow, server: str | None) -> None:
    if server is not None and row.server != server:
        raise BatchElsewhereError(f"Batch {row.id} is run by another server now.")


def _set_facts(row: BatchRow, facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        if name not in _FACTS:
            raise RegistryError(f"{name!r} is no fact that a batch's row takes.")
        setattr(row, name, value)


def _record(row: BatchRow) -> BatchRecord:
    return record_of(BatchRecord, row, errors=convert(row.errors or (), tuple[BatchError, ...]))
