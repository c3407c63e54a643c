"""Gives the disk back: of jobs that are over, and of what no row of the registry speaks of."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from onebase_adapters.registry import (
    ENDED_STATES,
    JobState,
    RegistryError,
    TrainingRecords,
    UnknownJobError,
)
from onebase_server.background import Threads
from onebase_server.jobs.outcomes import may_go_on
from onebase_server.jobs.registries import KnownRegistries
from onebase_server.jobs.storage import TrainingHome

_log = logging.getLogger(__name__)


class Tidying:
    """Deletes what a job does not need any more. No process may be writing into the job's folder."""

    def __init__(self, records: TrainingRecords, threads: Threads, home: TrainingHome) -> None:
        self._records = records
        self._threads = threads
        self._home = home
        self._registries = KnownRegistries(home.registries, records, home.server)
        self._warned = False

    async def job_over(self, tenant: str, job_id: str) -> None:
        """Look how it has ended, if it has. Raises RegistryError."""
        with suppress(UnknownJobError):
            job = await self._threads.run(self._records.job, tenant, job_id)
            await self._threads.run(self._forget, job_id, job.state, job.error.code if job.error else None)

    async def sweep(self, running: Collection[str]) -> None:
        """Uploads and jobs that a power cut ended, and jobs that ended unseen, or through another server.

        Args:
            running: jobs that have a process, which may write.
        """
        home = self._home
        try:
            left = await self._threads.run(home.listing)
            files = await self._threads.run(self._records.file_ids, home.server)
            jobs = await self._threads.run(self._records.job_ends, home.server)
            left = await self._threads.run(self._orphans_among, left, files)
            removed = await self._threads.run(home.sweep, left, files, jobs)
            over = {job_id: end for job_id, end in jobs.items() if job_id not in running}
            await self._threads.run(self._forget_all, over)
        except (RegistryError, OSError) as error:
            _log.warning("the training folder was not swept: %s", error)
        else:
            if removed:
                _log.info("swept %d left-over files and folders of training", removed)

    def _orphans_among(self, left: list[Path], file_ids: Collection[str]) -> list[Path]:
        """What may be deleted if no row speaks of it."""
        if self._registries.at_hand_alone(file_ids):
            return left
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s was used with several registries: what this one does not know stays there, since it may "
                "be another one's (--registry). Delete %s once only this one is in use.",
                self._home.root,
                self._registries.path,
            )
        return self._home.uploads(left)

    def _forget_all(self, ends: Mapping[str, tuple[JobState, str | None]]) -> None:
        for job_id, (state, code) in ends.items():
            self._forget(job_id, state, code)

    def _forget(self, job_id: str, state: JobState, code: str | None) -> None:
        if state in ENDED_STATES and not may_go_on(state, code):
            self._home.forget(job_id)
