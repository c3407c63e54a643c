"""The reading half of the registry."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import joinedload, undefer

from onebase_adapters.registry.database import Database
from onebase_adapters.registry.mapping import adapter_record, history_entry, version_record
from onebase_adapters.registry.queries import (
    find_adapters,
    referenced,
    require_adapter,
    require_version,
    scope,
)
from onebase_adapters.registry.records import (
    UNFINISHED,
    AdapterRecord,
    Changes,
    HistoryEntry,
    VersionRecord,
)
from onebase_adapters.registry.tables import AdapterRow, HistoryRow, VersionRow
from onebase_adapters.registry.training import TrainingRecords


class RegistryReader:
    """What can be asked; see Registry. Each answer is of one moment."""

    def __init__(self, url: str, *, base_id: str, base_name: str) -> None:
        self._database = Database(url)
        self.base_id = base_id
        self.base_name = base_name
        self.training = TrainingRecords(self._database, base_id)
        """Training files and jobs, in the same database."""

    def close(self) -> None:
        """Let go of the connections; the registry cannot be used any more."""
        self._database.close()

    def change_counter(self) -> int:
        """A number that every write raises, whichever server made it; cheap to ask for."""
        return self._database.counter()

    def snapshot(self, tenant: str | None = None) -> list[AdapterRecord]:
        """All adapters of this base by name, of one tenant or of all; reports without their modules."""
        with self._database.read() as session:
            return [adapter_record(row) for row in find_adapters(session, scope(self.base_id, tenant))]

    def changes(self, since: int = -1) -> Changes:
        """What is new since the counter was `since`: little work, even with thousands of adapters."""
        with self._database.read() as session:
            counter = self._database.counter(session)
            here = scope(self.base_id)
            changed = find_adapters(session, [*here, AdapterRow.changed > since])
            names = session.execute(select(AdapterRow.tenant, AdapterRow.name).where(*here))
            return Changes(
                counter,
                tuple(map(adapter_record, changed)),
                frozenset((tenant, name) for tenant, name in names),
            )

    def adapter(self, tenant: str, name: str) -> AdapterRecord:
        """One adapter; reports without their modules. Raises UnknownAdapterError."""
        with self._database.read() as session:
            return adapter_record(require_adapter(session, self.base_id, tenant, name))

    def versions(self, tenant: str, name: str) -> list[VersionRecord]:
        """Newest first, with whole reports. Raises UnknownAdapterError."""
        with self._database.read() as session:
            adapter = require_adapter(session, self.base_id, tenant, name)
            rows = session.scalars(
                select(VersionRow)
                .options(undefer(VersionRow.modules))
                .where(VersionRow.adapter_id == adapter.id)
                .order_by(VersionRow.id.desc())
            )
            return [version_record(row, adapter) for row in rows]

    def version(self, tenant: str, name: str, digest_or_prefix: str) -> VersionRecord:
        """One version by its digest or by at least its first 8 digits.

        Raises UnknownAdapterError; UnknownVersionError, also when several begin like that.
        """
        with self._database.read() as session:
            adapter = require_adapter(session, self.base_id, tenant, name)
            return version_record(require_version(session, adapter, digest_or_prefix), adapter)

    def history(self, tenant: str, name: str) -> list[HistoryEntry]:
        """What was active when, newest first. Raises UnknownAdapterError."""
        with self._database.read() as session:
            adapter = require_adapter(session, self.base_id, tenant, name)
            rows = session.scalars(
                select(HistoryRow).where(HistoryRow.adapter_id == adapter.id).order_by(HistoryRow.id.desc())
            )
            return [history_entry(row) for row in rows]

    def unfinished(self) -> list[VersionRecord]:
        """Versions that are neither ready nor failed, oldest first: what a restart has to take up again."""
        with self._database.read() as session:
            rows = session.scalars(
                select(VersionRow)
                .options(joinedload(VersionRow.adapter), undefer(VersionRow.modules))
                .join(VersionRow.adapter)
                .where(*scope(self.base_id), VersionRow.state.in_(UNFINISHED))
                .order_by(VersionRow.id)
            )
            return [version_record(row, row.adapter) for row in rows]

    def referenced_blobs(self) -> set[str]:
        """The SHA-256 sums of all blobs that any version of any tenant on any base needs."""
        with self._database.read() as session:
            return referenced(session)
