"""Streams over a connection: an answer piece by piece, and the events of a job."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType

import anyio

from .._core.requests import Call
from .._core.streams import AnswerView, EventsView, broken
from ..errors import APIConnectionError, APIStatusError, APITimeoutError, InvalidResponseError, OneBaseError
from ..training_types import TrainingEvent
from ..types import Generation, Piece
from .http import AsyncResponse


class AsyncStream(AnswerView):
    """An answer as it is written: `async with client.stream(...) as stream: async for piece in stream: ...`

    Leaving the `async with` block closes the connection. If the answer was not complete, that also ends the
    request on the server.
    """

    def __init__(self, connect: Callable[[], Awaitable[AsyncResponse]], schema: object = None) -> None:
        super().__init__(schema)
        self._connect = connect
        self._response: AsyncResponse | None = None
        self._pieces: AsyncGenerator[Piece, None] | None = None

    async def __aenter__(self) -> AsyncStream:
        if self._response is not None:
            raise RuntimeError("a stream can be entered once: call stream() again for another answer")
        self._response = await self._connect()
        self._pieces = self._read(self._response)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[Piece]:
        if self._pieces is None:
            raise RuntimeError("open the stream first: `async with client.stream(...) as stream:`")
        return self._pieces

    async def read(self) -> Generation:
        """Read the rest, and give the complete answer.

        Raises:
            StreamError: the stream failed.
        """
        async for _ in self:
            pass
        return self.result

    async def close(self) -> None:
        """End the stream. Safe to call twice."""
        if self._pieces is not None:
            await self._pieces.aclose()
        if self._response is not None:
            await self._response.close()

    async def _read(self, response: AsyncResponse) -> AsyncGenerator[Piece, None]:
        # Read past [DONE] to the end of the body: only then can the connection be used again.
        try:
            async with aclosing(response.events()) as events:
                async for event in events:
                    piece = self._assembler.read_piece(event.data)
                    if piece is not None:
                        yield piece
        except (APIConnectionError, APITimeoutError, InvalidResponseError) as error:
            if not self._assembler.done:
                raise broken(error) from error
        finally:
            await response.close()
        self._result = replace(self._assembler.result(), schema=self._schema)


class AsyncEventStream(EventsView):
    """A job's events as they happen, the oldest first: `async for event in job.stream_events(): ...`

    It ends with the job. While the job is paused, nothing comes. A connection that breaks is made again after
    the last event, for about a minute of failed attempts: no event is lost and none comes twice. To end it
    earlier, leave its `async with` block or call `close`.

    Raises, while iterating: OneBaseError, see `onebase.errors`.
    """

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

    def __aiter__(self) -> AsyncIterator[TrainingEvent]:
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
        """End the stream. The job continues. Safe to call twice."""
        await self._events.aclose()

    async def _read(self) -> AsyncGenerator[TrainingEvent, None]:
        position = self._position
        while not position.done:
            lost: OneBaseError | None = None
            try:
                async with aclosing(self._connected()) as events:
                    async for event in events:
                        yield event
            except (APIConnectionError, APITimeoutError, APIStatusError) as error:
                lost = error
            if not position.done:
                await anyio.sleep(position.delay(lost))

    async def _connected(self) -> AsyncGenerator[TrainingEvent, None]:
        """Yield the events of one connection."""
        response = await self._open(self._position.call())
        try:
            self._position.begin()
            async with aclosing(response.events()) as events:
                async for event in events:
                    found = self._position.read_event(event.event, event.data)
                    if found is not None:
                        yield found
                    if self._position.done:
                        return
        except APITimeoutError:
            self._position.silent()
            raise
        finally:
            await response.close()
