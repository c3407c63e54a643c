"""Record of one job in the registry, for the run that changes it, and those who follow the job."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from onebase_adapters.registry import (
    Checkpoint,
    FileRecord,
    JobElsewhereError,
    JobEvent,
    JobStateError,
    RegistryError,
    TrainingJob,
    TrainingRecords,
    UnknownFileError,
    UnknownJobError,
)
from onebase_edge.background import Backoff, Threads
from onebase_server.jobs.event_view import job_event
from onebase_server.jobs.state import Move
from onebase_training import events

BACKOFF = Backoff(0.5, 2.0)
"""Pause, in seconds, between tries while the registry cannot be reached."""
FLUSH_SECONDS = 0.5
"""Time, in seconds, between two writes of a run's messages."""
MAX_WAITING = 10_000
"""Events that wait while the registry cannot be written; older ones are lost."""
T = TypeVar("T")

_log = logging.getLogger(__name__)


class JobNotifier:
    """Wakes those who follow a job. For one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def notify(self, job_id: str) -> None:
        """Something new about the job is in the registry."""
        for event in self._waiting.get(job_id, ()):
            event.set()

    @contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        """Yield an event that each `notify` of this job sets."""
        event = asyncio.Event()
        self._waiting.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]


class JobRecord:
    """Reads and writes one job, for one run of it. Each write wakes those who follow the job.

    Once another server has taken the job over, reading and writing raise JobElsewhereError.

    `current`, `file`, `add` and `move` act at once. While the registry is away they wait: nobody else knows
    what has happened. What the run says is collected by `take` and written every FLUSH_SECONDS: soon enough
    to be followed, seldom enough to cost nothing. `close` writes what is left of it.
    """

    def __init__(
        self, job: TrainingJob, records: TrainingRecords, threads: Threads, notifier: JobNotifier
    ) -> None:
        self.retries = True
        """Whether to try again while the registry is away. If not, its error is raised, and `close` tries
        only once."""
        self.state = job.state
        """The state that the run has written last."""
        self.progress = dict(job.progress or {})
        """The newest figures of the run."""
        self._id = job.id
        self._tenant = job.tenant
        self._server = job.server
        self._records = records
        self._threads = threads
        self._notifier = notifier
        self._events: list[JobEvent] = []
        self._checkpoints: list[Checkpoint] = []
        self._changed, self._closing = asyncio.Event(), asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    async def current(self) -> TrainingJob:
        """Return the job as it is now. Raises UnknownJobError."""
        job = await self._try(self._records.job, self._tenant, self._id)
        if job.server != self._server:
            raise JobElsewhereError(f"Job {self._id} is run by another server now.")
        return job

    async def file(self, file_id: str) -> FileRecord:
        """Return one of the files that the job names. Raises RegistryError."""
        return await self._try(self._records.file, self._tenant, file_id)

    async def training_rates(self, limit: int) -> list[float]:
        """Return the speeds of the newest finished jobs of the base, FLOP/s."""
        return await self._try(self._records.training_rates, limit)

    async def add(self, *events: JobEvent) -> None:
        """Add events. Raises UnknownJobError."""
        await self._try(self._records.note, self._id, events, server=self._server)
        self._notifier.notify(self._id)

    async def move(self, move: Move, event: JobEvent | None = None, **facts: Any) -> TrainingJob:
        """Change the job's state, and fields of TrainingJob with it. Raises JobStateError: it has changed."""
        job: TrainingJob = await self._try(
            self._records.move,
            self._id,
            move.to,
            move.among,
            event,
            while_delivered=move.while_delivered,
            server=self._server,
            **facts,
        )
        self.state = job.state
        self._notifier.notify(self._id)
        return job

    async def _try(self, call: Callable[..., T], *args: Any, **facts: Any) -> T:
        for pause in BACKOFF.pauses():
            try:
                return await self._threads.run_blocking(call, *args, **facts)
            except (JobStateError, UnknownJobError, UnknownFileError):
                raise
            except RegistryError as error:
                if not self.retries:
                    raise
                _log.warning("job %s waits: %s", self._id, error)
            await asyncio.sleep(pause)
        raise AssertionError("there is a pause after each try")

    # ---- what the run says -------------------------------------------------------------------

    def record_event(self, event: events.Event) -> None:
        """Record an event of the run; `close` must follow."""
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._keep_writing())
        self.progress |= progress_of(event)
        made = job_event(event)
        if made is not None:
            self._events.append(made)
        if isinstance(event, events.Saved):
            loss = self.progress.get("loss")
            self._checkpoints.append(Checkpoint(event.step, event.path, event.at, loss, event.loss))
        self._changed.set()

    async def close(self) -> None:
        """Write what is left. Tries again while the registry cannot be written, if `retries`."""
        if self._writer is None:
            return
        self._closing.set()
        self._changed.set()
        await self._writer
        pauses = BACKOFF.pauses()
        while not await self._write() and self.retries:
            await asyncio.sleep(next(pauses))

    async def _keep_writing(self) -> None:
        while not self._closing.is_set():
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._write()
            except Exception:  # what comes next may be written; `close` raises what cannot be
                _log.exception("job %s: what it reports cannot be written now", self._id)
                del self._events[:-MAX_WAITING]
                self._changed.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), FLUSH_SECONDS)

    async def _write(self) -> bool:
        """Return True if nothing is left to write."""
        waiting, saved = len(self._events), len(self._checkpoints)
        if not waiting and not saved and not self.progress:
            return True
        try:
            await self._threads.run_blocking(
                self._records.note,
                self._id,
                self._events[:waiting],
                self._checkpoints[:saved],
                server=self._server,
                progress=dict(self.progress),
            )
        except UnknownJobError:
            pass
        except RegistryError as error:
            _log.warning("job %s: %s", self._id, error)
            del self._events[:-MAX_WAITING]
            self._changed.set()
            return False
        del self._events[:waiting], self._checkpoints[:saved]
        self._notifier.notify(self._id)
        return True


def progress_of(event: events.Event) -> dict[str, Any]:
    """Return the figures of a job's progress that an event changes."""
    if isinstance(event, events.StepDone):
        return {
            "step": event.step,
            "steps": event.steps,
            "loss": event.loss,
            "tokens": event.total_tokens,
            "tokens_per_second": event.tokens_per_second,
            "seconds_left": event.seconds_left,
            "memory_bytes": event.memory_bytes,
        }
    if isinstance(event, events.Evaluated):
        return {} if event.parent or event.active else {"eval_loss": event.loss}
    if isinstance(event, events.Planned):
        return {"step": event.first_step, "steps": event.steps}
    if isinstance(event, events.Phase):
        return {"phase": event.name, "part": None}
    if isinstance(event, events.StageProgress):
        return {"phase": event.name, "part": event.part}
    return {}
