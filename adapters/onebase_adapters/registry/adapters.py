"""Names of adapters, their versions and active versions, in a database that several servers may share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.orm import Session, joinedload, selectinload, undefer

from onebase_adapters.registry import activation, audit, gates, rollouts
from onebase_adapters.registry.batches import BatchRecords
from onebase_adapters.registry.database import Database, plain, referenced_blobs
from onebase_adapters.registry.errors import (
    GateError,
    RegistryError,
    UnknownAdapterError,
    UnknownVersionError,
)
from onebase_adapters.registry.jobs import TrainingRecords, check_owner
from onebase_adapters.registry.keys import ApiKeys
from onebase_adapters.registry.live import LiveRecords
from onebase_adapters.registry.proofs import ProofRecords
from onebase_adapters.registry.quotas import Tenants, check_adapters, check_bytes
from onebase_adapters.registry.records import (
    MODULES,
    STATES,
    UNFINISHED,
    UNSET,
    Action,
    AdapterRecord,
    AuditAction,
    Changes,
    ForcedDeletion,
    RolloutFigures,
    RolloutRecord,
    RolloutState,
    State,
    Unset,
    VersionRecord,
    record_of,
)
from onebase_adapters.registry.request_log import RequestLogRecords
from onebase_adapters.registry.servers import ServerRecords
from onebase_adapters.registry.tables import AdapterRow, AuditRow, BaseRow, HistoryRow, ProofRow, VersionRow
from onebase_adapters.registry.takeovers import Takeovers
from onebase_adapters.registry.usage import UsageRecords
from onebase_adapters.store.blobs import AdapterFiles, Blob
from onebase_protocol.adapters import Activation, SliceScore, VersionFailure, VersionGates

DEFAULT_TENANT = "default"
LEAST_PREFIX = 8
"""Smallest number of hexadecimal digits of a shortened digest."""
_NAME_LIMIT = 512
_MOST_DIGESTS = 16
"""Largest number of digests of a deleted adapter that its entry in the audit log names."""
_ARRIVALS: Mapping[str, AuditAction] = {
    "upload": "adapter.uploaded",
    "hub": "adapter.pulled",
    "folder": "adapter.loaded",
    "training": "adapter.trained",
    "live": "adapter.trained",
    "merge": "adapter.merged",
}
"""Actions in the audit log, by the kind of a version's source."""
SIGNATURE = "signature"
"""Key of a version's source that holds its SignatureReport and, as `bundle`, the signature itself."""
_ARRIVAL_FACTS = ("repo", "commit", "subfolder", "job", "method", "parents")
"""Fields of a version's source that its entry in the audit log holds."""
_DELETIONS: tuple[AuditAction, ...] = ("adapter.version_deleted", "adapter.deleted")
_PREFIX = re.compile(r"[0-9a-f]+")


class Registry:
    """Registry of the adapters of one base. All methods block and may be called from any thread.

    Each write is one transaction; when it has returned, it outlives `kill -9` and a power cut. Writes wait
    for each other, also those of other servers, so that of two activations with the same `expected` one
    fails.

    Args:
        url: `sqlite:///path` or `postgresql://user:password@host/database`.
        base_id: the base's identity; adapters of other bases on the same registry are not visible.
        base_name: the base's name for people.

    All methods raise RegistryBusyError when the database cannot be reached, the writing ones
    RegistryFullError when it has no space. No error holds the URL's password.
    """

    def __init__(self, url: str, *, base_id: str, base_name: str) -> None:
        self._database = Database(url)
        self.base_id = base_id
        self.base_name = base_name
        self.training = TrainingRecords(self._database, base_id)
        """Files and training jobs, in the same database."""
        self.takeovers = Takeovers(self._database, base_id)
        """Jobs that move to another server."""
        self.batches = BatchRecords(self._database, base_id)
        self.live = LiveRecords(self._database, base_id)
        """Sessions, samplers and promised samples of live training."""
        self.proofs = ProofRecords(self._database, base_id)
        """Claims of servers to prove versions, and proofs by kernels."""
        self.keys = ApiKeys(self._database)
        """API keys, for every base."""
        self.tenants = Tenants(self._database)
        """Tenants, their quotas and what they store, on every base."""
        self.usage = UsageRecords(self._database)
        """Usage by tenant, day, base and adapter, of every base."""
        self.servers = ServerRecords(self._database, base_id)
        """Leases of servers and the use of quotas that they admitted, of every base."""
        self.rollouts = rollouts.Rollouts(self._database, base_id)
        """Figures of rollouts, and the answers that feedback may be about."""
        self.gates = gates.Gates(self._database)
        """Rules of what a version has to pass before it answers, for every base."""
        self.request_log = RequestLogRecords(self._database)
        """Keys of the request logs' hashes, and what was erased from them, of every base."""
        self.audit = audit.AuditLog(self._database)
        """Audit log of every base."""

    def sign(self, server: str) -> None:
        """Write later entries of the audit log with this server's id."""
        self._database.server = server

    def close(self) -> None:
        """Close the connections; the registry cannot be used any more."""
        self._database.close()

    def migrate(self) -> None:
        """Create or update the tables, before any other call; safe while other servers start too."""
        self._database.migrate()
        name = plain(self.base_name)
        with self._database.read() as session:
            known = session.scalar(select(BaseRow.name).where(BaseRow.id == self.base_id))
        if known != name:
            with self._database.write() as (session, _):
                session.merge(BaseRow(id=self.base_id, name=name))

    # ---- what can be asked: each answer is of one moment -------------------------------------

    def change_counter(self) -> int:
        """Return a number that every write of any server increases; it is cheap to read."""
        return self._database.counter()

    def notify_changes(self, changed: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `changed` soon after each counted write of any server; see `Database.notify_changes`."""
        return self._database.notify_changes(changed)

    def snapshot(self, tenant: str | None = None) -> list[AdapterRecord]:
        """Return all adapters of this base by name, of one tenant or of all; reports lack their modules."""
        with self._database.read() as session:
            return [_adapter_record(row) for row in _find_adapters(session, _scope(self.base_id, tenant))]

    def changes(self, since: int = -1, audited: int | None = None) -> Changes:
        """Return the changes since the counter was `since`; cheap even with thousands of adapters.

        audited: `Changes.audited` of the call before, to get forced deletions since then; None: get none.
        """
        with self._database.read() as session:
            counter = self._database.counter(session)
            here = _scope(self.base_id)
            changed = _find_adapters(session, [*here, AdapterRow.changed > since])
            names = session.execute(select(AdapterRow.tenant, AdapterRow.name).where(*here))
            return Changes(
                counter,
                tuple(map(_adapter_record, changed)),
                frozenset((tenant, name) for tenant, name in names),
                session.scalar(select(func.max(AuditRow.number))) or 0,
                () if audited is None else _forced_since(session, self.base_id, audited),
            )

    def adapter(self, tenant: str, name: str) -> AdapterRecord:
        """Return one adapter; reports lack their modules. Raises UnknownAdapterError."""
        with self._database.read() as session:
            return _adapter_record(_require_adapter(session, self.base_id, tenant, name))

    def versions(self, tenant: str, name: str) -> list[VersionRecord]:
        """Return an adapter's versions, newest first, with whole reports. Raises UnknownAdapterError."""
        with self._database.read() as session:
            adapter = _require_adapter(session, self.base_id, tenant, name)
            rows = session.scalars(
                select(VersionRow)
                .options(undefer(VersionRow.modules))
                .where(VersionRow.adapter_id == adapter.id)
                .order_by(VersionRow.id.desc())
            )
            return [_version_record(row, adapter) for row in rows]

    def version(self, tenant: str, name: str, digest_or_prefix: str) -> VersionRecord:
        """Return one version by its digest, or by at least the first 8 digits of it.

        Raises UnknownAdapterError; UnknownVersionError, also if several digests begin like that.
        """
        with self._database.read() as session:
            adapter = _require_adapter(session, self.base_id, tenant, name)
            return _version_record(_require_version(session, adapter, digest_or_prefix), adapter)

    def history(self, tenant: str, name: str) -> list[Activation]:
        """Return the changes of the active version, newest first. Raises UnknownAdapterError."""
        with self._database.read() as session:
            adapter = _require_adapter(session, self.base_id, tenant, name)
            rows = session.scalars(
                select(HistoryRow).where(HistoryRow.adapter_id == adapter.id).order_by(HistoryRow.id.desc())
            )
            return [_history_entry(row) for row in rows]

    def unfinished(self) -> list[VersionRecord]:
        """Return the versions that are neither ready nor failed, oldest first; a restart resumes them."""
        with self._database.read() as session:
            rows = session.scalars(
                select(VersionRow)
                .options(joinedload(VersionRow.adapter), undefer(VersionRow.modules))
                .join(VersionRow.adapter)
                .where(*_scope(self.base_id), VersionRow.state.in_(UNFINISHED))
                .order_by(VersionRow.id)
            )
            return [_version_record(row, row.adapter) for row in rows]

    def referenced_blobs(self) -> set[str]:
        """Return the SHA-256 sums of all blobs that versions and files need, of any tenant on any base."""
        with self._database.read() as session:
            return referenced_blobs(session)

    # ---- what can be changed -----------------------------------------------------------------

    def add_version(
        self,
        name: str,
        digest: str,
        files: AdapterFiles,
        source: Mapping[str, Any],
        *,
        tenant: str = DEFAULT_TENANT,
        actor: str = "",
        state: State = "validating",
        activates: bool = False,
        if_due: bool = False,
    ) -> tuple[VersionRecord, bool]:
        """Register content under a name; the adapter is made with its first version.

        activates: whether an unfinished version is to become active once it is ready; see `activate`.
        if_due: leave that as it is for a version that is unfinished already: it may have been called off.

        The same content under the same name is the same version, in whatever state it is: it is returned with
        False. Only a failed one starts again in `state`, with the new source, and is returned with True. The
        files' blobs must already be in the store. Raises RegistryError for a name that cannot be stored, and
        QuotaError.
        """
        _check_name(name)
        now = time.time()
        with self._database.write() as (session, counter):
            check_owner(session)
            adapter = _find_adapter(session, self.base_id, tenant, name)
            if adapter is None:
                check_adapters(session, tenant)
                adapter = _new_adapter(self.base_id, tenant, name, now)
                session.add(adapter)
            version = session.scalar(
                select(VersionRow).where(VersionRow.adapter_id == adapter.id, VersionRow.digest == digest)
            )
            created = version is None or version.state == "failed"
            if version is None:
                check_bytes(session, tenant, files.config.size + files.weights.size)
                version = _new_version(digest, files, source, actor, now)
                adapter.versions.insert(0, version)
            elif created:
                version.source, version.created_by = dict(source), plain(actor)
                gates.forget(session, version)
            elif _store_signature(session, adapter, version, source.get(SIGNATURE), actor):
                adapter.changed, adapter.updated_at = counter, now
            if created:
                _set_state(version, state, now)
                version.activates = False
            if activates and version.state in UNFINISHED and (created or not if_due):
                version.activates, adapter.changed = True, counter
            if created:
                adapter.changed, adapter.updated_at = counter, now
                session.flush()
            gates.note_maker(session, version)
            if created:
                _note_arrival(session, adapter, version, source, actor)
            return _version_record(version, adapter), created

    def sign_version(
        self, tenant: str, name: str, digest: str, signature: Mapping[str, Any]
    ) -> VersionRecord:
        """Store the signature of a ready version, unless a verified one is there.

        Raises UnknownAdapterError; UnknownVersionError, also if the version is not ready.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            version = _require_version(session, adapter, digest)
            if version.state != "ready":
                raise UnknownVersionError(
                    f"Version {digest[:12]} of {name!r} is {version.state}: only a ready one is signed."
                )
            _store_signature(session, adapter, version, signature)
            return _version_record(version, adapter)

    def version_gates(
        self, tenant: str, name: str, digest: str, askers: Collection[str] = ()
    ) -> VersionGates:
        """Return the gates of a version, for the caller and the keys that ask for its activation besides.

        Raises UnknownAdapterError, UnknownVersionError.
        """
        with self._database.read() as session:
            adapter = _require_adapter(session, self.base_id, tenant, name)
            return gates.view(session, adapter, _require_version(session, adapter, digest), askers)

    def approve(self, tenant: str, name: str, digest: str, *, approved: bool = True) -> VersionGates:
        """Record that the caller's key approves a version, or not any more.

        Raises ApprovalError, UnknownAdapterError, UnknownVersionError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            version = _require_version(session, adapter, digest)
            if approved:
                gates.approve(session, adapter, version, now)
            else:
                gates.disapprove(session, adapter, version)
            return gates.view(session, adapter, version)

    def evaluate(
        self,
        tenant: str,
        name: str,
        digest: str,
        against: str | None,
        metric: str,
        slices: Sequence[SliceScore],
        *,
        job: str | None = None,
        data: str | None = None,
    ) -> VersionGates:
        """Record an evaluation of a version beside another one of the same name (None: beside the base).

        job: the job of this server that measured it. data: SHA-256 (hex) of the file with the held-out rows.

        Raises ApprovalError (the caller made the version, or may not evaluate it), UnknownAdapterError,
        UnknownVersionError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            version = _require_version(session, adapter, digest)
            other = against
            if against is not None and job is None:
                other = _require_version(session, adapter, against).digest
            gates.evaluate(session, adapter, version, other, metric, slices, now, job=job, data=data)
            return gates.view(session, adapter, version)

    def note_closed_gate(
        self, tenant: str, name: str, digest: str | None, details: Mapping[str, Any], *, actor: str = ""
    ) -> None:
        """Record that gates refused to let a version answer."""
        with self._database.write() as (session, _):
            audit.note(
                session,
                "gate.refused",
                tenant,
                name,
                version=digest,
                base_id=self.base_id,
                actor=actor,
                details=details,
            )

    def note_refusal(self, tenant: str, name: str, details: Mapping[str, Any], *, actor: str = "") -> None:
        """Record that an adapter's files were refused because of their signature."""
        with self._database.write() as (session, _):
            audit.note(
                session,
                "adapter.refused",
                tenant,
                name,
                base_id=self.base_id,
                actor=actor,
                details=details,
            )

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
        """Set a version's state, with `error` (code, message) for `failed`, `report` and `prepared` for
        `ready`.

        A ready version does not change, whatever a slower server reports; look at what is returned.
        Raises UnknownAdapterError, UnknownVersionError: it was deleted meanwhile.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            version = _require_version(session, adapter, digest)
            if version.state != "ready":
                _set_state(version, state, now, error=error, report=report, prepared=prepared)
                if state not in UNFINISHED:
                    _end_claims(session, version, report if state == "ready" else None)
            return _version_record(version, adapter)

    def reopen(
        self, tenant: str, name: str, digest: str, *, seen: VersionRecord | None = None
    ) -> VersionRecord:
        """Set a ready version to `validating`, because its prepared file is lost or of an older kind.

        It stays active if it is. `seen`: the version whose file that is. If the version has been proved again
        since, it has another file and stays `ready`, so look at what is returned.

        Raises UnknownAdapterError, UnknownVersionError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            version = _require_version(session, adapter, digest)
            # Not by the file's hash alone: the same version is prepared as the same bytes each time.
            if seen is None or version.finished_at == seen.finished_at:
                _set_state(version, "validating", now)
                version.proofs.clear()
            return _version_record(version, adapter)

    def activate(
        self,
        tenant: str,
        name: str,
        digest: str,
        *,
        expected: str | Unset | None = UNSET,
        if_due: bool = False,
        actor: str = "",
    ) -> AdapterRecord:
        """Make a ready version (by digest or prefix) the one that requests by name use.

        Args:
            expected: the digest that must be active now, None for none; if not given, any may be.
            if_due: change nothing unless the version is still to become active as its upload asked: several
                servers may wait for its proof, and nobody's later choice may be undone by the slowest.

        A version that gates refuse does not become active by itself later, whatever its upload asked.

        Raises NotReadyError, GateError, ActivationConflictError, UnknownAdapterError, UnknownVersionError;
        JobStateError on behalf of a job that was stopped."""
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            check_owner(session, running=True)
            activation.check_expected(adapter, expected)
            version = _require_version(session, adapter, digest)
            try:
                if version.activates or not if_due:
                    activation.activate(session, adapter, version, actor, now)
                return _adapter_record(adapter)
            except GateError as error:  # nothing was written yet: gates are checked first
                if not version.activates:
                    raise
                version.activates, refused = False, error
        raise refused

    def cancel_activation(self, tenant: str, name: str, digest: str) -> None:
        """Keep a ready version from becoming active by itself, as its upload asked. Raises
        UnknownAdapterError, UnknownVersionError."""
        with self._changing(tenant, name, time.time()) as (session, adapter):
            version = _require_version(session, adapter, digest)
            if version.state == "ready":
                version.activates = False

    def rollback(
        self, tenant: str, name: str, *, expected: str | Unset | None = UNSET, actor: str = ""
    ) -> AdapterRecord:
        """Activate the version that was active before the current one; called again, the one before that.

        Deleted versions are skipped. After `deactivate` it is the version that was active until then.
        Raises NothingToRollBackError, ActivationConflictError, UnknownAdapterError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            activation.check_expected(adapter, expected)
            activation.roll_back(session, adapter, actor, now)
            return _adapter_record(adapter)

    def deactivate(
        self, tenant: str, name: str, *, expected: str | Unset | None = UNSET, actor: str = ""
    ) -> AdapterRecord:
        """Make no version active, and keep those that are not ready yet from becoming active by themselves.

        Raises ActivationConflictError, UnknownAdapterError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            activation.check_expected(adapter, expected)
            activation.deactivate(session, adapter, actor, now)
            return _adapter_record(adapter)

    def start_rollout(self, rollout: RolloutRecord) -> RolloutRecord:
        """Start a rollout of a ready version beside the one that is active.

        The record's `baseline` is the digest that must be active. Raises RolloutStateError (one runs, or the
        versions do not fit), NotReadyError, StaleActivationError, UnknownAdapterError, UnknownVersionError.
        """
        now = time.time()
        with self._changing(rollout.tenant, rollout.name, now) as (session, adapter):
            activation.check_expected(adapter, rollout.baseline)
            candidate = _require_version(session, adapter, rollout.candidate)
            return rollouts.start(session, adapter, candidate, rollout, now)

    def change_rollout(
        self, tenant: str, name: str, *, percent: float | None = None, shadow: float | None = None
    ) -> RolloutRecord:
        """Change the shares of the rollout that runs. Raises RolloutStateError, UnknownAdapterError."""
        with self._changing(tenant, name, time.time()) as (session, adapter):
            return rollouts.change(session, adapter, percent, shadow)

    def end_rollout(
        self,
        tenant: str,
        name: str,
        state: RolloutState,
        reason: str,
        *,
        rollout: str | None = None,
        figures: RolloutFigures | None = None,
        facts: Mapping[str, Any] | None = None,
        actor: str = "",
    ) -> RolloutRecord:
        """End the rollout that runs; `promoted` activates its candidate in the same transaction.

        Args:
            rollout: the id of the one that must be running; None: any.
            figures: those that led to it, for the audit log; None: those of now. facts: more for it.

        Raises RolloutStateError (none runs, or another), NotReadyError, UnknownAdapterError,
        UnknownVersionError."""
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            row = rollouts.running(session, adapter, rollout)
            ended = rollouts.end(
                session, adapter, row, state, reason, now, figures=figures, facts=facts, actor=actor
            )
            if state == "promoted":
                candidate = _require_version(session, adapter, row.candidate)
                activation.activate(session, adapter, candidate, actor, now, (row.created_by,))
            return ended

    def pin(self, tenant: str, name: str, pinned: bool) -> AdapterRecord:
        """Set whether the active version stays in memory. Raises UnknownAdapterError."""
        with self._changing(tenant, name, time.time()) as (session, adapter):
            if adapter.pinned != pinned:
                adapter.pinned = pinned
                _note(session, "adapter.pinned" if pinned else "adapter.unpinned", adapter)
            return _adapter_record(adapter)

    def share(self, tenant: str, name: str, shared: bool) -> AdapterRecord:
        """Set whether all tenants may use and see the adapter. Raises UnknownAdapterError."""
        with self._changing(tenant, name, time.time()) as (session, adapter):
            if adapter.shared != shared:
                adapter.shared = shared
                _note(session, "adapter.shared" if shared else "adapter.unshared", adapter)
            return _adapter_record(adapter)

    def delete_version(
        self, tenant: str, name: str, digest: str, *, forced: bool = False, actor: str = ""
    ) -> set[str]:
        """Delete a version (by digest or prefix), deactivating it if it is active.

        The last version's adapter is deleted with it. Returns the blobs that nothing references any more.
        forced: every server that follows the changes must end the requests that use the version.

        Raises UnknownAdapterError, UnknownVersionError.
        """
        now = time.time()
        with self._changing(tenant, name, now) as (session, adapter):
            version = _require_version(session, adapter, digest)
            rollouts.version_deleted(session, adapter, version.digest, actor, now)
            if version.digest == adapter.active:
                activation.end_active(session, adapter, actor, now)
            blobs = _blobs_of(version)
            last = len(adapter.versions) == 1
            details = {"forced": True} if forced else None
            _note(
                session,
                "adapter.version_deleted",
                adapter,
                version=version.digest,
                actor=actor,
                details=details,
            )
            if last:
                _note_deleted(session, adapter, actor)
            session.delete(adapter if last else version)
            session.flush()
            return blobs - referenced_blobs(session, blobs)

    def delete_adapter(self, tenant: str, name: str, *, forced: bool = False) -> set[str]:
        """Delete a name, its versions and its history. Returns the blobs that nothing references any more.

        forced: as in `delete_version`, for all versions.

        Raises UnknownAdapterError.
        """
        with self._changing(tenant, name, time.time()) as (session, adapter):
            blobs = set().union(*map(_blobs_of, adapter.versions))
            _note_deleted(session, adapter, forced=forced)
            session.delete(adapter)
            session.flush()
            return blobs - referenced_blobs(session, blobs)

    @contextmanager
    def _changing(self, tenant: str, name: str, now: float) -> Iterator[tuple[Session, AdapterRow]]:
        """Yield a write transaction on one adapter and mark the adapter as changed. Raises
        UnknownAdapterError."""
        with self._database.write() as (session, counter):
            adapter = _require_adapter(session, self.base_id, tenant, name)
            adapter.changed = counter
            adapter.updated_at = now
            yield session, adapter
            session.flush()


# The audit log


def _note(session: Session, action: AuditAction, adapter: AdapterRow, **what: Any) -> None:
    audit.note(session, action, adapter.tenant, adapter.name, base_id=adapter.base_id, **what)


def _note_arrival(
    session: Session, adapter: AdapterRow, version: VersionRow, source: Mapping[str, Any], actor: str
) -> None:
    details = {name: source[name] for name in _ARRIVAL_FACTS if source.get(name)}
    details["bytes"] = version.config_size + version.weights_size
    if SIGNATURE in source:
        details[SIGNATURE] = _without_bundle(source[SIGNATURE])
    action = _ARRIVALS.get(str(source.get("kind")), "adapter.uploaded")
    _note(session, action, adapter, version=version.digest, actor=actor, details=details)


def _store_signature(
    session: Session,
    adapter: AdapterRow,
    version: VersionRow,
    signature: Mapping[str, Any] | None,
    actor: str = "",
) -> bool:
    """Store the signature of a version that is there already. Return False if the known one is as good."""
    if not signature or not _is_better(signature, version.source.get(SIGNATURE)):
        return False
    version.source = {**version.source, SIGNATURE: dict(signature)}
    session.flush()
    facts = {SIGNATURE: _without_bundle(signature)}
    _note(session, "adapter.signed", adapter, version=version.digest, actor=actor, details=facts)
    return True


def _without_bundle(signature: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in signature.items() if key not in ("bundle", "statement")}


def _is_better(signature: Mapping[str, Any] | None, known: Mapping[str, Any] | None) -> bool:
    """Return True if a signature takes the place of the known one: none that is verified is lost."""
    if not signature or signature == known:
        return False
    return signature.get("status") == "verified" or not known or known.get("status") != "verified"


def _note_deleted(session: Session, adapter: AdapterRow, actor: str = "", *, forced: bool = False) -> None:
    digests = [version.digest for version in adapter.versions]
    details = {"count": len(digests), "versions": digests[:_MOST_DIGESTS], "active": adapter.active}
    details |= {"forced": True} if forced else {}
    _note(session, "adapter.deleted", adapter, actor=actor, details=details)


def _forced_since(session: Session, base_id: str, number: int) -> tuple[ForcedDeletion, ...]:
    """Return the forced deletions after this entry of the audit log."""
    rows = session.scalars(
        select(AuditRow).where(
            AuditRow.number > number, AuditRow.base_id == base_id, AuditRow.action.in_(_DELETIONS)
        )
    )
    return tuple(
        ForcedDeletion(row.tenant, row.target, row.version)
        for row in rows
        if (row.details or {}).get("forced")
    )


# Looking rows up, within one tenant and one base


def _scope(base_id: str, tenant: str | None = None) -> list[ColumnElement[bool]]:
    """Return the conditions for adapters of one base, of one tenant or of all."""
    conditions = [AdapterRow.base_id == base_id]
    if tenant is not None:
        conditions.append(AdapterRow.tenant == tenant)
    return conditions


def _find_adapters(session: Session, conditions: Collection[ColumnElement[bool]]) -> list[AdapterRow]:
    """Return adapters with their versions, by name."""
    rows = session.scalars(
        select(AdapterRow)
        .options(selectinload(AdapterRow.versions))
        .where(*conditions)
        .order_by(AdapterRow.name, AdapterRow.tenant)
    )
    return list(rows)


def _find_adapter(session: Session, base_id: str, tenant: str, name: str) -> AdapterRow | None:
    """Return the adapter with its versions, or None."""
    if (plain(tenant), plain(name)) != (tenant, name):
        return None  # A database would refuse even to look for such a name.
    rows = _find_adapters(session, [*_scope(base_id, tenant), AdapterRow.name == name])
    return rows[0] if rows else None


def _require_adapter(session: Session, base_id: str, tenant: str, name: str) -> AdapterRow:
    """Return the adapter with its versions. Raises UnknownAdapterError."""
    adapter = _find_adapter(session, base_id, tenant, name)
    if adapter is None:
        raise UnknownAdapterError(f"There is no adapter {name[:80]!r} on this base.")
    return adapter


def _require_version(session: Session, adapter: AdapterRow, digest: str) -> VersionRow:
    """Return the version of a digest or of the beginning of one, with its whole report.

    Raises UnknownVersionError, also if several digests begin like that.
    """
    whole = select(VersionRow).options(undefer(VersionRow.modules)).where(VersionRow.adapter_id == adapter.id)
    if _PREFIX.fullmatch(digest) is None or len(digest) < LEAST_PREFIX:
        raise UnknownVersionError(
            f"{digest[:80]!r} names no version of {adapter.name!r}: give its digest, or at least the first "
            f"{LEAST_PREFIX} of its hexadecimal digits."
        )
    found = session.scalars(whole.where(VersionRow.digest.startswith(digest)).limit(2)).all()
    if len(found) > 1:
        raise UnknownVersionError(
            f"Several versions of {adapter.name!r} begin with {digest}: give more digits."
        )
    if not found:
        raise UnknownVersionError(f"{adapter.name!r} has no version {digest[:80]}.")
    return found[0]


def _blobs_of(version: VersionRow) -> set[str]:
    """Return the SHA-256 sums of the blobs that a version needs."""
    packed = (version.prepared_sha256, *(proof.prepared_sha256 for proof in version.proofs))
    return {one for one in (version.config_sha256, version.weights_sha256, *packed) if one is not None}


# From records to rows and back


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
        shared=False,
        created_at=now,
        updated_at=now,
        changed=0,
        versions=[],
        rollout=None,
    )


def _new_version(
    digest: str, files: AdapterFiles, source: Mapping[str, Any], actor: str, now: float
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
        makers=[],
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
    _set_report(version, report)
    version.prepared_sha256 = prepared.sha256 if prepared else None
    version.prepared_size = prepared.size if prepared else None
    version.finished_at = None if state in UNFINISHED else now


def _end_claims(session: Session, version: VersionRow, report: Mapping[str, Any] | None) -> None:
    """End the claims to what has ended: their servers may die, or find the registry away, before they
    release them. With kernels other than those of the report a ready version may still be proved.

    A statement, since another server may release its claim at the same moment.
    """
    ended = [ProofRow.version_id == version.id, ProofRow.until.is_not(None)]
    kernels = (report or {}).get("proof", {}).get("kernels")
    if kernels is not None:
        ended.append(ProofRow.kernels == kernels)
    session.execute(delete(ProofRow).where(*ended))
    session.expire(version, ["proofs"])


def _adapter_record(row: AdapterRow) -> AdapterRecord:
    return record_of(
        AdapterRecord,
        row,
        activated_at=row.switched_at if row.active is not None else None,
        versions=tuple(_version_record(version, row, whole=False) for version in row.versions),
        rollout=None if row.rollout is None else rollouts.record(row.rollout, row),
    )


def _version_record(row: VersionRow, adapter: AdapterRow, *, whole: bool = True) -> VersionRecord:
    """Convert a row. `whole`: with the report's modules, which cost a query of their own unless
    undeferred."""
    report = row.report
    if report is not None and whole:
        report = {**report, MODULES: row.modules or []}
    prepared = None
    if row.prepared_sha256 is not None:
        prepared = Blob(row.prepared_sha256, row.prepared_size or 0)
    error = None
    if row.error_code is not None:
        error = VersionFailure(row.error_code, row.error_message or "")
    return record_of(
        VersionRecord,
        row,
        tenant=adapter.tenant,
        name=adapter.name,
        files=AdapterFiles(
            Blob(row.config_sha256, row.config_size), Blob(row.weights_sha256, row.weights_size)
        ),
        prepared=prepared,
        report=report,
        error=error,
        is_active=adapter.active == row.digest,
        proofs={
            proof.kernels: Blob(proof.prepared_sha256, proof.prepared_size or 0)
            for proof in row.proofs
            if proof.prepared_sha256 is not None
        },
    )


def _history_entry(row: HistoryRow) -> Activation:
    return Activation(cast(Action, row.action), row.version, row.previous, row.actor, row.at)


def _set_report(row: VersionRow, report: Mapping[str, Any] | None) -> None:
    if report is None:
        row.report = row.modules = None
        return
    row.report = {key: value for key, value in report.items() if key != MODULES}
    row.modules = list(report.get(MODULES, ()))
