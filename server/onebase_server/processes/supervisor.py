"""Keeps one engine running and routes requests to it: start, watch, restart, and nothing that blocks."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from onebase_engine.engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterUnloaded,
    BaseInfo,
    EngineConfig,
    Loading,
    Ready,
    Shutdown,
    SlotsChanged,
    Start,
    StepDone,
    ToApi,
    ToEngine,
    to_api_decoder,
)
from onebase_server.adapters.prover import Prover
from onebase_server.adapters.residency import Residency
from onebase_server.errors import EngineRestartedError, UnavailableError
from onebase_server.generation.stream import Inflight
from onebase_server.processes.engine_link import ENGINE_COMMAND, ChildProcess
from onebase_server.processes.router import RequestRouter

_LEAST_RETRY_AFTER = 2.0
_LAST_WORDS_SECONDS = 1.0
"""An engine that has closed its socket is about to exit, with a status that says why."""
_log = logging.getLogger(__name__)


class EngineFailedError(RuntimeError):
    """The engine cannot be started, or not be kept running; the message is for the operator."""


class AdapterStartError(RuntimeError):
    """An adapter that was given at start cannot be served; the message names it and says why."""


class Trainers(Protocol):
    """Those who train on an engine's base."""

    def base_ready(self, config: EngineConfig, manifest: bytes, base_fd: int) -> None:
        """There is a base to train on; `base_fd` is open until `engine_gone` has returned."""

    async def engine_gone(self) -> None:
        """There is none any more: nobody holds on to it when this returns."""


@dataclass(frozen=True)
class Companions:
    """What lives and dies with an engine: its adapters in memory, and the processes on its base."""

    residency: Residency
    prover: Prover
    trainers: Trainers
    prepare: Callable[[], Awaitable[None]]
    """What must be in place before a new engine gets requests. May raise AdapterStartError."""


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
    """When to try again after an engine's death. All times in seconds."""

    first_delay: float = 0.5
    longest_delay: float = 30.0
    rapid_restarts: int = 5
    """More deaths than this, each after less than `healthy_after`, and the server gives up."""
    healthy_after: float = 60.0
    shutdown_grace: float = 5.0

    def delay(self, deaths: int) -> float:
        """Doubles with each death in a row."""
        return float(min(self.longest_delay, self.first_delay * 2 ** (deaths - 1)))


class EngineSupervisor:
    """The api's only way to the engine.

    `run` is a task for the server's lifetime; everything else is called from the same event loop and
    returns at once. `command` starts an engine process and gets `--fd N` appended.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        queue_limit: int,
        stall_timeout: float,
        command: Sequence[str] = ENGINE_COMMAND,
        policy: RestartPolicy | None = None,
        on_loading: Callable[[Loading], None] = lambda progress: None,
    ) -> None:
        self.state = EngineState.STARTING
        self.base: BaseInfo | None = None
        self.router = RequestRouter(queue_limit, self.send)
        """The requests that are running."""
        self.restarts = 0
        self.ready = asyncio.Event()
        """Set while requests can be submitted."""
        self.companions: Companions | None = None
        """Set before `run`; without them the engine has no adapters."""
        self._config = config
        self._stall_timeout = stall_timeout
        self._command = tuple(command)
        self._policy = policy or RestartPolicy()
        self._on_loading = on_loading
        self._engine: ChildProcess | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._restart_delay = 0.0
        self._stopping = False
        self._ever_ready = False

    # ---- for requests ------------------------------------------------------------------------

    def submit(self, request: Inflight) -> None:
        """Hand a request over.

        Raises UnavailableError, QueueFullError, InvalidRequestError (never fits), CrashesEngineError.
        """
        reason = self.unavailable()
        if reason is not None:
            raise reason
        self.router.submit(request, self.base.max_rows if self.base else 0)

    def unavailable(self) -> UnavailableError | None:
        """Why nothing can be submitted now, or None."""
        if self.state is EngineState.READY:
            return None
        return UnavailableError(
            f"The engine is {self.state.value}. Try again in a moment; GET /ready says when it is ready.",
            code=f"engine_{self.state.value}",
            retry_after=max(_LEAST_RETRY_AFTER, self._restart_delay),
        )

    # ---- the engine's life -------------------------------------------------------------------

    async def run(self) -> None:
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
                self._restart_delay = self._policy.delay(deaths)
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
        if self._engine is not None:
            self._engine.send(Shutdown())
            await self._engine.end(self._policy.shutdown_grace)
        await self._companions_gone()

    async def _run_one(self) -> str:
        """One engine from start to death. Returns why it ended, in words."""
        base_fd = os.memfd_create("onebase-base", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            return await self._run_on(base_fd)
        finally:
            os.close(base_fd)

    async def _run_on(self, base_fd: int) -> str:
        """`base_fd`: a memfd that the engine publishes its base into, for the verifier to attach."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()

        def end(reason: str) -> None:
            if not ended.done():
                ended.set_result(reason)

        def receive(message: ToApi) -> None:
            if not ended.done():
                self._receive(message, base_fd, end)

        self._engine = engine = await ChildProcess.spawn(
            self._command, to_api_decoder(), receive, lambda: end(""), fds={"--base-fd": base_fd}
        )
        watch = loop.create_task(self._watch(end))
        try:
            engine.send(Start(self._config))
            reason = await ended
        finally:
            watch.cancel()
            self._engine_gone()
            await self._companions_gone()
            if not self._stopping:
                status = await engine.end(0.0 if self.state is EngineState.STALLED else _LAST_WORDS_SECONDS)
                self._engine = None
        if self._stopping:
            return reason
        return reason or status

    def _engine_gone(self) -> None:
        self.ready.clear()
        if self.companions is not None:
            self.companions.residency.engine_gone()
        if self.state is EngineState.READY:
            self.state = EngineState.RESTARTING
        if not self._stopping:
            self.router.engine_died()
        self.router.fail_all(EngineRestartedError())
        self.router.forget_all()

    async def _companions_gone(self) -> None:
        """The verifier and trainers end before a new engine starts: they hold on to the old one's memory."""
        if self._preparing is not None:
            self._preparing.cancel()
        if self.companions is not None:
            await self.companions.trainers.engine_gone()
            await self.companions.prover.engine_gone()

    async def _watch(self, end: Callable[[str], None]) -> None:
        """Proves progress: rows in the engine and no step for the stall timeout is a stall."""
        while True:
            await asyncio.sleep(min(1.0, self._stall_timeout / 4))
            idle = self.router.stalled_for()
            if idle > self._stall_timeout:
                self.state = EngineState.STALLED
                end(f"a stall: {self.router.open_rows} rows without progress for {idle:.1f} s")
                return

    # ---- messages ----------------------------------------------------------------------------

    def _receive(self, message: ToApi, base_fd: int, end: Callable[[str], None]) -> None:
        if isinstance(message, StepDone):
            self.router.deliver(message)
        elif isinstance(message, Loading):
            self._on_loading(message)
        elif isinstance(message, Ready):
            self._base_ready(message, base_fd, end)
        elif isinstance(message, AdapterLoaded | AdapterFailed | AdapterUnloaded | SlotsChanged):
            if self.companions is not None:
                self.companions.residency.receive(message)
        else:
            end(message.message)

    def _base_ready(self, message: Ready, base_fd: int, end: Callable[[str], None]) -> None:
        self.base = message.base
        if self.companions is None:
            self._become_ready()
            return
        self.companions.residency.engine_ready()
        self.companions.prover.base_ready(self._config, message.manifest, base_fd)
        self.companions.trainers.base_ready(self._config, message.manifest, base_fd)
        self._preparing = asyncio.get_running_loop().create_task(self._prepare(self.companions, end))

    async def _prepare(self, companions: Companions, end: Callable[[str], None]) -> None:
        try:
            await companions.prepare()
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
        self.router.note_progress()
        self.state = EngineState.READY
        self.ready.set()

    def send(self, message: ToEngine) -> None:
        """Pass a message to the engine without blocking; lost when there is none."""
        if self._engine is not None:
            self._engine.send(message)
