"""The api's side of live adapters: it accepts operations, and keeps a trainer running that does them."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from onebase_edge.background import Backoff, Threads, keep_running
from onebase_engine.engine.messages import EngineConfig
from onebase_engine.environment import behind_serving
from onebase_engine.machine import niceness_for
from onebase_server.processes.link import ChildProcess
from onebase_server.processes.live_protocol import (
    Done,
    FromLive,
    LiveFailed,
    LiveReady,
    Look,
    StartLive,
    StopLive,
    from_live_decoder,
)
from onebase_server.processes.trainer_client import ENVIRONMENT
from onebase_training.live_operations import ModelSpec, Operation, Result
from onebase_training.live_store import LiveStore, ModelRefusedError

LIVE_COMMAND = (sys.executable, "-m", "onebase_server.processes", "live")
MAX_DEATHS = 3
"""Deaths of the trainer during one operation, or while a model is made, after which it is refused."""
RESTARTS = Backoff(0.2, 30.0)
"""Pauses, in seconds, before a trainer that died is started again."""
STOP_SECONDS = 15.0
"""Time, in seconds, in which the trainer may write its models to the disk when the server stops."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveSettings:
    """Settings of the trainer of live adapters.

    share: part of the time for it while sequences run. memory: bytes for all models, 0 for a part of what is
    free. busy_fd: file descriptor of the byte that says whether sequences run.
    """

    base_name: str
    base_commit: str | None
    share: float
    memory: int
    busy_fd: int
    command: Sequence[str] = LIVE_COMMAND


@dataclass(frozen=True)
class _Base:
    config: EngineConfig
    manifest: bytes
    fd: int


class LiveTrainer:
    """Live adapters of one server. Made and called in one event loop.

    What `create` and `submit` accepted is on the disk, and is done once, whatever dies meanwhile. A trainer
    runs from the first model on, while there is a base.
    """

    def __init__(self, store: LiveStore, disk: Threads, settings: LiveSettings) -> None:
        self.store = store
        self._disk = disk
        self._settings = settings
        self._creating = asyncio.Lock()
        self._base: _Base | None = None
        self._child: ChildProcess | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._waiters: dict[tuple[str, int], set[asyncio.Event]] = {}
        """One event for each call that waits for a result; number 0: for the model itself."""
        self._deaths: Counter[tuple[str, int]] = Counter()
        self._ready = False
        self._stopping = False

    # ---- requests ------------------------------------------------------------------------------

    async def create(self, spec: ModelSpec, files: Mapping[str, Path] = MappingProxyType({})) -> None:
        """Accept a model. The same one may come again.

        files: those of the version that it begins with, by name; none: it begins with the base.

        Raises SequenceConflictError, ModelRefusedError: its owner has too many; OSError.
        """
        async with self._creating:  # which holds one thread, however many are created
            await self._disk.run_blocking(self.store.create, spec, files)
        self._start()
        self._look(spec.id)

    async def created(self, model_id: str, timeout: float) -> bool:
        """Return True once the model is made; False if it is not yet after `timeout` seconds.

        Raises UnknownModelError; ModelRefusedError: it cannot be made.
        """
        end = time.monotonic() + timeout
        with self._waiting_for(model_id, 0) as event:
            while True:
                event.clear()
                made = await self._disk.run_blocking(self.store.made, model_id)
                if made is not None and made.refused:
                    raise ModelRefusedError(made.refused)
                if made is not None:
                    return True
                if not await _waited(event, end - time.monotonic()):
                    await self._disk.run_blocking(self.store.spec, model_id)
                    return False

    async def submit(self, model_id: str, seq_id: int, operation: Operation) -> None:
        """Accept an operation: it is on the disk when this returns. The same one may come again.

        Raises UnknownModelError; OtherBaseError; SequenceConflictError: another one waits under this number;
        OSError.
        """
        await self._disk.run_blocking(self.store.submit, model_id, seq_id, operation)
        self._start()
        self._look(model_id)

    async def result(self, model_id: str, seq_id: int) -> Result | None:
        """Return a kept result, or None."""
        return await self._disk.run_blocking(self.store.result, model_id, seq_id)

    async def wait(self, model_id: str, seq_id: int, timeout: float) -> Result | None:
        """Return the result once there is one; None if there is none after `timeout` seconds."""
        end = time.monotonic() + timeout
        with self._waiting_for(model_id, seq_id) as event:
            while True:
                event.clear()
                found = await self.result(model_id, seq_id)
                if found is not None or not await _waited(event, end - time.monotonic()):
                    return found

    async def expired(self, model_id: str, seq_id: int) -> bool:
        """Return True if the operation was done whose result is no longer kept."""
        return await self._disk.run_blocking(self.store.expired, model_id, seq_id)

    def queue_state(self) -> str:
        """Return the client's word for what an operation waits for."""
        return "active" if self._ready else "paused_capacity"

    async def unload(self, model_id: str) -> None:
        """End a model; its checkpoints stay. Raises UnknownModelError."""
        await self._disk.run_blocking(self.store.spec, model_id)
        await self._disk.run_blocking(self.store.unload, model_id)
        self._look(model_id)
        for key in list(self._waiters):
            if key[0] == model_id:
                self._wake(key)

    @contextmanager
    def _waiting_for(self, model_id: str, seq_id: int) -> Iterator[asyncio.Event]:
        """Give an event of the caller's own, which is set when there may be a result."""
        key, event = (model_id, seq_id), asyncio.Event()
        self._waiters.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            self._waiters[key].discard(event)
            if not self._waiters[key]:
                del self._waiters[key]

    def _wake(self, key: tuple[str, int]) -> None:
        for event in self._waiters.get(key, ()):
            event.set()

    def _look(self, model_id: str) -> None:
        if self._child is not None:
            self._child.send(Look(model_id))

    # ---- the process ---------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Process id of the trainer, if one runs."""
        return None if self._child is None else self._child.pid

    def base_ready(self, config: EngineConfig, manifest: bytes, base_fd: int) -> None:
        """Record that there is a base to train on. The caller owns `base_fd` and keeps it open until
        `engine_gone`."""
        self._base = _Base(config, manifest, base_fd)
        if self.store.models():
            self._start()

    async def engine_gone(self) -> None:
        """End the trainer: its base is the engine's memory. Nothing that was accepted is lost."""
        self._base = None
        await self._end(0.0)

    async def stop(self) -> None:
        """Let the trainer write its models to the disk and end."""
        self._stopping = True
        await self._end(STOP_SECONDS)

    async def _end(self, seconds: float) -> None:
        keeping, self._keeping = self._keeping, None
        if keeping is None:
            return
        if self._child is not None and seconds:
            self._child.send(StopLive())
            await asyncio.wait([keeping], timeout=seconds)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    def _start(self) -> None:
        if self._keeping is None and self._base is not None and not self._stopping:
            keep = keep_running("training live adapters", partial(self._keep, self._base))
            self._keeping = asyncio.get_running_loop().create_task(keep)

    async def _keep(self, base: _Base) -> None:
        """Keep a trainer running on the base until cancelled, or until the server stops."""
        failures = 0
        while not self._stopping:
            began = time.monotonic()
            try:
                how = await self._run(base)
            except OSError as error:
                how = f"it cannot be started: {error}"
            if self._stopping:
                return
            if (fatal := await self._disk.run_blocking(self.store.died_of)) is not None:
                self._deaths[fatal] += 1
            failures = 1 if time.monotonic() - began > RESTARTS.longest else failures + 1
            _log.error("the trainer of live adapters died (%s) and is started again", how)
            await asyncio.sleep(RESTARTS.pause(failures))

    async def _run(self, base: _Base) -> str:
        """Run one trainer to its end, and return how it ended."""
        lost = asyncio.Event()
        settings = self._settings
        await self._disk.run_blocking(self.store.forget_begun)
        self._child = child = await ChildProcess.spawn(
            settings.command,
            from_live_decoder(),
            self._take,
            lost.set,
            {"--base-fd": base.fd, "--busy-fd": settings.busy_fd},
            ENVIRONMENT | behind_serving(),
            niceness_for(settings.share),
        )
        try:
            child.send(
                StartLive(
                    config=base.config,
                    manifest=base.manifest,
                    root=str(self.store.root),
                    base_id=self.store.base_id,
                    base_name=settings.base_name,
                    base_commit=settings.base_commit,
                    share=settings.share,
                    memory_limit=settings.memory,
                    refuse=[key for key, count in self._deaths.items() if count >= MAX_DEATHS],
                )
            )
            await lost.wait()
            return await child.end(1.0)
        finally:
            self._child, self._ready = None, False
            await child.end()
            for key in list(self._waiters):
                self._wake(key)  # a result may have been written, and its writer killed before it reported it

    def _take(self, message: FromLive) -> None:
        if isinstance(message, LiveReady):
            self._ready = True
        elif isinstance(message, LiveFailed):
            _log.error("live adapters cannot be trained: %s", message.message)
        elif isinstance(message, Done):
            key = (message.model_id, message.seq_id)
            self._deaths.pop(key, None)
            self._wake(key)


async def _waited(event: asyncio.Event, seconds: float) -> bool:
    """Return True if the event is set within so many seconds."""
    if seconds <= 0:
        return False
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):  # wait_for could miss being cancelled
            await event.wait()
            return True
    return False
