"""From a finished run to a version of its adapter: added, proved, and activated if that was asked for."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from onebase_adapters.registry import Origin, RegistryError, TrainingJob, VersionRecord, acting
from onebase_adapters.store.blobs import ADAPTER_FILES, VersionFiles
from onebase_adapters.store.store import StoreError
from onebase_server.adapters.catalog import label
from onebase_server.adapters.service import AdapterService, VersionOptions
from onebase_server.adapters.sources import take_folder
from onebase_server.background import Backoff
from onebase_server.errors import OneBaseError, StoreFullError, UnavailableError
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders
from onebase_server.jobs.handover_files import ADAPTER, KeptFiles
from onebase_server.jobs.job_record import JobRecord
from onebase_server.storage import storage_errors

ACTOR = "training"
BACKOFF = Backoff(4.0, 60.0)
"""Between tries, while the store or the registry is away."""
TRIES = 6
"""Of one delivery: over about two minutes."""
PROOFS_WAITED = 6
"""The wait for a version's proof lasts as long as this many proofs may take: others may be ahead of it."""
LOST = "adapter_lost"
"""The trained files are gone: the job has to be trained again."""
_SHOWN = 5
_CODES = {"store_full": "disk_full"}
"""A job's error code, by that of its version."""

_log = logging.getLogger(__name__)


class DeliveryError(Exception):
    """What was trained is not served. `code` is stable, the message says why and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Delivered:
    """What became of a job. `as_asked`: False when its version should be active and is not."""

    version: str
    activated: bool
    result_file: str
    message: str
    as_asked: bool


class Delivery:
    """Adds what jobs trained to the adapter service, as an upload would be.

    The library is never asked to activate: after a restart it would, even if the job was cancelled since.

    proof_seconds: limit for a version's proof, the wait for others included.
    """

    def __init__(
        self,
        library: AdapterService,
        folders: JobFolders,
        files: TrainingFiles,
        kept: KeptFiles,
        proof_seconds: float,
    ) -> None:
        self._library = library
        self._files = files
        self._folders = folders
        self._kept = kept
        self._proof_seconds = proof_seconds

    async def deliver(self, job: TrainingJob, record: JobRecord) -> Delivered:
        """Safe to repeat after a crash: the same content is the same version.

        Args:
            record: tells whether the job still runs; only then is its version activated.

        Raises DeliveryError.
        """
        for pause in BACKOFF.tries(TRIES):
            try:
                with acting(Origin(job.key, actor=f"job {job.id}", owned=(job.id, job.server))):
                    return await self._deliver(job, record)
            except StoreFullError as error:
                raise DeliveryError("disk_full", error.message) from error
            except (UnavailableError, RegistryError, StoreError, OSError) as error:
                if pause is None:
                    raise DeliveryError("delivery_failed", f"{error} Resume the job later.") from error
                _log.warning("job %s waits: %s", job.id, error)
            except OneBaseError as error:
                raise DeliveryError(error.code, error.message) from error
            await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _deliver(self, job: TrainingJob, record: JobRecord) -> Delivered:
        report = job.report or {}
        asked = job.activate == "always" or (job.activate == "if_better" and bool(report.get("better")))
        asked = asked and not _regressed(job)
        await self._kept.restore(job)
        folder = self._folders.job(job.id) / ADAPTER
        if not all((folder / file).is_file() for file in ADAPTER_FILES):
            raise DeliveryError(
                LOST,
                "The trained adapter is gone from --data-dir. Resume the job: it trains on from its last "
                "checkpoint, or from its beginning if that is gone as well.",
            )
        result_file = await self._files.keep_curve(job.tenant, job.id, report)
        with storage_errors(job.name):
            files = await self._library.disk.run(take_folder, self._library.store, folder)
        version = await self._proved(job, files)
        if version.error is not None:
            code = _CODES.get(version.error.code, version.error.code)
            raise DeliveryError(code, f"The adapter is not served: {version.error.message}")
        if version.state != "ready":
            raise DeliveryError("delivery_failed", "The adapter was not proved. Resume the job.")
        problem = await self._activate(version, record) if asked else ""
        adapter = self._library.catalog.of(job.tenant).own(job.name)
        active = adapter is not None and adapter.active == version.digest
        return Delivered(
            version=version.digest,
            activated=active,
            result_file=result_file,
            message=_message(job, version.digest, active=active, asked=asked, problem=problem),
            as_asked=active or not asked,
        )

    async def _proved(self, job: TrainingJob, files: VersionFiles) -> VersionRecord:
        """The version once its proof has ended. Raises DeliveryError when that takes too long."""
        source: dict[str, Any] = {"kind": "training", "job": job.id}
        if job.parent is not None:
            source["parent"] = {"name": job.parent.name, "version": job.parent.digest}
        options = VersionOptions(any_base=True)
        added = await self._library.add(job.tenant, job.name, files, source, options, actor=ACTOR)
        try:
            async with asyncio.timeout(self._proof_seconds):
                await self._library.wait(added.tenant, added.name, added.digest)
        except TimeoutError as error:
            raise DeliveryError(
                "delivery_failed",
                f"The adapter was not proved within {self._proof_seconds:g} s: others are ahead of it, or no "
                "verifier runs; the server's log may say why. Resume the job to wait again.",
            ) from error
        except OneBaseError as error:  # an upload of the same content asked to activate it, and that failed
            _log.info("version %s of %s: %s", added.digest[:12], added.name, error)
        return await self._library.version(added.tenant, added.name, added.digest)

    async def _activate(self, version: VersionRecord, record: JobRecord) -> str:
        """Activate the version, unless the job was stopped. Returns why that failed, or ""."""
        if (await record.current()).state != "running":
            return ""
        failure = await self._library.activate_with_retries(version)
        return failure.message if failure else ""


def _regressed(job: TrainingJob) -> list[str]:
    """The slices that got worse by more than the job allows."""
    found: list[str] = ((job.report or {}).get("slices") or {}).get("regressed", [])
    return found


def _message(job: TrainingJob, digest: str, *, active: bool, asked: bool, problem: str) -> str:
    model = label(job.name, digest)
    if active:
        return f"{model} is proved and active: requests for {job.name} get it."
    if asked:
        return f"{model} is proved, but could not be activated: {problem or 'another version was chosen'}."
    if job.activate == "never":
        return f"{model} is proved. The job asked not to activate it."
    if regressed := _regressed(job):
        named = ", ".join(regressed[:_SHOWN]) + (", ..." if len(regressed) > _SHOWN else "")
        limit = job.settings.get("max_regression")
        return f"{model} is proved. It is not activated: on {named} it is worse by more than {limit:g}."
    better = (job.report or {}).get("better")
    than = f" than {label(job.parent.name, job.parent.digest)} and the base" if job.parent else ""
    worse = f"it is no better{than} on held-out data"
    reason = "nothing was held out to compare it on" if better is None else worse
    return f"{model} is proved. It is not activated: {reason}."
