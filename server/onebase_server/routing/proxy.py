"""`onebase route`: one address for several servers of one base. A request goes where its adapter is.

The servers share a registry and a store, so that any of them knows every adapter. What each has in memory and
to do is read off its `/metrics`, as other gateways do.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import httpx2
import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from onebase_server.errors import InvalidRequestError, OneBaseError, PayloadTooLargeError, UnavailableError
from onebase_server.http.door import CHANGE, Door
from onebase_server.http.refusals import error_json, is_anthropic, refusal
from onebase_server.http.request_id import request_id
from onebase_server.http.server import QuietServer, uvicorn_config
from onebase_server.http.sse import DONE, connection_abort
from onebase_server.metrics import CONTENT_TYPE
from onebase_server.routing.placement import NoReplicaError, Placement, Report
from onebase_server.settings import Settings

LOOK_SECONDS = 0.5
"""Between two looks at a server."""
_LOOK_TIMEOUT = 3.0
_CONNECT_SECONDS = 2.0
_TIMEOUT = {"timeout": httpx2.Timeout(None, connect=_CONNECT_SECONDS).as_dict()}
_AWAY = 2
"""Looks in a row that get no answer, after which a server is away."""
_METRICS_BYTES = 16 << 20
"""Of a server's metrics at most."""
_MOST_BROKEN = 2
"""Servers that one request may break: what ends one would end the next."""
_MOST_WAITING = 256
"""Requests that wait for a first server: each has its body in memory."""
_MOST_REFUSED = 3
"""Servers that are asked again where one has no room, or does not know an adapter."""
_KEPT_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), seconds)
        for name, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
)
"""A machine that is gone without a word is noticed within half a minute."""
_NULL = msgspec.Raw(b"null")
_NAME_CHARACTERS = 512
"""Of a name that is remembered."""
_ANSWER_TOKENS = 128
"""Of a request that names no limit."""
_PREFIX_CHARACTERS = 512
_PROBLEM_BYTES = 64 << 10
"""Of an answer that may be tried elsewhere, which is read whole."""
_HOP_BY_HOP = frozenset(
    {
        b"connection", b"content-length", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
_OURS = frozenset(
    {
        b"host", b"expect", b"x-request-id",
        b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-port", b"x-forwarded-proto",
        b"x-real-ip", CHANGE,
        b"origin", b"sec-fetch-site",
    }
)  # fmt: skip
"""Headers of a request that servers are told by us, or that `Door` has checked: they go by another name."""
_DATE = frozenset({b"date"})
"""Of an answer, which gets its own."""
_OF_ONE_SERVER = ("/pause", "/resume", "/is_paused", "/status", "/server_info", "/get_world_size")
_KEPT_BY_ONE = b"response_not_found"
_LEARNT = (b"model_not_found", b"adapter_not_found")
"""Codes of errors that say that another server may know: of what it keeps alone, or has learnt first."""
_TEXT = frozenset(
    {
        "/", "/generate", "/generate/many", "/v1/completions", "/v1/chat/completions", "/v1/responses",
        "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/v1/classify", "/classify",
        "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/v1/decide", "/tokenize",
        "/detokenize",
    }
)  # fmt: skip
"""Paths of requests that may be sent again to another server, whatever came of the first."""

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: \S+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")

_log = logging.getLogger(__name__)
T = TypeVar("T")


def replica_lost() -> UnavailableError:
    """The server that was answering is gone; nothing is known of its answer but what was passed on."""
    return UnavailableError(
        "The server that was answering has gone. Send the request again.",
        code="replica_lost",
        retry_after=1.0,
    )


# ---- what a request is for -----------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What is read off a request's body: the adapter (None: the base, or none is named), an estimate of its
    tokens, and what it begins with."""

    adapter: str | None = None
    tokens: float = 1.0
    prefix: str | None = None


class _Body(msgspec.Struct):
    """The fields that are looked at; of the others no object is made."""

    adapter: Any = None
    adapter_id: Any = None
    model: Any = None
    parameters: msgspec.Raw = _NULL
    max_tokens: msgspec.Raw = _NULL
    max_completion_tokens: msgspec.Raw = _NULL
    max_output_tokens: msgspec.Raw = _NULL
    system: msgspec.Raw = _NULL
    instructions: msgspec.Raw = _NULL
    prompt: msgspec.Raw = _NULL
    inputs: msgspec.Raw = _NULL
    input: msgspec.Raw = _NULL
    messages: msgspec.Raw = _NULL
    requests: msgspec.Raw = _NULL


class _Parameters(msgspec.Struct):
    adapter_id: Any = None


class _Message(msgspec.Struct):
    content: msgspec.Raw = _NULL


def asked(body: bytes, bases: frozenset[str]) -> Asked:
    """Of a body that may be anything: what cannot be read is for a server to refuse."""
    fields = _read(body, _Body)
    if fields is None:
        return Asked()
    many = _read(fields.requests, list[msgspec.Raw])
    if many:
        fields = _read(many[0], _Body) or fields  # of those that go together the first decides
    inner = _read(fields.parameters, _Parameters)
    named = (fields.adapter, fields.adapter_id, inner.adapter_id if inner else None, fields.model)
    adapter = next((name for one in named if (name := _name(one)) is not None), None)
    if adapter is not None and adapter.rpartition("/")[2].lower() in {base.lower() for base in bases}:
        adapter = None  # by its name here, or on the Hub
    given = (fields.max_tokens, fields.max_completion_tokens, fields.max_output_tokens)
    limits = (_read(one, int) for one in given)
    most = next((one for one in limits if one is not None and one > 0), _ANSWER_TOKENS)
    return Asked(adapter, len(body) / 4 + min(most, 4 * _ANSWER_TOKENS), _beginning(fields))


def _read(data: bytes | msgspec.Raw, kind: type[T]) -> T | None:
    """None for what is not of that kind."""
    if data is _NULL:
        return None
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None


def _name(value: Any) -> str | None:
    """An adapter's, without its version; those of a weighted sum go together."""
    if isinstance(value, str) and value:
        name = value[:_NAME_CHARACTERS]
        if name.startswith("hub:"):
            return name
        parts = name.split(":")  # ft:base:organization:name:version
        return parts[3] if parts[0] == "ft" and len(parts) > 3 else name.partition("@")[0]
    if isinstance(value, list) and value:
        names = [_name(one.get("name")) if isinstance(one, dict) else None for one in value]
        return "+".join(sorted(name for name in names if name is not None))[:_NAME_CHARACTERS] or None
    return None


def _beginning(fields: _Body) -> str | None:
    for one in (fields.system, fields.instructions, fields.prompt, fields.inputs, fields.input):
        if (text := _read(one, str)) is not None:
            return text[:_PREFIX_CHARACTERS]
    messages = _read(fields.messages, list[msgspec.Raw])
    first = _read(messages[0], _Message) if messages else None
    text = _read(first.content, str) if first else None
    return None if text is None else text[:_PREFIX_CHARACTERS]


# ---- what a server tells of itself -----------------------------------------------------------------


def read_report(text: str) -> tuple[Report, frozenset[str]]:
    """A server's metrics as a report, and the names of its base. Raises ValueError for what has none.

    The text may be anything: KeyError and OverflowError are raised too. It is read here since servers with
    many adapters have thousands of lines, twice a second: prometheus_client takes ten times as long.
    """
    found: dict[str, float] = {}
    slots: dict[str, bool] = {}
    host: set[str] = set()
    running: set[str] = set()
    bases: set[str] = set()
    wanted = (
        "vllm:num_requests_", "vllm:lora_adapter_loaded{", "vllm:lora_requests_info{", "onebase_max_rows",
        "vllm:max_gpu_lora_adapters",
    )  # fmt: skip
    for line in text.split("\n"):
        if not line.startswith(wanted):
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample is None:
            raise ValueError(f"no sample of a metric: {line[:80]!r}")
        name, inside, value = sample.groups()
        labels = {key: _ESCAPED.sub(_unescaped, text) for key, text in _LABEL.findall(inside or "")}
        if name == "vllm:lora_adapter_loaded":
            if labels.get("level") == "gpu":
                slots[labels["adapter_name"]] = False
            else:
                host.add(labels["adapter_name"])
        elif name == "vllm:lora_requests_info":
            running |= set(labels.get("running_lora_adapters", "").split(","))
        else:
            found[name] = float(value)
            bases |= {labels["model_name"]} if "model_name" in labels else set()
    if "vllm:num_requests_running" not in found:
        raise ValueError("no vllm:num_requests_running among the metrics")
    report = Report(
        rows=max(1, int(found.get("onebase_max_rows", 32))),
        slots=int(found.get("vllm:max_gpu_lora_adapters", 0)),
        in_slots={name: name in running for name in slots},
        in_host=host,
        waiting=int(found.get("vllm:num_requests_waiting", 0)),
        running=int(found["vllm:num_requests_running"]),
    )
    return report, frozenset(bases)


def _unescaped(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]


@dataclass
class Replica:
    """A server behind the address. missed: looks in a row that got no answer; why: the last one did not.
    open: requests that were sent to it and have not ended."""

    url: str
    way: httpx2.AsyncHTTPTransport
    ready: bool = False
    missed: int = 0
    why: str = "not looked at yet"
    bases: frozenset[str] = field(default_factory=frozenset)
    open: int = 0
    looking: asyncio.Task[None] | None = None


# ---- the proxy -----------------------------------------------------------------------------------


class Route:
    """The ASGI app.

    Args:
        key: of a server's operator, with which its metrics are read.
        max_body: bytes of a body that is read for its adapter; larger ones of other kinds pass through.
        listed: the servers from now on, asked before each look; None where they stay the same.
        wait: seconds that a request waits for a server where there is none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str | None,
        max_body: int,
        clock: Callable[[], float] = time.monotonic,
        listed: Callable[[], Sequence[str] | None] = lambda: None,
        wait: float = 0.0,
    ) -> None:
        self.replicas: dict[str, Replica] = {}
        self.placement = Placement()
        self._clock = clock
        self._listed = listed
        self._wait = wait
        self._came = anyio.Event()
        self._leaving: set[asyncio.Task[None]] = set()
        self._headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._max_body = max_body
        self._change = 0
        """The registry's last change that an answer was as of: none that follows is older."""
        self._trust = httpx2.create_ssl_context(trust_env=False)
        self._known = CollectorRegistry()
        self._ready = Gauge(
            "onebase_route_ready", "1 for a server that answers.", ["replica"], registry=self._known
        )
        self._sent = Counter("onebase_route_requests", "Requests sent.", ["replica"], registry=self._known)
        self._again = Counter("onebase_route_retries", "Sent again to another.", registry=self._known)
        self._lost = Counter("onebase_route_lost", "Answers cut by a server that went.", registry=self._known)
        self._waiting = Gauge(
            "onebase_route_waiting", "Requests that wait for a first server.", registry=self._known
        )
        self._waiters = 0
        self.set_replicas(urls)

    @property
    def bases(self) -> frozenset[str]:
        return frozenset().union(*(one.bases for one in self.replicas.values()))

    async def close(self) -> None:
        for task in self._leaving:
            task.cancel()
        for one in self.replicas.values():
            if one.looking is not None:
                one.looking.cancel()
            await one.way.aclose()

    def set_replicas(self, urls: Sequence[str]) -> None:
        """These servers are behind the address from now on. What was sent to others goes on there."""
        for url in [url for url in self.replicas if url not in urls]:
            gone = self.replicas.pop(url)
            self.placement.lost(url)
            for known in (self._ready, self._sent):
                known.remove(url)
            _log.warning("%s is taken out", url)
            task = asyncio.get_running_loop().create_task(_leave(gone))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        for url in urls:
            if url not in self.replicas:
                # A transport each: a pool looks through all of its connections at each request.
                limits = httpx2.Limits(max_connections=None, max_keepalive_connections=256)
                way = httpx2.AsyncHTTPTransport(
                    verify=self._trust, trust_env=False, limits=limits, socket_options=_KEPT_ALIVE
                )
                self.replicas[url] = Replica(url, way)
                self._ready.labels(url).set(0)
                self._sent.labels(url)

    # ---- looking -----------------------------------------------------------------------------

    def read_list(self) -> None:
        urls = self._listed()
        if urls is not None:
            self.set_replicas(urls)

    async def follow(self) -> None:
        """Look at every server again and again, and at the list of them. Never returns."""
        while True:
            self.read_list()
            for one in self.replicas.values():
                if one.looking is None or one.looking.done():
                    one.looking = asyncio.create_task(self.look(one))
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self, replica: Replica) -> None:
        """See whether a server is ready, and what it has to do."""
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT):
                for path in ("/ready", "/metrics"):
                    status, told = await self._ask(replica, path)
                    if status != 200:
                        self._is_away(replica, f"{path} answers {status}", at_once=True)
                        return
            report, bases = read_report(told.decode("utf-8", "replace"))
        except TimeoutError:
            self._is_away(replica, "does not answer in time", at_once=False)
            return
        except Exception as error:  # of a text and a server that may be anything: looking goes on
            self._is_away(replica, str(error) or type(error).__name__, at_once=False)
            return
        if self.replicas.get(replica.url) is not replica:
            return  # taken out meanwhile
        replica.missed, replica.bases = 0, bases
        self.placement.told(replica.url, report)
        if not replica.ready:
            replica.ready = True
            _log.warning("%s is ready", replica.url)
            self._came.set()
            self._came = anyio.Event()
        self._ready.labels(replica.url).set(1)

    async def _ask(self, replica: Replica, path: str) -> tuple[int, bytes]:
        """Status and body. Raises ValueError for one that is too large."""
        sent = httpx2.Request("GET", replica.url + path, headers=self._headers, extensions=_TIMEOUT)
        answer = await replica.way.handle_async_request(sent)
        try:
            body = bytearray()
            async for piece in answer.aiter_raw():
                body += piece
                if len(body) > _METRICS_BYTES:
                    raise ValueError(f"{path} is over {_METRICS_BYTES >> 20} MB")
            return answer.status_code, bytes(body)
        finally:
            await answer.aclose()

    def _is_away(self, replica: Replica, why: str, *, at_once: bool) -> None:
        replica.missed += 1
        replica.why = why
        if self.replicas.get(replica.url) is not replica:
            return
        if at_once or replica.missed >= _AWAY:
            self.placement.lost(replica.url)
            self._ready.labels(replica.url).set(0)
            if replica.ready:
                replica.ready = False
                _log.warning("%s is away: %s", replica.url, why)

    # ---- answering ---------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"nobody is let in by {scope['type']}")
        client = _Client(scope, receive)
        async with anyio.create_task_group() as group:
            group.start_soon(client.leaves, group.cancel_scope)
            try:
                answer = await self._answer(client)
                await answer(scope, receive, send)
            except OneBaseError as error:
                await refusal(error)(scope, receive, send)
            except ClientDisconnect:
                pass
            finally:
                group.cancel_scope.cancel()

    async def _answer(self, client: _Client) -> ASGIApp:
        request, path = client.request, client.path
        if path == "/health":
            return _json({"status": "ok", "servers": len(self.placement.replicas)})
        if path == "/ready":
            there = len(self.placement.replicas)
            ready = bool(there or self._wait)
            status = {"status": "ready" if ready else "not ready", "servers": there}
            return _json(status, 200 if ready else 503)
        if path == "/metrics":
            return Response(generate_latest(self._known), media_type=CONTENT_TYPE)
        if path in _OF_ONE_SERVER:
            raise UnavailableError(
                f"{path} is of one server: ask it at its own address.", code="of_one_server", retry_after=60.0
            )
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind in ("application/json", ""):
            body = await client.whole(self._max_body)
            return await self._pass_on(client, asked(body, self.bases), body, path in _TEXT)
        if request.method in ("GET", "HEAD", "DELETE", "OPTIONS"):
            client.unread()
            return await self._pass_on(client, Asked(), b"", request.method != "DELETE")
        return await self._pass_on(client, Asked(), client.pieces(), False)

    async def _pass_on(
        self, client: _Client, wanted: Asked, body: bytes | AsyncIterator[bytes], again: bool
    ) -> ASGIApp:
        """The answer of the first server that has one. again: whether one that broke may have computed it."""
        tried: list[str] = []
        until = self._clock() + self._wait
        broken = refused = 0
        problem: Response | None = None
        while True:
            now = self._clock()
            try:
                url = self.placement.place(
                    wanted.adapter, wanted.tokens, now, prefix=wanted.prefix, but=tried
                )
            except NoReplicaError:
                if problem is not None:
                    return problem
                if not tried and await self._has_come(until - now):
                    continue
                raise UnavailableError(
                    "None of the servers behind this address answers now. Send the request again soon.",
                    code="no_replica",
                    retry_after=2.0,
                ) from None
            tried.append(url)
            self._sent.labels(url).inc()
            if len(tried) > 1:
                self._again.inc()
            replica = self.replicas[url]
            sending = _Sending(self.placement, self._clock, replica, wanted, now)
            try:
                answer = await self._send(client, replica, body)
            except httpx2.LocalProtocolError as error:
                sending.refused()
                raise InvalidRequestError(
                    "Headers: a server would not take them. Send plain ones.", code="invalid_http"
                ) from error
            except httpx2.TransportError as error:
                begun = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                if begun and not isinstance(body, bytes):  # for what it sends, or how slowly
                    sending.refused()
                else:
                    sending.failed()
                _log.warning("%s broke: %s", url, error or type(error).__name__)
                broken += begun
                if begun and (not again or broken >= _MOST_BROKEN):
                    raise replica_lost() from error
                continue
            except BaseException:
                sending.ended()
                raise
            streamed = _is_events(answer)
            if streamed:
                sending.answered()
            maybe = answer.status_code in (404, 503) or (again and answer.status_code in (502, 504))
            if not (isinstance(body, bytes) and maybe and _is_short(answer)):
                return _Passing(answer, sending, self._lost)
            problem = await _whole(answer, sending)
            if answer.status_code == 404 and _KEPT_BY_ONE in bytes(problem.body):
                continue
            refused += 1
            known = answer.status_code == 404 and not any(code in bytes(problem.body) for code in _LEARNT)
            if known or refused >= _MOST_REFUSED:
                return problem

    async def _has_come(self, seconds: float) -> bool:
        """Whether a server is ready within the time, where there was none."""
        if seconds <= 0 or self._waiters >= _MOST_WAITING:
            return False
        self._waiters += 1
        self._waiting.inc()
        try:
            with anyio.move_on_after(seconds):
                await self._came.wait()
                return True
            return False
        finally:
            self._waiters -= 1
            self._waiting.dec()

    async def _send(
        self, client: _Client, replica: Replica, body: bytes | AsyncIterator[bytes]
    ) -> httpx2.Response:
        scope = client.request.scope
        headers = _passed(scope["headers"], _OURS)
        headers.append((b"x-request-id", request_id(scope).encode("latin-1")))
        if client.request.client is not None:
            headers.append((b"x-forwarded-for", client.request.client.host.encode("latin-1", "replace")))
        headers.append((b"x-forwarded-proto", scope["scheme"].encode()))
        headers.append((CHANGE, b"%d" % self._change))
        length = client.request.headers.get("content-length")
        if not isinstance(body, bytes) and length is not None:
            headers.append((b"content-length", length.encode("latin-1")))
        sent = httpx2.Request(
            client.request.method,
            replica.url,
            headers=headers,
            content=body or None,
            extensions=_TIMEOUT | {"target": client.target},
        )
        answer = await replica.way.handle_async_request(sent)
        change = answer.headers.get(CHANGE.decode(), "")
        if change.isdigit() and len(change) < 19:
            self._change = max(self._change, int(change))
        return answer


async def _leave(replica: Replica) -> None:
    """Close the connections to a server that was taken out, once what goes over them has ended."""
    if replica.looking is not None:
        replica.looking.cancel()
    while replica.open:
        await asyncio.sleep(LOOK_SECONDS)
    await replica.way.aclose()


class _Client:
    """Who asks: what it sends, and whether it is still there."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.request = Request(scope, receive)
        self.path: str = scope["path"]
        self._receive = receive
        self._read = anyio.Event()
        """Its body, or it will not be: what comes now is only that it leaves."""

    @property
    def target(self) -> bytes:
        """The address as it was sent. Raises InvalidRequestError for one that is no path."""
        scope = self.request.scope
        raw: bytes = (scope.get("raw_path") or self.path.encode()).partition(b"?")[0]
        if not raw.startswith(b"/"):
            raise InvalidRequestError(
                "The request's address does not begin with a slash.", code="invalid_http"
            )
        query: bytes = scope.get("query_string", b"")
        return raw + (b"?" + query if query else b"")

    async def whole(self, most: int) -> bytes:
        """The body. Raises PayloadTooLargeError, ClientDisconnect."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > most:
                raise PayloadTooLargeError(most)
        return bytes(body)

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it comes. Raises ClientDisconnect."""
        async for piece in self.request.stream():
            if piece:
                yield piece
        self._read.set()

    def unread(self) -> None:
        """The body is not wanted."""
        self._read.set()

    async def leaves(self, answering: anyio.CancelScope) -> None:
        """Ends the answer once nobody waits for it."""
        await self._read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        answering.cancel()


class _Passing:
    """A server's answer as it comes, with the same bytes. Events that break off end with an error."""

    def __init__(self, answer: httpx2.Response, sending: _Sending, lost: Counter) -> None:
        self._answer = answer
        self._sending = sending
        self._lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        headers = _passed(answer.headers.raw, _DATE)
        length = answer.headers.get("content-length")
        if length is not None and answer.status_code != 304:  # of a body that is not sent
            headers.append((b"content-length", length.encode("latin-1")))
        try:
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            try:
                async for piece in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except httpx2.TransportError as error:
                self._sending.failed()
                self._lost.inc()
                _log.warning("%s broke in an answer: %s", self._sending.url, error or type(error).__name__)
                if not _is_events(answer):
                    connection_abort(scope)()
                    await asyncio.sleep(0)  # until the connection knows of it
                    return
                await send({"type": "http.response.body", "body": _lost_event(scope), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if answer.status_code < 400:
                self._sending.ended()
            self._sending.refused()
            with anyio.CancelScope(shield=True):
                await answer.aclose()


class _Sending:
    """One request on one server, which ends once."""

    def __init__(
        self,
        placement: Placement,
        clock: Callable[[], float],
        replica: Replica,
        wanted: Asked,
        since: float,
    ) -> None:
        self.url = replica.url
        self._replica = replica
        self._placement = placement
        self._clock = clock
        self._wanted = wanted
        self._since = since
        self._over = False
        replica.open += 1

    def answered(self) -> None:
        now = self._clock()
        self._placement.answered(self.url, now - self._since, now)

    def failed(self) -> None:
        self._end(None)

    def ended(self) -> None:
        self._end(self._clock() - self._since)

    def refused(self) -> None:
        """It says nothing of the server, nor of how long an answer takes."""
        self._end(None, refused=True)

    def _end(self, seconds: float | None, *, refused: bool = False) -> None:
        if not self._over:
            self._over = True
            self._replica.open -= 1
            name, tokens = self._wanted.adapter, self._wanted.tokens
            self._placement.ended(self.url, name, tokens, self._clock(), seconds=seconds, refused=refused)


def _is_short(answer: httpx2.Response) -> bool:
    length = answer.headers.get("content-length", "")
    return length.isdigit() and int(length) <= _PROBLEM_BYTES


async def _whole(answer: httpx2.Response, sending: _Sending) -> Response:
    try:
        content = b"".join([piece async for piece in answer.aiter_raw()])
    except httpx2.TransportError:
        return refusal(replica_lost())
    finally:
        sending.refused()
        with anyio.CancelScope(shield=True):
            await answer.aclose()
    made = Response(content, answer.status_code)
    made.raw_headers = [*_passed(answer.headers.raw, _DATE), (b"content-length", b"%d" % len(content))]
    return made


def _is_events(answer: httpx2.Response) -> bool:
    """Whether it is a stream, the head of which comes with its first event."""
    kind: str = answer.headers.get("content-type", "")
    return kind.startswith("text/event-stream")


def _passed(headers: Iterable[tuple[bytes, bytes]], but: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """Headers that go on: without those of one connection, which it may name itself."""
    found = [(name.lower(), value.strip(b" \t")) for name, value in headers]
    named = {
        one.strip().lower() for name, value in found if name == b"connection" for one in value.split(b",")
    }
    return [
        (name, value) for name, value in found if not (name in _HOP_BY_HOP or name in but or name in named)
    ]


def _lost_event(scope: Scope) -> bytes:
    """What ends a stream whose server has gone, as the API that was asked tells errors."""
    error = replica_lost()
    data = error_json(error, scope)
    if is_anthropic(scope):
        return b"event: error\ndata: " + data + b"\n\n"
    if scope["path"].rstrip("/") == "/v1/responses":
        told = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return b"event: error\ndata: " + msgspec.json.encode(told) + b"\n\n"
    return b"\n\ndata: " + data + b"\n\n" + (b"" if scope["path"] == "/" else DONE)


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def serve(
    route: Route, settings: Settings, listener: socket.socket, on_ready: Callable[[], None]
) -> None:
    """Serve until a signal, then until what is running has ended, for at most the drain timeout.

    on_ready: called once, after the first look at the servers.
    """
    config = uvicorn_config(Door(route, settings), settings)
    config.timeout_graceful_shutdown = math.ceil(settings.drain_timeout)
    server = QuietServer(config)

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    route.read_list()
    await asyncio.gather(*map(route.look, route.replicas.values()))
    following = loop.create_task(route.follow())
    try:
        on_ready()
        await server.serve(sockets=[listener])
    finally:
        following.cancel()
        await route.close()
