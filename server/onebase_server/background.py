"""Waiting: for a disk, a database or the Hub off the event loop, and between two tries of anything."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from onebase_adapters.registry import RegistryBusyError, RegistryError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Backoff:
    """Pauses between tries, in seconds: each is twice the one before it, up to the longest."""

    first: float
    longest: float

    def pause(self, failures: int) -> float:
        """What follows so many failures in a row; the first failure is 1."""
        doublings = min(failures - 1, 64)
        return min(self.longest, self.first * 2.0**doublings)

    def pauses(self) -> Iterator[float]:
        """Those after the first failure, the second, and so on without end."""
        return map(self.pause, itertools.count(1))

    def tries(self, most: int) -> Iterator[float | None]:
        """For each of `most` tries the pause that follows its failure; None for the last."""
        return itertools.chain(itertools.islice(self.pauses(), most - 1), (None,))


class Threads:
    """At most `most` calls at once, each in a daemon thread of its own: none holds up the process's end.

    Made and used in one event loop.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._free = asyncio.Semaphore(most)

    async def run(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The call's result, or what it raised. Cancelling stops the wait; the call itself goes on.

        Raises RuntimeError also when the machine gives no thread.
        """
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def finish(result: Any, error: BaseException | None) -> None:
            self._free.release()
            if answer.done():
                return
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                result = call(*args, **kwargs)
            except BaseException as caught:
                error = RuntimeError(str(caught)) if isinstance(caught, StopIteration) else caught
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who asked
                loop.call_soon_threadsafe(finish, result, error)

        try:
            context = contextvars.copy_context()  # on whose behalf: see registry/audit.py
            threading.Thread(target=context.run, args=(work,), name=self._name, daemon=True).start()
        except BaseException:
            self._free.release()
            raise
        value: T = await answer
        return value


class RegistryThreads(Threads):
    """Threads for the registry's calls. A write ends when every subscriber has seen it."""

    def __init__(self, name: str, most: int) -> None:
        super().__init__(name, most)
        self._subscribers: list[Callable[[], Awaitable[None]]] = []

    def subscribe(self, subscriber: Callable[[], Awaitable[None]]) -> None:
        """Call it after each write."""
        self._subscribers.append(subscriber)

    async def write(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """As `run`, for a call that changes the registry. Raises also what a subscriber raises: the message
        says then that the change was made."""
        result = await self.run(call, *args, **kwargs)
        try:
            for subscriber in self._subscribers:
                await subscriber()
        except RegistryError as error:
            raise RegistryBusyError(
                f"the change was made, but what it changed cannot be read: {error}"
            ) from error
        return result
