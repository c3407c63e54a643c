"""Work off the event loop, pauses between two tries of anything, and tasks that must keep running."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import itertools
import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from onebase_engine.machine import thread_seconds

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backoff:
    """Pauses between tries, in seconds: each is twice the one before it, up to the longest."""

    first: float
    longest: float

    def pause(self, failures: int) -> float:
        """Return the pause after so many failures in a row, in seconds; the first failure is 1."""
        doublings = min(failures - 1, 64)
        return min(self.longest, self.first * 2.0**doublings)

    def pauses(self) -> Iterator[float]:
        """Yield the pauses after the first failure, the second, and so on without end."""
        return map(self.pause, itertools.count(1))

    def tries(self, most: int) -> Iterator[float | None]:
        """Return the pause after each of `most` tries that fails; None after the last."""
        return itertools.chain(itertools.islice(self.pauses(), most - 1), (None,))


AGAIN = Backoff(1.0, 60.0)
"""Pause, in seconds, before work that must continue begins again."""


async def keep_running(name: str, work: Callable[[], Awaitable[None]], backoff: Backoff = AGAIN) -> None:
    """Do work that must continue until this is cancelled: where it fails, log that, and start it again."""
    failures = 0
    while True:
        began = time.monotonic()
        try:
            return await work()
        except Exception:
            failures = 1 if time.monotonic() - began > backoff.longest else failures + 1
            pause = backoff.pause(failures)
            _log.exception("%s failed; it begins again in %g s", name, pause)
        await asyncio.sleep(pause)


class TurnBudget:
    """Limit of what one turn of the event loop computes for all requests together; the rest goes to threads.

    A limit for each request alone would not bound a turn in which many requests are ready.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = most

    def try_spend(self, size: int) -> bool:
        """Return True if so much may be computed in this turn, and count it."""
        if size > self._left:
            return False
        if self._left == self._most:
            asyncio.get_running_loop().call_soon(self._begin_turn)
        self._left -= size
        return True

    def _begin_turn(self) -> None:
        self._left = self._most


class FairSemaphore:
    """Semaphore whose permits tenants acquire in turns, however many acquisitions each of them has waiting.

    One tenant has at most `each` permits at once (by default all of them). Made and used in one event loop.
    """

    def __init__(self, permits: int, each: int | None = None) -> None:
        self.free = permits
        """Number of permits that nobody has; nobody who may acquire one waits while it is positive."""
        self._each = math.inf if each is None else each
        self._running: Counter[str] = Counter()
        """Number of permits that each tenant has."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Acquisitions that wait, by tenant; the tenant whose last turn was latest comes last."""

    async def acquire(self, tenant: str) -> None:
        """Acquire a permit once it is the tenant's turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._drop(tenant, turn)
            else:  # it was admitted in the same moment
                self.release(tenant)
            raise

    def release(self, tenant: str) -> None:
        """Release a permit of the tenant's."""
        self.free += 1
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        if tenant in self._waiting:
            self._waiting[tenant] = self._waiting.pop(tenant)
        self._admit()

    def resize(self, change: int) -> None:
        """Add so many permits, or take so many away: those that are in use once they are released."""
        self.free += change
        self._admit()

    def _admit(self) -> None:
        """Give out the free permits, to the tenants first that have the fewest."""
        while self.free > 0:
            able = [tenant for tenant in self._waiting if self._running[tenant] < self._each]
            if not able:
                return
            tenant = min(able, key=self._running.__getitem__)
            waiting = self._waiting.pop(tenant)
            turn = waiting.popleft()
            if waiting:
                self._waiting[tenant] = waiting
            if not turn.done():  # else it was given up
                turn.set_result(None)
                self.free -= 1
                self._running[tenant] += 1

    def _drop(self, tenant: str, turn: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(tenant)
        if waiting is not None and turn in waiting:
            waiting.remove(turn)
            if not waiting:
                del self._waiting[tenant]


THREAD_RETRY = Backoff(0.1, 5.0)
"""Pause, in seconds, before the next try to start a thread that the machine refused."""

PAYER: ContextVar[Callable[[float], None]] = ContextVar("onebase_payer", default=lambda seconds: None)
"""Called in the event loop with the processor time, in seconds, of each call of `Threads` in this context."""


class Threads:
    """Daemon threads for at most `most` calls at once. They are started when they are first needed, and kept:
    the event loop stands still until the system has begun to run a new thread, which on busy cores takes
    longer than most calls do.

    Tenants take turns, however many calls each of them has waiting, and one tenant has at most `each` calls
    running (by default all of them). PAYER gets the processor time. Made and used in one event loop.
    """

    def __init__(self, name: str, most: int, each: int | None = None) -> None:
        self._name = name
        self._most = most
        self._permits = FairSemaphore(most, each)
        self._started = 0
        self._refusals = 0
        self._retry: asyncio.TimerHandle | None = None
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    async def run_blocking(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the call's result, or raise what it raised, on behalf of no tenant. See `run_for`."""
        return await self.run_for("", call, *args, **kwargs)

    async def run_for(self, tenant: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the call's result, or raise what it raised, once it is the tenant's turn.

        Cancelling stops the wait; the call itself continues. Raises RuntimeError also when there is no thread
        and the machine gives none."""
        await self._permits.acquire(tenant)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        pay = PAYER.get()

        def finish(result: Any, error: BaseException | None, seconds: float) -> None:
            pay(seconds)
            if not answer.done():
                if error is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(error)
            # After the answer: whoever called learns it before the next call begins.
            self._permits.release(tenant)

        def work() -> None:
            result, error = None, None
            began = thread_seconds()
            try:
                result = call(*args, **kwargs)
            except BaseException as caught:
                error = RuntimeError(str(caught)) if isinstance(caught, StopIteration) else caught
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who asked
                loop.call_soon_threadsafe(finish, result, error, thread_seconds() - began)

        try:
            self._start_threads()
            context = contextvars.copy_context()  # on whose behalf: see registry/audit.py
            self._calls.put(functools.partial(context.run, work))
        except BaseException:
            self._permits.release(tenant)
            raise
        value: T = await answer
        return value

    def _start_threads(self) -> None:
        """Start threads until there is one for each running call. If the machine gives none, the call waits
        for one of the others or for a later try. Raises RuntimeError if there are no others."""
        while self._started < self._most - self._permits.free:
            try:
                threading.Thread(target=self._run_calls, name=self._name, daemon=True).start()
            except RuntimeError:
                if not self._started:
                    raise
                self._try_later()
                return
            self._started += 1
            self._refusals = 0

    def _try_later(self) -> None:
        if self._retry is not None:
            return
        self._refusals += 1
        if self._refusals == 1:
            _log.warning("no thread could be started for %s: a call waits for one", self._name)
        pause = THREAD_RETRY.pause(self._refusals)
        self._retry = asyncio.get_running_loop().call_later(pause, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        if self._calls.empty():
            self._refusals = 0
        else:
            self._start_threads()

    def _run_calls(self) -> None:
        while True:
            self._calls.get()()
