"""How versions come to be: files in, registered, proved, packed, ready, and activated if that was wished.

Everything here goes on after a restart: what is on its way is in the registry, with what was wished.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from typing import Any

from onebase_adapters import registry as registry_errors
from onebase_adapters.format.config import AdapterFormatError, check_config
from onebase_adapters.registry import DEFAULT_TENANT, Registry, VersionRecord
from onebase_adapters.store.content import VersionFiles
from onebase_adapters.store.store import Store, StoreError, StoreFullError
from onebase_server.adapters.activation import Activation
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.memory_use import PackedAdapterFile
from onebase_server.adapters.names import same_base
from onebase_server.background import Threads
from onebase_server.errors import (
    ConflictError,
    EngineRestartedError,
    OneBaseError,
    QueueFullError,
    UnavailableError,
    VersionFailedError,
)
from onebase_server.processes.verifier_client import (
    Proof,
    RejectedError,
    VerifierClient,
    VerifierGoneError,
)
from onebase_server.processes.verifier_protocol import Progress
from onebase_server.storage_errors import storage_errors

ACTIVATION_PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds between tries to record or to activate what is ready: the registry is away, the engine restarts,
memory is full."""
WISHES = "options"
"""Key of a version's source that holds what was asked for with it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """What is asked for together with a version."""

    activate: bool = False
    allow_noop: bool = False
    any_base: bool = False

    @classmethod
    def of(cls, source: Mapping[str, Any]) -> Wishes:
        """Those that a version was registered with."""
        return cls(**source.get(WISHES, {}))


@dataclass(eq=False)
class _Job:
    """A version on its way to being ready."""

    wishes: Wishes
    task: asyncio.Task[None] | None = None
    progress: Progress | None = None
    activate: bool = False
    failure: OneBaseError | None = None
    """Why the version, though ready, was not activated."""


class Library:
    """Brings versions into the registry and makes them ready. Called from one event loop.

    Args:
        base_names: what an adapter's config may call this base, its own name first.
        records, disk: threads for the registry's calls and for the store's.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        catalog: Catalog,
        activation: Activation,
        verifier: VerifierClient,
        *,
        base_names: tuple[str, ...],
        records: Threads,
        disk: Threads,
    ) -> None:
        self.store = store
        self.catalog = catalog
        self.activation = activation
        self.disk = disk
        self._registry = registry
        self._verifier = verifier
        self._base_names = base_names
        self._records = records
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[tuple[str, str], _Job] = {}

    # ---- coming in ---------------------------------------------------------------------------

    async def check_config(self, name: str, config: bytes, wishes: Wishes) -> None:
        """Look at an adapter's config before anything else is done with it.

        Raises VersionFailedError, or ConflictError when it belongs to another base.
        """
        try:
            facts = await self.disk.run(check_config, config)
        except AdapterFormatError as error:
            raise VersionFailedError(f"adapter_config.json: {error}", code=error.code) from error
        if not wishes.any_base and not same_base(facts.base_name, *self._base_names):
            raise ConflictError(
                f"Adapter {name!r} was trained on {facts.base_name!r} and this server's base is "
                f"{self._base_names[0]!r}. Send it to a server of that base, or send any_base if this is the "
                "same model by another name.",
                code="base_mismatch",
                param="files",
            )

    async def read_config(self, files: VersionFiles) -> bytes:
        """The config of stored files. Raises UnavailableError."""
        with storage_errors():
            path = await self.disk.run(self.store.local, files.config.sha256)
            return await self.disk.run(path.read_bytes)

    async def add(
        self,
        name: str,
        files: VersionFiles,
        source: Mapping[str, Any],
        wishes: Wishes,
        *,
        actor: str = "",
        wait_for_verifier: bool = True,
    ) -> VersionRecord:
        """Register stored files under a name, and begin to make them ready unless that was done before.

        Raises StoreFullError, UnavailableError.
        """
        stored = {**source, WISHES: asdict(wishes)}
        with storage_errors(name):
            version, _ = await self._records.run(
                self._registry.add_version, name, files.digest, files, stored, actor=actor
            )
            await self.catalog.refresh()
        if version.state == "ready":
            if wishes.activate:
                await self.activation.activate(name, version.digest, actor=actor)
            return version
        self._begin(version, wishes, wait_for_verifier=wait_for_verifier)
        return version

    async def resume(self) -> None:
        """Take up again what a restart interrupted. Raises RegistryError."""
        for version in await self._records.run(self._registry.unfinished):
            if version.tenant == DEFAULT_TENANT:
                self._begin(version, Wishes.of(version.source))
        for record in self.catalog:
            newest = record.versions[0]
            if newest.state == "ready" and newest.digest != record.active:
                await self._grant_late(newest)

    async def _grant_late(self, version: VersionRecord) -> None:
        """Activate a version that became ready just before the restart, unless somebody has decided since."""
        if not Wishes.of(version.source).activate:
            return
        history = await self._records.run(self._registry.history, version.tenant, version.name)
        if not history or history[0].at < (version.finished_at or 0.0):
            job = _Job(Wishes.of(version.source), activate=True)
            await self._activate_if_wished(version, job)

    def begin_again(self, prepared: PackedAdapterFile) -> None:
        """A prepared file is lost or damaged: make another one for the versions that still have it."""
        task = asyncio.get_running_loop().create_task(self._begin_again(prepared))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin_again(self, prepared: PackedAdapterFile) -> None:
        reopened: list[VersionRecord] = []
        try:
            # All of its names first: none of them may take another's damaged file for a proof.
            for seen in prepared.versions:
                with suppress(registry_errors.UnknownAdapterError, registry_errors.UnknownVersionError):
                    version = await self._records.run(
                        self._registry.reopen, seen.tenant, seen.name, seen.digest, seen=seen
                    )
                    if not version.finished:
                        reopened.append(version)
            await self.catalog.refresh()
        except registry_errors.RegistryError as error:
            _log.error("file %s cannot be prepared again: %s", prepared.blob.sha256[:12], error)
        for version in reopened:
            self._begin(version, replace(Wishes.of(version.source), activate=False))

    async def wait(self, name: str, digest: str) -> VersionRecord:
        """The version once it is finished, and activated if that was wished.

        Raises what the activation raised, and UnknownAdapterError when the version is deleted meanwhile.
        """
        job = self._jobs.get((name, digest))
        if job is not None and job.task is not None:
            await asyncio.shield(job.task)
            if job.failure is not None:
                raise job.failure
        return await self.version(name, digest)

    async def version(self, name: str, digest: str) -> VersionRecord:
        """One version with its whole report, by digest or a beginning of it. Raises UnknownAdapterError."""
        with storage_errors(name):
            return await self._records.run(self._registry.version, DEFAULT_TENANT, name, digest)

    async def versions(self, name: str) -> list[VersionRecord]:
        """Newest first, with their whole reports. Raises UnknownAdapterError."""
        with storage_errors(name):
            return await self._records.run(self._registry.versions, DEFAULT_TENANT, name)

    def progress(self, name: str, digest: str) -> Progress | None:
        """How far a version has come that is on its way in this server."""
        job = self._jobs.get((name, digest))
        return None if job is None else job.progress

    # ---- on the way --------------------------------------------------------------------------

    def _begin(self, version: VersionRecord, wishes: Wishes, *, wait_for_verifier: bool = True) -> None:
        key = (version.name, version.digest)
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(wishes)
            job.task = asyncio.get_running_loop().create_task(self._run(version, job, wait_for_verifier))
            job.task.add_done_callback(lambda done: self._jobs.pop(key, None))
        job.activate = job.activate or wishes.activate

    async def _run(self, version: VersionRecord, job: _Job, wait_for_verifier: bool) -> None:
        """The whole way of one version; whatever happens is in the registry afterwards."""
        try:
            proof = await self._proof(version, job, wait_for_verifier)
            await self._finish(version, "ready", report=proof.report, prepared=proof.packed)
        except RejectedError as error:
            await self._failed(version, error.code, error.message)
        except StoreFullError:
            await self._failed(version, "store_full", "the store had no space for the packed adapter")
        except StoreError as error:
            await self._failed(version, "store_unavailable", str(error))
        except VerifierGoneError as error:
            _log.error("version %s of %s was not proved: %s", version.digest[:12], version.name, error)
        except (registry_errors.UnknownAdapterError, registry_errors.UnknownVersionError):
            _log.info("version %s of %s was deleted on its way", version.digest[:12], version.name)
        except Exception:
            _log.exception("version %s of %s failed", version.digest[:12], version.name)
            await self._failed(
                version, "internal_error", "the server failed on this version; its log says why"
            )
        else:
            await self._activate_if_wished(version, job)

    async def activate_patiently(self, version: VersionRecord) -> OneBaseError | None:
        """Activate a version that is ready. Returns why it could not be, after several tries."""
        job = _Job(Wishes(activate=True), activate=True)
        await self._activate_if_wished(version, job)
        return job.failure

    async def _activate_if_wished(self, version: VersionRecord, job: _Job) -> None:
        if not job.activate:
            return
        for pause in (*ACTIVATION_PAUSES, None):
            try:
                await self.activation.activate(version.name, version.digest, actor=version.created_by)
                return
            except OneBaseError as error:
                passing = isinstance(error, EngineRestartedError | UnavailableError | QueueFullError)
                if pause is None or not passing:
                    _log.error("version %s of %s is not active: %s", version.digest[:12], version.name, error)
                    job.failure = error
                    return
            await asyncio.sleep(pause)

    async def _failed(self, version: VersionRecord, code: str, message: str) -> None:
        try:
            await self._finish(version, "failed", error=(code, message))
        except registry_errors.RegistryError as error:
            _log.error("version %s of %s: %s", version.digest[:12], version.name, error)

    async def _finish(self, version: VersionRecord, state: Any, **facts: Any) -> None:
        """As `_set_state`, until the registry takes it: nobody else would finish what this server proved.

        Raises UnknownAdapterError, UnknownVersionError.
        """
        for pause in chain(ACTIVATION_PAUSES, repeat(ACTIVATION_PAUSES[-1])):
            try:
                await self._set_state(version, state, **facts)
                return
            except (registry_errors.UnknownAdapterError, registry_errors.UnknownVersionError):
                raise
            except registry_errors.RegistryError as error:
                _log.warning("version %s of %s waits: %s", version.digest[:12], version.name, error)
            await asyncio.sleep(pause)

    async def _set_state(self, version: VersionRecord, state: Any, **facts: Any) -> None:
        await self._records.run(
            self._registry.set_state, version.tenant, version.name, version.digest, state, **facts
        )
        await self.catalog.refresh()

    async def _proof(self, version: VersionRecord, job: _Job, wait_for_verifier: bool) -> Proof:
        marked: list[asyncio.Task[None]] = []

        def follow(progress: Progress) -> None:
            if progress.stage == "proving" and not marked:
                marked.append(asyncio.get_running_loop().create_task(self._mark_proving(version)))
            job.progress = progress

        known = await self._known_proof(version, job.wishes.allow_noop)
        if known is not None:
            return known
        try:
            return await self._verifier.prove(
                version.files,
                allow_noop=job.wishes.allow_noop,
                wait_for_verifier=wait_for_verifier,
                on_progress=follow,
            )
        finally:
            await asyncio.gather(*marked)

    async def _known_proof(self, version: VersionRecord, allow_noop: bool) -> Proof | None:
        """What was found when this content was proved under another name, if its packed adapter is here."""
        for other in self.catalog.of_digest(version.digest):
            if other.state != "ready" or other.prepared is None or other.report is None:
                continue
            if other.report["proof"]["modules_changed"] == 0 and not allow_noop:
                continue
            if await self.disk.run(self.store.exists, other.prepared.sha256):
                whole = await self._records.run(
                    self._registry.version, other.tenant, other.name, other.digest
                )
                if whole.report is not None and whole.prepared is not None:
                    return Proof(dict(whole.report), whole.prepared)
        return None

    async def _mark_proving(self, version: VersionRecord) -> None:
        try:
            await self._set_state(version, "proving")
        except registry_errors.RegistryError as error:
            _log.warning("version %s of %s: %s", version.digest[:12], version.name, error)
