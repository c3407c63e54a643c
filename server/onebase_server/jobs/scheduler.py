"""Follows the jobs in the registry: starts what waits, stops what was stopped, resumes what was interrupted.

The registry says what is to be; the scheduler makes it so. A new job, a pause or a cancellation, whichever
server took it, is written there first, and seen here at once or at the next look.

Of several servers on a registry and a store, the one with most trainers free trains a job. Another takes it
over when its server does not renew its lease any more, and continues from what the store has of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from onebase_adapters.registry import (
    JobEvent,
    JobStateError,
    OpenJob,
    RegistryError,
    ServerIdInUseError,
    TakeableJob,
    TrainingJob,
    UnknownJobError,
)
from onebase_adapters.store.store import StoreError
from onebase_engine.engine.messages import EngineConfig
from onebase_protocol.training import TrainingFailure
from onebase_server.jobs.folders import GarbageCollector
from onebase_server.jobs.job_run import STOP_SECONDS, AttachedBase, JobRun, RunKind, TrainerPool
from onebase_server.jobs.state import FAILED, MAX_DEATHS, REQUEUED, STARTED, Move, resume_point
from onebase_server.tenancy.peers import Peers

_log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 15.0
"""The same limit, when the server stops."""
LEASE_LOST_SECONDS = 5.0
"""The same limit, when another server may soon resume the job."""
LEFT_SECONDS = 5.0
"""Time, in seconds, for which a waiting job is left to a server with more free trainers before it begins
here."""
NOT_HERE_SECONDS = 60.0
"""Time, in seconds, between two looks for the files of another server's job that the store did not have."""
SWEEP_SECONDS = 3600.0
"""Time, in seconds, between two sweeps of the jobs' folders."""


class JobScheduler:
    """Runs this server's jobs, `most` at a time, oldest first. Called from one event loop.

    Files are checked by processes of their own, one at a time, also while jobs run.
    """

    def __init__(
        self,
        pool: TrainerPool,
        peers: Peers,
        *,
        most: int,
        look_seconds: float,
        sweep_seconds: float = SWEEP_SECONDS,
    ) -> None:
        self._pool = pool
        self._peers = peers
        self._records = pool.records
        self._threads = pool.threads
        self._most = most
        self._look_seconds = look_seconds
        self._sweep_seconds = sweep_seconds
        self._next_sweep = 0.0
        self._runs: dict[str, JobRun] = {}
        self._garbage = GarbageCollector(
            self._records, self._threads, pool.files.disk, pool.folders, pool.checkpoints, pool.kept
        )
        self._known: dict[str, str] = {}
        """Tenants, by job id, of the jobs that were open or had a process at the last look."""
        self._begun: set[str] = set()
        """Jobs that had a run since the server started."""
        self._noted_disabled: set[str] = set()
        self._left: dict[str, float] = {}
        """Time until which a waiting job is left to a server that has more room, by the job's id."""
        self._not_here: dict[str, float] = {}
        """Time until which another server's job is left alone because this store lacks its files, by the
        job's id."""
        self._base: AttachedBase | None = None
        self._changed = asyncio.Event()
        self._ending = False

    # ---- the base ----------------------------------------------------------------------------

    def base_ready(self, config: EngineConfig, manifest: bytes, base_fd: int) -> None:
        """Record that there is a base to train on. The caller owns `base_fd` and keeps it open until
        `engine_gone`."""
        self._base = AttachedBase(config, manifest, base_fd)
        self.look()

    async def engine_gone(self) -> None:
        """End the trainers: their base is the engine's memory. Their jobs wait for the next engine."""
        self._base = None
        runs = [run for run in self._runs.values() if run.holds_base]
        for run in runs:
            run.interrupt("the engine ended", 0.0)
        await asyncio.gather(*(run.released() for run in runs))

    # ---- following the registry ----------------------------------------------------------------

    def look(self) -> None:
        """Something has changed in the registry."""
        self._changed.set()

    async def claim(self) -> bool:
        """Return True once this process runs the jobs of its data folder; False if another one on the folder
        does, its lock cannot be opened, or the registry takes no lease.

        Raises ServerIdInUseError: a process with a copy of the folder runs them.
        """
        folders = self._pool.folders
        try:
            if not folders.own():
                _log.warning("another process runs the training jobs of %s; waiting", folders.root)
                return False
            await self._peers.claim(room=self.room())
        except ServerIdInUseError:
            raise
        except RegistryError as error:
            _log.warning("no training job of %s can be run, waiting: %s", folders.root, error)
            return False
        except OSError as error:
            _log.error("no training job of %s can be run: %s (--data-dir); waiting", folders.root, error)
            return False
        return True

    async def follow(self) -> None:
        """Do what the registry says, whatever fails, until cancelled. Raises ServerIdInUseError."""
        while not await self.claim():
            await asyncio.sleep(self._look_seconds)
        while not self._ending:
            if self._peers.conflict is not None:
                await self._abandon_runs()
                raise self._peers.conflict
            self._changed.clear()
            try:
                await self._sweep_if_due()
                jobs = await self._threads.run_blocking(self._records.open_jobs, self._pool.folders.server)
                await self._reconcile(jobs)
                await self._collect_garbage(jobs)
                if self._peers.have_been:
                    await self._take_over()
                self._peers.report_room(self.room())
                self._pool.kept.look()
            except (RegistryError, OSError) as error:
                _log.warning("training jobs cannot be followed: %s", error)
            except Exception:
                _log.exception("training jobs cannot be followed")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look_seconds):  # wait_for could miss being cancelled
                    await self._changed.wait()

    async def _abandon_runs(self) -> None:
        """Kill the trainers, and leave their jobs' states to the process that runs these jobs now."""
        runs = list(self._runs.values())
        for run in runs:
            run.stop("cancel", 0.0)
        await asyncio.gather(*(run.ended() for run in runs))

    async def _sweep_if_due(self) -> None:
        if time.monotonic() >= self._next_sweep:
            await self._garbage.sweep(self._runs)
            self._next_sweep = time.monotonic() + self._sweep_seconds

    async def forget(self, job_id: str) -> None:
        """Delete the files of a job that has ended and has no run."""
        await self._garbage.forget(job_id)

    async def stop(self) -> None:
        """Let trainers write a checkpoint and end; their jobs are queued for the next start."""
        self._ending = True
        runs = list(self._runs.values())
        for run in runs:
            run.interrupt("the server stops", SHUTDOWN_SECONDS)
        try:
            await asyncio.gather(*(run.ended() for run in runs))
        finally:
            await self._pool.kept.finish(SHUTDOWN_SECONDS)

    @property
    def deaths(self) -> int:
        """Trainers that died without being stopped."""
        return self._pool.deaths

    @property
    def running(self) -> Sequence[JobRun]:
        """The runs of now."""
        return list(self._runs.values())

    @property
    def runs_jobs(self) -> bool:
        """Return True if this process runs the jobs of its data folder."""
        return self._pool.folders.is_owned

    def room(self) -> int:
        """Return the number of trainers that could start now."""
        return 0 if self._base is None or self._ending else max(0, self._most - self._count("train"))

    def has_run(self, job_id: str) -> bool:
        """Return True if the job has a run here, perhaps one that is about to end."""
        return job_id in self._runs

    async def _reconcile(self, jobs: Sequence[OpenJob]) -> None:
        """Start, stop and resume runs by the registry's open jobs (`jobs`, oldest first)."""
        states = {job.id: job for job in jobs}
        for job_id, run in list(self._runs.items()):
            job = states.get(job_id)
            if job is None:
                await self._stop_run(job_id, run)
            elif job.state == "queued" and run.computes:
                await self._move(job, STARTED)  # paused and resumed before the scheduler looked
            elif job.last_step is not None:
                run.end_after(job.last_step)
        waiting = [job for job in jobs if job.id not in self._runs]
        for job in waiting:
            if job.state == "running":
                await self._requeue(job)
        if any(job.state == "running" for job in waiting):
            return  # they keep their place before the jobs that wait
        if self._most == 0:
            await self._note_disabled(waiting)
            return
        for job in waiting:
            if self._ending:
                return
            if job.state == "validating_files" and not self._count("check"):
                await self._begin(job, "check")
            elif job.state == "queued" and self.room() and not self._leave(job):
                await self._begin(job, "train")

    # ---- other servers -----------------------------------------------------------------------

    def _leave(self, job: OpenJob) -> bool:
        """Return True if a job is left for now to a server that has more room, and will take it."""
        if not self._peers.holds_lease:
            return True
        if self._peers.most_room <= self.room() or not job.is_movable:
            return False
        return time.monotonic() < self._left.setdefault(job.id, time.monotonic() + LEFT_SECONDS)

    async def _take_over(self) -> None:
        """Take over the oldest job that another server leaves to this one, if there is room for it."""
        room, takeovers, here = self.room(), self._pool.kept.takeovers, self._pool.folders.server
        if not room or not self._peers.holds_lease:
            return
        for job in await self._threads.run_blocking(takeovers.takeable, here, room):
            if job.id in self._runs or not await self._has_files_of(job):
                continue
            await self._pool.files.disk.run_blocking(
                self._pool.folders.forget, job.id
            )  # of when it was here before
            with suppress(UnknownJobError):  # another was faster
                taken = await self._threads.run_blocking(
                    takeovers.take_job, job.id, job.server, here, room, _taken_over
                )
                self._pool.notifier.notify(job.id)
                _log.warning("job %s is taken over from %s", job.id, job.server)
                if taken.deaths > MAX_DEATHS:
                    await self._fail_deadly(taken)
                self.look()
                return

    async def _has_files_of(self, job: TakeableJob) -> bool:
        """Return True if the job's files are in this server's store. If not, it has another one; the log says
        so."""
        if time.monotonic() < self._not_here.get(job.id, 0.0):
            return False
        files = [job.training_file, *([job.validation_file] if job.validation_file else [])]
        try:
            found = [await self._pool.files.is_stored(job.tenant, file) for file in files]
            kept = await self._threads.run_blocking(self._pool.kept.takeovers.kept, job.id)
            store, run = self._pool.files.store, self._pool.files.disk.run_blocking
            found += [await run(store.exists, sha256) for sha256 in kept.values()]
        except StoreError as error:
            _log.info("job %s is not taken over: %s", job.id, error)
            return False
        if not all(found):
            now = time.monotonic()
            self._not_here = {one: until for one, until in self._not_here.items() if until > now}
            self._not_here[job.id] = now + NOT_HERE_SECONDS
            _log.warning("job %s is not taken over: this server's --store has not all its files", job.id)
        return all(found)

    async def _fail_deadly(self, job: TrainingJob) -> None:
        message = (
            f"The servers that ran the job went away {job.deaths} times without reaching a checkpoint. "
            "Their logs may say more. The job can be resumed."
        )
        event = JobEvent(time.time(), message, level="error", data={"code": "trainer_died"})
        with suppress(JobStateError, UnknownJobError):
            failed = TrainingFailure("trainer_died", message)
            await self._threads.run_blocking(
                self._records.move, job.id, FAILED.to, FAILED.among, event, server=job.server, error=failed
            )

    def lease_lost(self) -> None:
        """End the trainers: another server may soon resume their jobs."""
        for run in self._runs.values():
            if not run.stopping:
                run.interrupt("the registry could not be reached in time", LEASE_LOST_SECONDS)

    async def _note_disabled(self, waiting: Sequence[OpenJob]) -> None:
        """Notify each waiting job once that this server trains nothing."""
        text = "The server was started with --train-jobs 0: the job waits for one that trains."
        for job in waiting:
            if job.id not in self._noted_disabled:
                events = [JobEvent(time.time(), text, "warn")]
                with suppress(UnknownJobError):
                    await self._threads.run_blocking(
                        self._records.note, job.id, events, server=self._pool.folders.server
                    )
                self._noted_disabled.add(job.id)
                self._pool.notifier.notify(job.id)

    async def _collect_garbage(self, jobs: Sequence[OpenJob]) -> None:
        """Delete what jobs leave that have ended since the last look, whichever server ended them."""
        open_jobs = {run.job.id: run.job.tenant for run in self._runs.values()}
        open_jobs |= {job.id: job.tenant for job in jobs}
        self._known |= open_jobs
        self._left = {job_id: until for job_id, until in self._left.items() if job_id in open_jobs}
        self._noted_disabled &= open_jobs.keys()
        for job_id in self._known.keys() - open_jobs.keys():
            await self._garbage.job_over(self._known[job_id], job_id)
            del self._known[job_id]

    async def _begin(self, seen: OpenJob, kind: RunKind) -> None:
        job = await self._threads.run_blocking(self._records.job, seen.tenant, seen.id)
        is_same = job.state == seen.state and job.server == self._pool.folders.server
        if not is_same or self._ending or (kind == "train" and self._base is None):
            return
        self._left.pop(job.id, None)
        self._begun.add(job.id)
        run = self._runs[job.id] = JobRun(self._pool, job, kind, self._base)
        run.begin()

        def forget(_task: asyncio.Task[None]) -> None:
            self._runs.pop(job.id, None)
            self._pool.notifier.notify(job.id)
            self.look()

        run.task.add_done_callback(forget)

    def _count(self, kind: RunKind) -> int:
        return sum(run.kind == kind and not run.delivering for run in self._runs.values())

    async def _stop_run(self, job_id: str, run: JobRun) -> None:
        if run.stopping:
            return
        with suppress(UnknownJobError):
            job = await self._threads.run_blocking(self._records.job, run.job.tenant, job_id)
            if job.server != self._pool.folders.server:
                _log.warning("job %s was taken over by %s: its trainer here ends", job_id, job.server)
                run.stop("cancel", 0.0)
            elif job.state in ("paused", "queued"):
                run.stop("pause", STOP_SECONDS)
            elif job.state == "cancelled":
                run.stop("cancel", 0.0)

    async def _requeue(self, job: OpenJob) -> None:
        """Let a job continue whose run ended without writing how."""
        began_here = job.id in self._begun
        why = "The registry was away" if began_here else "The server was started again"
        event = JobEvent(time.time(), f"{why}; the job continues {resume_point(job)}.")
        await self._move(job, REQUEUED, event)
        self.look()

    async def _move(self, job: OpenJob, move: Move, event: JobEvent | None = None) -> None:
        with suppress(JobStateError, UnknownJobError):
            await self._threads.run_blocking(
                self._records.move, job.id, move.to, move.among, event, server=self._pool.folders.server
            )
            self._pool.notifier.notify(job.id)


def _taken_over(job: TrainingJob) -> JobEvent:
    """Return the event of a job that has changed its server."""
    resumed = f"resumed at step {job.saved_step}" if job.saved_step else "begun again"
    if job.state == "validating_files" or not job.started_at:
        resumed = "where it waits for its turn" if job.state == "queued" else "which checks its files"
    if job.trained:
        resumed = "which proves its adapter"
    data = {"kind": "taken_over", "step": job.saved_step}
    return JobEvent(time.time(), f"Taken over by another server, {resumed}.", data=data)
