"""Puts what a run says into the registry: often enough to be followed, seldom enough to cost nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from onebase_adapters.registry import Checkpoint, JobEvent, RegistryError, TrainingRecords, UnknownJobError
from onebase_adapters.training import events
from onebase_server.background import Threads
from onebase_server.jobs.event_view import told
from onebase_server.jobs.notifier import Watchers
from onebase_server.jobs.store import PAUSE_SECONDS

FLUSH_SECONDS = 0.5
MOST_KEPT = 10_000
"""Events that wait while the registry cannot be written; older ones are lost."""

_log = logging.getLogger(__name__)


class Recorder:
    """What one run said and is not written yet. `listen` from the event loop; `close` in any case."""

    def __init__(
        self,
        job_id: str,
        records: TrainingRecords,
        threads: Threads,
        watchers: Watchers,
        progress: Mapping[str, Any],
    ) -> None:
        self.job_id = job_id
        self.silent: tuple[type[events.Event], ...] = ()
        """Kinds of events that are not told again."""
        self.progress = dict(progress)
        self._records = records
        self._threads = threads
        self._watchers = watchers
        self._events: list[JobEvent] = []
        self._checkpoints: list[Checkpoint] = []
        self._changed, self._closing = asyncio.Event(), asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._keep_writing())

    def listen(self, event: events.Event) -> None:
        """Take an event of the run."""
        self._note_progress(event)
        made = None if isinstance(event, self.silent) else told(event)
        if made is not None:
            self._events.append(made)
        if isinstance(event, events.Saved):
            checkpoint = Checkpoint(event.step, event.path, event.at, self.progress.get("loss"), event.loss)
            self._checkpoints.append(checkpoint)
        self._changed.set()

    async def close(self, patient: Callable[[], bool]) -> None:
        """Write what is left; while the registry cannot be written, again and again as long as `patient`."""
        self._closing.set()
        self._changed.set()
        await self._task
        while not await self._write() and patient():
            await asyncio.sleep(PAUSE_SECONDS)

    async def _keep_writing(self) -> None:
        while not self._closing.is_set():
            await self._changed.wait()
            self._changed.clear()
            await self._write()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), FLUSH_SECONDS)

    async def _write(self) -> bool:
        """Whether nothing is left to write."""
        waiting, saved = len(self._events), len(self._checkpoints)
        if not self._events and not self._checkpoints and not self.progress:
            return True
        try:
            await self._threads.run(
                self._records.note,
                self.job_id,
                self._events[:waiting],
                self._checkpoints[:saved],
                progress=dict(self.progress),
            )
        except UnknownJobError:
            pass
        except RegistryError as error:
            _log.warning("job %s: %s", self.job_id, error)
            del self._events[:-MOST_KEPT]
            self._changed.set()
            return False
        del self._events[:waiting], self._checkpoints[:saved]
        self._watchers.notify(self.job_id)
        return True

    def _note_progress(self, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            self.progress |= {
                "step": event.step,
                "steps": event.steps,
                "loss": event.loss,
                "tokens": event.total_tokens,
                "tokens_per_second": event.tokens_per_second,
                "seconds_left": event.seconds_left,
                "memory_bytes": event.memory_bytes,
            }
        elif isinstance(event, events.Evaluated):
            self.progress |= {"eval_loss": event.loss}
        elif isinstance(event, events.Planned):
            self.progress |= {"step": event.first_step, "steps": event.steps}
        elif isinstance(event, events.Phase):
            self.progress |= {"phase": event.name, "part": None}
        elif isinstance(event, events.Progress):
            self.progress |= {"phase": event.name, "part": event.part}
