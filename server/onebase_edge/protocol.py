"""One connection: uvicorn's protocol, with limits on what a client may send, hold open and leave unread.

httptools takes headers of any size, and uvicorn waits for ever for the rest of whatever a client has started.
Here each wait has an end, and what is refused is answered once, as every other error, before the connection
closes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import re
import socket
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import get_client_addr, get_path_with_query_string

from onebase_edge.cross_site import SECURITY_HEADERS
from onebase_edge.errors import (
    ApiError,
    HeadersTooLargeError,
    HttpVersionError,
    InvalidRequestError,
    TooSlowError,
    TransferCodingError,
    UnavailableError,
    error_headers,
    status_of,
)
from onebase_edge.refusals import error_json, id_headers
from onebase_edge.request_id import AccessLog
from onebase_edge.sse import ABORT_EXTENSION

_log = logging.getLogger(__name__)
_CHUNK_LINE_BYTES = 32
"""Bytes that a chunk of a body may take besides its content: its length, line ends, and a little more."""
_FREE_CHUNKS = 10_000
_LEAST_CHUNK_BYTES = 8
"""Least mean size, in bytes, of a body's chunks beyond the free ones: each costs as much as a kilobyte."""
_LENGTH_DIGITS = 20
"""Number of digits of the largest length that the parser takes, 2^64 - 1. Python may not read one with zeros
before it."""
_VERSIONS = ("1.1", "1.0")
_PIPELINED = 16
"""Largest number of requests that wait on one connection while an earlier one is answered."""
_RESERVE = 16
"""Number of connections that loopback has beyond the limit, so that probes are answered when it is
reached."""
_LINGER_SECONDS = 2.0
"""Time, in seconds, that a refused client is still read: closed at once, its kernel would discard the
answer."""
_LOG_SECONDS = 60.0


def _lines(headers: Iterable[tuple[str, object]]) -> bytes:
    return "".join(f"{name.lower()}: {value}\r\n" for name, value in headers).encode("latin-1")


_SECURITY_LINES = _lines(SECURITY_HEADERS.items())
_AUTHORITY = re.compile(rb"[a-z][a-z0-9+.-]*://([^/?#]*)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Sizes in bytes, times in seconds. The settings' help texts say what each is for."""

    max_header: int
    max_header_lines: int
    header_timeout: float
    body_timeout: float
    min_body_rate: float
    write_timeout: float
    max_connections: int
    max_connections_per_host: int
    trusted_proxy: tuple[str, ...] = ()


@dataclass
class Connections:
    """Connections to one server by host, shared by its protocols."""

    limits: ConnectionLimits
    by_host: Counter[str] = field(default_factory=Counter)
    _logged: float = -_LOG_SECONDS

    def __post_init__(self) -> None:
        self._proxies = [ipaddress.ip_network(proxy, strict=False) for proxy in self.limits.trusted_proxy]

    def open_connection(self, address: str) -> ApiError | None:
        """Count a connection. Return the error if it is one too many: it counts all the same, until
        `close`."""
        host, exempt = self._host(address)
        self.by_host[host] += 1
        limits = self.limits
        if self.by_host.total() > limits.max_connections + (_RESERVE if exempt else 0):
            return self._refusal(f"{limits.max_connections} connections are open (--max-connections)")
        if not exempt and self.by_host[host] > limits.max_connections_per_host:
            return self._refusal(
                f"{limits.max_connections_per_host} connections from {host} are open "
                "(--max-connections-per-host; --trusted-proxy for a proxy)"
            )
        return None

    def close(self, address: str) -> None:
        host, _ = self._host(address)
        self.by_host[host] -= 1
        if not self.by_host[host]:
            del self.by_host[host]

    def _host(self, address: str) -> tuple[str, bool]:
        """Return the host by which connections are counted, and whether it is loopback or a proxy."""
        try:
            ip = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:  # a local socket
            return address, True
        if isinstance(ip, ipaddress.IPv6Address):
            ip = ip.ipv4_mapped or ip
        exempt = ip.is_loopback or any(ip in network for network in self._proxies)
        if isinstance(ip, ipaddress.IPv6Address) and not exempt:
            return str(ipaddress.ip_network((ip, 64), strict=False)), False
        return str(ip), exempt

    def _refusal(self, reason: str) -> ApiError:
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            _log.warning("connections are refused: %s", reason)
        return UnavailableError(f"{reason}. Try again later.", code="too_many_connections", retry_after=5.0)


class _Reading(Enum):
    NOTHING = "between two requests"
    HEAD = "the address and headers"
    BODY = "the body, and what follows it"


class _Flow(FlowControl):
    """Remembers that the server made the client wait."""

    resumed = False

    def resume_reading(self) -> None:
        self.resumed = self.resumed or self.read_paused
        super().resume_reading()


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol within `connections.limits`; streams can drop it with the unsent bytes.

    turned_away: the error with which the app would answer a request, if that is plain from its address and
    headers: then it is answered here, without a task, and the app does not run.
    """

    flow: _Flow

    def __init__(
        self,
        *args: Any,
        connections: Connections,
        turned_away: Callable[[Any], ApiError | None] = lambda scope: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._turned_away = turned_away
        self._parsing = False
        self._next: tuple[RequestResponseCycle, Any] | None = None
        """Request that starts once the data that brought it is read."""
        self._clients = connections
        self._limits = connections.limits
        self._reading = _Reading.NOTHING
        self._refusal: ApiError | None = None
        self._refused = False
        """Whether the refusal was sent."""
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._message_ended = False
        """Whether a message ended within the last piece of data."""
        self._head_bytes = self._head_lines = self._head_pieces = 0
        self._body_bytes = self._chunks = self._between_chunks = 0
        self._brought = self._body_total = 0

    # ---- the connection ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        refusal = self._clients.open_connection(self._address)
        if refusal is not None:
            self._refusal = refusal
            transport.write(self._answer(refusal, None, close=True))
            transport.close()
            return
        self._expect(self._limits.header_timeout, self._head_too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clients.close(self._address)
        self._expect_nothing()
        self._all_is_written()
        self._unset_keepalive_if_required()
        for cycle, _ in self.pipeline:
            cycle.disconnected = True
        super().connection_lost(exc)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def eof_received(self) -> None:
        """Do nothing: the transport closes itself."""

    # ---- reading -------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._parsing = True
        try:
            self._parse(data)
        except (httptools.HttpParserError, HeadersTooLargeError) as error:
            own = error if isinstance(error, HeadersTooLargeError) else error.__context__
            self._refuse(own if isinstance(own, ApiError) else _malformed())
        else:
            self._expect_rest()
        finally:
            self._parsing = False
        if self._next is not None:
            (cycle, app), self._next = self._next, None
            if not cycle.disconnected and not self.transport.is_closing():
                self._start_asgi_task(cycle, app)

    def _parse(self, data: bytes) -> None:
        """Feed data to the parser. Raises HttpParserError, HeadersTooLargeError."""
        before, self._message_ended, self._body_bytes = self._reading, False, 0
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # For the parser all that follows is another protocol: a body would be the next request. And one
            # that has read `Connection: close` reads nothing more.
            head = self._without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._parse(head + data[upgrade.args[0] :])
            return
        self._check_unparsed(before, len(data))

    def _without_upgrade(self) -> bytes:
        """Return the head of a request for another protocol as if it had not asked for one."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _check_unparsed(self, before: _Reading, size: int) -> None:
        """Count what no callback has seen: a line that has not ended. Raises HeadersTooLargeError."""
        if self._message_ended:
            return
        if self._reading is _Reading.HEAD:
            self._head_pieces += size
        elif self._reading is _Reading.BODY:
            head = 0 if before is _Reading.BODY else self._head_bytes
            self._between_chunks += max(0, size - head - self._body_bytes)
        if max(self._head_pieces, self._between_chunks - _CHUNK_LINE_BYTES * self._chunks) > (
            self._limits.max_header
        ):
            raise self._too_large()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope["extensions"] = {ABORT_EXTENSION: {"abort": self.transport.abort}}
        self._unset_keepalive_if_required()
        self._reading = _Reading.HEAD
        self._head_bytes = self._head_lines = self._head_pieces = 0
        self._chunks = self._between_chunks = self._body_total = 0
        self._expect_nothing()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url), 0)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + len(": \r\n"), 1)
        if len(value) > _LENGTH_DIGITS and name.lower() == b"content-length":
            raise _malformed()
        if self._reading is _Reading.HEAD:  # nobody looks at trailers
            super().on_header(name, value)

    def _count_head(self, size: int, lines: int) -> None:
        self._head_bytes += size
        self._head_lines += lines
        if self._head_bytes > self._limits.max_header or self._head_lines > self._limits.max_header_lines:
            raise self._too_large()

    def _too_large(self) -> HeadersTooLargeError:
        return HeadersTooLargeError(self._limits.max_header, self._limits.max_header_lines)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise _malformed()
        self._check_message()
        if self.parser.should_upgrade():
            return  # it comes again without
        self._check_address()
        self._expect_nothing()
        self._unset_keepalive_if_required()  # set by an earlier request, if its answer ended within this head
        if len(self.pipeline) >= _PIPELINED:
            raise InvalidRequestError(
                f"over {_PIPELINED} requests wait on this connection. Read their answers first.",
                code="invalid_http",
            )
        super().on_headers_complete()
        self._reading = _Reading.BODY

    def _check_message(self) -> None:
        """Raise HttpVersionError, TransferCodingError or InvalidRequestError for a message of another kind.

        The parser lets through other versions, bodies in other codings, and chunks in HTTP/1.0, whose readers
        know none.
        """
        version = self.parser.get_http_version()
        if version not in _VERSIONS:
            raise HttpVersionError(version)
        codings = [
            value.strip(b" \t").lower() for name, value in self.headers if name == b"transfer-encoding"
        ]
        if codings and version == "1.0":
            raise _malformed()
        if codings not in ([], [b"chunked"]):
            raise TransferCodingError

    def _check_address(self) -> None:
        """Raise InvalidRequestError if the address names another server than `Host` does.

        An address may name one, as those for a proxy do, and counts more than `Host`.
        """
        named = _AUTHORITY.match(self.url)
        if named and any(
            name == b"host" and value.lower() != named[1].lower() for name, value in self.headers
        ):
            raise InvalidRequestError(
                "Host: the request's address names another server. Send one and the same name.",
                code="host_not_allowed",
            )

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > _FREE_CHUNKS + self._body_total // _LEAST_CHUNK_BYTES:
            raise InvalidRequestError(
                f"The body comes in over {_FREE_CHUNKS} chunks of less than {_LEAST_CHUNK_BYTES} bytes on "
                "average. Send it in larger ones.",
                code="invalid_http",
            )

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._body_total += len(body)
        self._brought += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._message_ended = True
        self._reading = _Reading.NOTHING
        self._expect_nothing()
        super().on_message_complete()

    # ---- answering -----------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._parsing:
            self._next = cycle, app
            return
        if self.access_log:
            cycle.access_logger = AccessLog(self.access_logger, cycle.scope)  # type: ignore[assignment]
        error = None if self.flow.write_paused else self._turned_away(cycle.scope)
        if error is None:
            super()._start_asgi_task(cycle, app)
        else:
            self._turn_away(cycle, error)

    def _turn_away(self, cycle: RequestResponseCycle, error: ApiError) -> None:
        """Answer as the cycle would."""
        scope: Any = cycle.scope
        if self.access_log:
            cycle.access_logger.info(
                '%s - "%s %s HTTP/%s" %d',
                get_client_addr(scope),
                scope["method"],
                get_path_with_query_string(scope),
                scope["http_version"],
                status_of(error)[0],
            )
        self.transport.write(
            self._answer(error, scope, close=not cycle.keep_alive, with_body=scope["method"] != "HEAD")
        )
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _answer(self, error: ApiError, scope: Any, *, close: bool, with_body: bool = True) -> bytes:
        """Return an error's answer. `scope`: of the request, as far as it has come; None if none has."""
        body = error_json(error, scope)
        headers = [*error_headers(error).items(), ("content-length", len(body))]
        return b"".join(
            (
                STATUS_LINE[status_of(error)[0]],
                *(b"%s: %s\r\n" % header for header in self.server_state.default_headers),
                _lines(headers),
                b"content-type: application/json\r\n",
                _SECURITY_LINES,
                _lines(id_headers(scope).items()),
                b"connection: close\r\n" if close else b"",
                b"\r\n",
                body if with_body else b"",
            )
        )

    # ---- refusing ------------------------------------------------------------------------------

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error once earlier requests have theirs, and close. Nothing more is read."""
        if self.transport.is_closing():
            return
        self._refusal = error
        self._expect_nothing()
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._send_refusal()
        elif self._reading is _Reading.BODY:  # of this very request
            if cycle.response_started or self.pipeline:
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
            self._send_refusal()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._refusal is not None and self.cycle.response_complete and not self.transport.is_closing():
            self._send_refusal()

    def _send_refusal(self) -> None:
        if self._refusal is None or self._refused:
            return
        self._refused = True
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        scope = None if self._reading is _Reading.NOTHING else self.scope
        self.transport.write(self._answer(self._refusal, scope, close=True))
        self.transport.write_eof()
        self._expect(_LINGER_SECONDS, self.transport.abort)

    # ---- waiting -------------------------------------------------------------------------------

    def _expect(self, seconds: float, otherwise: Any) -> None:
        self._expect_nothing()
        self._read_timer = self.loop.call_later(seconds, otherwise)

    def _expect_nothing(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _head_too_slow(self) -> None:
        if self._reading is _Reading.NOTHING:
            self.transport.close()
        else:
            seconds = self._limits.header_timeout
            self._refuse(TooSlowError(f"headers did not end within {seconds:g} seconds (--header-timeout)"))

    def _expect_rest(self) -> None:
        """Start a timer for the rest of a request; most requests arrive whole, and need none."""
        if self._read_timer is None:
            if self._reading is _Reading.HEAD:
                self._expect(self._limits.header_timeout, self._head_too_slow)
            elif self._reading is _Reading.BODY:
                self._expect_body()

    def _expect_body(self) -> None:
        self._brought = 0
        self.flow.resumed = False
        self._expect(self._limits.body_timeout, self._check_body)

    def _check_body(self) -> None:
        """Refuse a body that came too slowly, unless the server made the client wait."""
        limits = self._limits
        least = limits.min_body_rate * limits.body_timeout
        if self.flow.read_paused or self.flow.resumed or self._brought >= least:
            self._expect_body()
            return
        self._refuse(
            TooSlowError(
                f"body brought {self._brought} bytes in {limits.body_timeout:g} seconds (--body-timeout), "
                f"and the least is {limits.min_body_rate:g} a second (--min-body-rate)"
            )
        )

    # ---- writing -------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader(_unread(self.transport))

    def resume_writing(self) -> None:
        self._all_is_written()
        super().resume_writing()

    def _expect_reader(self, unread: int) -> None:
        self._all_is_written()
        self._write_timer = self.loop.call_later(self._limits.write_timeout, self._check_reader, unread)

    def _check_reader(self, before: int) -> None:
        unread = _unread(self.transport)
        if unread < before:
            self._expect_reader(unread)
        else:
            self.transport.abort()

    def _all_is_written(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def limit_unread(listener: socket.socket, seconds: float) -> None:
    """Let the kernel drop connections whose peer takes nothing of what was sent for so long.

    The protocol sees only what the kernel no longer takes, which is megabytes later. Where the system cannot,
    that is all.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        listener.setsockopt(socket.IPPROTO_TCP, option, round(seconds * 1000))


def _unread(transport: asyncio.Transport) -> int:
    """Return the bytes that were sent and did not arrive yet: with us, and with the kernel if it says."""
    unsent = transport.get_write_buffer_size()
    with contextlib.suppress(OSError, AttributeError):
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0" * 4)
        unsent += int.from_bytes(answer, sys.byteorder)
    return unsent


def _malformed() -> InvalidRequestError:
    return InvalidRequestError(
        "This is not a request in HTTP/1.1, or its parts contradict each other.", code="invalid_http"
    )
