"""Follows the jobs in the registry: starts what waits, stops what was stopped, resumes what was interrupted.

The registry says what is to be; the scheduler makes it so. A new job, a pause or a cancellation, whichever
server took it, is written there first, and seen here at once or at the next look.
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
    UnknownJobError,
)
from onebase_engine.engine.messages import EngineConfig
from onebase_server.jobs.folders import GarbageCollector
from onebase_server.jobs.job_run import STOP_SECONDS, AttachedBase, Run, RunKind, TrainerPool
from onebase_server.jobs.state import REQUEUED, STARTED, Move, resume_point

_log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 15.0
"""The same limit, when the server stops."""
SWEEP_SECONDS = 3600.0
"""From one sweep of the jobs' folders to the next."""


class JobScheduler:
    """Runs this server's jobs, `most` at a time, oldest first. Called from one event loop.

    Files are checked by processes of their own, one at a time, also while jobs run.
    """

    def __init__(
        self, pool: TrainerPool, *, most: int, look_seconds: float, sweep_seconds: float = SWEEP_SECONDS
    ) -> None:
        self._pool = pool
        self._records = pool.records
        self._threads = pool.threads
        self._most = most
        self._look_seconds = look_seconds
        self._sweep_seconds = sweep_seconds
        self._next_sweep = 0.0
        self._runs: dict[str, Run] = {}
        self._garbage = GarbageCollector(
            self._records, self._threads, pool.files.disk, pool.folders, pool.checkpoints
        )
        self._known: dict[str, str] = {}
        """Tenants, by job id, of the jobs that were open or had a process at the last look."""
        self._begun: set[str] = set()
        """Jobs that had a run since the server started."""
        self._noted_disabled: set[str] = set()
        self._base: AttachedBase | None = None
        self._changed = asyncio.Event()
        self._ending = False

    # ---- the base ----------------------------------------------------------------------------

    def base_ready(self, config: EngineConfig, manifest: bytes, base_fd: int) -> None:
        """There is a base to train on. The caller owns `base_fd` and keeps it open until `engine_gone`."""
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

    async def follow(self) -> None:
        """Do what the registry says, whatever fails, until cancelled."""
        while not self._own():
            await asyncio.sleep(self._look_seconds)
        while not self._ending:
            self._changed.clear()
            try:
                await self._sweep_if_due()
                jobs = await self._threads.run(self._records.open_jobs, self._pool.folders.server)
                await self._reconcile(jobs)
                await self._collect_garbage(jobs)
            except (RegistryError, OSError) as error:
                _log.warning("training jobs cannot be followed: %s", error)
            except Exception:
                _log.exception("training jobs cannot be followed")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look_seconds):  # wait_for could miss being cancelled
                    await self._changed.wait()

    def _own(self) -> bool:
        """Whether this process runs the jobs of the folder; the log says why not."""
        root = self._pool.folders.root
        try:
            if self._pool.folders.own():
                return True
            _log.warning("another process runs the training jobs of %s; waiting", root)
        except OSError as error:
            _log.error("no training job of %s can be run: %s (--data-dir); waiting", root, error)
        return False

    async def _sweep_if_due(self) -> None:
        if time.monotonic() >= self._next_sweep:
            await self._garbage.sweep(self._runs)
            await self._pool.files.take_over()
            self._next_sweep = time.monotonic() + self._sweep_seconds

    async def forget(self, job_id: str) -> None:
        """Delete what a job that is over, and has no run, has left."""
        await self._garbage.forget(job_id)

    async def stop(self) -> None:
        """Let trainers write a checkpoint and end; their jobs are queued for the next start."""
        self._ending = True
        runs = list(self._runs.values())
        for run in runs:
            run.interrupt("the server stops", SHUTDOWN_SECONDS)
        await asyncio.gather(*(run.ended() for run in runs))

    @property
    def deaths(self) -> int:
        """Trainers that died without being stopped."""
        return self._pool.deaths

    @property
    def running(self) -> Sequence[Run]:
        """The runs of now."""
        return list(self._runs.values())

    def has_run(self, job_id: str) -> bool:
        """Whether the job has a run here, perhaps one that is about to end."""
        return job_id in self._runs

    async def _reconcile(self, jobs: Sequence[OpenJob]) -> None:
        """`jobs`: those in the registry that are open, oldest first."""
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
            elif job.state == "queued" and self._base is not None and self._count("train") < self._most:
                await self._begin(job, "train")

    async def _note_disabled(self, waiting: Sequence[OpenJob]) -> None:
        """Tell each job once why nothing happens."""
        text = "The server was started with --train-jobs 0: the job waits until it is started with more."
        for job in waiting:
            if job.id not in self._noted_disabled:
                await self._threads.run(self._records.note, job.id, [JobEvent(time.time(), text, "warn")])
                self._noted_disabled.add(job.id)
                self._pool.notifier.notify(job.id)

    async def _collect_garbage(self, jobs: Sequence[OpenJob]) -> None:
        """Delete what jobs leave that have ended since the last look, whichever server ended them."""
        open_jobs = {run.job.id: run.job.tenant for run in self._runs.values()}
        open_jobs |= {job.id: job.tenant for job in jobs}
        self._known |= open_jobs
        for job_id in self._known.keys() - open_jobs.keys():
            await self._garbage.job_over(self._known[job_id], job_id)
            del self._known[job_id]

    async def _begin(self, seen: OpenJob, kind: RunKind) -> None:
        job = await self._threads.run(self._records.job, seen.tenant, seen.id)
        if job.state != seen.state or self._ending or (kind == "train" and self._base is None):
            return
        self._begun.add(job.id)
        run = self._runs[job.id] = Run(self._pool, job, kind, self._base)
        run.begin()

        def forget(_task: asyncio.Task[None]) -> None:
            self._runs.pop(job.id, None)
            self._pool.notifier.notify(job.id)
            self.look()

        run.task.add_done_callback(forget)

    def _count(self, kind: RunKind) -> int:
        return sum(run.kind == kind and not run.delivering for run in self._runs.values())

    async def _stop_run(self, job_id: str, run: Run) -> None:
        if run.stopping:
            return
        with suppress(UnknownJobError):
            job = await self._threads.run(self._records.job, run.job.tenant, job_id)
            if job.state in ("paused", "queued"):
                run.stop("pause", STOP_SECONDS)
            elif job.state == "cancelled":
                run.stop("cancel", 0.0)

    async def _requeue(self, job: OpenJob) -> None:
        """Let a job go on whose run ended without writing how."""
        began_here = job.id in self._begun
        why = "The registry was away" if began_here else "The server was started again"
        event = JobEvent(time.time(), f"{why}; the job goes on {resume_point(job)}.")
        await self._move(job, REQUEUED, event)
        self.look()

    async def _move(self, job: OpenJob, move: Move, event: JobEvent | None = None) -> None:
        with suppress(JobStateError, UnknownJobError):
            await self._threads.run(self._records.move, job.id, move.to, move.among, event)
            self._pool.notifier.notify(job.id)
