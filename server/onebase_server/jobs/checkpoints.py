"""Checkpoints of jobs as models: proved and loaded when a request first names one, gone with their files."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from onebase_adapters.registry import (
    AdapterRecord,
    Origin,
    TrainingJob,
    TrainingRecords,
    UnknownJobError,
    acting,
)
from onebase_edge.background import Threads
from onebase_edge.errors import AdapterNotFoundError, ApiError, StateConflictError, VersionFailedError
from onebase_server.adapters.catalog import CHECKPOINT, is_checkpoint
from onebase_server.adapters.service import CHECKPOINT_KIND, AdapterService, VersionOptions
from onebase_server.adapters.sources import take_folder
from onebase_server.jobs.folders import JobFolders, is_over
from onebase_server.storage.calls import storage_errors

ADAPTER = "adapter"
"""The folder in a checkpoint's with the adapter as PEFT has it."""
ACTOR = "first use"
AUDITED_EVERY = 600.0
"""Shortest time, in seconds, between two refusals of one job's checkpoints in the audit log."""

_log = logging.getLogger(__name__)


class _Wanted(NamedTuple):
    name: str
    job: str
    step: int


def checkpoint_model(job: TrainingJob, step: int) -> str:
    """Return the name by which requests ask for a checkpoint: `acme:ftjob-5b7e0d12:step-8`. No adapter has
    such."""
    return f"{job.name}:{job.id}:step-{step}"


def adapter_of(name: str) -> str:
    """Return the adapter whose checkpoint this is the name of; any other name as it is."""
    return name.partition(":")[0] if is_checkpoint(name) else name


class CheckpointModels:
    """Registers checkpoints as adapters, each when it is first asked for. Called from one event loop."""

    def __init__(
        self, library: AdapterService, records: TrainingRecords, threads: Threads, folders: JobFolders
    ) -> None:
        self._library = library
        self._records = records
        self._threads = threads
        self._folders = folders
        self._first_uses: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._audited: dict[str, float] = {}
        """Time of the last refusal that the audit log was told of, by the job's id."""

    async def use(self, tenant: str, name: str, *, param: str) -> None:
        """Register an existing checkpoint as an adapter that is proved and active, unless it is one already.

        Concurrent first uses wait for the same proof. Raises AdapterNotFoundError when it is gone,
        StateConflictError when it lies on another server, VersionFailedError (also where today's policy for
        signatures refuses what its job trains), UnavailableError, and what adding an adapter raises.

        One that is active and failed when it was proved again is proved once more. One that was deactivated
        stays so, also when that happened during its proof, or it is proved again."""
        job, step, place = await self.check(tenant, name, param=param)
        catalog = self._library.catalog
        record = catalog.of(tenant).own(name)
        if record is None or record.active is None or not _is_settled(record):
            await catalog.look()  # another server may have changed it
            record = catalog.of(tenant).own(name)
        if record is not None and _is_settled(record):
            return
        if place is None:
            raise StateConflictError(
                f"{name} lies on another server, where its job runs: ask that one.",
                code="job_state",
                param=param,
            )
        key = tenant, name
        if key not in self._first_uses:
            task = asyncio.get_running_loop().create_task(self._first_use(job, step, place))
            self._first_uses[key] = task
            task.add_done_callback(lambda done: self._first_uses.pop(key))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._first_uses[key])

    async def check(self, tenant: str, name: str, *, param: str) -> tuple[TrainingJob, int, Path | None]:
        """Return the checkpoint's job, step and folder; None if that is on another server.

        Raises AdapterNotFoundError when it is gone, VersionFailedError where today's policy for signatures
        refuses what its job trains, and UnavailableError.
        """
        found = job, _, _ = await self._found(tenant, name, param)
        now = time.monotonic()
        self._audited = {one: at for one, at in self._audited.items() if now - at < AUDITED_EVERY}
        is_first, is_audited = job.id not in self._audited, False
        if is_first:
            self._audited[job.id] = now
        try:
            await self._library.check_job(job, actor=ACTOR, audited=is_first)
        except VersionFailedError as error:
            is_audited = error.is_audited
            raise
        finally:
            if is_first and not is_audited:
                self._audited.pop(job.id, None)
        return found

    async def forget(self, job_id: str) -> None:
        """Delete the adapters that were made of a job's checkpoints; those in use with the next sweep."""
        for record in list(self._library.catalog):
            wanted = _parsed(record.name)
            if wanted is not None and wanted.job == job_id:
                await self._delete(record.tenant, record.name)

    async def sweep(self) -> None:
        """Delete the adapters whose checkpoints are gone. Raises RegistryError."""
        for record in list(self._library.catalog):
            if is_checkpoint(record.name):
                with suppress(ApiError):  # `_found` deletes what is gone
                    await self._found(record.tenant, record.name, "model")

    async def _found(self, tenant: str, name: str, param: str) -> tuple[TrainingJob, int, Path | None]:
        """Return the checkpoint's job, step and folder; None if that is on another server. Raises
        AdapterNotFoundError."""
        wanted = _parsed(name)
        job = None
        if wanted is not None:
            with storage_errors(), suppress(UnknownJobError):
                job = await self._threads.run_blocking(self._records.job, tenant, wanted.job)
        if wanted is None or job is None or job.name != wanted.name:
            raise AdapterNotFoundError(f"There is no checkpoint {name[:200]!r}.", param=param)
        if job.server != self._folders.server and not is_over(job.state, job.error_code):
            return job, wanted.step, None
        with storage_errors():
            found = await self._threads.run_blocking(self._records.checkpoints, job)
        for one in found:
            place = self._folders.checkpoint(job.id, one.path) / ADAPTER
            if one.step == wanted.step and not is_over(job.state, job.error_code) and place.is_dir():
                return job, wanted.step, place
        await self._delete(tenant, name)
        instead = f"Ask for {job.name}." if job.version else "See the job's list of checkpoints."
        raise AdapterNotFoundError(
            f"Checkpoint {name} is gone: a job keeps its latest ones, and none once it is over. {instead}",
            param=param,
            code="checkpoint_gone",
        )

    async def _first_use(self, job: TrainingJob, step: int, place: Path) -> None:
        tenant, name = job.tenant, checkpoint_model(job, step)
        record = self._library.catalog.of(tenant).own(name)
        ready = next((one for one in record.versions if one.state == "ready"), None) if record else None
        if ready is not None:
            await self._library.activation.activate(tenant, name, ready.digest, if_due=True, actor=ACTOR)
            return
        with storage_errors(name):
            files = await self._library.disk.run_blocking(take_folder, self._library.store, place)
        await self._library.catalog.look()
        record = self._library.catalog.of(tenant).own(name)
        if record is not None and _is_settled(record):  # it was deactivated meanwhile
            return
        source = {"kind": CHECKPOINT_KIND, "job": job.id, "step": step}
        options = VersionOptions(activate=True, any_base=True)
        with acting(Origin(job.key, actor=ACTOR)):
            version = await self._library.add(tenant, name, files, source, options, if_due=True, actor=ACTOR)
        version = await self._library.wait(tenant, name, version.digest)
        if version.error is not None:
            raise VersionFailedError(
                f"{name} cannot be served: {version.error.message}", code=version.error.code
            )

    async def _delete(self, tenant: str, name: str) -> None:
        if self._library.catalog.of(tenant).own(name) is None:
            return
        try:
            await self._library.activation.delete(tenant, name, force=False)
        except ApiError as error:
            _log.info("%s stays for now: %s", name, error.message)


def _is_settled(record: AdapterRecord) -> bool:
    """Return True if a checkpoint is active and can be served once its proof is done, or if somebody has
    decided that it is not to be active."""
    if record.active_version is not None:
        return record.active_version.state != "failed"
    return not all(one.activates for one in record.versions)


def _parsed(name: str) -> _Wanted | None:
    found = CHECKPOINT.fullmatch(name)
    return None if found is None else _Wanted(found[1], found[2], int(found[3]))
