"""The events of a job as they happen. A connection that breaks is made anew from the last event on."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing
from types import TracebackType
from typing import Final

import anyio

from . import _parse, _training_parse, _training_requests
from ._http import AsyncResponse, Response
from ._requests import Call
from ._retry import FIRST_DELAY_S, LONGEST_DELAY_S
from ._sse import ServerEvent, SSEParser
from .errors import APIConnectionError, APIStatusError, APITimeoutError, InvalidResponseError, OneBaseError
from .training_types import TrainingEvent, TrainingJobInfo

RECONNECTS: Final = 10
"""Vain attempts in a row before it gives up: about a minute, in which a server can be started again."""

_DONE: Final = "done"


class Patience:
    """Bears a server that is away, as long as a restart takes."""

    def __init__(self) -> None:
        self._failures = 0

    def reset(self) -> None:
        """The server is there."""
        self._failures = 0

    def delay(self, error: OneBaseError | None, call: Call) -> float:
        """Seconds until `call` is worth another attempt, after `error` or an answer that ended too early.

        Raises:
            OneBaseError: it is not.
        """
        if error is not None and not _passes(error, call):
            raise error
        self._failures += 1
        if self._failures > RECONNECTS:
            raise error or APIConnectionError("the stream of events always ends at once", sent=True)
        return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (self._failures - 1)) * (0.5 + random.random() / 2)


class _Position:
    """Which event of a stream came last, how often it broke since. Pure: the caller reads and sleeps."""

    def __init__(self, job_id: str, after: str | None, known: bool) -> None:
        self.last_id = after
        self.job: TrainingJobInfo | None = None
        self._job_id = job_id
        self._known = known
        self._patience = Patience()
        self._parser = SSEParser()

    @property
    def done(self) -> bool:
        return self.job is not None

    def call(self) -> Call:
        return _training_requests.stream_events(self._job_id, self.last_id)

    def begin(self) -> None:
        """A connection is there: what an earlier one left half-sent will come again."""
        self._known = True
        self._parser = SSEParser()

    def feed(self, chunk: bytes) -> Iterator[TrainingEvent]:
        """The events that `chunk` completes.

        Raises:
            InvalidResponseError: it is no stream of a job's events.
        """
        try:
            events = self._parser.feed_events(chunk)
        except ValueError as error:
            raise InvalidResponseError(str(error)) from error
        for event in events:
            yield from self._take(event)

    def _take(self, event: ServerEvent) -> Iterator[TrainingEvent]:
        if self.done:
            return
        content = event.data.encode()
        if event.name == _DONE:
            self.job = _parse.parse(content, _training_parse.job)
            return
        told = _parse.parse(content, _training_parse.event)
        if told.id == self.last_id:
            return
        # Before it is handed out: whoever stops there has had it.
        self.last_id = told.id
        self._patience.reset()
        yield told

    def silent(self) -> None:
        """Nothing came for longer than the client bears: the job has nothing to tell, the server is there."""
        self._patience.reset()

    def delay(self, error: OneBaseError | None) -> float:
        """Seconds until the next attempt, after `error` or a stream that ended too early.

        Raises:
            OneBaseError: it is not worth another one.
        """
        if error is not None and not self._known:
            raise error
        return self._patience.delay(error, self.call())


def _passes(error: OneBaseError, call: Call) -> bool:
    """Whether it may be over soon, as a restart of the server is."""
    if isinstance(error, APIStatusError):
        return error.status in call.retry_statuses
    return isinstance(error, APIConnectionError | APITimeoutError)


class _BaseEventStream:
    """What EventStream and AsyncEventStream share: how far they are.

    `known`: the server has told of this job, so that it is worth waiting for also before the first answer.
    """

    def __init__(self, job_id: str, after: str | None, known: bool) -> None:
        self._position = _Position(job_id, after, known)

    @property
    def last_id(self) -> str | None:
        """The id of the newest event that was handed out: another stream may go on `after` it."""
        return self._position.last_id

    @property
    def job(self) -> TrainingJobInfo | None:
        """The job as it ended, once the stream has been read to its end."""
        return self._position.job


class EventStream(_BaseEventStream):
    """A job's events, oldest first, as they happen: `for event in job.stream_events(): ...`

    It ends with the job; while one is paused, nothing comes. A connection that breaks is made anew, for
    about a minute of vain attempts: no event is lost, none comes twice. Leave a `with` block, or call
    `close`, to end it before.

    Raises, while iterating: OneBaseError, see `onebase.errors`.
    """

    def __init__(
        self, open: Callable[[Call], Response], job_id: str, after: str | None, *, known: bool = False
    ) -> None:
        super().__init__(job_id, after, known)
        self._open = open
        self._events = self._read()

    def __iter__(self) -> Iterator[TrainingEvent]:
        return self._events

    def __next__(self) -> TrainingEvent:
        return next(self._events)

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream, not the job. Safe to call twice."""
        self._events.close()

    def _read(self) -> Generator[TrainingEvent, None, None]:
        position = self._position
        while not position.done:
            broken: OneBaseError | None = None
            try:
                yield from self._connected()
            except (APIConnectionError, APITimeoutError, APIStatusError) as error:
                broken = error
            if not position.done:
                time.sleep(position.delay(broken))

    def _connected(self) -> Generator[TrainingEvent, None, None]:
        """What one connection brings."""
        response = self._open(self._position.call())
        try:
            self._position.begin()
            for chunk in response.chunks():
                yield from self._position.feed(chunk)
                if self._position.done:
                    return
        except APITimeoutError:
            self._position.silent()
            raise
        finally:
            response.close()


class AsyncEventStream(_BaseEventStream):
    """As EventStream: `async with job.stream_events() as events: async for event in events: ...`"""

    def __init__(
        self,
        open: Callable[[Call], Awaitable[AsyncResponse]],
        job_id: str,
        after: str | None,
        *,
        known: bool = False,
    ) -> None:
        super().__init__(job_id, after, known)
        self._open = open
        self._events = self._read()

    def __aiter__(self) -> AsyncGenerator[TrainingEvent, None]:
        return self._events

    async def __anext__(self) -> TrainingEvent:
        return await anext(self._events)

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream, not the job. Safe to call twice."""
        await self._events.aclose()

    async def _read(self) -> AsyncGenerator[TrainingEvent, None]:
        position = self._position
        while not position.done:
            broken: OneBaseError | None = None
            try:
                async with aclosing(self._connected()) as events:
                    async for event in events:
                        yield event
            except (APIConnectionError, APITimeoutError, APIStatusError) as error:
                broken = error
            if not position.done:
                await anyio.sleep(position.delay(broken))

    async def _connected(self) -> AsyncGenerator[TrainingEvent, None]:
        response = await self._open(self._position.call())
        try:
            self._position.begin()
            async with aclosing(response.chunks()) as chunks:
                async for chunk in chunks:
                    for event in self._position.feed(chunk):
                        yield event
                    if self._position.done:
                        return
        except APITimeoutError:
            self._position.silent()
            raise
        finally:
            await response.close()
