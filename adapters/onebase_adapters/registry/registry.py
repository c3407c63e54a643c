"""Names, versions and which of them is active, in a database that several servers may share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from onebase_adapters.registry import activation
from onebase_adapters.registry.errors import RegistryError
from onebase_adapters.registry.mapping import adapter_record, plain, set_report, version_record
from onebase_adapters.registry.queries import (
    blobs_of,
    find_adapter,
    referenced,
    require_adapter,
    require_version,
)
from onebase_adapters.registry.reader import RegistryReader
from onebase_adapters.registry.records import (
    STATES,
    UNFINISHED,
    UNSET,
    AdapterRecord,
    State,
    Unset,
    VersionRecord,
)
from onebase_adapters.registry.tables import AdapterRow, BaseRow, VersionRow
from onebase_adapters.store.content import Blob, VersionFiles

DEFAULT_TENANT = "default"
_NAME_LIMIT = 512


class Registry(RegistryReader):
    """What adapters there are on one base. All methods block and may be called from any thread.

    Each write is one transaction; when it has returned, it outlives `kill -9` and a power cut. Writes wait
    for each other, also those of other servers, so that of two activations with the same `expected` one
    fails.

    Args:
        url: `sqlite:///path` or `postgresql://user:password@host/database`.
        base_id: the base's identity; adapters of other bases on the same registry are not seen.
        base_name: what people call it.

    All methods raise RegistryBusyError when the database cannot be reached, the writing ones
    RegistryFullError when it has no space. No error holds the URL's password.
    """

    def migrate(self) -> None:
        """Create or update the tables; safe while other servers start too. Call it before anything else."""
        self._database.migrate()
        name = plain(self.base_name)
        with self._database.read() as session:
            known = session.scalar(select(BaseRow.name).where(BaseRow.id == self.base_id))
        if known != name:
            with self._database.write() as (session, _):
                session.merge(BaseRow(id=self.base_id, name=name))

    def add_version(
        self,
        name: str,
        digest: str,
        files: VersionFiles,
        source: Mapping[str, Any],
        *,
        tenant: str = DEFAULT_TENANT,
        actor: str = "",
        state: State = "validating",
    ) -> tuple[VersionRecord, bool]:
        """Register content under a name; the adapter is made with its first version.

        The same content under the same name is the same version, in whatever state it is: it is returned with
        False. Only a failed one begins again in `state`, and is returned with True. The files' blobs must be
        in the store by now. Raises RegistryError for a name that cannot be stored.
        """
        _check_name(name)
        now = time.time()
        with self._database.write() as (session, counter):
            adapter = find_adapter(session, self.base_id, tenant, name)
            if adapter is None:
                adapter = _new_adapter(self.base_id, tenant, name, now)
                session.add(adapter)
            version = session.scalar(
                select(VersionRow).where(VersionRow.adapter_id == adapter.id, VersionRow.digest == digest)
            )
            created = version is None or version.state == "failed"
            if version is None:
                version = _new_version(digest, files, source, actor, now)
                adapter.versions.insert(0, version)
            if created:
                _set_state(version, state, now)
                adapter.changed, adapter.updated_at = counter, now
                session.flush()
            return version_record(version, adapter), created

    def set_state(
        self,
        tenant: str,
        name: str,
        digest: str,
        state: State,
        *,
        error: tuple[str, str] | None = None,
        report: Mapping[str, Any] | None = None,
        prepared: Blob | None = None,
    ) -> VersionRecord:
        """Say how far a version has come: `error` (code, message) with `failed`, `report` and `prepared` with
        `ready`. A ready version stays as it is, whatever a slower server says; look at what is returned.

        Raises UnknownAdapterError, UnknownVersionError: it was deleted meanwhile.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            version = require_version(session, adapter, digest)
            if version.state != "ready":
                _set_state(version, state, now, error=error, report=report, prepared=prepared)
            return version_record(version, adapter)

    def reopen(
        self, tenant: str, name: str, digest: str, *, seen: VersionRecord | None = None
    ) -> VersionRecord:
        """Prove a ready version once more (its prepared file is lost or of an older kind): `validating`.

        It stays active if it is. `seen`: the version whose file that is; one that has been proved again since
        has another file and stays `ready`, so look at what is returned.

        Raises UnknownAdapterError, UnknownVersionError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            version = require_version(session, adapter, digest)
            # Not by the file's hash alone: the same version is prepared as the same bytes each time.
            if seen is None or version.finished_at == seen.finished_at:
                _set_state(version, "validating", now)
            return version_record(version, adapter)

    def activate(
        self,
        tenant: str,
        name: str,
        digest: str,
        *,
        expected: str | Unset | None = UNSET,
        actor: str = "",
    ) -> AdapterRecord:
        """Make a ready version (by digest or prefix) the one that requests by name get.

        Args:
            expected: the digest that must be active now, None for none; not given: whatever is.

        Raises NotReadyError, StaleActivationError, UnknownAdapterError, UnknownVersionError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            activation.check_expected(adapter, expected)
            activation.activate(session, adapter, require_version(session, adapter, digest), actor, now)
            return adapter_record(adapter)

    def rollback(
        self, tenant: str, name: str, *, expected: str | Unset | None = UNSET, actor: str = ""
    ) -> AdapterRecord:
        """Activate the version that was active before the current one was activated; once more: the one
        before that. Deleted ones are passed over; after `deactivate` it is the one active until then.

        Raises NothingToRollBackError, StaleActivationError, UnknownAdapterError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            activation.check_expected(adapter, expected)
            activation.roll_back(session, adapter, actor, now)
            return adapter_record(adapter)

    def deactivate(
        self, tenant: str, name: str, *, expected: str | Unset | None = UNSET, actor: str = ""
    ) -> AdapterRecord:
        """No version is active from now on. Raises StaleActivationError, UnknownAdapterError."""
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            activation.check_expected(adapter, expected)
            activation.deactivate(session, adapter, actor, now)
            return adapter_record(adapter)

    def pin(self, tenant: str, name: str, pinned: bool) -> AdapterRecord:
        """Whether the active version is to stay in memory. Raises UnknownAdapterError."""
        with self._changing(tenant, name, time.time()) as (_, adapter):
            adapter.pinned = pinned
            return adapter_record(adapter)

    def delete_version(self, tenant: str, name: str, digest: str, *, actor: str = "") -> set[str]:
        """Delete a version (by digest or prefix), deactivating it if it is active; with the last one its
        adapter goes too. Returns the blobs that nothing references any more.

        Raises UnknownAdapterError, UnknownVersionError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            version = require_version(session, adapter, digest)
            if version.digest == adapter.active:
                activation.deactivate(session, adapter, actor, now)
            blobs = blobs_of(version)
            last = len(adapter.versions) == 1
            session.flush()
            session.delete(adapter if last else version)
            session.flush()
            return blobs - referenced(session, blobs)

    def delete_adapter(self, tenant: str, name: str) -> set[str]:
        """Delete a name, its versions and its history. Returns the blobs that nothing references any more.

        Raises UnknownAdapterError.
        """
        with self._changing(tenant, name, time.time()) as (session, adapter):
            blobs = set().union(*map(blobs_of, adapter.versions))
            session.delete(adapter)
            session.flush()
            return blobs - referenced(session, blobs)

    @contextmanager
    def _changing(self, tenant: str, name: str, now: float) -> Iterator[tuple[Session, AdapterRow]]:
        """A write transaction on one adapter, which is marked as changed. Raises UnknownAdapterError."""
        with self._database.write() as (session, counter):
            adapter = require_adapter(session, self.base_id, tenant, name)
            adapter.changed = counter
            adapter.updated_at = now
            yield session, adapter
            session.flush()


def _check_name(name: str) -> None:
    if not 0 < len(name) <= _NAME_LIMIT or not name.isprintable():
        raise RegistryError(
            f"adapter name {name[:80]!r}: use 1 to {_NAME_LIMIT} characters that can be printed."
        )


def _new_adapter(base_id: str, tenant: str, name: str, now: float) -> AdapterRow:
    return AdapterRow(
        base_id=base_id,
        tenant=tenant,
        name=name,
        active=None,
        pinned=False,
        created_at=now,
        updated_at=now,
        changed=0,
        versions=[],
    )


def _new_version(
    digest: str, files: VersionFiles, source: Mapping[str, Any], actor: str, now: float
) -> VersionRow:
    return VersionRow(
        digest=digest,
        config_sha256=files.config.sha256,
        config_size=files.config.size,
        weights_sha256=files.weights.sha256,
        weights_size=files.weights.size,
        source=dict(source),
        created_at=now,
        created_by=plain(actor),
    )


def _set_state(
    version: VersionRow,
    state: State,
    now: float,
    *,
    error: tuple[str, str] | None = None,
    report: Mapping[str, Any] | None = None,
    prepared: Blob | None = None,
) -> None:
    if state not in STATES:
        raise RegistryError(f"{state!r} is no state of a version: those are {', '.join(STATES)}.")
    version.state = state
    version.error_code, version.error_message = map(plain, error) if error else (None, None)
    set_report(version, report)
    version.prepared_sha256 = prepared.sha256 if prepared else None
    version.prepared_size = prepared.size if prepared else None
    version.finished_at = None if state in UNFINISHED else now
