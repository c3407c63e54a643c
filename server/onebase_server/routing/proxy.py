"""`onebase route`: one address for several servers of one base. A request goes where its adapter is.

The servers share a registry and a store, so that any of them knows every adapter. What each has in memory and
to do is read off its `/metrics`, as other gateways do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from onebase_server.errors import OneBaseError, PayloadTooLargeError, UnavailableError
from onebase_server.http.door import Door
from onebase_server.http.refusals import error_json, is_anthropic, refusal
from onebase_server.http.server import QuietServer, uvicorn_config
from onebase_server.http.sse import DONE
from onebase_server.metrics import CONTENT_TYPE
from onebase_server.routing.placement import NoReplicaError, Placement, Report
from onebase_server.settings import Settings

LOOK_SECONDS = 0.5
"""Between two looks at a server."""
_LOOK_TIMEOUT = 3.0
_CONNECT_SECONDS = 2.0
_AWAY = 2
"""Looks in a row that get no answer, after which a server is away."""
_ANSWER_TOKENS = 128
"""Of a request that names no limit."""
_PREFIX_CHARACTERS = 512
_PROBLEM_BYTES = 64 << 10
"""Of an answer that may be tried elsewhere, which is read whole."""
_HOP_BY_HOP = frozenset(
    {
        "connection", "content-length", "host", "keep-alive", "proxy-authenticate", "proxy-authorization",
        "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_OF_ONE_SERVER = ("/pause", "/resume", "/is_paused", "/status", "/server_info", "/get_world_size")
_ELSEWHERE = (b"response_not_found", b"model_not_found", b"adapter_not_found")
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

_log = logging.getLogger(__name__)


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


def asked(body: bytes, bases: frozenset[str]) -> Asked:
    """Of a body that may be anything: what cannot be read is for a server to refuse."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return Asked()
    if not isinstance(fields, dict):
        return Asked()
    many = fields.get("requests")
    if isinstance(many, list) and many and isinstance(many[0], dict):
        fields = many[0]  # of those that go together the first decides
    parameters = fields.get("parameters")
    inner = parameters if isinstance(parameters, dict) else {}
    named = [fields.get("adapter"), fields.get("adapter_id"), inner.get("adapter_id"), fields.get("model")]
    adapter = next((name for one in named if (name := _name(one)) is not None), None)
    if adapter is not None and adapter.rpartition("/")[2].lower() in {base.lower() for base in bases}:
        adapter = None  # by its name here, or on the Hub
    limits = (fields.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"))
    most = next((one for one in limits if isinstance(one, int) and one > 0), _ANSWER_TOKENS)
    return Asked(adapter, len(body) / 4 + min(most, 4 * _ANSWER_TOKENS), _beginning(fields))


def _name(value: Any) -> str | None:
    """An adapter's, without its version; those of a weighted sum go together."""
    if isinstance(value, str) and value:
        if value.startswith("hub:"):
            return value
        parts = value.split(":")  # ft:base:organization:name:version
        return parts[3] if parts[0] == "ft" and len(parts) > 3 else value.partition("@")[0]
    if isinstance(value, list) and value:
        names = [_name(one.get("name")) if isinstance(one, dict) else None for one in value]
        return "+".join(sorted(name for name in names if name is not None)) or None
    return None


def _beginning(fields: Mapping[str, Any]) -> str | None:
    for name in ("system", "instructions", "prompt", "inputs", "input"):
        if isinstance(fields.get(name), str):
            return str(fields[name])[:_PREFIX_CHARACTERS]
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        text = messages[0].get("content")
        return text[:_PREFIX_CHARACTERS] if isinstance(text, str) else None
    return None


# ---- what a server tells of itself -----------------------------------------------------------------


def read_report(text: str) -> tuple[Report, frozenset[str]]:
    """A server's metrics as a report, and the names of its base. Raises ValueError for what has none."""
    found: dict[str, float] = {}
    slots: dict[str, bool] = {}
    host: set[str] = set()
    running: set[str] = set()
    bases: set[str] = set()
    wanted = (
        "vllm:num_requests_", "vllm:lora_adapter_loaded{", "vllm:lora_requests_info{", "onebase_max_rows",
        "vllm:max_gpu_lora_adapters",
    )  # fmt: skip
    lines = [line for line in text.splitlines() if line.startswith(wanted)]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "vllm:lora_adapter_loaded":
                if labels.get("level") == "gpu":
                    slots[labels["adapter_name"]] = False
                else:
                    host.add(labels["adapter_name"])
            elif sample.name == "vllm:lora_requests_info":
                running |= set(labels.get("running_lora_adapters", "").split(","))
            else:
                found[sample.name] = sample.value
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


@dataclass
class Replica:
    """A server behind the address. missed: looks in a row that got no answer; why: the last one did not."""

    url: str
    ready: bool = False
    missed: int = 0
    why: str = "not looked at yet"
    bases: frozenset[str] = field(default_factory=frozenset)


# ---- the proxy -----------------------------------------------------------------------------------


class Route:
    """The ASGI app.

    Args:
        key: of a server's operator, with which its metrics are read.
        max_body: bytes of a body that is read for its adapter; larger ones of other kinds pass through.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        key: str | None,
        max_body: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replicas = {url: Replica(url) for url in urls}
        self.placement = Placement()
        self._clock = clock
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._max_body = max_body
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=256)
        self._timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)
        self._client = httpx2.AsyncClient(limits=limits, timeout=self._timeout, trust_env=False)
        self._known = CollectorRegistry()
        self._ready = Gauge(
            "onebase_route_ready", "1 for a server that answers.", ["replica"], registry=self._known
        )
        self._sent = Counter("onebase_route_requests", "Requests sent.", ["replica"], registry=self._known)
        self._again = Counter("onebase_route_retries", "Sent again to another.", registry=self._known)
        self._lost = Counter("onebase_route_lost", "Answers cut by a server that went.", registry=self._known)

    @property
    def bases(self) -> frozenset[str]:
        return frozenset().union(*(one.bases for one in self.replicas.values()))

    async def close(self) -> None:
        await self._client.aclose()

    # ---- looking -----------------------------------------------------------------------------

    async def follow(self) -> None:
        """Look at every server again and again. Never returns."""
        await asyncio.gather(*(self._follow(one) for one in self.replicas.values()))

    async def _follow(self, replica: Replica) -> None:
        while True:
            await self.look(replica)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self, replica: Replica) -> None:
        """See whether a server is ready, and what it has to do."""
        try:
            ready = await self._client.get(f"{replica.url}/ready", timeout=_LOOK_TIMEOUT)
            if ready.status_code != 200:
                self._is_away(replica, f"/ready answers {ready.status_code}", at_once=True)
                return
            told = await self._client.get(
                f"{replica.url}/metrics", headers=self._headers, timeout=_LOOK_TIMEOUT
            )
            if told.status_code != 200:
                self._is_away(replica, f"/metrics answers {told.status_code}", at_once=True)
                return
            report, bases = read_report(told.text)
        except (httpx2.HTTPError, ValueError) as error:
            self._is_away(replica, str(error) or type(error).__name__, at_once=False)
            return
        replica.missed, replica.bases = 0, bases
        self.placement.told(replica.url, report)
        if not replica.ready:
            replica.ready = True
            _log.warning("%s is ready", replica.url)
        self._ready.labels(replica.url).set(1)

    def _is_away(self, replica: Replica, why: str, *, at_once: bool) -> None:
        replica.missed += 1
        replica.why = why
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
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except OneBaseError as error:
            answer = refusal(error)
        except ClientDisconnect:
            return
        with contextlib.suppress(ClientDisconnect):
            await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        if path == "/health":
            return _json({"status": "ok", "servers": len(self.placement.replicas)})
        if path == "/ready":
            there = len(self.placement.replicas)
            status = {"status": "ready" if there else "not ready", "servers": there}
            return _json(status, 200 if there else 503)
        if path == "/metrics":
            return Response(generate_latest(self._known), media_type=CONTENT_TYPE)
        if path in _OF_ONE_SERVER:
            raise UnavailableError(
                f"{path} is of one server: ask it at its own address.", code="of_one_server", retry_after=60.0
            )
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind in ("application/json", ""):
            body = await self._read(request)
            return await self._pass_on(request, asked(body, self.bases), body, path in _TEXT)
        if request.method in ("GET", "HEAD", "DELETE", "OPTIONS"):
            return await self._pass_on(request, Asked(), b"", request.method != "DELETE")
        return await self._pass_on(request, Asked(), request.stream(), False)

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_body:
                raise PayloadTooLargeError(self._max_body)
        return bytes(body)

    async def _pass_on(
        self, request: Request, wanted: Asked, body: bytes | AsyncIterator[bytes], again: bool
    ) -> Response:
        """The answer of the first server that has one. again: whether one that broke may have computed it."""
        tried: list[str] = []
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
                raise UnavailableError(
                    "None of the servers behind this address answers now. Send the request again soon.",
                    code="no_replica",
                    retry_after=2.0,
                ) from None
            tried.append(url)
            self._sent.labels(url).inc()
            if len(tried) > 1:
                self._again.inc()
            sending = _Sending(self.placement, self._clock, url, wanted, now)
            try:
                answer = await self._send(request, url, body)
            except httpx2.TransportError as error:
                sending.failed()
                _log.warning("%s broke: %s", url, error or type(error).__name__)
                begun = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                if not isinstance(body, bytes) or (begun and not again):
                    raise replica_lost() from error
                continue
            except BaseException:
                sending.ended()
                raise
            sending.answered()
            maybe = answer.status_code == 503 or (again and answer.status_code in (404, 502, 504))
            if not (isinstance(body, bytes) and maybe and _is_short(answer)):
                return self._streamed(request.scope, answer, sending)
            problem = await _whole(answer)
            sending.ended()
            if answer.status_code == 404 and not any(code in bytes(problem.body) for code in _ELSEWHERE):
                return problem

    async def _send(self, request: Request, url: str, body: bytes | AsyncIterator[bytes]) -> httpx2.Response:
        raw: bytes = request.scope.get("raw_path") or request.url.path.encode()
        query: bytes = request.scope.get("query_string", b"")
        target = (
            url + raw.partition(b"?")[0].decode("latin-1") + (f"?{query.decode('latin-1')}" if query else "")
        )
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOP_BY_HOP]
        if request.client is not None:
            headers.append(("x-forwarded-for", request.client.host))
        length = request.headers.get("content-length")
        if not isinstance(body, bytes) and length is not None:
            headers.append(("content-length", length))
        limits = {"timeout": self._timeout.as_dict()}
        sent = httpx2.Request(
            request.method, target, headers=headers, content=body or None, extensions=limits
        )
        return await self._client.send(sent, stream=True)

    def _streamed(self, scope: Scope, answer: httpx2.Response, sending: _Sending) -> Response:
        kept = [(name, value) for name, value in answer.headers.multi_items() if name not in _HOP_BY_HOP]
        length = answer.headers.get("content-length")
        made = StreamingResponse(self._pieces(scope, answer, sending), answer.status_code)
        made.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept]
        if length is not None:
            made.raw_headers.append((b"content-length", length.encode("latin-1")))
        return made

    async def _pieces(
        self, scope: Scope, answer: httpx2.Response, sending: _Sending
    ) -> AsyncGenerator[bytes]:
        """The body as it comes, with the same bytes. A stream of events that breaks ends with an error."""
        try:
            async for piece in answer.aiter_raw():
                yield piece
        except httpx2.TransportError as error:
            sending.failed()
            self._lost.inc()
            _log.warning("%s broke in an answer: %s", sending.url, error or type(error).__name__)
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise
            yield _lost_event(scope)
        finally:
            sending.ended()
            await answer.aclose()


class _Sending:
    """One request on one server, which ends once."""

    def __init__(
        self, placement: Placement, clock: Callable[[], float], url: str, wanted: Asked, since: float
    ) -> None:
        self.url = url
        self._placement = placement
        self._clock = clock
        self._wanted = wanted
        self._since = since
        self._over = False

    def answered(self) -> None:
        now = self._clock()
        self._placement.answered(self.url, now - self._since, now)

    def failed(self) -> None:
        self._end(None)

    def ended(self) -> None:
        self._end(self._clock() - self._since)

    def _end(self, seconds: float | None) -> None:
        if not self._over:
            self._over = True
            wanted = self._wanted
            self._placement.ended(self.url, wanted.adapter, wanted.tokens, self._clock(), seconds=seconds)


def _is_short(answer: httpx2.Response) -> bool:
    length = answer.headers.get("content-length", "")
    return length.isdigit() and int(length) <= _PROBLEM_BYTES


async def _whole(answer: httpx2.Response) -> Response:
    try:
        content = b"".join([piece async for piece in answer.aiter_raw()])
    except httpx2.TransportError:
        return refusal(replica_lost())
    finally:
        await answer.aclose()
    kept = {name: value for name, value in answer.headers.items() if name not in _HOP_BY_HOP}
    return Response(content, answer.status_code, kept)


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
    await asyncio.gather(*map(route.look, route.replicas.values()))
    following = loop.create_task(route.follow())
    try:
        on_ready()
        await server.serve(sockets=[listener])
    finally:
        following.cancel()
        await route.close()
