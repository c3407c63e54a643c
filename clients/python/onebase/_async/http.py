"""Calls and their responses: sent, retried, read, closed."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

import anyio

from onebase_protocol.common import Item, PageAnswer

from .._core.config import ClientOptions
from .._core.parse import decode
from .._core.requests import Call, page_size
from .._core.retry import retry_delay
from .._http import (
    AsyncPool,
    LibraryResponse,
    Reply,
    ServerEvent,
    is_answer,
    prepared,
    refusal,
    server_events,
    translated,
)
from ..errors import OneBaseError

T = TypeVar("T")


class AsyncResponse:
    """An open response. Read it or iterate over it, and close it in any case."""

    def __init__(self, response: LibraryResponse) -> None:
        self._response = response
        self.status = response.status_code

    async def read(self) -> bytes:
        """Return the whole body."""
        with translated(self._response.request):
            return await self._response.aread()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives. Close the generator if you leave it early."""
        with translated(self._response.request):
            async for chunk in self._response.aiter_bytes():
                yield chunk

    async def events(self) -> AsyncGenerator[ServerEvent, None]:
        """Yield the server-sent events of the body as they arrive. Close the generator if you leave it
        early."""
        with translated(self._response.request):
            async for event in server_events(self._response):
                if event.data:  # the library also makes an event of an id or a name alone
                    yield event

    async def close(self) -> None:
        """Close it. The connection is used again if the body was read to its end."""
        await self._response.aclose()


class AsyncHttp:
    """Sends calls to one server, with the options of one client.

    Every method that sends raises APIConnectionError, APITimeoutError, APIStatusError or
    InvalidResponseError; OSError or ValueError if a file that belongs to the call cannot be read.
    """

    def __init__(self, pool: AsyncPool, options: ClientOptions) -> None:
        self._pool = pool
        self.options = options

    def with_options(self, options: ClientOptions) -> AsyncHttp:
        """Return the same connections with other options."""
        return AsyncHttp(self._pool, options)

    async def ask(self, call: Call, kind: type[T]) -> T:
        """Send a call, and return its answer, of this type."""
        reply = await self.send(call)
        return decode(reply.body, kind)

    async def collect(
        self,
        page: Callable[[str | None, int], Call],
        kind: type[PageAnswer[Item]],
        limit: int | None = None,
        after: str | None = None,
    ) -> tuple[Item, ...]:
        """Return the first `limit` items (None: all) of a list that comes in pages.

        Args:
            page: Gives the call for the page after an id, and of how many items.
            kind: The type of a page.
            after: The id after which the list begins.

        Raises:
            ValueError: `limit` is below 1.
        """
        items: list[Item] = []
        while size := page_size(limit, len(items)):
            found = await self.ask(page(after, size), kind)
            items += found.data
            after = found.next_after
            if after is None:
                break
        return tuple(items)

    async def send(self, call: Call) -> Reply:
        """Send `call`, again where a failure allows that, and give the whole response."""
        return await self._retried(call, self._fetch_once)

    async def open_stream(self, call: Call) -> AsyncResponse:
        """Send a call as `send` does, with the answer's body still unread."""
        return await self._retried(call, self._open_once)

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()

    async def _retried(self, call: Call, send: Callable[[Call], Awaitable[T]]) -> T:
        attempt = 0
        while True:
            try:
                return await send(call)
            except OneBaseError as error:
                delay = retry_delay(error, call, attempt, self.options.max_retries, random.random())
                if delay is None:
                    raise
            await anyio.sleep(delay)
            attempt += 1

    async def _fetch_once(self, call: Call) -> Reply:
        response = await self._open_once(call)
        try:
            return Reply(response.status, await response.read())
        finally:
            await response.close()

    async def _open_once(self, call: Call) -> AsyncResponse:
        with prepared(self._pool, call, self.options) as request, translated(request):
            response = await self._pool.send(request, stream=True)
            if is_answer(call, response):
                return AsyncResponse(response)
            try:
                await response.aread()
            finally:
                await response.aclose()
        raise refusal(response)
