# Generated from _async/http.py by tools/generate_sync.py; do not edit.
"""Calls and their responses: sent, retried, read, closed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from typing import TypeVar

from onebase_protocol.common import Item, PageAnswer

from .._core.config import ClientOptions
from .._core.parse import decode
from .._core.requests import Call, page_size
from .._core.retry import retry_delay
from .._http import (
    LibraryResponse,
    Pool,
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


class Response:
    """An open response. Read it or iterate over it, and close it in any case."""

    def __init__(self, response: LibraryResponse) -> None:
        self._response = response
        self.status = response.status_code

    def read(self) -> bytes:
        """Return the whole body."""
        with translated(self._response.request):
            return self._response.read()

    def chunks(self) -> Generator[bytes, None, None]:
        """Yield the body as it arrives. Close the generator if you leave it early."""
        with translated(self._response.request):
            for chunk in self._response.iter_bytes():
                yield chunk

    def events(self) -> Generator[ServerEvent, None, None]:
        """Yield the server-sent events of the body as they arrive. Close the generator if you leave it
        early."""
        with translated(self._response.request):
            for event in server_events(self._response):
                if event.data:  # the library also makes an event of an id or a name alone
                    yield event

    def close(self) -> None:
        """Close it. The connection is used again if the body was read to its end."""
        self._response.close()


class Http:
    """Sends calls to one server, with the options of one client.

    Every method that sends raises APIConnectionError, APITimeoutError, APIStatusError or
    InvalidResponseError; OSError or ValueError if a file that belongs to the call cannot be read.
    """

    def __init__(self, pool: Pool, options: ClientOptions) -> None:
        self._pool = pool
        self.options = options

    def with_options(self, options: ClientOptions) -> Http:
        """Return the same connections with other options."""
        return Http(self._pool, options)

    def ask(self, call: Call, kind: type[T]) -> T:
        """Send a call, and return its answer, of this type."""
        reply = self.send(call)
        return decode(reply.body, kind)

    def collect(
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
            found = self.ask(page(after, size), kind)
            items += found.data
            after = found.next_after
            if after is None:
                break
        return tuple(items)

    def send(self, call: Call) -> Reply:
        """Send `call`, again where a failure allows that, and give the whole response."""
        return self._retried(call, self._fetch_once)

    def open_stream(self, call: Call) -> Response:
        """Send a call as `send` does, with the answer's body still unread."""
        return self._retried(call, self._open_once)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def _retried(self, call: Call, send: Callable[[Call], T]) -> T:
        attempt = 0
        while True:
            try:
                return send(call)
            except OneBaseError as error:
                delay = retry_delay(error, call, attempt, self.options.max_retries, random.random())
                if delay is None:
                    raise
            time.sleep(delay)
            attempt += 1

    def _fetch_once(self, call: Call) -> Reply:
        response = self._open_once(call)
        try:
            return Reply(response.status, response.read())
        finally:
            response.close()

    def _open_once(self, call: Call) -> Response:
        with prepared(self._pool, call, self.options) as request, translated(request):
            response = self._pool.send(request, stream=True)
            if is_answer(call, response):
                return Response(response)
            try:
                response.read()
            finally:
                response.close()
        raise refusal(response)
