"""Keeps one engine running and routes requests to it: start, watch, restart, and nothing that blocks."""

from __future__ import annotations

import asyncio
import enum
import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onebase_server.catalog import Catalog
from onebase_server.engine.protocol import (
    AdapterFailed,
    AdapterLoaded,
    BaseInfo,
    Cancel,
    EngineConfig,
    Fatal,
    Loading,
    Ready,
    Shutdown,
    Start,
    Stats,
    StepDone,
    ToApi,
)
from onebase_server.engine_link import ENGINE_COMMAND, EngineProcess
from onebase_server.errors import EngineRestartedError, InvalidRequestError, QueueFullError, UnavailableError
from onebase_server.inflight import Inflight

_LAST_WORDS_SECONDS = 1.0
"""An engine that has closed its socket is about to exit, with a status that says why."""
_log = logging.getLogger(__name__)


class EngineFailedError(RuntimeError):
    """The engine cannot be started, or not be kept running; the message is for the operator."""


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
        catalog: Catalog,
        *,
        queue_limit: int,
        stall_timeout: float,
        command: Sequence[str] = ENGINE_COMMAND,
        policy: RestartPolicy | None = None,
        on_loading: Callable[[Loading], None] = lambda progress: None,
    ) -> None:
        self.state = EngineState.STARTING
        self.base: BaseInfo | None = None
        self.stats: Stats | None = None
        self.restarts = 0
        self.ready = asyncio.Event()
        """Set while requests can be submitted."""
        self._config = config
        self._catalog = catalog
        self._queue_limit = queue_limit
        self._stall_timeout = stall_timeout
        self._command = tuple(command)
        self._policy = policy or RestartPolicy()
        self._on_loading = on_loading
        self._engine: EngineProcess | None = None
        self._ended: asyncio.Future[str] | None = None
        self._awaited_adapters: set[str] = set()
        self._requests: dict[str, Inflight] = {}
        self._open_rows = 0
        self._last_progress = 0.0
        self._row_seconds = 0.5
        self._last_row_end = 0.0
        self._stopping = False
        self._ever_ready = False

    # ---- for requests ------------------------------------------------------------------------

    @property
    def open_requests(self) -> int:
        return len({id(request) for request in self._requests.values()})

    @property
    def engine_pid(self) -> int | None:
        return self._engine.pid if self._engine else None

    def submit(self, request: Inflight) -> None:
        """Hand a request over. Raises UnavailableError, QueueFullError, InvalidRequestError (never fits)."""
        engine = self._require_ready()
        capacity = self._row_capacity()
        if request.rows > capacity:
            raise InvalidRequestError(
                f"The request asks for {request.rows} completions at once and this server takes {capacity} "
                "(--max-rows plus --queue-limit). Lower n or send fewer prompts.",
                param="n",
            )
        if self._open_rows + request.rows > capacity:
            waiting = max(0, self._open_rows - (capacity - self._queue_limit))
            raise QueueFullError(waiting, self._queue_limit, min(30.0, self._row_seconds * (waiting + 1)))
        if self._open_rows == 0:
            self._last_progress = time.monotonic()
        self._open_rows += request.rows
        for message in request.submits:
            self._requests[message.id] = request
            engine.send(message)

    def cancel(self, request: Inflight, request_id: str | None = None, choice: int | None = None) -> None:
        """End all of a request's rows, or one choice of one of its submits."""
        if self._engine is None:
            return
        for open_id in [request_id] if request_id else list(request.open_rows):
            if open_id in self._requests:
                self._engine.send(Cancel(open_id, choice))

    def unavailable(self) -> UnavailableError | None:
        """Why nothing can be submitted now, or None."""
        if self.state is EngineState.READY:
            return None
        delay = self._policy.delay(max(1, self.restarts)) if self._ever_ready else 5.0
        return UnavailableError(
            f"The engine is {self.state.value}. Try again in a moment; GET /ready says when it is ready.",
            code=f"engine_{self.state.value}",
            retry_after=max(2.0, delay),
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
                delay = self._policy.delay(deaths)
                _log.error("the engine is gone (%s); starting a new one in %.1f s", reason, delay)
                self.restarts += 1
                await asyncio.sleep(delay)
        except EngineFailedError:
            self.state = EngineState.FAILED
            raise

    async def stop(self) -> None:
        """Ask the engine to exit, then make it. Requests still running end with an error."""
        self._stopping = True
        engine, ended = self._engine, self._ended
        self.state = EngineState.STOPPED
        self.ready.clear()
        if engine is None or ended is None:
            return
        engine.send(Shutdown())
        await engine.end(self._policy.shutdown_grace)

    def kill_now(self) -> None:
        """End the engine without waiting for anything: the api is about to exit."""
        self._stopping = True
        if self._engine is not None:
            self._engine.signal_group(signal.SIGKILL)

    async def _run_one(self) -> str:
        """One engine from start to death. Returns why it ended, in words."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()
        self._ended = ended

        def end(reason: str) -> None:
            if not ended.done():
                ended.set_result(reason)

        def receive(message: ToApi) -> None:
            if not ended.done():
                self._receive(message, end)

        self._engine = engine = await EngineProcess.spawn(self._command, receive, lambda: end(""))
        watch = loop.create_task(self._watch(end))
        try:
            engine.send(Start(self._config))
            reason = await ended
        finally:
            watch.cancel()
            self._close_requests()
            if not self._stopping:
                status = await engine.end(0.0 if self.state is EngineState.STALLED else _LAST_WORDS_SECONDS)
                self._engine = None
        if self._stopping:
            return reason
        return reason or status

    def _close_requests(self) -> None:
        self.ready.clear()
        self._catalog.mark_unloaded()
        if self.state is EngineState.READY:
            self.state = EngineState.RESTARTING
        for request in list(self._requests.values()):
            request.fail(EngineRestartedError())
        self._requests.clear()
        self._open_rows = 0

    async def _watch(self, end: Callable[[str], None]) -> None:
        """Proves progress: rows in the engine and no step for the stall timeout is a stall."""
        while True:
            await asyncio.sleep(min(1.0, self._stall_timeout / 4))
            idle = time.monotonic() - self._last_progress
            if self._open_rows and idle > self._stall_timeout:
                self.state = EngineState.STALLED
                end(f"a stall: {self._open_rows} rows without progress for {idle:.1f} s")
                return

    # ---- messages ----------------------------------------------------------------------------

    def _receive(self, message: ToApi, end: Callable[[str], None]) -> None:
        if isinstance(message, StepDone):
            self._step_done(message)
        elif isinstance(message, Loading):
            self._on_loading(message)
        elif isinstance(message, Ready):
            self._base_ready(message)
        elif isinstance(message, AdapterLoaded):
            self._catalog.mark_loaded(message)
            self._adapter_answered(message.digest)
        elif isinstance(message, AdapterFailed):
            self._adapter_failed(message, end)
        else:
            self._fatal(message, end)

    def _step_done(self, step: StepDone) -> None:
        now = time.monotonic()
        if step.rows or self.stats is None or step.stats.steps != self.stats.steps:
            self._last_progress = now
        self.stats = step.stats
        requests = self._requests
        for output in step.rows:
            request = requests.get(output.id)
            if request is None:
                continue
            if not request.push(output):
                _log.warning("request %s is not read fast enough: cut off", output.id)
                self.cancel(request)
            if output.finish is not None:
                self._row_ended(request, output.id, now)

    def _row_ended(self, request: Inflight, request_id: str, now: float) -> None:
        self._open_rows -= 1
        if request_id not in request.open_rows:
            del self._requests[request_id]
        if self._last_row_end:
            gap = min(60.0, now - self._last_row_end)
            self._row_seconds += 0.1 * (gap - self._row_seconds)
        self._last_row_end = now

    def _base_ready(self, message: Ready) -> None:
        self.base = message.base
        loads = self._catalog.loads()
        self._awaited_adapters = {load.digest for load in loads}
        for load in loads:
            if self._engine is not None:
                self._engine.send(load)
        self._ready_if_complete()

    def _adapter_answered(self, digest: str) -> None:
        self._awaited_adapters.discard(digest)
        self._ready_if_complete()

    def _adapter_failed(self, message: AdapterFailed, end: Callable[[str], None]) -> None:
        names = ", ".join(self._catalog.names_of(message.digest)) or message.digest
        text = f"adapter {names} cannot be served ({message.code}): {message.message}"
        if not self._ever_ready:
            end(text)
            return
        _log.error("%s", text)
        self._adapter_answered(message.digest)

    def _fatal(self, message: Fatal, end: Callable[[str], None]) -> None:
        end(message.message)

    def _ready_if_complete(self) -> None:
        if self._awaited_adapters or self._stopping:
            return
        self._ever_ready = True
        self._last_progress = time.monotonic()
        self.state = EngineState.READY
        self.ready.set()

    def _require_ready(self) -> EngineProcess:
        reason = self.unavailable()
        if reason is not None or self._engine is None:
            raise reason or UnavailableError("The engine is gone.", code="engine_restarting", retry_after=2.0)
        return self._engine

    def _row_capacity(self) -> int:
        max_rows = self.base.max_rows if self.base else 0
        return max_rows + self._queue_limit
