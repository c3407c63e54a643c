"""Creating, pausing, resuming, stopping and cancelling jobs for users, and following their events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from onebase_adapters.registry import (
    OPEN_STATES,
    Checkpoint,
    JobEvent,
    JobStateError,
    JobStop,
    NewJob,
    ParentVersion,
    Tenants,
    TrainingJob,
    TrainingRecords,
    current_origin,
)
from onebase_edge.background import Threads
from onebase_edge.errors import StateConflictError
from onebase_protocol.training import Activate
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders
from onebase_server.jobs.job_record import JobNotifier
from onebase_server.jobs.scheduler import JobScheduler
from onebase_server.jobs.state import (
    PAUSED,
    Move,
    cancelled,
    is_resumable,
    resumed,
    steps_done,
    stopping,
)
from onebase_server.storage.calls import storage_errors
from onebase_training.recipe import Recipe

LIFE_SECONDS = 15.0
"""Seconds within which a follower of a job always gets something."""
LET_GO_SECONDS = 30.0
"""The answer to a pause waits this long for the end of the job's process."""
MOST_EVENTS = 500
"""Events that are read at once for a follower."""


def new_job_id() -> str:
    """Return an id for a job that is to be created."""
    return f"ftjob-{secrets.token_hex(12)}"


def default_name(job_id: str) -> str:
    """Return the adapter's name of a job that names none."""
    return f"ft-{job_id.removeprefix('ftjob-')[:8]}"


class JobService:
    """The jobs of this server's registry. For one event loop. Every method may raise UnavailableError."""

    def __init__(
        self,
        records: TrainingRecords,
        tenants: Tenants,
        threads: Threads,
        files: TrainingFiles,
        folders: JobFolders,
        scheduler: JobScheduler,
        notifier: JobNotifier,
        *,
        most: int,
        look_seconds: float,
    ) -> None:
        self._records = records
        self._tenants = tenants
        self._threads = threads
        self._files = files
        self._folders = folders
        self._scheduler = scheduler
        self._notifier = notifier
        self._most = most
        self._look_seconds = look_seconds

    async def create(
        self,
        tenant: str,
        recipe: Recipe,
        *,
        training_file: str,
        validation_file: str | None,
        job_id: str,
        name: str,
        activate: Activate,
        labels: Mapping[str, str],
        parent: ParentVersion | None = None,
        hold: bool = False,
    ) -> TrainingJob:
        """Create a job. It begins when its turn comes, also after a restart.

        Args:
            parent: the version that training continues from; the recipe has its settings.
            hold: pause once the files are checked and the estimate is there, until `resume`.
            job_id: made by `new_job_id`.
            name: of the adapter that gets the result as a version.

        Raises InvalidRequestError (a file that cannot be used), StateConflictError (no jobs are run here),
        QuotaExceededError.
        """
        self._check_on()
        await self._files.usable(tenant, training_file, "training_file")
        if validation_file is not None:
            await self._files.usable(tenant, validation_file, "validation_file")
        job = NewJob(
            id=job_id,
            tenant=tenant,
            server=self._folders.server,
            name=name,
            training_file=training_file,
            validation_file=validation_file,
            activate=activate,
            settings=recipe.to_json(),
            labels=labels,
            parent=parent,
            hold=hold,
        )
        event = JobEvent(time.time(), "The job is created; its files are checked.")
        with storage_errors():
            made = await self._threads.run_blocking(self._records.add_job, job, event)
        self._scheduler.look()
        return made

    async def get(self, tenant: str, job_id: str) -> TrainingJob:
        """Raises JobNotFoundError."""
        with storage_errors():
            return await self._threads.run_blocking(self._records.job, tenant, job_id)

    async def find(
        self, tenant: str, *, after: str | None, limit: int, labels: Mapping[str, str]
    ) -> list[TrainingJob]:
        """Newest first. Raises JobNotFoundError (`after`)."""
        with storage_errors():
            return await self._threads.run_blocking(
                self._records.jobs, tenant, after=after, limit=limit, labels=labels
            )

    async def checkpoints(self, tenant: str, job_id: str) -> list[Checkpoint]:
        """Return the checkpoints that exist, newest first. Raises JobNotFoundError."""
        job = await self.get(tenant, job_id)
        with storage_errors():
            found = await self._threads.run_blocking(self._records.checkpoints, job)
        if not (job.state in OPEN_STATES or is_resumable(job.state, job.error_code)):
            return []  # it does not continue, and nothing is stored for that
        if job.server != self._folders.server:
            return found
        return [one for one in found if self._folders.checkpoint(job.id, one.path).is_dir()]

    # ---- pause and resume --------------------------------------------------------------------

    async def cancel(self, tenant: str, job_id: str) -> TrainingJob:
        """End a job for good, even one that has failed and could be resumed.

        Raises JobNotFoundError, StateConflictError when it has ended or is being delivered.
        """
        found = await self.get(tenant, job_id)
        job = await self._move(
            found, cancelled(found), "The job is cancelled.", "there is nothing left to cancel"
        )
        if job.server == self._folders.server and not self._scheduler.has_run(job.id):
            await self._scheduler.forget(job.id)
        return job

    async def pause(self, tenant: str, job_id: str) -> TrainingJob:
        """Stop the job within a step; it keeps its place. Raises as `cancel`.

        The pause holds at once. If the job runs here, the answer waits, LET_GO_SECONDS at most, until its
        process has ended and its last step and checkpoint are in the registry.
        """
        job = await self._move(
            await self.get(tenant, job_id),
            PAUSED,
            "The job is to pause.",
            "only one that is queued or running can be paused",
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(LET_GO_SECONDS):
                job = await self._wait_for_release(job)
        return job

    async def _wait_for_release(self, job: TrainingJob) -> TrainingJob:
        """Return the job once its run here has ended, or somebody has resumed it."""
        with self._notifier.watch(job.id) as news:
            while job.state == "paused" and self._scheduler.has_run(job.id):
                await news.wait()
                news.clear()
                job = await self.get(job.tenant, job.id)
            return await self.get(job.tenant, job.id)

    async def resume(self, tenant: str, job_id: str) -> TrainingJob:
        """Continue from the last checkpoint; start, if the job was created on hold.

        Raises JobNotFoundError, StateConflictError, QuotaExceededError.
        """
        self._check_on()
        job = await self.get(tenant, job_id)
        if job.state == "validating_files" and job.hold:
            raise _conflict(job, "it waits for a resume once its files are checked; send this again then")
        if job.state in OPEN_STATES:
            return job
        if not is_resumable(job.state, job.error_code):
            raise _conflict(job, "only a paused one, or one that failed for a passing reason, can be resumed")
        await self._check_quota(job)
        return await self._move(
            job, resumed(job), "The job is resumed.", _CHANGED, hold=job.hold and not job.plan, deaths=0
        )

    async def stop(self, tenant: str, job_id: str) -> TrainingJob:
        """End training at the job's next step, and keep what was best, as at its own end.

        A job that is paused, or that failed and could be resumed, continues for that alone.

        Raises JobNotFoundError, QuotaExceededError; StateConflictError: it has no step done, or has ended.
        """
        self._check_on()
        job = await self.get(tenant, job_id)
        waits = is_resumable(job.state, job.error_code)
        if job.stop is not None and job.state in (*OPEN_STATES, "succeeded"):
            return job
        if job.state not in OPEN_STATES and not waits:
            raise _conflict(job, "there is nothing left to stop")
        if job.trained:
            raise _conflict(job, f"its adapter is trained; {_RESUME_IT if waits else _PROVED_NOW}")
        if not (done := steps_done(job)):
            raise _conflict(
                job, "it has no step done of which something could be kept; cancel it, or let it train first"
            )
        await self._check_quota(job)
        stop = job.stop or JobStop(done, current_origin().key, time.time())
        message = "The job is to stop: training ends at its next step, and what is best by then is kept."
        return await self._move(job, stopping(job), message, _CHANGED, stop=stop, deaths=0)

    async def _check_quota(self, job: TrainingJob) -> None:
        """Raises QuotaExceededError: a job that is to continue could not train."""
        if job.state not in OPEN_STATES and not job.trained:
            with storage_errors():
                await self._threads.run_blocking(self._tenants.check_training, job.tenant)

    async def _move(
        self, job: TrainingJob, move: Move, message: str, otherwise: str, **facts: Any
    ) -> TrainingJob:
        """Make the move, which a user asked for. `otherwise`: why it is not possible in another state."""
        if job.state == move.to and not facts:
            return job  # asked for twice
        event = JobEvent(time.time(), message)
        with storage_errors():
            try:
                moved = await self._threads.run_blocking(
                    self._records.move,
                    job.id,
                    move.to,
                    move.among,
                    event,
                    while_delivered=move.while_delivered,
                    **facts,
                )
            except JobStateError as error:
                if error.state == "running" and "running" in move.among:
                    otherwise = f"its adapter is trained; {_PROVED_NOW}"
                raise _conflict(job, otherwise, error.state) from error
        self._scheduler.look()
        self._notifier.notify(job.id)
        return moved

    def _check_on(self) -> None:
        if self._most == 0:
            raise StateConflictError(
                "This server trains nothing: it was started with --train-jobs 0. Ask another one.",
                code="training_off",
            )

    # ---- what they say ----------------------------------------------------------------------

    async def events(self, tenant: str, job_id: str, *, before: int | None, limit: int) -> list[JobEvent]:
        """Newest first. Raises JobNotFoundError."""
        job = await self.get(tenant, job_id)
        with storage_errors():
            return await self._threads.run_blocking(self._records.events, job, before=before, limit=limit)

    async def follow(self, job: TrainingJob, after: int) -> AsyncIterator[JobEvent | TrainingJob | None]:
        """Yield every event newer than number `after`, oldest first, then the live ones; at the end the job
        itself.

        None comes when there was nothing for a while.
        """
        with self._notifier.watch(job.id) as news:
            while True:
                news.clear()
                # The state first: what is said before an end is read after it. A run that is being ended may
                # still say something, though its job is cancelled.
                has_run = self._scheduler.has_run(job.id)
                current = await self.get(job.tenant, job.id)
                with storage_errors():
                    found = await self._threads.run_blocking(
                        self._records.events_since, job, after, MOST_EVENTS
                    )
                for event in found:
                    after = event.number
                    yield event
                if len(found) == MOST_EVENTS:
                    continue
                if current.ended and not has_run:
                    yield current
                    return
                if not found:
                    yield None
                await _wait(news, min(self._look_seconds, LIFE_SECONDS))


_PROVED_NOW = "it is being proved, which takes a moment"
_RESUME_IT = "resume the job to have it proved"
_CHANGED = "its state has just changed; look at it again"


async def _wait(news: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await news.wait()


def _conflict(job: TrainingJob, why: str, state: str | None = None) -> StateConflictError:
    return StateConflictError(f"Job {job.id} is {state or job.state}: {why}.", code="job_state")
