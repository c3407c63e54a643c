"""The HTTP library, for OneBase's servers alone: requests, forms, and its failures as OneBase's errors."""

from __future__ import annotations

import io
import ipaddress
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias, cast

import anyio.to_thread
import httpx2

from ._core import parse
from ._core.config import ClientOptions, Timeout, sdk_version
from ._core.requests import Call, Sent, UploadForm
from ._core.retry import parse_retry_after
from .errors import APIConnectionError, APIStatusError, APITimeoutError, InvalidResponseError, status_error

Transport: TypeAlias = httpx2.BaseTransport
AsyncTransport: TypeAlias = httpx2.AsyncBaseTransport
LibraryResponse: TypeAlias = httpx2.Response
ServerEvent: TypeAlias = httpx2.ServerSentEvent

MAX_EVENT_BYTES: Final = 64 * 1024 * 1024
"""A server that sends more than this without the end of an event sends no events."""

# A server may close an idle connection after 5 s (uvicorn's default). We drop it sooner, so that a
# request is never sent on a connection that the server is closing.
_LIMITS = httpx2.Limits(max_connections=1000, max_keepalive_connections=100, keepalive_expiry=4.0)


class Pool(httpx2.Client):
    """The connections to one server."""

    def __init__(self, url: str, transport: Transport | None) -> None:
        super().__init__(
            base_url=_url(url),
            transport=transport,
            limits=_LIMITS,
            trust_env=not _is_loopback(url),
            follow_redirects=False,  # the key is for this server alone
        )


class AsyncPool(httpx2.AsyncClient):
    """The connections to one server, for asynchronous code."""

    def __init__(self, url: str, transport: AsyncTransport | None) -> None:
        super().__init__(
            base_url=_url(url),
            transport=transport,
            limits=_LIMITS,
            trust_env=not _is_loopback(url),
            follow_redirects=False,  # the key is for this server alone
        )


@dataclass(frozen=True)
class Reply:
    """A whole response."""

    status: int
    body: bytes


@contextmanager
def prepared(pool: Pool | AsyncPool, call: Call, options: ClientOptions) -> Iterator[httpx2.Request]:
    """Yield the library's request for `call`. The files of a form are open inside the block.

    Raises:
        OSError: a file cannot be opened.
    """
    headers = {"User-Agent": f"onebase-python/{sdk_version()}", **dict(call.headers)}
    timeout = _timeout(options.timeout)
    with ExitStack() as stack:
        if isinstance(call.body, UploadForm):
            form = call.body
            opened = [stack.enter_context(_AnnouncedFile(path)) for path in form.files]
            files = [
                (form.files_field, (file.path.name, file, "application/octet-stream")) for file in opened
            ]
            request = pool.build_request(
                call.method, call.path, data=dict(form.fields), files=files, headers=headers, timeout=timeout
            )
            request.stream = _CountedForm(request, form.on_sent)
        else:
            if call.body is not None:
                headers["Content-Type"] = "application/json"
            request = pool.build_request(
                call.method, call.path, content=call.body, headers=headers, timeout=timeout
            )
        if options.api_key is not None:
            # Only here, where the library shows it as [secure]: a traceback may show every local name.
            request.headers["Authorization"] = f"Bearer {options.api_key}"
        yield request


class _AnnouncedFile(io.FileIO):
    """A file that gives as many bytes as it had when it was opened, even if it grows meanwhile."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self.path = path
        self._left = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes.

        Raises:
            ValueError: the file became shorter than the length that the request announced.
        """
        wanted = self._left if size is None or size < 0 else min(size, self._left)
        chunk = super().read(wanted) or b""
        if wanted and not chunk:
            raise ValueError(f"{self.path} became shorter while it was sent: send it when it is complete")
        self._left -= len(chunk)
        return chunk


class _CountedForm(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A form as the library encodes it. Each chunk is reported once it was taken, and can be taken once.

    The library would read the disk in the event loop. Here a thread does.
    """

    def __init__(self, request: httpx2.Request, on_sent: Sent | None) -> None:
        self._chunks = iter(cast(httpx2.SyncByteStream, request.stream))
        self._length = int(request.headers["Content-Length"])
        self._on_sent = on_sent
        self._given = 0
        self._reported = 0

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._next():
            yield chunk
            self._report()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self  # an asynchronous generator would have to be closed when it is left half-read

    async def __anext__(self) -> bytes:
        self._report()
        chunk = await anyio.to_thread.run_sync(self._next)
        if not chunk:
            raise StopAsyncIteration
        return chunk

    def _next(self) -> bytes:
        chunk = next(filter(None, self._chunks), b"")
        self._given += len(chunk)
        return chunk

    def _report(self) -> None:
        if self._on_sent is not None and self._reported < self._given:
            self._on_sent(self._given, self._length)
        self._reported = self._given


def _timeout(timeout: Timeout) -> httpx2.Timeout:
    # pool=None: with all connections busy a request waits its turn, and `read` limits those before it.
    return httpx2.Timeout(connect=timeout.connect, read=timeout.read, write=timeout.write, pool=None)


def is_answer(call: Call, response: httpx2.Response) -> bool:
    """Return True if the response answers `call`, rather than refusing it."""
    return response.is_success or response.status_code in call.answer_statuses


def refusal(response: httpx2.Response) -> APIStatusError:
    """Return the error of a response that has been read."""
    retry_after = parse_retry_after(response.headers.get("retry-after"), datetime.now(UTC))
    detail = parse.error_detail(response.status_code, response.content)
    return status_error(response.status_code, detail, retry_after=retry_after)


def server_events(response: httpx2.Response) -> httpx2.EventSource:
    """Return the server-sent events in the body of a response, to iterate over."""
    return httpx2.EventSource(response, max_event_size=MAX_EVENT_BYTES)


@contextmanager
def translated(request: httpx2.Request) -> Iterator[None]:
    """Raise the library's failures as OneBase's errors."""
    server = f"{request.url.scheme}://{request.url.netloc.decode()}"
    try:
        yield
    except httpx2.ConnectTimeout as error:
        raise APITimeoutError(f"connecting to {server} took too long", sent=False) from error
    except httpx2.TimeoutException as error:
        raise APITimeoutError(
            f"{server} sent nothing for too long; raise `timeout`, or stream the answer", sent=True
        ) from error
    except httpx2.SSEError as error:
        raise InvalidResponseError(f"{server} sent no stream of events: {error}") from error
    except httpx2.DecodingError as error:
        raise InvalidResponseError(f"the answer of {server} cannot be decoded: {error}") from error
    except httpx2.ConnectError as error:
        raise APIConnectionError(
            f"cannot connect to {server} ({error}): is the server running?", sent=False
        ) from error
    except httpx2.RequestError as error:
        reason = str(error) or type(error).__name__
        raise APIConnectionError(f"the connection to {server} broke: {reason}", sent=True) from error


def _url(url: str) -> httpx2.URL:
    try:
        return httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"url {url!r} is not valid: {error}") from error


def _is_loopback(url: str) -> bool:
    """Return True if the server is on this machine: then no proxy is used, whatever the environment says."""
    host = _url(url).host
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
