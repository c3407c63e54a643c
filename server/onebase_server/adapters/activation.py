"""Activation, rollback, pinning, sharing and deletion of adapter versions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from onebase_adapters.registry import (
    UNSET,
    AdapterRecord,
    Registry,
    RolloutRecord,
    RolloutState,
    Unset,
    VersionRecord,
)
from onebase_adapters.store.store import Store
from onebase_edge.background import Threads
from onebase_edge.errors import (
    ActivationConflictError,
    ApiError,
    GateClosedError,
    InvalidRequestError,
    StateConflictError,
)
from onebase_protocol import adapters as wire
from onebase_server.adapters.catalog import Catalog, VersionRef, VisibleAdapters, not_ready
from onebase_server.adapters.residency import Residency
from onebase_server.storage.calls import RegistryThreads, delete_blobs, storage_errors
from onebase_server.tenancy.quotas import Window

WARM_SECONDS = 5.0
"""Longest time, in seconds, that a rollback or a pin waits for the version to be loaded."""
MOST_REFUSALS = 30
"""Largest number of refusals of one kind and one tenant that the audit log takes within 60 seconds."""
PREFETCHES = 4
"""Largest number of concurrent prefetches of versions that have become active."""

_log = logging.getLogger(__name__)


class RefusalLimit:
    """Limit of the refusals that the audit log takes, by tenant, so that nobody can fill the disk."""

    def __init__(self) -> None:
        self._windows: dict[str, Window] = {}

    def take(self, tenant: str) -> bool:
        """Count one more refusal. Return False if the tenant has had MOST_REFUSALS in 60 seconds."""
        now = time.monotonic()
        self._windows = {one: window for one, window in self._windows.items() if window.by_second(now)}
        window = self._windows.setdefault(tenant, Window())
        if window.total >= MOST_REFUSALS:
            return False
        window.add(1, now)
        return True


class ActivationService:
    """Activates, pins, shares and deletes versions. Called from one event loop.

    What another tenant shares may only be used and looked at: changing it raises ForbiddenError. Changes
    wait for each other, so that what one of them has checked still holds when it writes.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        catalog: Catalog,
        residency: Residency,
        records: RegistryThreads,
        disk: Threads,
    ) -> None:
        self._registry = registry
        self._store = store
        self._catalog = catalog
        self._residency = residency
        self._records = records
        self._disk = disk
        self._turn = asyncio.Lock()
        self._refusals = RefusalLimit()
        self.changes: Counter[str] = Counter()
        """Changes made by this server, by action: `activate`, `rollback`, `deactivate`."""
        self.rollouts: Counter[str] = Counter()
        """Rollouts that this server ended, by their state then."""
        self._actives: dict[tuple[str, str], str | None] | None = None
        """Active digest of each (tenant, name) at the last change of the catalog; None before the first."""
        self._prefetched: dict[tuple[str, str], AdapterRecord] = {}
        """Adapters whose newly active version is to be prefetched."""
        self._prefetching: set[asyncio.Task[None]] = set()
        catalog.subscribe(self._names_changed)

    async def activate(
        self,
        tenant: str,
        name: str,
        version: str,
        *,
        expected: str | Unset | None = UNSET,
        if_due: bool = False,
        actor: str = "",
    ) -> AdapterRecord:
        """Load the version, then let the name point at it; requests see either the old one or the new one.

        if_due: see Registry.activate.

        Raises AdapterNotFoundError, StateConflictError (not ready), ActivationConflictError, GateClosedError,
        InvalidRequestError (no room for it in memory), UnavailableError."""
        names = await self._look(tenant, name)
        found = names.version(name, version, param="version")
        if found.state != "ready":
            raise not_ready(found, "version")
        record = names.adapter(name, param="name")
        if not isinstance(expected, Unset) and expected != record.active:
            raise ActivationConflictError(name, record.active)
        async with (
            self._noting_gates(tenant, name, found.digest, "activate", actor),
            self._residency.lease([VersionRef.of(found)]),
            self._turn,
        ):
            with storage_errors(name):
                await self._records.write(
                    self._registry.activate,
                    tenant,
                    name,
                    found.digest,
                    expected=expected,
                    if_due=if_due,
                    actor=actor,
                )
        self.changes["activate"] += 1
        return self._catalog.of(tenant).adapter(name, param="name")

    async def start_rollout(self, rollout: RolloutRecord) -> RolloutRecord:
        """Load the candidate, then let it answer its share of the requests. `rollout`: what is wanted.

        Raises what `activate` raises, and StateConflictError if the two versions cannot be compared."""
        names = await self._look(rollout.tenant, rollout.name)
        candidate = names.version(rollout.name, rollout.candidate, param="version")
        if candidate.state != "ready":
            raise not_ready(candidate, "version")
        active = names.adapter(rollout.name, param="name").active_version
        if active is None:
            raise StateConflictError(
                f"A rollout compares a version with the active one, and of {rollout.name!r} no version is "
                "active: activate one first.",
                code="rollout_state",
            )
        for version in (candidate, active):
            if (task := (version.report or {}).get("task", "CAUSAL_LM")) != "CAUSAL_LM":
                raise InvalidRequestError(
                    f"version: rollouts are for adapters that generate text, and the task_type of "
                    f"{version.digest[:12]} is {task}. Activate it instead.",
                    param="version",
                    code="adapter_task",
                )
        async with (
            self._noting_gates(
                rollout.tenant, rollout.name, candidate.digest, "start a rollout", rollout.created_by
            ),
            self._residency.lease([VersionRef.of(candidate)]),
            self._turn,
        ):
            with storage_errors(rollout.name):
                return await self._records.write(
                    self._registry.start_rollout,
                    replace(
                        rollout,
                        candidate=candidate.digest,
                        baseline=active.digest,
                    ),
                )

    async def change_rollout(
        self, tenant: str, name: str, *, percent: float | None, shadow: float | None
    ) -> RolloutRecord:
        """Change the shares of the rollout that runs. Raises StateConflictError, AdapterNotFoundError,
        GateClosedError."""
        self._catalog.of(tenant).check_own(name)
        async with self._noting_gates(tenant, name, None, "change a rollout", ""), self._turn:
            with storage_errors(name):
                return await self._records.write(
                    self._registry.change_rollout, tenant, name, percent=percent, shadow=shadow
                )

    async def end_rollout(
        self,
        tenant: str,
        name: str,
        state: RolloutState,
        reason: str,
        *,
        seen: RolloutRecord | None = None,
        facts: Mapping[str, Any] | None = None,
        actor: str = "",
    ) -> RolloutRecord:
        """End the rollout that runs. A promotion loads the candidate and activates it; after any other end
        new requests get the active version at once.

        Args:
            seen: the rollout that must be running, with the figures that led to this; None: whichever runs.
            facts: further facts for the audit log.

        Raises what `activate` raises; StateConflictError if none runs."""
        self._catalog.of(tenant).check_own(name)
        record = self._catalog.of(tenant).adapter(name, param="name")
        rollout = record.rollout
        uses = []
        if state == "promoted" and rollout is not None:
            uses = [VersionRef(tenant, name, rollout.candidate)]
        digest = None if rollout is None else rollout.candidate
        async with (
            self._noting_gates(tenant, name, digest, "promote", actor),
            self._residency.lease(uses),
            self._turn,
        ):
            with storage_errors(name):
                ended = await self._records.write(
                    self._registry.end_rollout,
                    tenant,
                    name,
                    state,
                    reason,
                    rollout=None if seen is None else seen.id,
                    figures=None if seen is None else seen.figures,
                    facts=facts,
                    actor=actor,
                )
        self.rollouts[state] += 1
        self.changes["activate"] += state == "promoted"
        return ended

    @asynccontextmanager
    async def _noting_gates(
        self, tenant: str, name: str, digest: str | None, act: str, actor: str
    ) -> AsyncIterator[None]:
        """Record in the audit log that gates refused what this block does; of one tenant at most
        MOST_REFUSALS a minute."""
        try:
            yield
        except GateClosedError as error:
            _log.warning("%s of %r: %s", act, tenant, error)
            if self._refusals.take(tenant):
                gates = {one["gate"]: one["reason"] for one in error.details["gates"]}
                details = {"act": act, "gates": gates}
                with storage_errors(name):
                    await self._records.write(
                        self._registry.note_closed_gate, tenant, name, digest, details, actor=actor
                    )
            raise

    async def gate_rules(self, tenant: str | None) -> list[wire.GateRule]:
        """Return the rules that apply to a tenant; None: all. Raises UnavailableError."""
        with storage_errors():
            return await self._records.run_blocking(self._registry.gates.all, tenant)

    async def set_gate(self, rule: wire.GateRule, *, actor: str) -> wire.GateRule:
        """Store a rule in place of the one with the same patterns. Raises UnavailableError."""
        with storage_errors():
            return await self._records.write(self._registry.gates.set, rule, actor=actor)

    async def delete_gate(self, rule: str, *, actor: str) -> wire.GateRule:
        """Delete a rule. Raises GateNotFoundError, UnavailableError."""
        with storage_errors():
            return await self._records.write(self._registry.gates.delete, rule, actor=actor)

    async def gates(
        self, tenant: str, name: str, version: str, askers: Collection[str] = ()
    ) -> wire.VersionGates:
        """Return the gates of a version, for the caller and the keys that ask for its activation besides.

        Raises AdapterNotFoundError, ForbiddenError, UnavailableError.
        """
        self._catalog.of(tenant).check_own(name, "look at its gates")
        with storage_errors(name):
            return await self._records.run_blocking(
                self._registry.version_gates, tenant, name, version, askers
            )

    async def approve(self, tenant: str, name: str, version: str, *, approved: bool) -> wire.VersionGates:
        """Record that the caller's key approves a version, or not any more.

        Raises ForbiddenError (the key made the version, or is none that may approve), AdapterNotFoundError,
        UnavailableError.
        """
        self._catalog.of(tenant).check_own(name)
        with storage_errors(name):
            return await self._records.write(self._registry.approve, tenant, name, version, approved=approved)

    async def evaluate(
        self,
        tenant: str,
        name: str,
        version: str,
        against: str | None,
        metric: str,
        slices: Sequence[wire.SliceScore],
        *,
        job: str | None = None,
        data: str | None = None,
    ) -> wire.VersionGates:
        """Record an evaluation of a version beside another one, or beside the base.

        Args:
            job: the job of this server that measured it; None: the caller did, and must not have made the
                version.
            data: SHA-256 (hex) of the file with the held-out rows.

        Raises ForbiddenError, AdapterNotFoundError, UnavailableError.
        """
        self._catalog.of(tenant).check_own(name)
        with storage_errors(name):
            return await self._records.write(
                self._registry.evaluate,
                tenant,
                name,
                version,
                against,
                metric,
                slices,
                job=job,
                data=data,
            )

    async def roll_back(
        self, tenant: str, name: str, *, expected: str | Unset | None = UNSET, actor: str = ""
    ) -> AdapterRecord:
        """Activate the version that was active before, even if it cannot be loaded now. It passes no gate.

        Raises AdapterNotFoundError, ActivationConflictError, UnavailableError, StateConflictError (there is
        none)."""
        self._catalog.of(tenant).check_own(name)
        async with self._turn:
            with storage_errors(name):
                record = await self._records.write(
                    self._registry.rollback, tenant, name, expected=expected, actor=actor
                )
        self.changes["rollback"] += 1
        await self._warm(record)
        return self._catalog.of(tenant).adapter(name, param="name")

    async def deactivate(self, tenant: str, name: str, *, actor: str = "") -> AdapterRecord:
        """Deactivate the name, so that no version answers to it. Raises AdapterNotFoundError."""
        self._catalog.of(tenant).check_own(name)
        async with self._turn:
            with storage_errors(name):
                await self._records.write(self._registry.deactivate, tenant, name, actor=actor)
        self.changes["deactivate"] += 1
        return self._catalog.of(tenant).adapter(name, param="name")

    async def pin(self, tenant: str, name: str, pinned: bool) -> AdapterRecord:
        """Pin the active version in host memory, or unpin it.

        Raises AdapterNotFoundError, InvalidRequestError (more than fits), UnavailableError.
        """
        async with self._turn:
            record = (await self._look(tenant, name)).adapter(name, param="name")
            if pinned:
                others = (one.active for one in self._catalog if one.pinned and one.active)
                self._residency.check_pins([*others, *([record.active] if record.active else [])])
            with storage_errors(name):
                await self._records.write(self._registry.pin, tenant, name, pinned)
        if pinned:
            await self._warm(record)
        return self._catalog.of(tenant).adapter(name, param="name")

    async def share(self, tenant: str, name: str, shared: bool) -> AdapterRecord:
        """Let all tenants use and inspect the adapter, or stop that. Running requests continue.

        Raises AdapterNotFoundError, UnavailableError.
        """
        self._catalog.of(tenant).check_own(name)
        with storage_errors(name):
            await self._records.write(self._registry.share, tenant, name, shared)
        return self._catalog.of(tenant).adapter(name, param="name")

    async def history(self, tenant: str, name: str) -> list[wire.Activation]:
        """Return the history of activations, newest first. Raises AdapterNotFoundError."""
        with storage_errors(name):
            return await self._records.run_blocking(self._registry.history, tenant, name)

    async def _look(self, tenant: str, name: str) -> VisibleAdapters:
        """Return the tenant's names after a refresh. Raises ForbiddenError (another tenant's),
        UnavailableError."""
        with storage_errors(name):
            await self._catalog.refresh()
        names = self._catalog.of(tenant)
        names.check_own(name)
        return names

    async def _warm(self, record: AdapterRecord) -> None:
        """Load the active version; requests would do it too, only later.

        Never fails, and waits for at most WARM_SECONDS: the rollback or the pin is already done, and after an
        error its caller would do it again.
        """
        if record.active is None:
            return
        try:
            async with (
                asyncio.timeout(WARM_SECONDS),
                self._residency.lease([VersionRef(record.tenant, record.name, record.active)]),
            ):
                pass
        except TimeoutError:
            _log.warning("%s is not in memory yet: it waits for room", record.name)
        except ApiError as error:
            _log.warning("%s is not in memory yet: %s", record.name, error)

    # ---- deleting ----------------------------------------------------------------------------

    async def delete_version(
        self, tenant: str, name: str, version: str, *, force: bool, actor: str = ""
    ) -> str:
        """Delete one version; with the last one its name goes too. Returns its digest.

        Raises AdapterNotFoundError, and StateConflictError while it is active or in use. With force, the
        requests that use it end with AdapterDeletedError, also on other servers once they learn of it."""
        async with self._turn:
            names = await self._look(tenant, name)
            found = names.version(name, version, param="version")
            record = names.adapter(name, param="name")
            if not force:
                if record.active == found.digest:
                    raise _in_use(name, f"version {found.digest[:12]} is the active one")
                if record.rollout is not None and record.rollout.candidate == found.digest:
                    raise _in_use(name, f"a rollout of version {found.digest[:12]} runs")
                self._check_unused([found])
            with storage_errors(name):
                blobs = await self._records.write(
                    self._registry.delete_version, tenant, name, found.digest, forced=force, actor=actor
                )
            await delete_blobs(self._store, self._disk, blobs)
        return found.digest

    async def delete(self, tenant: str, name: str, *, force: bool) -> None:
        """Delete a name with all its versions, also the active one. Raises as `delete_version`."""
        async with self._turn:
            record = (await self._look(tenant, name)).adapter(name, param="name")
            if not force:
                self._check_unused(record.versions)
            with storage_errors(name):
                blobs = await self._records.write(self._registry.delete_adapter, tenant, name, forced=force)
            await delete_blobs(self._store, self._disk, blobs)

    def _check_unused(self, versions: Iterable[VersionRecord]) -> None:
        for version in versions:
            if self._residency.is_used(VersionRef.of(version)):
                raise _in_use(version.name, f"requests run with version {version.digest[:12]}")

    def _names_changed(self) -> None:
        """Follow a change of the catalog.

        Requests that use a version deleted by force end. Versions without a name are unloaded. An adapter
        that is pinned, or has a version in memory, gets its newly active version prefetched. So this server
        has it before the first request, whichever server activated it. Versions are unloaded as others are
        prefetched, so that the memory limit holds.
        """
        for one in self._catalog.forced:
            self._residency.revoke(one.tenant, one.name, one.digest)
        self._prefetch_moved()
        self._residency.pin(record.active for record in self._catalog if record.pinned and record.active)
        self._residency.keep_only(lambda digest: bool(self._catalog.of_digest(digest)))

    def _prefetch_moved(self) -> None:
        before, self._actives = self._actives, {(one.tenant, one.name): one.active for one in self._catalog}
        if before is None:
            return  # the first look: nothing has moved
        for record in self._catalog:
            key = record.tenant, record.name
            if record.active is None or record.active == before.get(key):
                continue
            if record.pinned or any(self._residency.tier(one.digest) != "disk" for one in record.versions):
                self._prefetched[key] = record
        if self._prefetched and len(self._prefetching) < PREFETCHES:
            task = asyncio.get_running_loop().create_task(self._prefetch())
            self._prefetching.add(task)
            task.add_done_callback(self._prefetching.discard)

    async def _prefetch(self) -> None:
        while self._prefetched:
            await self._warm(self._prefetched.pop(next(iter(self._prefetched))))


def _in_use(name: str, why: str) -> StateConflictError:
    return StateConflictError(
        f"Adapter {name!r} is in use: {why}. Wait or activate another version, or delete with force=true, "
        "which ends those requests with an error.",
        code="adapter_in_use",
    )
