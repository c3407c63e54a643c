"""The asynchronous client: Client's methods, awaited. What they mean is documented there."""

from __future__ import annotations

import copy
import random
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar, Unpack

import anyio

from . import _parse, _requests
from ._async_adapters import AsyncAdapters
from ._async_training import AsyncTraining
from ._config import UNSET, ClientOptions, Timeout, Unset, api_key_or_default, url_or_default
from ._files import AsyncFiles
from ._http import AsyncHttp, AsyncTransport, Reply
from ._requests import Call
from ._retry import retry_delay
from ._streaming import AsyncStream
from .errors import OneBaseError
from .types import (
    AdapterSpec,
    Generation,
    Health,
    Messages,
    Model,
    SamplingFields,
    ServerVersion,
)

T = TypeVar("T")


class AsyncClient:
    """Talks to one OneBase server from asyncio or trio; arguments as for Client.

    Example:
        >>> async with AsyncClient() as client:  # doctest: +SKIP
        ...     answer = await client.chat("What is the capital of France?")
        ...     async with client.stream("Once upon a time") as stream:
        ...         async for piece in stream:
        ...             print(piece.text, end="", flush=True)
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | Timeout | None = Timeout(),  # noqa: B008 (frozen)
        max_retries: int = 2,
        transport: AsyncTransport | None = None,
    ) -> None:
        self._options = ClientOptions(api_key_or_default(api_key), Timeout.of(timeout), max_retries)
        self._url = url_or_default(url)
        self._http = AsyncHttp(self._url, transport)

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._url

    def with_options(
        self,
        *,
        api_key: str | Unset | None = UNSET,
        timeout: float | Timeout | Unset | None = UNSET,
        max_retries: int | Unset = UNSET,
    ) -> AsyncClient:
        """A client with other options over the same connections. Closing either closes both."""
        client = copy.copy(self)
        client._options = self._options.changed(api_key, timeout, max_retries)
        return client

    @property
    def adapters(self) -> AsyncAdapters:
        """The server's adapters, and how new ones get there."""
        return AsyncAdapters(self._send)

    @property
    def files(self) -> AsyncFiles:
        """Files of examples that jobs learn from, and the curves that they leave."""
        return AsyncFiles(self._send)

    @property
    def training(self) -> AsyncTraining:
        """Jobs that train adapters on the server's base."""
        return AsyncTraining(self._send, lambda call: self._retried(call, self._http.open))

    @property
    def models(self) -> AsyncModels:
        """What a request can name: the base and the adapters."""
        return AsyncModels(self)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        adapter: AdapterSpec = None,
        **sampling: Unpack[SamplingFields],
    ) -> Generation:
        """As Client.generate."""
        call = _requests.generate(prompt, messages, adapter, sampling, stream=False)
        return _parse.parse((await self._send(call)).body, _parse.generation)

    async def chat(
        self, messages: Messages, *, adapter: AdapterSpec = None, **sampling: Unpack[SamplingFields]
    ) -> Generation:
        """As Client.chat."""
        return await self.generate(messages=messages, adapter=adapter, **sampling)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        adapter: AdapterSpec = None,
        **sampling: Unpack[SamplingFields],
    ) -> AsyncStream:
        """As Client.stream, for `async with` and `async for`."""
        call = _requests.generate(prompt, messages, adapter, sampling, stream=True)
        return AsyncStream(lambda: self._retried(call, self._http.open))

    async def health(self) -> Health:
        """As Client.health."""
        reply = await self._send(_requests.HEALTH)
        return _parse.health(reply.status, reply.body)

    async def ready(self) -> Health:
        """As Client.ready."""
        reply = await self._send(_requests.READY)
        return _parse.health(reply.status, reply.body)

    async def version(self) -> ServerVersion:
        """As Client.version."""
        return _parse.parse((await self._send(_requests.VERSION)).body, _parse.version)

    async def close(self) -> None:
        """Close the connections; the client cannot be used any more."""
        await self._http.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call) -> Reply:
        return await self._retried(call, self._http.fetch)

    async def _retried(self, call: Call, send: Callable[[Call, ClientOptions], Awaitable[T]]) -> T:
        attempt = 0
        while True:
            try:
                return await send(call, self._options)
            except OneBaseError as error:
                delay = retry_delay(error, call, attempt, self._options.max_retries, random.random())
                if delay is None:
                    raise
            await anyio.sleep(delay)
            attempt += 1


class AsyncModels:
    """`client.models`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> tuple[Model, ...]:
        """The base and every adapter."""
        return _parse.parse((await self._client._send(_requests.MODELS)).body, _parse.models)

    async def retrieve(self, model_id: str) -> Model:
        """As Models.retrieve."""
        return _parse.parse((await self._client._send(_requests.model(model_id))).body, _parse.model)
