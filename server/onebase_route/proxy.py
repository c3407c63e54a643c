"""`onebase route`: one address for several servers of one base. A request goes where its adapter is.

The servers share a registry and a store, so that any of them knows every adapter. What each has in memory and
to do is read off its `/metrics`, as other gateways do.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import re
import signal
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, TypeVar

import anyio
import httpx2
import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from onebase.metrics import parse_metrics
from onebase_edge.background import Backoff, keep_running
from onebase_edge.cross_site import CrossSiteMiddleware
from onebase_edge.errors import (
    AdapterNotFoundError,
    ApiError,
    BodyTooLargeError,
    ForbiddenError,
    InvalidRequestError,
    StateConflictError,
    UnavailableError,
    WrongMethodError,
)
from onebase_edge.forwarded import (
    CHANGE,
    NEWEST,
    OURS,
    SECRET,
    TENANT,
    TRANSCRIPT_HEADER,
    change_of,
    forwarded_of,
)
from onebase_edge.listener import QuietServer, take_new_connections, uvicorn_config
from onebase_edge.refusals import error_json, is_anthropic, may_repeat, refusal
from onebase_edge.request_id import request_id
from onebase_edge.settings import Settings, is_loopback
from onebase_edge.sse import DONE, connection_abort
from onebase_engine.machine import freeze_loaded
from onebase_protocol.errors import AnthropicError, Error
from onebase_route.placement import NoReplicaError, Placement, ReplicaReport
from onebase_route.resumption import DiffersError, SharedBudget, StreamRecord, WaitingRoom

LOOK_SECONDS = 0.5
"""Time, in seconds, between two looks at a server."""
_LOOK_TIMEOUT = 3.0
_CONNECT_SECONDS = 2.0
_TIMEOUT = {"timeout": httpx2.Timeout(None, connect=_CONNECT_SECONDS).as_dict()}
_AWAY = 2
"""Number of consecutive looks without an answer after which a server is away."""
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METRICS_BYTES = 16 << 20
"""Largest size, in bytes, of a server's metrics."""
_MOST_BROKEN = 2
"""Largest number of servers that one request may break: what ends one would end the next."""
_MOST_STILL = 6
"""Largest number of servers in a row that may break in one stream without having added an event to it."""
_RESUME_BACKOFF = Backoff(0.25, 2.0)
"""Pauses between two rounds over the servers on behalf of a broken stream."""
_SILENT_SECONDS = 15.0
"""Seconds without any answer of a server after which nothing is awaited from it any more."""
_MOST_WAITING = 256
"""Largest number of requests that wait for a server: each has its body in memory."""
_WAITING_PART = 4
"""One part in this many of the memory for bodies is for requests that wait for a server."""
_REPLACED_SECONDS = 60.0
"""Time, in seconds after one server was ready, in which another is expected in its place."""
_WAIT_SECONDS = 15.0
"""Longest time, in seconds, that a request then waits for it."""
_PASSING_CODES = (b'"server_stopping"', b'"engine_starting"', b'"engine_restarting"')
"""Codes of refusals for which a request waits: nothing was begun, and the server is soon replaced."""
_REPEATABLE_CODES = (
    *_PASSING_CODES,
    *(b'"too_many_connections"', b'"too_many_bodies"', b'"body_unread"', b'"merges_busy"', b'"pulls_busy"'),
    *(b'"engine_busy"', b'"adapter_unavailable"', b'"adapter_timeout"', b'"verifier_unavailable"'),
)
"""Codes of a 503 after which a request that changes something is sent to another server: what may have been
done by then can be done twice. After others, as of a registry that cannot be reached, that is not known."""
_MOST_TENANTS = 10_000
"""Largest number of keys whose tenants are remembered."""
_LEAVE_SECONDS = 2.0
"""Longest time, in seconds after a signal, in which clients' connections close one by one, each after an
answer that says so."""
_ACCEPT_SECONDS = 0.25
"""Time, in seconds after a signal, in which connections are accepted whose handshake had begun by then."""
_MOST_HELD = 1 << 30
"""Largest total size, in bytes, of bodies and of streams' transcripts that are held at once."""
_BEHIND_SECONDS = 5.0
"""Time, in seconds, by which a client must be behind its server to be the cause of a break."""
_MOST_REFUSED = 3
"""Largest number of servers that are asked if they have no room, or do not know an adapter."""
_KEPT_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), seconds)
        for name, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
)
"""Socket options by which a machine that is gone without a word is noticed within half a minute."""
_NULL = msgspec.Raw(b"null")
_NAME_CHARACTERS = 512
"""Largest length, in characters, of a name that is remembered."""
_ANSWER_TOKENS = 128
"""Length of an answer, in tokens, that is assumed for a request without a limit."""
_PREFIX_CHARACTERS = 512
_PROBLEM_BYTES = 64 << 10
"""Largest size, in bytes, of an answer that is read whole since the request may be tried elsewhere."""
_SHORT = re.compile(r"[0-9]{1,9}")
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
        b"x-real-ip", b"origin", b"sec-fetch-site",
    }
) | OURS  # fmt: skip
"""Headers of a request that are not passed on: the route sets its own, or `CrossSiteMiddleware` has checked
them."""
_NOT_PASSED = frozenset({b"date"}) | OURS
"""Headers of an answer that are not passed on; it gets its own date."""
_NO_SECRET = (401, 403, 404)
"""Statuses of an answer of /route_secret for as long as the server and the route's key are the same."""
_SECRET = re.compile(r"[0-9a-f]{64}")
_OWN = ("/health", "/ready", "/metrics")
_OF_ONE_SERVER = (
    "/route_secret",
    "/pause",
    "/resume",
    "/is_paused",
    "/status",
    "/status/history",
    "/v1/load",
    "/server_info",
    "/get_world_size",
)
_LIVE = "/api/v1/"
"""Beginning of the paths of live training, whose runs one server has. Its clients try again after a 503."""
_KEPT_BY_ONE = (
    b"response_not_found",
    b"conversation_not_found",
    b"generation_not_found",
    b"request_not_found",
)
_PASSING = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses of a refusal to resume a stream that may end soon."""
_OF_ONE = ("response_not_found", "conversation_not_found", "invalid_transcript")
"""Codes of refusals to resume a stream that do not mean that other servers refuse it too."""
_LEARNT = (b"model_not_found", b"adapter_not_found", b"version_not_found")
"""Codes of errors for names that another server may know, because it alone has them or learnt of them
first."""
_LOG = "/v1/requests"
"""Path at which each server lists its own log; what is erased there is erased on all servers."""
_LOADS = re.compile(r"/v1/adapters/([^/]+)/(?:activate|rollback)")
"""Paths of requests that load an adapter where they are answered: at one of its homes."""

_OF_BASES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:max_gpu_lora_adapters")
_OF_CACHE = "vllm:cache_config_info"
_TOLD = (
    *_OF_BASES,
    "vllm:lora_adapter_loaded",
    "vllm:lora_requests_info",
    "onebase_max_sequences",
    _OF_CACHE,
)
"""Metrics that are read."""

_SUMMARY_SECONDS = 1.0
"""Time, in seconds, in which the streams that go on at other servers share a line of the log."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


_PLACES = (
    (re.compile(r"/v1/adapters/merge"), "/v1/adapters"),
    (re.compile(r"/v1/(?:un)?load_lora_adapter"), "/v1/models"),
    (re.compile(r"(/v1/gates|/v1/keys|/v1/tenants)/[^/]+"), r"\1"),
    (re.compile(r"(/v1/adapters/[^/]+)/(?:activate|rollback|deactivate)"), r"\1/history"),
    (re.compile(r"(/v1/adapters/[^/]+/versions/[^/]+)/(?:approval|evaluation)"), r"\1/gates"),
    (re.compile(r"(/v1/adapters/[^/]+)/(?:pin|share)"), r"\1"),
    (re.compile(r"(/v1/adapters/[^/]+/rollout)/(?:share|promote|rollback)"), r"\1"),
    (re.compile(r"(/v1/(?:batches|fine_tuning/jobs)/[^/]+)/(?:cancel|pause|stop|resume)"), r"\1"),
)
"""Paths of requests that change something, each with the path at which GET shows the result. Others have
their own path."""


def target_in(path: str) -> str:
    """Return the path at which GET shows whether a request that changes something was carried out."""
    for pattern, place in _PLACES:
        if found := pattern.fullmatch(path):
            return found.expand(place)
    return path


def replica_lost(method: str = "GET", path: str = "") -> UnavailableError:
    """Return the error for a request whose server went away before its answer was complete.

    The message of one that may have changed something names the request that shows whether it has.
    """
    remedy = "Send the request again."
    if method not in ("GET", "HEAD", "OPTIONS") and not may_repeat(path):
        place = target_in(path)
        hint = ", where 404 means that it was" if method == "DELETE" and place == path else ""
        remedy = (
            f"It may have carried the request out. Send `GET {place}` to find out{hint}, and send the "
            "request again only if it was not."
        )
    return UnavailableError(
        f"The server that was answering has gone. {remedy}", code="replica_lost", retry_after=1.0
    )


class OpenServersError(Exception):
    """Everybody on a network could do everything on the servers behind an address."""

    def __init__(self, host: str, urls: Sequence[str]) -> None:
        super().__init__(
            f"--host {host} lets others reach {', '.join(urls)}, and there is no API key yet: make one with "
            "`onebase keys create --scope admin`, with the --data-dir and --registry of the servers, or pass "
            "--insecure to let everybody do everything, here and to the servers"
        )


# ---- what a request is for -----------------------------------------------------------------------


@dataclass(frozen=True)
class RequestNeeds:
    """Adapter, size and beginning of a request, as far as its body tells them.

    Args:
        adapter: its name; None: the base, or none is named.
        tokens: an estimate of prompt and answer.
        prefix: the beginning of the prompt, if it was found.
    """

    adapter: str | None = None
    tokens: float = 1.0
    prefix: str | None = None


class _Body(msgspec.Struct):
    """Fields that are read; no objects are made of the others."""

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


def read_needs(body: bytes, bases: frozenset[str]) -> RequestNeeds:
    """Read a request's body, which may be anything: one that cannot be read is for a server to refuse."""
    fields = _read(body, _Body)
    if fields is None:
        return RequestNeeds()
    prefix, many = _beginning(fields), _read(fields.requests, list[msgspec.Raw])
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
    return RequestNeeds(adapter, len(body) / 4 + min(most, 4 * _ANSWER_TOKENS), prefix or _beginning(fields))


def _read(data: bytes | msgspec.Raw, kind: type[T]) -> T | None:
    """Return the decoded data, or None if it is not of that kind."""
    if data is _NULL:
        return None
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None


def _name(value: Any) -> str | None:
    """Return an adapter's name without its version, or None. The names of a weighted sum are joined."""
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


# ---- reports of servers -----------------------------------------------------------------------------


def read_report(text: str) -> tuple[ReplicaReport, frozenset[str]]:
    """Return a server's metrics as a report, and the names of its base. Raises ValueError if there are none.

    The text may be anything: KeyError, OverflowError and InvalidResponseError are raised too.
    """
    told = parse_metrics(text, _TOLD)
    if "vllm:num_requests_running" not in told.samples:
        raise ValueError("no vllm:num_requests_running among the metrics")
    slots: set[str] = set()
    host: set[str] = set()
    for labels, _ in told.of("vllm:lora_adapter_loaded"):
        (slots if labels.get("level") == "gpu" else host).add(labels["adapter_name"])
    running: set[str] = set()
    for labels, _ in told.of("vllm:lora_requests_info"):
        running |= set(labels.get("running_lora_adapters", "").split(","))
    report = ReplicaReport(
        sequences=max(1, int(told.total("onebase_max_sequences") or 32)),
        slots=int(told.total("vllm:max_gpu_lora_adapters")),
        in_slots={name: name in running for name in slots},
        in_host=host,
        waiting=int(told.total("vllm:num_requests_waiting")),
        running=int(told.total("vllm:num_requests_running")),
        kv_dtype=next(iter(told.by(_OF_CACHE, "cache_dtype")), "")[:_NAME_CHARACTERS],
    )
    bases = {name for metric in _OF_BASES for name in told.by(metric, "model_name") if name}
    return report, frozenset(bases)


@dataclass(eq=False)
class Replica:
    """A server behind the address.

    Args:
        missed: looks in a row that failed; why: the last one did.
        silent: when the first look timed out, of those in a row that did; None: the last one was answered.
        open: requests that were sent to it and have not ended.
        awaited: scopes that wait for its bytes now, each with the time at which the wait began.
        secret: text with which it believes our headers; "" if it gives none, None until it was asked.
        needs_no_key: whether it must not be used, since it needs none.
    """

    url: str
    way: httpx2.AsyncHTTPTransport
    ready: bool = False
    missed: int = 0
    why: str = "not looked at yet"
    bases: frozenset[str] = field(default_factory=frozenset)
    kv_dtype: str = ""
    open: int = 0
    secret: str | None = None
    needs_no_key: bool = False
    looking: asyncio.Task[None] | None = None
    silent: float | None = None
    awaited: dict[anyio.CancelScope, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def awaiting(self, now: float) -> Iterator[None]:
        """Wait for its bytes in this block. Raises ReadTimeout once it has been silent for too long."""
        with anyio.CancelScope() as scope:
            self.awaited[scope] = now
            try:
                yield
            finally:
                del self.awaited[scope]
        if scope.cancelled_caught:
            raise httpx2.ReadTimeout(f"no answer for {_SILENT_SECONDS:g} s")

    def note_silence(self, now: float) -> None:
        """Note that a look has timed out; end what waits for the server once it has been silent for too long.

        A process that was stopped keeps its connections open: nothing else would end the waiting.
        """
        self.silent = now if self.silent is None else self.silent
        if now - self.silent >= _SILENT_SECONDS:
            for scope, since in list(self.awaited.items()):
                if now - since >= _SILENT_SECONDS:
                    scope.cancel()


# ---- the proxy -----------------------------------------------------------------------------------


class Route:
    """The ASGI app.

    Args:
        key: of a server's operator, with which its metrics and its secret are read.
        keyed: whether only servers are used that need an API key.
        max_body: bytes of a body that is read for its adapter; larger ones of other kinds pass through.
        listed: returns the URLs of the servers, before each look; None if they have not changed.
        wait: seconds that a request waits for a server where none answers; None: only while one is replaced.
        resume: seconds that a broken stream waits for a server that resumes it.
        most_held: bytes of bodies, and of streams' transcripts, that are held at once.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str | None,
        max_body: int,
        keyed: bool = False,
        clock: Callable[[], float] = time.monotonic,
        listed: Callable[[], Sequence[str] | None] = lambda: None,
        wait: float | None = None,
        resume: float = 60.0,
        most_held: int = _MOST_HELD,
    ) -> None:
        self.room = SharedBudget(max(most_held, 2 * max_body))
        self.replicas: dict[str, Replica] = {}
        self.placement = Placement()
        self.clock = clock
        self._listed = listed
        self._wait = wait
        self.resume = resume
        self._came = anyio.Event()
        self._ready_at = -math.inf
        """Time at which a server was ready last."""
        self._waiting_room = WaitingRoom(_MOST_WAITING, self.room.most // _WAITING_PART)
        self._tenants: OrderedDict[bytes, str] = OrderedDict()
        """Tenant of each key that a server has known, by the key's digest."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._keyed = keyed
        self._headers = {"accept-encoding": "identity"}
        self._key = {"authorization": f"Bearer {key}"} if key else {}
        self._max_body = max_body
        self.change = 0
        """Newest change of the registry that an answer is based on; no later answer is based on an older
        one."""
        self.is_beside_another = False
        """Whether another route at this address gives answers too, whose changes this one does not know."""
        self._trust = httpx2.create_ssl_context(trust_env=False)
        self._known = CollectorRegistry()
        self._ready = Gauge(
            "onebase_route_ready", "1 for a server that answers.", ["replica"], registry=self._known
        )
        self._sent = Counter("onebase_route_requests", "Requests sent.", ["replica"], registry=self._known)
        self._again = Counter("onebase_route_retries", "Sent again to another.", registry=self._known)
        self.resumed = Counter(
            "onebase_route_resumed", "Streams that went on at another server.", registry=self._known
        )
        self._resumed_lately: dict[str, int] = {}
        """Streams that went on at each server since the log was last written."""
        self.lost = Counter("onebase_route_lost", "Answers cut by a server that went.", registry=self._known)
        waiting = Gauge("onebase_route_waiting", "Requests that wait for a server.", registry=self._known)
        waiting.set_function(self._waiting_room.__len__)
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

    def note_resumed(self, url: str) -> None:
        """Count a stream that goes on at this server. The log has one line a second, however many do."""
        self.resumed.inc()
        if not self._resumed_lately:
            asyncio.get_running_loop().call_later(_SUMMARY_SECONDS, self._log_resumed)
        self._resumed_lately[url] = self._resumed_lately.get(url, 0) + 1

    def _log_resumed(self) -> None:
        """Write which servers resumed how many streams."""
        for url, count in self._resumed_lately.items():
            _log.warning("%s resumed %d stream%s", url, count, "" if count == 1 else "s")
        self._resumed_lately.clear()

    def set_replicas(self, urls: Sequence[str]) -> None:
        """Set the servers behind the address. Requests that were sent to others end there."""
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
                    replica.silent = None
                    if status != 200:
                        self._is_away(replica, f"{path} answers {status}", at_once=True)
                        return
                report, bases = read_report(told.decode("utf-8", "replace"))
                if replica.secret is None and not await self._meet(replica):
                    return
        except (TimeoutError, httpx2.TimeoutException):
            replica.note_silence(self.clock())
            self._is_away(replica, "does not answer in time", at_once=False)
            return
        except Exception as error:  # the text may be anything, and looking has to continue
            if _has_no_files(error):
                return
            self._is_away(replica, str(error) or type(error).__name__, at_once=False)
            return
        if self.replicas.get(replica.url) is not replica:
            return  # taken out meanwhile
        replica.missed, replica.bases, replica.kv_dtype = 0, bases, report.kv_dtype
        self.placement.record_report(replica.url, report)
        self._ready_at = self.clock()
        if not replica.ready:
            replica.ready = True
            _log.warning("%s is ready", replica.url)
            self._compare(replica)
            self._came.set()
            self._came = anyio.Event()
        self._ready.labels(replica.url).set(1)

    def _compare(self, new: Replica) -> None:
        """Warn if a server that has come stores keys and values otherwise than one that is there."""
        for one in self.replicas.values():
            if one.ready and one.kv_dtype and new.kv_dtype and one.kv_dtype != new.kv_dtype:
                _log.warning(
                    "%s keeps keys and values in %r, and %s in %r: texts differ by where they are made, and "
                    "a stream that continues elsewhere has other rounding from there. Start all servers with "
                    "the same --kv-dtype",
                    *(new.url, new.kv_dtype, one.url, one.kv_dtype),
                )
                return

    async def _meet(self, replica: Replica) -> bool:
        """Learn a server's secret, and whether it needs keys. Return False if it is not to be used."""
        if self._keyed:
            status, _ = await self._ask(replica, "/v1/key", with_key=False)
            replica.needs_no_key = status == 200
            if status != 401:
                why = "has no API key" if status == 200 else f"does not say if it needs keys ({status})"
                if replica.why != why:
                    _log.error("%s is not used: it %s, and others reach this address", replica.url, why)
                self._is_away(replica, why, at_once=True)
                return False
        status, report = await self._ask(replica, "/route_secret")
        if status != 200 and status not in _NO_SECRET:
            return True  # it is asked again at the next look
        replica.secret = _secret(report) if status == 200 else ""
        if replica.secret:  # a route before this one has given answers of changes up to the newest
            looked, _ = await self._ask(replica, "/v1/key", of_route=True)
            if looked >= 500:
                replica.secret = None
        else:
            _log.warning(
                "%s gives this route no secret (status %d): its streams are not resumed elsewhere when "
                "it dies, and it may know less than another server has answered before. Give an admin key of "
                "the servers with --key-file",
                *(replica.url, status),
            )
        return True

    async def _ask(
        self, replica: Replica, path: str, *, with_key: bool = True, of_route: bool = False
    ) -> tuple[int, bytes]:
        """Return status and body of an answer. Raises ValueError for a body that is too large.

        of_route: whether the server looks in the registry, and names its newest change.
        """
        headers = self._headers | (self._key if with_key else {})
        if of_route:
            headers |= {SECRET.decode(): replica.secret or "", CHANGE.decode(): str(NEWEST)}
        sent = httpx2.Request("GET", replica.url + path, headers=headers, extensions=_TIMEOUT)
        answer = await replica.way.handle_async_request(sent)
        try:
            body = bytearray()
            async for piece in answer.aiter_raw():
                body += piece
                if len(body) > _METRICS_BYTES:
                    raise ValueError(f"{path} is over {_METRICS_BYTES >> 20} MB")
            if of_route and (change := answer.headers.get(CHANGE.decode())) is not None:
                self.change = max(self.change, change_of(change.encode()))
            return answer.status_code, bytes(body)
        finally:
            await answer.aclose()

    def without_secret(self) -> list[str]:
        """Return the servers that would not believe a transcript."""
        return [one.url for one in self.replicas.values() if not one.secret]

    async def lives(self, url: str) -> bool:
        """Return True if a server answers at all: it did not break a stream by its end."""
        replica = self.replicas.get(url)
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT):
                return replica is not None and bool(await self._ask(replica, "/health"))
        except (TimeoutError, httpx2.TransportError, ValueError):
            return False

    def note_sent(self, url: str, *, again: bool) -> None:
        self._sent.labels(url).inc()
        if again:
            self._again.inc()

    def _is_away(self, replica: Replica, why: str, *, at_once: bool) -> None:
        replica.missed += 1
        replica.why = why
        if self.replicas.get(replica.url) is not replica:
            return
        if at_once or replica.missed >= _AWAY:
            self.placement.lost(replica.url)
            replica.secret = None  # another server may be there next
            self._ready.labels(replica.url).set(0)
            if replica.ready:
                replica.ready = False
                _log.warning("%s is away: %s", replica.url, why)

    # ---- answering ---------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"nobody is let in by {scope['type']}")
        client = _Client(scope, receive, self)
        async with anyio.create_task_group() as group:
            group.start_soon(client.leaves, group.cancel_scope)
            try:
                answer = await self._answer(client)
                await answer(scope, receive, send)
            except ApiError as error:
                await refusal(error)(scope, receive, send)
            except ClientDisconnect:
                pass
            finally:
                client.give_room_back()
                group.cancel_scope.cancel()

    async def _answer(self, client: _Client) -> ASGIApp:
        request, path = client.request, client.path
        if path in _OWN and request.method not in ("GET", "HEAD"):
            raise WrongMethodError(request.method, path, {"GET", "HEAD"})
        if path == "/health":
            return _json({"status": "ok", "servers": len(self.placement.replicas)})
        if path == "/ready":
            there = len(self.placement.replicas)
            ready = bool(there or self._wait)
            status = {"status": "ready" if ready else "not ready", "servers": there}
            return _json(status, 200 if ready else 503)
        if path == "/metrics":
            return Response(generate_latest(self._known), media_type=_METRICS_TYPE)
        if path in _OF_ONE_SERVER or (path == _LOG and request.method == "GET"):
            raise UnavailableError(
                f"{path} is of one server: ask it at its own address.", code="of_one_server", retry_after=60.0
            )
        if path.startswith(_LIVE):
            raise InvalidRequestError(
                f"{path} is of one server: give clients of the Tinker API that server's own address.",
                code="of_one_server",
            )
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind in ("application/json", ""):
            body = await client.whole(self._max_body)
            loads = _LOADS.fullmatch(path)
            wanted = RequestNeeds(_name(loads[1])) if loads else read_needs(body, self.bases)
            return await self._pass_on(client, wanted, body, may_repeat(path))
        if request.method in ("GET", "HEAD", "DELETE", "OPTIONS"):
            client.unread()
            return await self._pass_on(client, RequestNeeds(), b"", request.method != "DELETE")
        return await self._pass_on(client, RequestNeeds(), client.pieces(), False)

    async def _pass_on(
        self, client: _Client, wanted: RequestNeeds, body: bytes | AsyncIterator[bytes], again: bool
    ) -> ASGIApp:
        """Return the answer of the first server that has one. again: whether one that broke may have computed
        it."""
        sent = _Sent(self, client, wanted, body, again)
        problem: Response | None = None
        is_elsewhere = is_final = False
        while True:
            try:
                answer, sending = await sent.next()
            except NoReplicaError:
                if not is_final and await self._waits_on(sent):
                    continue
                if is_elsewhere and sent.lost:
                    raise replica_lost() from None
                if problem is not None:
                    return problem
                raise UnavailableError(
                    "None of the servers behind this address answers now. Send the request again soon.",
                    code="no_replica",
                    retry_after=2.0,
                ) from None
            if _is_events(answer):
                sending.answered()
                if answer.status_code == 200 and TRANSCRIPT_HEADER in answer.headers:
                    return _Stream(answer, sending, sent)
            maybe = answer.status_code in (404, 503) or (again and answer.status_code in (502, 504))
            if not (isinstance(body, bytes) and maybe and _is_short(answer)):
                return _Passing(answer, sending, self.lost)
            found = await _whole(answer, sending, replica_lost(client.request.method, client.path))
            content = bytes(found.body)
            if not (again or answer.status_code == 404 or any(code in content for code in _REPEATABLE_CODES)):
                return found
            if answer.status_code == 404 and any(code in content for code in _KEPT_BY_ONE):
                is_final = True
                if problem is None or problem.status_code == 404:
                    problem, is_elsewhere = found, True
                continue  # one without room, or that broke, may be the one that has it
            problem, is_elsewhere = found, False
            if answer.status_code == 503 and any(code in content for code in _PASSING_CODES):
                continue
            is_final = True
            sent.refused += 1
            known = answer.status_code == 404 and not any(code in content for code in _LEARNT)
            if known or sent.refused >= _MOST_REFUSED:
                return problem

    async def _waits_on(self, sent: _Sent) -> bool:
        """Wait for a server, until the next look at most. Return True if the request is to be sent again: its
        time is not over, and it has a place among those that wait."""
        now = self.clock()
        is_replaced = now - self._ready_at < _REPLACED_SECONDS
        seconds = self._wait if self._wait is not None else _WAIT_SECONDS if is_replaced else 0.0
        left = sent.since + seconds - now
        tenant, size = self.tenant_of(sent.client.request), sent.size
        if left <= 0 or not self._waiting_room.enter(tenant, size):
            return False
        try:  # its place is free again while a server has it
            with anyio.move_on_after(min(left, LOOK_SECONDS)):
                await self._came.wait()
        finally:
            self._waiting_room.leave(tenant, size)
        sent.tried = []
        return True

    def tenant_of(self, request: Request) -> str:
        """Return whose a request is: the tenant of its key if a server has named it, or else its address."""
        tenant = self._tenants.get(_key_digest(request))
        return f"address {_client_of(request.scope)}" if tenant is None else f"tenant {tenant}"

    def learn_tenant(self, request: Request, answer: httpx2.Response) -> None:
        """Remember the tenant of the request's key, if the server has named it."""
        tenant = answer.headers.get(TENANT.decode())
        digest = _key_digest(request)
        if not tenant or not digest:
            return
        self._tenants[digest] = tenant[:_NAME_CHARACTERS]
        self._tenants.move_to_end(digest)
        if len(self._tenants) > _MOST_TENANTS:
            self._tenants.popitem(last=False)


async def _leave(replica: Replica) -> None:
    """Close the connections to a server that was taken out, once what goes over them has ended."""
    if replica.looking is not None:
        replica.looking.cancel()
    while replica.open:
        await asyncio.sleep(LOOK_SECONDS)
    await replica.way.aclose()


class _Sent:
    """One request, which is sent to servers until one answers.

    Args:
        again: whether it may be sent again where a server that broke may have done it.
    """

    def __init__(
        self,
        route: Route,
        client: _Client,
        wanted: RequestNeeds,
        body: bytes | AsyncIterator[bytes],
        again: bool,
    ) -> None:
        self.route = route
        self.client = client
        self.since = route.clock()
        self.tried: list[str] = []
        self.broken = 0
        """Servers that broke while they had it, in a row."""
        self.lost = False
        """True once a server could not be reached, or broke."""
        self.refused = 0
        self._most_broken = _MOST_BROKEN
        self._unfit: set[str] = set()
        """Servers that cannot resume the stream, also later."""
        self._wanted = wanted
        self._body = body
        self._again = again

    @property
    def size(self) -> int:
        """Size, in bytes, of the body that it has in memory."""
        return len(self._body) if isinstance(self._body, bytes) else 0

    async def next(self, transcript: bytes = b"") -> tuple[httpx2.Response, _Sending]:
        """Send the request to the next server, and return its answer.

        Raises NoReplicaError, InvalidRequestError, and UnavailableError if too many broke.

        transcript: the transcript to resume the stream from; empty for a new request.
        """
        route, body = self.route, self._body
        while True:
            now = route.clock()
            wanted = self._wanted
            but = {*self.tried, *self._unfit, *(route.without_secret() if transcript else ())}
            url = route.placement.place(wanted.adapter, wanted.tokens, now, prefix=wanted.prefix, but=but)
            self.tried.append(url)
            route.note_sent(url, again=len(self.tried) > 1)
            replica = route.replicas[url]
            sending = _Sending(route, replica, wanted, now)
            try:
                return await self._send(replica, transcript, now - self.since), sending
            except httpx2.LocalProtocolError as error:
                sending.refused()
                raise InvalidRequestError(
                    "Headers: a server would not take them. Send plain ones.", code="invalid_http"
                ) from error
            except httpx2.TransportError as error:
                if _has_no_files(error):
                    sending.refused()
                    raise UnavailableError(
                        "The route has as many files open as it may (`ulimit -n`). Send the request again.",
                        code="too_many_connections",
                        retry_after=1.0,
                    ) from error
                begun = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                if begun and not isinstance(body, bytes):  # for what it sends, or how slowly
                    sending.refused()
                else:
                    sending.failed()
                _log.warning("%s broke: %s", url, error or type(error).__name__)
                self.lost = True
                self.broken += begun
                if begun and (not self._again or self.broken >= self._most_broken):
                    asked_for = self.client.request
                    raise replica_lost(asked_for.method, self.client.path) from error
            except BaseException:
                sending.ended()
                raise

    async def resume(self, kept: StreamRecord, broke: str) -> tuple[httpx2.Response, _Sending]:
        """Return the stream of a server that resumes the one that broke, as soon as one does.

        A server that is starting, full or cannot be reached is asked again until the time is over.

        Raises:
            ApiError: of a server, which says why nobody can resume it; or `replica_lost`.

        Args:
            broke: the server that had it, which is asked again last.
        """
        self.broken = 1 if kept.has_grown else self.broken + 1
        self._most_broken, self.tried = _MOST_STILL, [broke]
        until, pauses = self.route.clock() + self.route.resume, _RESUME_BACKOFF.pauses()
        while kept.can_resume and self.broken < self._most_broken:
            try:
                answer, sending = await self.next(bytes(kept.transcript))
            except NoReplicaError:
                there = self.route.placement.replicas
                if self.route.clock() >= until or (there and self._unfit.issuperset(there)):
                    break
                await asyncio.sleep(next(pauses))
                self.tried = []
                continue
            if answer.status_code == 200 and TRANSCRIPT_HEADER in answer.headers:
                sending.answered()
                self.route.note_resumed(sending.url)
                kept.begin_again()
                return answer, sending
            await self._refused(answer, sending)
        raise replica_lost()

    async def _refused(self, answer: httpx2.Response, sending: _Sending) -> None:
        """Note that a server does not resume a stream. Raises ApiError where no server would."""
        problem = None
        if _is_short(answer):
            problem = bytes((await _whole(answer, sending, replica_lost())).body)
        else:
            sending.refused()
            with anyio.CancelScope(shield=True):
                await answer.aclose()
        error = None if problem is None else _read_error(answer.status_code, problem)
        code = None if error is None else error.code
        _log.warning("%s does not resume a stream: %s %s", sending.url, answer.status_code, code or "")
        if answer.status_code == 400 and CHANGE.decode() not in answer.headers:
            # It was started again, has another secret, and took the transcript for a part of the body.
            sending.replica.secret = None
            return
        if answer.status_code in _PASSING or code == "version_not_ready":
            return
        self._unfit.add(sending.url)
        if error is not None and answer.status_code < 500 and code not in _OF_ONE:
            raise error

    async def _send(self, replica: Replica, transcript: bytes, seconds: float) -> httpx2.Response:
        request, body = self.client.request, self._body
        scope = request.scope
        headers = _passed(scope["headers"], _OURS)
        headers.append((b"x-request-id", request_id(scope).encode("latin-1")))
        if (client := _client_of(scope)) is not None:
            headers.append((b"x-forwarded-for", client.encode("latin-1", "replace")))
        headers.append((b"x-forwarded-proto", scope["scheme"].encode()))
        secret = replica.secret
        if secret:
            known = NEWEST if self.route.is_beside_another else self.route.change
            headers += [(SECRET, secret.encode()), (CHANGE, b"%d" % known)]
        length = request.headers.get("content-length")
        if not isinstance(body, bytes):
            if length is not None:
                headers.append((b"content-length", length.encode("latin-1")))
        elif self._again and body and secret:
            headers.append((TRANSCRIPT_HEADER.encode(), b"%d %.3f" % (len(body), seconds)))
            body += transcript
        sent = httpx2.Request(
            request.method,
            replica.url,
            headers=headers,
            content=body or None,
            extensions=_TIMEOUT | {"target": self.client.target},
        )
        with replica.awaiting(self.route.clock()):
            answer = await replica.way.handle_async_request(sent)
        if secret:
            self.route.learn_tenant(request, answer)
        report = answer.headers.get(CHANGE.decode())
        if report is not None:
            self.route.change = max(self.route.change, change_of(report.encode()))
        elif secret and answer.status_code < 400 and replica.secret == secret:
            replica.secret = None  # it was started again, and has another one
        return answer


class _Client:
    """Client of a request: what it sends, and whether it is still there."""

    def __init__(self, scope: Scope, receive: Receive, route: Route) -> None:
        self.request = Request(scope, receive)
        self.path: str = scope["path"]
        self._receive = receive
        self._room = route.room
        self._tenant = route.tenant_of(self.request)
        self._held = 0
        self._read = anyio.Event()
        """Event set once the body is read, or will not be: then only a disconnect can come."""

    @property
    def target(self) -> bytes:
        """Request target as it was sent. Raises InvalidRequestError for one that is no path."""
        scope = self.request.scope
        raw: bytes = (scope.get("raw_path") or self.path.encode()).partition(b"?")[0]
        if not raw.startswith(b"/"):
            raise InvalidRequestError(
                "The request's address does not begin with a slash.", code="invalid_http"
            )
        query: bytes = scope.get("query_string", b"")
        return raw + (b"?" + query if query else b"")

    async def whole(self, most: int) -> bytes:
        """Return the whole body. Raises BodyTooLargeError, UnavailableError, ClientDisconnect."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > most:
                raise BodyTooLargeError(most)
            if not self._room.reserve(self._tenant, len(piece)):
                raise UnavailableError(
                    f"Requests that run have {self._room.reserved >> 20} MB of bodies already, and this "
                    f"address holds {self._room.most >> 20} MB at once: a tenant, or an address without a "
                    "key, has no more of that than is free. Send the request again in a moment.",
                    code="too_many_bodies",
                    retry_after=1.0,
                )
            self._held += len(piece)
        return bytes(body)

    def give_room_back(self) -> None:
        """Release the room that the body took."""
        self._room.release(self._tenant, self._held)
        self._held = 0

    async def pieces(self) -> AsyncGenerator[bytes]:
        """Yield the body as it comes. Raises ClientDisconnect."""
        async for piece in self.request.stream():
            if piece:
                yield piece
        self._read.set()

    def unread(self) -> None:
        """Note that the body will not be read."""
        self._read.set()

    async def leaves(self, answering: anyio.CancelScope) -> None:
        """Cancel the answer once the client has disconnected."""
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
        headers = _passed(answer.headers.raw, _NOT_PASSED)
        length = answer.headers.get("content-length")
        if length is not None and answer.status_code != 304:  # of a body that is not sent
            headers.append((b"content-length", length.encode("latin-1")))
        try:
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            try:
                pieces = answer.aiter_raw()
                while (piece := await self._sending.next_piece(pieces)) is not None:
                    await self._sending.pass_on(send, piece)
            except httpx2.TransportError as error:
                await self._sending.broke(error, "an answer")
                self._lost.inc()
                if not _is_events(answer):
                    connection_abort(scope)()
                    await asyncio.sleep(0)  # until the connection knows of it
                    return
                event = _error_event(replica_lost(), scope)
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if answer.status_code < 400:
                self._sending.ended()
            self._sending.refused()
            with anyio.CancelScope(shield=True):
                await answer.aclose()


class _Stream:
    """Event stream of a server that sends a transcript, resumed at another server if that one dies.

    A server cuts off a client that does not read, and so the route whose own client does not: such a stream
    is not resumed.
    """

    def __init__(self, answer: httpx2.Response, sending: _Sending, sent: _Sent) -> None:
        self._answer = answer
        self._sending = sending
        self._sent = sent
        self._kept = StreamRecord(sent.route.room, sent.route.tenant_of(sent.client.request))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _passed(self._answer.headers.raw, _NOT_PASSED)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with contextlib.aclosing(self._events(scope)) as events:
                async for some in events:
                    await self._sending.pass_on(send, some)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._kept.give_up()
            await self._close()

    async def _events(self, scope: Scope) -> AsyncGenerator[bytes]:
        """Yield whole events, and an error at the end if no server resumes the stream."""
        kept = self._kept
        while True:
            try:
                pieces = self._answer.aiter_raw()
                while (piece := await self._sending.next_piece(pieces)) is not None:
                    if events := kept.read(piece):
                        yield events
                if events := kept.end():
                    yield events
                return
            except httpx2.TransportError as error:
                if await self._sending.broke(error, "a stream"):
                    kept.give_up()
            except DiffersError:
                _log.warning("%s does not resume with the same events", self._sending.url)
                kept.give_up()
            await self._close()
            try:
                self._answer, self._sending = await self._sent.resume(kept, self._sending.url)
            except ApiError as error:
                self._sent.route.lost.inc()
                yield _error_event(error, scope)
                return

    async def _close(self) -> None:
        self._sending.ended()
        with anyio.CancelScope(shield=True):
            await self._answer.aclose()


class _Sending:
    """One request on one server, which ends once."""

    def __init__(self, route: Route, replica: Replica, wanted: RequestNeeds, since: float) -> None:
        self.url = replica.url
        self.replica = replica
        self._route = route
        self._placement = route.placement
        self._clock = route.clock
        self._wanted = wanted
        self._since = since
        self._behind = 0.0
        """Time, in seconds, that the client was waited for, less the time that the server was since then."""
        self._over = False
        replica.open += 1

    async def next_piece(self, pieces: AsyncIterator[bytes]) -> bytes | None:
        """Return the next bytes of its answer, or None at the end. Raises TransportError."""
        since = self._clock()
        try:
            with self.replica.awaiting(since):
                return await anext(pieces, None)
        finally:
            self._behind = max(0.0, self._behind - (self._clock() - since))

    async def pass_on(self, send: Send, piece: bytes) -> None:
        """Send a part of its answer to the client."""
        since = self._clock()
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        self._behind += self._clock() - since

    async def broke(self, error: httpx2.TransportError, where: str) -> bool:
        """Note that the server broke off its answer. Return True if the client's not reading is the cause."""
        if self._behind > _BEHIND_SECONDS and await self._route.lives(self.url):
            _log.warning("%s cut off a client that does not read", self.url)
            self.refused()
            return True
        _log.warning("%s broke in %s: %s", self.url, where, error or type(error).__name__)
        self.failed()
        return False

    def answered(self) -> None:
        now = self._clock()
        self._placement.answered(self.url, now - self._since, now)

    def failed(self) -> None:
        self._end(None)

    def ended(self) -> None:
        self._end(self._clock() - self._since)

    def refused(self) -> None:
        """End it with no effect on the server's record, or on how long answers take."""
        self._end(None, refused=True)

    def _end(self, seconds: float | None, *, refused: bool = False) -> None:
        if not self._over:
            self._over = True
            self.replica.open -= 1
            name, tokens = self._wanted.adapter, self._wanted.tokens
            self._placement.ended(self.url, name, tokens, self._clock(), seconds=seconds, refused=refused)


def _client_of(scope: Scope) -> str | None:
    """Return the address of the request's client; behind a proxy on this machine, whatever it names."""
    client = scope["client"]
    if client is None:
        return None
    host: str = client[0]
    return forwarded_of(scope).afar or host if is_loopback(host) else host


def _key_digest(request: Request) -> bytes:
    """Return a digest of the request's key; empty if it has none."""
    given = request.headers.get("authorization") or request.headers.get("x-api-key")
    return blake2b(given.encode("utf-8", "surrogatepass"), digest_size=16).digest() if given else b""


def _secret(report: bytes) -> str:
    """Return the secret in an answer of /route_secret; "" if there is none."""
    found = _read(report, dict[str, Any]) or {}
    secret = found.get("secret")
    return secret if isinstance(secret, str) and _SECRET.fullmatch(secret) else ""


def _has_no_files(error: BaseException | None) -> bool:
    """Return True if a connection failed because this process may open no more files."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return any(map(_has_no_files, (*inner, error.__cause__ or error.__context__)))


def _is_short(answer: httpx2.Response) -> bool:
    length = answer.headers.get("content-length", "")
    return _SHORT.fullmatch(length) is not None and int(length) <= _PROBLEM_BYTES


async def _whole(answer: httpx2.Response, sending: _Sending, lost: ApiError) -> Response:
    """Return a server's answer in one piece, or the error for one that breaks off."""
    try:
        content = b"".join([piece async for piece in answer.aiter_raw()])
    except httpx2.TransportError:
        return refusal(lost)
    finally:
        sending.refused()
        with anyio.CancelScope(shield=True):
            await answer.aclose()
    made = Response(content, answer.status_code)
    made.raw_headers = [*_passed(answer.headers.raw, _NOT_PASSED), (b"content-length", b"%d" % len(content))]
    return made


def _is_events(answer: httpx2.Response) -> bool:
    """Return True if the answer is an event stream, whose head comes with its first event."""
    kind: str = answer.headers.get("content-type", "")
    return kind.startswith("text/event-stream")


def _passed(headers: Iterable[tuple[bytes, bytes]], but: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the headers to pass on: without those of one connection, which may name more of them."""
    found = [(name.lower(), value.strip(b" \t")) for name, value in headers]
    named = {
        one.strip().lower() for name, value in found if name == b"connection" for one in value.split(b",")
    }
    return [
        (name, value) for name, value in found if not (name in _HOP_BY_HOP or name in but or name in named)
    ]


def _error_event(error: ApiError, scope: Scope) -> bytes:
    """Return the event that ends a stream with an error, in the format of the API that was asked.

    It begins with an empty line, which ends an event of which only a part was passed on.
    """
    data = error_json(error, scope)
    if is_anthropic(scope):
        return b"\n\nevent: error\ndata: " + data + b"\n\n"
    if scope["path"].rstrip("/") == "/v1/responses":
        report = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return b"\n\nevent: error\ndata: " + msgspec.json.encode(report) + b"\n\n"
    return b"\n\ndata: " + data + b"\n\n" + (b"" if scope["path"] == "/" else DONE)


def _read_error(status: int, body: bytes) -> ApiError | None:
    """Return a server's refusal as an error of the same code, or None for what is no such answer."""
    if (anthropic := _read(body, AnthropicError)) is not None:
        message, code = anthropic.error.message, str(anthropic.error.details.error_code)
    elif (report := _read(body, Error)) is not None:
        message, code = report.error.message, str(report.error.code)
    else:
        return None
    if status == 404:
        return AdapterNotFoundError(message, code=code)
    kind = {403: ForbiddenError, 409: StateConflictError}.get(status)
    return InvalidRequestError(message, code=code) if kind is None else kind(message, code=code)


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def serve(
    route: Route,
    settings: Settings,
    listener: socket.socket,
    on_ready: Callable[[], None],
    before: int | None = None,
) -> None:
    """Serve until a signal, then until what is running has ended, for at most the drain timeout.

    Raises OpenServersError.

    Args:
        on_ready: called once, when connections are accepted.
        before: handle of the process of a route at this address, which is stopped then.
    """
    middleware = CrossSiteMiddleware(route, settings)
    config = uvicorn_config(middleware, settings, files_each=2)
    config.timeout_graceful_shutdown = math.ceil(settings.drain_timeout)
    server = QuietServer(config)
    loop = asyncio.get_running_loop()
    leaving: list[asyncio.Task[None]] = []

    def stop() -> None:
        server.force_exit = server.should_exit = middleware.closing
        middleware.closing = route.is_beside_another = True
        if not leaving:
            leaving.append(loop.create_task(_leave_address(server)))

    def take_over(before: int) -> None:
        def ended() -> None:
            loop.remove_reader(before)
            os.close(before)
            route.is_beside_another = False

        route.is_beside_another = True
        take_new_connections(listener)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(before, signal.SIGTERM)
        loop.add_reader(before, ended)

    async def report() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        on_ready()
        if before is not None:
            take_over(before)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    route.read_list()
    await asyncio.gather(*map(route.look, route.replicas.values()))
    if without := [one.url for one in route.replicas.values() if one.needs_no_key]:
        await route.close()
        raise OpenServersError(settings.host, without)
    following = loop.create_task(keep_running("following the servers", route.follow))
    reporting = loop.create_task(report())
    try:
        freeze_loaded()
        await server.serve(sockets=[listener])
    finally:
        for task in (following, reporting, *leaving):
            task.cancel()
        await route.close()


async def _leave_address(server: QuietServer) -> None:
    """Leave new connections to a route that has taken the address over, then end the server.

    A connection closes after its next answer, which says so: closed without a word, it could meet a request.
    """
    await asyncio.sleep(_ACCEPT_SECONDS)
    for listening in getattr(server, "servers", ()):
        listening.close()
    until = time.monotonic() + _LEAVE_SECONDS
    while server.server_state.connections and time.monotonic() < until:
        await asyncio.sleep(0.05)
    server.should_exit = True
