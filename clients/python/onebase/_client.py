"""The synchronous client."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar, Unpack

from . import _parse, _requests
from ._adapters import Adapters
from ._config import UNSET, ClientOptions, Timeout, Unset, api_key_or_default, url_or_default
from ._files import Files
from ._http import Http, Reply, Transport
from ._requests import Call
from ._retry import retry_delay
from ._streaming import Stream
from ._training import Training
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


class Client:
    """Talks to one OneBase server. Safe to share between threads; close it, or use it in a `with` block.

    Example:
        >>> with Client() as client:  # doctest: +SKIP
        ...     answer = client.chat("What is the capital of France?", adapter="acme-support")
        ...     print(answer.text)

    Args:
        url: Where the server is; else $ONEBASE_URL, else http://127.0.0.1:8000.
        api_key: Sent as a bearer token; else $ONEBASE_API_KEY, else none.
        timeout: Seconds that the server may be silent, or a Timeout for each kind of wait, or None for
            no limit. By default 5 seconds to connect and 600 for an answer.
        max_retries: How often a request is sent again after a failure that sending it again cannot make
            worse: no connection, 429, 503; for reads also a lost connection, a timeout and 502 and 504.
            It waits longer each time, or as long as the server asks by Retry-After. A stream that has
            begun is never repeated.
        transport: Replaces the network, for tests.

    Raises:
        ValueError: an argument is out of range, or `url` is not a URL.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | Timeout | None = Timeout(),  # noqa: B008 (frozen)
        max_retries: int = 2,
        transport: Transport | None = None,
    ) -> None:
        self._options = ClientOptions(api_key_or_default(api_key), Timeout.of(timeout), max_retries)
        self._url = url_or_default(url)
        self._http = Http(self._url, transport)

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
    ) -> Client:
        """A client with other options over the same connections: `client.with_options(timeout=5).chat(...)`.

        Closing either closes both.
        """
        client = copy.copy(self)
        client._options = self._options.changed(api_key, timeout, max_retries)
        return client

    @property
    def adapters(self) -> Adapters:
        """The server's adapters, and how new ones get there."""
        return Adapters(self._send)

    @property
    def files(self) -> Files:
        """Files of examples that jobs learn from, and the curves that they leave."""
        return Files(self._send)

    @property
    def training(self) -> Training:
        """Jobs that train adapters on the server's base."""
        return Training(self._send, lambda call: self._retried(call, self._http.open))

    @property
    def models(self) -> Models:
        """What a request can name: the base and the adapters."""
        return Models(self)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        adapter: AdapterSpec = None,
        **sampling: Unpack[SamplingFields],
    ) -> Generation:
        """Continue a text, or answer a conversation.

        Args:
            prompt: Text to continue, as it is, without a chat template.
            messages: A conversation instead; see `chat`.
            adapter: None for the base, a name, `name@version`, `hub:org/repo@revision`, or weights:
                `{"acme": 0.7, "legal": 0.3}`.
            **sampling: See SamplingFields.

        Raises:
            OneBaseError: see `onebase.errors` for its kinds.
            TypeError, ValueError: an argument is wrong; nothing was sent.
        """
        call = _requests.generate(prompt, messages, adapter, sampling, stream=False)
        return _parse.parse(self._send(call).body, _parse.generation)

    def chat(
        self, messages: Messages, *, adapter: AdapterSpec = None, **sampling: Unpack[SamplingFields]
    ) -> Generation:
        """Answer a conversation, laid out by the base's chat template.

        Args:
            messages: The turns so far, or one question as a string. Append the answer's `message` to go on.
            adapter, **sampling: As for `generate`.

        Raises:
            As `generate`.
        """
        return self.generate(messages=messages, adapter=adapter, **sampling)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        adapter: AdapterSpec = None,
        **sampling: Unpack[SamplingFields],
    ) -> Stream:
        """As `generate`, piece by piece. The request is sent on entering the `with` block.

        Example:
            >>> with client.stream("Once upon a time") as stream:  # doctest: +SKIP
            ...     for piece in stream:
            ...         print(piece.text, end="", flush=True)
            ...     print(stream.result.usage)

        Raises:
            As `generate`, on entering; StreamError while iterating.
        """
        call = _requests.generate(prompt, messages, adapter, sampling, stream=True)
        return Stream(lambda: self._retried(call, self._http.open))

    def health(self) -> Health:
        """Whether the server makes progress. A server that is there but unwell is an answer, no error.

        Raises:
            APIConnectionError, APITimeoutError: nobody answers.
        """
        reply = self._send(_requests.HEALTH)
        return _parse.health(reply.status, reply.body)

    def ready(self) -> Health:
        """Whether the server takes requests now: false while it loads the base, and while it drains.

        Raises:
            APIConnectionError, APITimeoutError: nobody answers.
        """
        reply = self._send(_requests.READY)
        return _parse.health(reply.status, reply.body)

    def version(self) -> ServerVersion:
        """The server's version."""
        return _parse.parse(self._send(_requests.VERSION).body, _parse.version)

    def close(self) -> None:
        """Close the connections; the client cannot be used any more."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call) -> Reply:
        return self._retried(call, self._http.fetch)

    def _retried(self, call: Call, send: Callable[[Call, ClientOptions], T]) -> T:
        attempt = 0
        while True:
            try:
                return send(call, self._options)
            except OneBaseError as error:
                delay = retry_delay(error, call, attempt, self._options.max_retries, random.random())
                if delay is None:
                    raise
            time.sleep(delay)
            attempt += 1


class Models:
    """`client.models`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> tuple[Model, ...]:
        """The base and every adapter."""
        return _parse.parse(self._client._send(_requests.MODELS).body, _parse.models)

    def retrieve(self, model_id: str) -> Model:
        """One of them.

        Raises:
            NotFoundError: there is none of this name.
        """
        return _parse.parse(self._client._send(_requests.model(model_id)).body, _parse.model)
