"""From a finished run to a version of its adapter: taken in, proved, and activated if that was wished."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from onebase_adapters.content import ADAPTER_FILES, VersionFiles
from onebase_adapters.registry import RegistryError, TrainingJob, VersionRecord
from onebase_adapters.store import StoreError
from onebase_server.errors import OneBaseError, StoreFullError, UnavailableError
from onebase_server.library import Library, Wishes
from onebase_server.names import label
from onebase_server.storage_errors import storage_errors
from onebase_server.training.files import TrainingFiles
from onebase_server.training.home import TrainingHome

ACTOR = "training"
PAUSES = (1.0, 5.0, 15.0, 30.0, 60.0)
"""Seconds before another try, while the store or the registry is away."""
LOST = "adapter_lost"
"""Nothing is left to deliver: the job has to be trained again."""
_CODES = {"store_full": "disk_full"}
"""What a version's error is called as a job's."""

_log = logging.getLogger(__name__)


class DeliveryError(Exception):
    """What was trained is not served. `code` is stable, the message says why and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Delivered:
    """What became of a job. `as_wished`: False when it should be active and is not."""

    version: str
    activated: bool
    result_file: str
    message: str
    as_wished: bool


class Delivery:
    """Brings what jobs trained into the library, as an upload would be."""

    def __init__(self, library: Library, home: TrainingHome, files: TrainingFiles) -> None:
        self.files = files
        self._library = library
        self._home = home

    async def deliver(self, job: TrainingJob) -> Delivered:
        """May be asked for again after a crash: the same content is the same version.

        Raises DeliveryError.
        """
        for pause in (*PAUSES, None):
            try:
                return await self._deliver(job)
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

    async def _deliver(self, job: TrainingJob) -> Delivered:
        report = job.report or {}
        wished = job.activate == "always" or (job.activate == "if_better" and bool(report.get("better")))
        folder = self._home.job(job.id) / "adapter"
        if not all((folder / file).is_file() for file in ADAPTER_FILES):
            raise DeliveryError(
                LOST,
                "The trained adapter is gone from --data-dir. Resume the job: it trains on from its last "
                "checkpoint, or from its beginning if that is gone as well.",
            )
        result_file = await self.files.keep_curve(job.id, report)
        with storage_errors(job.name):
            files = await self._library.disk.run(self._take, folder)
        wishes = Wishes(activate=wished, any_base=True)
        version, problem = await self._added(job, files, wishes)
        if version.error is not None:
            code = _CODES.get(version.error.code, version.error.code)
            raise DeliveryError(code, f"The adapter is not served: {version.error.message}")
        if version.state != "ready":
            raise DeliveryError("delivery_failed", "The adapter was not proved. Resume the job.")
        record = self._library.catalog.get(job.name)
        active = record is not None and record.active == version.digest
        return Delivered(
            version=version.digest,
            activated=active,
            result_file=result_file,
            message=_message(job, version.digest, active=active, wished=wished, problem=problem),
            as_wished=active or not wished,
        )

    async def _added(
        self, job: TrainingJob, files: VersionFiles, wishes: Wishes
    ) -> tuple[VersionRecord, str]:
        """The version once it is proved, and why it was not activated although it was wished."""
        source = {"kind": "training", "job": job.id}
        try:
            added = await self._library.add(job.name, files, source, wishes, actor=ACTOR)
        except OneBaseError:
            known = self._library.catalog.of_digest(files.digest)
            version = next((one for one in known if one.name == job.name and one.state == "ready"), None)
            if version is None:
                raise
            failure = await self._library.activate_patiently(version)
            return version, failure.message if failure else ""
        try:
            return await self._library.wait(added.name, added.digest), ""
        except OneBaseError as error:
            return await self._library.version(added.name, added.digest), error.message

    def _take(self, folder: Path) -> VersionFiles:
        config, weights = (self._library.store.add_file(folder / file) for file in ADAPTER_FILES)
        return VersionFiles(config, weights)


def _message(job: TrainingJob, digest: str, *, active: bool, wished: bool, problem: str) -> str:
    model = label(job.name, digest)
    if active:
        return f"{model} is proved and active: requests for {job.name} get it."
    if wished:
        return f"{model} is proved, but could not be activated: {problem or 'another version was chosen'}."
    if job.activate == "never":
        return f"{model} is proved. It is not active, as it was wished."
    better = (job.report or {}).get("better")
    reason = "nothing was held out to compare it on" if better is None else "it is no better on held-out data"
    return f"{model} is proved. It is not active, since {reason}."
