"""Server-sent events, and noticing that the caller has left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from onebase_edge.errors import ApiError, ClientGoneError, SlowReaderError
from onebase_edge.forwarded import TRANSCRIPT_HEADER

ABORT_EXTENSION = "onebase.abort"
"""ASGI extension: a call that drops the connection and its unsent bytes at once."""
DONE = b"data: [DONE]\n\n"
_READ_GRACE_SECONDS = 60.0
"""Time, in seconds beyond the generation's own limit, after which a stream that is not read yet is
dropped."""
_encode = msgspec.json.Encoder().encode


def event(data: Any) -> bytes:
    """Return one `data:` event. JSON escapes newlines, so that one line holds it."""
    return b"data: " + _encode(data) + b"\n\n"


def identified_event(data: Any, *, identity: str = "", event: str = "") -> bytes:
    """Return an event that a client can resume after: its `id:` comes back as `Last-Event-ID`."""
    head = f"id: {identity}\n" if identity else ""
    kind = f"event: {event}\n" if event else ""
    return (head + kind).encode() + b"data: " + _encode(data) + b"\n\n"


def connection_abort(scope: Scope) -> Callable[[], None]:
    """Return a call that drops the caller's connection and its unsent bytes; it does nothing if the server
    cannot."""
    abort: Callable[[], None] = (
        scope.get("extensions", {}).get(ABORT_EXTENSION, {}).get("abort", lambda: None)
    )
    return abort


class Cancellable(Protocol):
    """Anything that runs until it has ended or is cancelled."""

    def cancel(self) -> None:
        """End it: nobody wants the rest."""


class EventStream(Response):
    """Streams events of what runs, which takes at most `seconds`.

    The status line waits for the first event: until then an error is still an HTTP error. A caller
    who leaves cancels what runs; one who does not read is cut off, and the engine never waits.

    with_transcript: whether its events have a transcript between them.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        run: Cancellable,
        events: AsyncGenerator[bytes],
        seconds: float,
        *,
        with_transcript: bool = False,
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers | ({TRANSCRIPT_HEADER: "1"} if with_transcript else {}))
        del self.headers["content-length"]
        self._run = run
        self._events = events
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = asyncio.get_running_loop().call_later(
            self._seconds + _READ_GRACE_SECONDS, connection_abort(scope)
        )
        try:
            with cancelled_when_gone(receive, self._run):
                async with contextlib.aclosing(self._events):
                    await self._send_all(send)
        finally:
            limit.cancel()

    async def _send_all(self, send: Send) -> None:
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        with contextlib.suppress(SlowReaderError, ClientGoneError):
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def guarded(
    events: AsyncIterator[bytes], failure: Callable[[ApiError], bytes], end: bytes
) -> AsyncGenerator[bytes]:
    """Yield the events; after the first one, an error becomes an event of its own instead of a broken stream.

    failure: makes that event. end: what ends the stream in any case.
    """
    started = False
    try:
        async for chunk in events:
            started = True
            yield chunk
    except (SlowReaderError, ClientGoneError):
        raise
    except ApiError as error:
        if not started:
            raise
        yield failure(error)
    if end:
        yield end


async def with_transcript(
    events: AsyncGenerator[bytes], take_transcript: Callable[[], bytes]
) -> AsyncGenerator[bytes]:
    """Yield the events, each after the lines of the transcript that it was made of."""
    async with contextlib.aclosing(events):
        async for chunk in events:
            yield take_transcript() + chunk


@contextlib.contextmanager
def cancelled_when_gone(receive: Receive, run: Cancellable) -> Iterator[None]:
    """Cancel what runs if the caller closes the connection while this is open."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        run.cancel()

    task = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    finally:
        task.cancel()


class MergedEvents:
    """Events of several sources in one stream, as they come. The first error of a source ends all.

    Args:
        order: which source comes first, second and so on, before they come as they do.
    """

    def __init__(
        self, sources: Sequence[AsyncGenerator[bytes]], end: bytes, order: Sequence[int] = ()
    ) -> None:
        self._sources = sources
        self._end = end
        self._order = order
        self._tasks: list[asyncio.Task[None]] = []
        self._gone = False

    def cancel(self) -> None:
        """Close each source: nobody wants the rest. `events` then raises ClientGoneError."""
        self._gone = True
        for task in self._tasks:
            task.cancel()

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield what all sources yield, then `end`.

        Raises what a source raises, and ClientGoneError.
        """
        try:
            for number in self._order:
                if self._gone:
                    raise ClientGoneError()
                yield await anext(self._sources[number], b"")
        except BaseException:
            for source in self._sources:
                await source.aclose()
            raise
        # Few may wait here: what a slow reader leaves must fill the mailboxes of its requests.
        waiting: asyncio.Queue[bytes] = asyncio.Queue(len(self._sources))

        async def drain(source: AsyncGenerator[bytes]) -> None:
            async with contextlib.aclosing(source):
                async for chunk in source:
                    await waiting.put(chunk)

        self._tasks = [asyncio.create_task(drain(source)) for source in self._sources]
        ended = asyncio.gather(*self._tasks)
        taking = asyncio.create_task(waiting.get())
        try:
            while True:
                await asyncio.wait((taking, ended), return_when=asyncio.FIRST_COMPLETED)
                chunks = []
                if taking.done():
                    chunks.append(taking.result())
                    taking = asyncio.create_task(waiting.get())
                while not waiting.empty():
                    chunks.append(waiting.get_nowait())
                if chunks:
                    yield b"".join(chunks)
                elif ended.done():
                    break
            if self._gone:
                raise ClientGoneError()
            await ended
        finally:
            for task in (taking, *self._tasks):
                task.cancel()
            await asyncio.gather(taking, ended, *self._tasks, return_exceptions=True)
        yield self._end
