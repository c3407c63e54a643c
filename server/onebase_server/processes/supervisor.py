"""Keeps one engine running and routes requests to it: start, watch, restart, and nothing that blocks."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from onebase_edge.background import Backoff, keep_running
from onebase_edge.errors import EngineRestartedError, UnavailableError
from onebase_engine.engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterUnloaded,
    BaseInfo,
    EngineConfig,
    Loading,
    Pause,
    Ready,
    Shutdown,
    SlotsChanged,
    Start,
    StepResult,
    ToApi,
    to_api_decoder,
)
from onebase_engine.machine import describe_refusal, explain_refusal
from onebase_server.processes.engine_client import EngineClient
from onebase_server.processes.inflight import Inflight
from onebase_server.processes.link import ENGINE_COMMAND, ChildProcess, EngineLink

_LEAST_RETRY_AFTER = 2.0
RESTARTS = Backoff(0.5, 30.0)
_PAUSE_POLL_SECONDS = 0.01
_LAST_WORDS_SECONDS = 1.0
"""Time, in seconds, for an engine that has closed its socket to exit with a status that says why."""
AboutVersions = AdapterLoaded | AdapterFailed | AdapterUnloaded | SlotsChanged

_log = logging.getLogger(__name__)


class EngineFailedError(RuntimeError):
    """The engine cannot be started, or not be kept running; the message is for the operator."""


class AdapterStartError(RuntimeError):
    """An adapter that was given at start cannot be served; the message names it and says why."""


class VersionListener(Protocol):
    """Listener to the versions in the engine's memory."""

    def engine_ready(self) -> None:
        """Called when versions can be loaded."""

    def receive(self, message: AboutVersions) -> None:
        """Called with each message of the engine about versions."""

    def engine_gone(self) -> None:
        """Called when the engine's memory is gone, and everything in it."""


class BaseListener(Protocol):
    """Listener that has processes on the engine's base."""

    def base_ready(self, config: EngineConfig, manifest: bytes, base_fd: int) -> None:
        """Called when there is a base to attach; `base_fd` is open until `engine_gone` has returned."""

    async def engine_gone(self) -> None:
        """Called when the base is gone; when this returns, no process holds on to it."""


async def _nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class EngineListeners:
    """Listeners to the life of the engine."""

    versions: VersionListener | None = None
    base: Sequence[BaseListener] = ()
    """Listeners called in this order when there is a base, and when it is gone."""
    prepare: Callable[[], Awaitable[None]] = _nothing
    """Preparation that must end before a new engine gets requests. May raise AdapterStartError."""


class EngineState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STALLED = "stalled"
    """No progress for the stall timeout; stays until a new engine is ready."""
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class RestartPolicy:
    """Policy of restarts after an engine's death. All times are in seconds."""

    backoff: Backoff = RESTARTS
    rapid_restarts: int = 5
    """Largest number of consecutive deaths, each after less than `healthy_after`, before the server gives
    up."""
    healthy_after: float = 60.0
    shutdown_grace: float = 5.0


class EngineSupervisor:
    """Starts the engine and watches it.

    `run` is a task for the server's lifetime; everything else is called from the same event loop and
    returns at once. `command` starts an engine process and gets `--fd N` appended. `link` leads to the engine
    that runs now; without listeners (see `listen`) the engine has no adapters. `busy` is called with True
    when the first sequence begins, and with False when the last one has ended.
    """

    def __init__(
        self,
        config: EngineConfig,
        link: EngineLink,
        *,
        queue_limit: int,
        stall_timeout: float,
        command: Sequence[str] = ENGINE_COMMAND,
        policy: RestartPolicy | None = None,
        on_loading: Callable[[Loading], None] = lambda progress: None,
        busy: Callable[[bool], None] = lambda busy: None,
    ) -> None:
        self.state = EngineState.STARTING
        self.base: BaseInfo | None = None
        self.loaded_at: float | None = None
        """Time of the last load of the base, in Unix seconds."""
        self._listeners = EngineListeners()
        self.client = EngineClient(queue_limit, link.send, busy)
        """Router of the running requests."""
        self.restarts = 0
        self.ready = asyncio.Event()
        """Set while requests can be submitted."""
        self._config = config
        self._link = link
        self._stall_timeout = stall_timeout
        self._command = tuple(command)
        self._policy = policy or RestartPolicy()
        self._on_loading = on_loading
        self._preparing: asyncio.Task[None] | None = None
        self._restart_delay = 0.0
        self._stopping = False
        self._ever_ready = False
        self._pausing = asyncio.Lock()
        self.paused = False
        """Whether the engine is paused, or was asked to pause."""

    def listen(self, listeners: EngineListeners) -> None:
        """Have these told of the engine's life. Called before `run`."""
        self._listeners = listeners

    def kernels(self) -> str:
        """Return the name of the kernels that the engine computes with; "" before there was a base."""
        return "" if self.base is None else self.base.kernels

    # ---- for requests ------------------------------------------------------------------------

    def submit(self, request: Inflight) -> None:
        """Submit a request to the engine.

        Raises UnavailableError, QueueFullError, InvalidRequestError (never fits), CrashesEngineError.
        """
        reason = self.unavailable()
        if reason is not None:
            raise reason
        self.client.submit(request, self.base.max_sequences if self.base else 0)

    def check_room(self, tenant: str, sequences: int) -> None:
        """Check that the queue has room for so many sequences, before work is spent on them.

        Raises QueueFullError, InvalidRequestError (never fits).
        """
        self.client.check_room(tenant, sequences, self.base.max_sequences if self.base else 0)

    def unavailable(self) -> UnavailableError | None:
        """Return the error for requests that cannot be submitted now, or None if they can."""
        if self.state is EngineState.READY:
            return None
        return UnavailableError(
            f"The engine is {self.state.value}. Try again in a moment; GET /ready says when it is ready.",
            code=f"engine_{self.state.value}",
            retry_after=max(_LEAST_RETRY_AFTER, self._restart_delay),
        )

    async def pause(self, paused: bool) -> None:
        """Pause the engine between two steps, keeping its sequences, or resume it. Wait until it has.

        Raises UnavailableError.
        """
        async with self._pausing:
            self._send_paused(paused)
            deadline = time.monotonic() + self._stall_timeout
            while self.client.stats is None or self.client.stats.paused != paused:
                await asyncio.sleep(_PAUSE_POLL_SECONDS)
                if self.paused != paused:  # the server ends, and lets what runs end
                    return
                if time.monotonic() > deadline or self.unavailable() is not None:
                    if paused:  # a pause that never was would keep a stall from being seen
                        self.paused = False
                        self._link.send(Pause(False))
                    raise UnavailableError(
                        "The engine did not answer. Try again.", code="engine_busy", retry_after=1.0
                    )

    def go_on(self) -> None:
        """End a pause, if there is one: the server is stopping, and running requests may end."""
        if self.paused and self.unavailable() is None:
            self._send_paused(False)

    def _send_paused(self, paused: bool) -> None:
        """Send a pause, or its end, to the engine. Raises UnavailableError."""
        reason = self.unavailable()
        if reason is not None:
            raise reason
        self.paused = paused
        self._link.send(Pause(paused))

    # ---- the engine's life -------------------------------------------------------------------

    async def run_engine(self) -> None:
        """Start the engine and keep one running until `stop`.

        Raises EngineFailedError when the first start fails, or when engines keep dying.
        """
        deaths = 0
        try:
            while True:
                started = time.monotonic()
                reason = await self._run_one()
                if self._stopping:
                    return
                if not self._ever_ready:
                    raise EngineFailedError(reason)
                lived = time.monotonic() - started
                deaths = 1 if lived >= self._policy.healthy_after else deaths + 1
                if deaths > self._policy.rapid_restarts:
                    raise EngineFailedError(
                        f"the engine died {deaths} times in a row, the last time by {reason}; giving up"
                    )
                self._restart_delay = self._policy.backoff.pause(deaths)
                _log.error(
                    "the engine is gone (%s); starting a new one in %.1f s", reason, self._restart_delay
                )
                self.restarts += 1
                await asyncio.sleep(self._restart_delay)
        except EngineFailedError:
            self.state = EngineState.FAILED
            raise

    async def stop(self) -> None:
        """Ask the engine to exit, then make it. Requests still running end with an error."""
        self._stopping = True
        self.state = EngineState.STOPPED
        self.ready.clear()
        try:
            if self._link.engine is not None:
                self._link.send(Shutdown())
                await self._link.engine.end(self._policy.shutdown_grace)
        finally:
            await self._base_gone()

    async def _run_one(self) -> str:
        """Run one engine from start to death. Returns why it ended, in words."""
        try:
            base_fd = os.memfd_create("onebase-base", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            return f"it cannot be started: {explain_refusal(error) or error}"
        try:
            return await self._run_on(base_fd)
        finally:
            os.close(base_fd)

    async def _run_on(self, base_fd: int) -> str:
        """Run one engine. `base_fd`: a memfd that it publishes its base into, for the verifier to attach."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()

        def end(reason: str) -> None:
            if not ended.done():
                ended.set_result(reason)

        def receive(message: ToApi) -> None:
            if not ended.done():
                self._receive(message, base_fd, end)

        fds = {"--base-fd": base_fd}
        try:
            self._link.engine = engine = await ChildProcess.spawn(
                self._command, to_api_decoder(), receive, lambda: end(""), fds=fds
            )
        except BlockingIOError as error:  # no more processes
            return f"it cannot be started: {describe_refusal(error)}"
        except (OSError, MemoryError) as error:  # no memory, or no more files
            return f"it cannot be started: {explain_refusal(error) or error}"
        watch = loop.create_task(keep_running("watching for stalls of the engine", partial(self._watch, end)))
        try:
            engine.send(Start(self._config))
            reason = await ended
        finally:
            watch.cancel()
            self._engine_gone()
            await self._base_gone()
            if not self._stopping:
                status = await engine.end(0.0 if self.state is EngineState.STALLED else _LAST_WORDS_SECONDS)
                self._link.engine = None
        if self._stopping:
            return reason
        return reason or status

    def _engine_gone(self) -> None:
        self.ready.clear()
        if self._listeners.versions is not None:
            self._listeners.versions.engine_gone()
        if self.state is EngineState.READY:
            self.state = EngineState.RESTARTING
        if not self._stopping:
            self.client.engine_died()
        self.client.fail_all(EngineRestartedError())
        self.client.forget_all()

    async def _base_gone(self) -> None:
        """End the processes on the base before a new engine starts: they hold on to the old one's memory."""
        if self._preparing is not None:
            self._preparing.cancel()
        for listener in self._listeners.base:
            await listener.engine_gone()

    async def _watch(self, end: Callable[[str], None]) -> None:
        """End an engine that has sequences but made no progress for the stall timeout."""
        while True:
            await asyncio.sleep(min(1.0, self._stall_timeout / 4))
            if self.paused:
                self.client.note_progress()
            idle = self.client.stalled_for()
            if idle > self._stall_timeout:
                self.state = EngineState.STALLED
                end(f"a stall: {self.client.open_sequences} sequences without progress for {idle:.1f} s")
                return

    # ---- messages ----------------------------------------------------------------------------

    def _receive(self, message: ToApi, base_fd: int, end: Callable[[str], None]) -> None:
        if isinstance(message, StepResult):
            self.client.deliver(message)
        elif isinstance(message, Loading):
            self._on_loading(message)
        elif isinstance(message, Ready):
            self._base_ready(message, base_fd, end)
        elif isinstance(message, AboutVersions):
            if self._listeners.versions is not None:
                self._listeners.versions.receive(message)
        else:
            end(message.message)

    def _base_ready(self, message: Ready, base_fd: int, end: Callable[[str], None]) -> None:
        self.base, self.loaded_at = message.base, time.time()
        if self._listeners.versions is not None:
            self._listeners.versions.engine_ready()
        for listener in self._listeners.base:
            listener.base_ready(self._config, message.manifest, base_fd)
        self._preparing = asyncio.get_running_loop().create_task(self._prepare(end))

    async def _prepare(self, end: Callable[[str], None]) -> None:
        try:
            await self._listeners.prepare()
        except AdapterStartError as error:
            end(str(error))
        except Exception as error:
            _log.exception("the adapters cannot be made ready")
            end(f"the adapters cannot be made ready: {error}")
        else:
            self._become_ready()

    def _become_ready(self) -> None:
        if self._stopping:
            return
        self._ever_ready = True
        self.client.note_progress()
        if self.paused:  # what died was
            self._link.send(Pause(True))
        self.state = EngineState.READY
        self.ready.set()
