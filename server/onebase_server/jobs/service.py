"""What callers may do with jobs: make them, look at them, and say how they go on."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from onebase_adapters.registry import (
    DEFAULT_TENANT,
    OPEN_STATES,
    Activate,
    Checkpoint,
    JobState,
    JobStateError,
    NewEvent,
    NewJob,
    TrainingEvent,
    TrainingJob,
    TrainingRecords,
)
from onebase_adapters.training.recipe import Recipe
from onebase_server.background import Threads
from onebase_server.errors import ConflictError
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.manager import Manager
from onebase_server.jobs.notifier import Watchers
from onebase_server.jobs.outcomes import resumable
from onebase_server.jobs.storage import TrainingHome
from onebase_server.storage import storage_errors

LIFE_SECONDS = 15.0
"""One who follows a job hears at least so often that it is still there."""
LET_GO_SECONDS = 30.0
"""For so long the answer to a pause waits until the job's process has ended."""
MOST_EVENTS = 500
"""Read at once by one who follows a job."""


class Jobs:
    """The jobs of this server's registry. For one event loop. Every method may raise UnavailableError."""

    def __init__(
        self,
        records: TrainingRecords,
        threads: Threads,
        files: TrainingFiles,
        home: TrainingHome,
        manager: Manager,
        watchers: Watchers,
        *,
        most: int,
        look_seconds: float,
    ) -> None:
        self._records = records
        self._threads = threads
        self._files = files
        self._home = home
        self._manager = manager
        self._watchers = watchers
        self._most = most
        self._look_seconds = look_seconds

    async def create(
        self,
        recipe: Recipe,
        *,
        training_file: str,
        validation_file: str | None,
        name: str | None,
        activate: Activate,
        labels: Mapping[str, str],
    ) -> TrainingJob:
        """A new job; it is begun when its turn comes, also after a restart.

        Args:
            name: of the adapter that will have what comes out as a version; None: made from the job's id.

        Raises InvalidRequestError (a file that cannot be used), ConflictError (no jobs are run here).
        """
        self._check_on()
        await self._files.usable(training_file, "training_file")
        if validation_file is not None:
            await self._files.usable(validation_file, "validation_file")
        number = secrets.token_hex(12)
        job = NewJob(
            id=f"ftjob-{number}",
            tenant=DEFAULT_TENANT,
            server=self._home.server,
            name=name or f"ft-{number[:8]}",
            training_file=training_file,
            validation_file=validation_file,
            activate=activate,
            settings=recipe.to_json(),
            labels=labels,
        )
        event = NewEvent(time.time(), "The job is created; its files are checked.")
        with storage_errors():
            made = await self._threads.run(self._records.add_job, job, event)
        self._manager.look()
        return made

    async def get(self, job_id: str) -> TrainingJob:
        """Raises UnknownJobError."""
        with storage_errors():
            return await self._threads.run(self._records.job, DEFAULT_TENANT, job_id)

    async def find(self, *, after: str | None, limit: int, labels: Mapping[str, str]) -> list[TrainingJob]:
        """Newest first. Raises UnknownJobError (`after`)."""
        with storage_errors():
            return await self._threads.run(
                self._records.jobs, DEFAULT_TENANT, after=after, limit=limit, labels=labels
            )

    async def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Those that are there, newest first. Raises UnknownJobError."""
        job = await self.get(job_id)
        with storage_errors():
            found = await self._threads.run(self._records.checkpoints, job)
        if not (job.state in OPEN_STATES or resumable(job)):
            return []  # it does not go on, and nothing is kept for that
        if job.server != self._home.server:
            return found
        return [one for one in found if self._home.checkpoint(job.id, one.path).is_dir()]

    # ---- how they go on ----------------------------------------------------------------------

    async def cancel(self, job_id: str) -> TrainingJob:
        """End it for good, also one that has failed and could go on.

        Raises UnknownJobError, ConflictError when it has ended or is being delivered.
        """
        failed: tuple[JobState, ...] = ("failed",) if resumable(await self.get(job_id)) else ()
        job = await self._move(
            job_id,
            "cancelled",
            ("validating_files", "queued", "running", "paused", *failed),
            "The job is cancelled.",
            "there is nothing left to cancel",
        )
        if job.server == self._home.server and not self._manager.has_run(job.id):
            await self._threads.run(self._home.forget, job.id)
        return job

    async def pause(self, job_id: str) -> TrainingJob:
        """Let go of the machine within a step; the job keeps its place. Raises as `cancel`.

        Returns when the process has ended and its last step and checkpoint are in the registry, if the job
        runs here and the process ends within LET_GO_SECONDS; the pause itself holds from the beginning.
        """
        job = await self._move(
            job_id,
            "paused",
            ("queued", "running"),
            "The job is to pause.",
            "only one that is queued or running can be paused",
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(LET_GO_SECONDS):
                job = await self._let_go(job)
        return job

    async def _let_go(self, job: TrainingJob) -> TrainingJob:
        """The job once it has no run here any more, or somebody has resumed it."""
        with self._watchers.watch(job.id) as news:
            while job.state == "paused" and self._manager.has_run(job.id):
                await news.wait()
                news.clear()
                job = await self.get(job.id)
            return await self.get(job.id)

    async def resume(self, job_id: str) -> TrainingJob:
        """Go on from the last checkpoint. Raises UnknownJobError, ConflictError."""
        self._check_on()
        job = await self.get(job_id)
        if job.state in ("queued", "running", "validating_files"):
            return job
        if not resumable(job):
            raise _conflict(job, "only a paused one, or one that failed for a passing reason, can be resumed")
        state: JobState = "queued" if job.plan else "validating_files"
        return await self._move(
            job_id, state, (job.state,), "The job is resumed.", "somebody else was faster", deaths=0
        )

    async def _move(
        self,
        job_id: str,
        state: JobState,
        among: tuple[JobState, ...],
        said: str,
        otherwise: str,
        **facts: Any,
    ) -> TrainingJob:
        job = await self.get(job_id)
        if job.state == state:
            return job  # asked for twice
        event = NewEvent(time.time(), said)
        with storage_errors():
            try:
                moved = await self._threads.run(
                    self._records.move, job_id, state, among, event, while_delivered=False, **facts
                )
            except JobStateError as error:
                if error.state == "running" and "running" in among:
                    otherwise = "its adapter is trained and being proved, which takes a moment"
                raise _conflict(job, otherwise, error.state) from error
        self._manager.look()
        self._watchers.notify(job_id)
        return moved

    def _check_on(self) -> None:
        if self._most == 0:
            raise ConflictError(
                "This server trains nothing: it was started with --train-jobs 0. Ask another one.",
                code="training_off",
            )

    # ---- what they tell ----------------------------------------------------------------------

    async def events(self, job_id: str, *, before: int | None, limit: int) -> list[TrainingEvent]:
        """Newest first. Raises UnknownJobError."""
        job = await self.get(job_id)
        with storage_errors():
            return await self._threads.run(self._records.events, job, before=before, limit=limit)

    async def follow(self, job: TrainingJob, after: int) -> AsyncIterator[TrainingEvent | TrainingJob | None]:
        """Every event newer than number `after`, oldest first, then the live ones; at the end the job itself.

        None comes when there was nothing for a while.
        """
        with self._watchers.watch(job.id) as news:
            while True:
                news.clear()
                # The state first: what is told before an end is read after it. A run that is being ended
                # may still tell something, though its job is cancelled.
                telling = self._manager.has_run(job.id)
                current = await self.get(job.id)
                with storage_errors():
                    found = await self._threads.run(self._records.events_since, job, after, MOST_EVENTS)
                for event in found:
                    after = event.number
                    yield event
                if len(found) == MOST_EVENTS:
                    continue
                if current.ended and not telling:
                    yield current
                    return
                if not found:
                    yield None
                await _wait(news, min(self._look_seconds, LIFE_SECONDS))


async def _wait(news: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await news.wait()


def _conflict(job: TrainingJob, why: str, state: str | None = None) -> ConflictError:
    return ConflictError(f"Job {job.id} is {state or job.state}: {why}.", code="job_state")
