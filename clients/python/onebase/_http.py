"""The only file that imports the HTTP library: sends a Call, gives bytes, speaks OneBase's errors."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

import httpx2

from . import _parse
from ._config import ClientOptions, Timeout
from ._multipart import Multipart, OpenForm
from ._requests import Call
from ._retry import parse_retry_after
from ._version import sdk_version
from .errors import APIConnectionError, APIStatusError, APITimeoutError, InvalidResponseError, status_error

Transport: TypeAlias = httpx2.BaseTransport
AsyncTransport: TypeAlias = httpx2.AsyncBaseTransport

# A server may close an idle connection after 5 s (uvicorn's default). We drop it sooner, so that a
# request is never sent on a connection that is just being closed.
_LIMITS = httpx2.Limits(max_connections=1000, max_keepalive_connections=100, keepalive_expiry=4.0)


@dataclass(frozen=True)
class Reply:
    """A whole response."""

    status: int
    body: bytes


class Response:
    """An open response: read it or iterate over it, and close it in any case."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self.status = response.status_code

    def read(self) -> bytes:
        with _errors(self._response.request):
            return self._response.read()

    def chunks(self) -> Generator[bytes, None, None]:
        """The body as it arrives."""
        with _errors(self._response.request):
            yield from self._response.iter_bytes()

    def close(self) -> None:
        self._response.close()


class AsyncResponse:
    """As Response, for asynchronous code."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self.status = response.status_code

    async def read(self) -> bytes:
        with _errors(self._response.request):
            return await self._response.aread()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. Close the generator, or the body stays open until it is collected."""
        with _errors(self._response.request):
            async with aclosing(self._response.aiter_bytes()) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def close(self) -> None:
        await self._response.aclose()


class Http:
    """One connection pool to one server."""

    def __init__(self, url: str, transport: Transport | None) -> None:
        self._client = httpx2.Client(
            base_url=_url(url), transport=transport, limits=_LIMITS, trust_env=not _is_loopback(url)
        )

    def open(self, call: Call, options: ClientOptions) -> Response:
        """Send `call` once and give the response, its body still unread.

        Raises:
            APIConnectionError, APITimeoutError, APIStatusError, InvalidResponseError.
            OSError, ValueError: a file that belongs to `call` cannot be read.
        """
        with _content(call) as content:
            request = _request(self._client, call, content, options)
            return self._send(call, request)

    def _send(self, call: Call, request: httpx2.Request) -> Response:
        with _errors(request):
            response = self._client.send(request, stream=True)
            if _is_answer(call, response):
                return Response(response)
            try:
                response.read()
            finally:
                response.close()
        raise _status_error(response)

    def fetch(self, call: Call, options: ClientOptions) -> Reply:
        """Send `call` once and give the whole response. Raises as `open`."""
        response = self.open(call, options)
        try:
            return Reply(response.status, response.read())
        finally:
            response.close()

    def close(self) -> None:
        self._client.close()


class AsyncHttp:
    """As Http, for asynchronous code."""

    def __init__(self, url: str, transport: AsyncTransport | None) -> None:
        self._client = httpx2.AsyncClient(
            base_url=_url(url), transport=transport, limits=_LIMITS, trust_env=not _is_loopback(url)
        )

    async def open(self, call: Call, options: ClientOptions) -> AsyncResponse:
        """As Http.open."""
        with _content(call) as content:
            request = _request(self._client, call, content, options)
            return await self._send(call, request)

    async def _send(self, call: Call, request: httpx2.Request) -> AsyncResponse:
        with _errors(request):
            response = await self._client.send(request, stream=True)
            if _is_answer(call, response):
                return AsyncResponse(response)
            try:
                await response.aread()
            finally:
                await response.aclose()
        raise _status_error(response)

    async def fetch(self, call: Call, options: ClientOptions) -> Reply:
        """As Http.fetch."""
        response = await self.open(call, options)
        try:
            return Reply(response.status, await response.read())
        finally:
            await response.close()

    async def close(self) -> None:
        await self._client.aclose()


def _content(call: Call) -> AbstractContextManager[bytes | OpenForm | None]:
    """What is sent as the body; the files of a form are open inside the block."""
    return call.body.opened() if isinstance(call.body, Multipart) else nullcontext(call.body)


def _request(
    client: httpx2.Client | httpx2.AsyncClient,
    call: Call,
    content: bytes | OpenForm | None,
    options: ClientOptions,
) -> httpx2.Request:
    headers = {"User-Agent": f"onebase-python/{sdk_version()}", **dict(call.headers)}
    if isinstance(call.body, Multipart):
        headers["Content-Type"] = call.body.content_type
    elif call.body is not None:
        headers["Content-Type"] = "application/json"
    body: bytes | Iterator[bytes] | AsyncIterator[bytes] | None
    if isinstance(content, OpenForm):
        headers["Content-Length"] = str(content.length)  # else it would be sent chunked
        body = content.achunks() if isinstance(client, httpx2.AsyncClient) else content.chunks()
    else:
        body = content
    if options.api_key is not None:
        headers["Authorization"] = f"Bearer {options.api_key}"
    return client.build_request(
        call.method, call.path, content=body, headers=headers, timeout=_timeout(options.timeout)
    )


def _timeout(timeout: Timeout) -> httpx2.Timeout:
    # pool=None: with all connections busy a request waits its turn; `read` then bounds those before it.
    return httpx2.Timeout(connect=timeout.connect, read=timeout.read, write=timeout.write, pool=None)


def _is_answer(call: Call, response: httpx2.Response) -> bool:
    return response.is_success or response.status_code in call.answer_statuses


def _status_error(response: httpx2.Response) -> APIStatusError:
    retry_after = parse_retry_after(response.headers.get("retry-after"), datetime.now(UTC))
    detail = _parse.error_detail(response.status_code, response.content)
    return status_error(response.status_code, detail, retry_after=retry_after)


@contextmanager
def _errors(request: httpx2.Request) -> Iterator[None]:
    """Raise the library's failures as ours."""
    server = f"{request.url.scheme}://{request.url.netloc.decode()}"
    try:
        yield
    except httpx2.ConnectTimeout as error:
        raise APITimeoutError(f"connecting to {server} took too long", sent=False) from error
    except httpx2.TimeoutException as error:
        raise APITimeoutError(
            f"{server} sent nothing for too long; raise `timeout`, or stream the answer", sent=True
        ) from error
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
    """Whether the server is this machine: never through a proxy, whatever the environment says."""
    host = _url(url).host
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
