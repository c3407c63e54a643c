"""One job's row in the registry, for the run that changes it: patient, and heard by those who follow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from onebase_adapters.registry import (
    JobEvent,
    JobState,
    JobStateError,
    RegistryError,
    TrainingFile,
    TrainingJob,
    TrainingRecords,
    UnknownFileError,
    UnknownJobError,
)
from onebase_server.background import Threads
from onebase_server.jobs.notifier import Watchers

PAUSE_SECONDS = 1.0
"""Before another try while the registry is away."""
T = TypeVar("T")

_log = logging.getLogger(__name__)


class JobRecord:
    """Reads and writes one job. While the registry is away it waits: nobody else knows what has happened."""

    def __init__(
        self, job: TrainingJob, records: TrainingRecords, threads: Threads, watchers: Watchers
    ) -> None:
        self.patient = True
        """When False, an error of the registry is raised."""
        self._id = job.id
        self._tenant = job.tenant
        self._records = records
        self._threads = threads
        self._watchers = watchers

    async def current(self) -> TrainingJob:
        """As it is now. Raises UnknownJobError."""
        return await self._try(self._records.job, self._tenant, self._id)

    async def file(self, file_id: str) -> TrainingFile:
        """One of the files that the job names. Raises RegistryError."""
        return await self._try(self._records.file, self._tenant, file_id)

    async def tell(self, *events: JobEvent, **facts: Any) -> None:
        """Add events, and change fields of TrainingJob. Raises UnknownJobError."""
        await self._try(self._records.note, self._id, events, **facts)
        self._watchers.notify(self._id)

    async def move(
        self, state: JobState, among: Sequence[JobState], event: JobEvent | None = None, **facts: Any
    ) -> TrainingJob:
        """Raises JobStateError: somebody has moved it meanwhile."""
        job: TrainingJob = await self._try(self._records.move, self._id, state, among, event, **facts)
        self._watchers.notify(self._id)
        return job

    async def _try(self, call: Callable[..., T], *args: Any, **facts: Any) -> T:
        while True:
            try:
                return await self._threads.run(call, *args, **facts)
            except (JobStateError, UnknownJobError, UnknownFileError):
                raise
            except RegistryError as error:
                if not self.patient:
                    raise
                _log.warning("job %s waits: %s", self._id, error)
            await asyncio.sleep(PAUSE_SECONDS)
