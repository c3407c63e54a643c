"""What one connection may send, hold open and leave unread, on real sockets and with short limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onebase_edge.cross_site import CrossSiteMiddleware
from onebase_edge.errors import ApiError, ForbiddenError, UnauthenticatedError, UnavailableError
from onebase_edge.listener import QuietServer, bind, take_new_connections
from onebase_edge.protocol import ConnectionLimits, Connections, LimitedProtocol, limit_unread
from onebase_edge.refusals import refusal
from onebase_edge.settings import Settings

LONG = 30.0
LIMITS = ConnectionLimits(
    max_header=64 << 10,
    max_header_lines=200,
    header_timeout=LONG,
    body_timeout=LONG,
    min_body_rate=1000,
    write_timeout=LONG,
    max_connections=50,
    max_connections_per_host=10,
)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass
class App:
    """Reads the body, then answers with its length; `/endless` streams until its caller is gone."""

    seen: list[Scope] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    read: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    slow: threading.Event = field(default_factory=threading.Event)
    """While it is not set, bodies sent to `/slow` are not read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        if scope["path"] == "/endless":
            await self._stream(receive, send)
            return
        while scope["path"] == "/slow" and not self.slow.is_set():
            await asyncio.sleep(0.01)
        size, message = 0, {"more_body": True}
        while message.get("more_body"):
            message = await receive()  # type: ignore[assignment]
            size += len(message.get("body", b""))  # type: ignore[arg-type]
            self.read.release()
            if message.get("type") == "http.disconnect":
                self.gone.set()
                return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
        await send({"type": "http.response.body", "body": b"%8d" % size})

    async def _stream(self, receive: Receive, send: Send) -> None:
        async def until_gone() -> None:
            message: Message = {"type": ""}
            while message["type"] != "http.disconnect":
                message = await receive()

        gone = asyncio.ensure_future(until_gone())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
            await asyncio.sleep(0)
        self.gone.set()


@dataclass
class Running:
    app: App
    port: int
    server: uvicorn.Server

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG)

    def answer(self, data: bytes) -> tuple[list[int], bytes]:
        """What a connection is told until it is closed: the statuses, and all of it."""
        with self.connect() as connection:
            send(connection, data)
            received = until_closed(connection)
        return statuses(received), received


@contextlib.contextmanager
def running(
    limits: ConnectionLimits = LIMITS,
    keep_alive: float = LONG,
    around: Callable[[App], ASGIApp] = lambda app: app,
    **more: Any,
) -> Iterator[Running]:
    """around: gives what is served instead of the app; more: of LimitedProtocol."""
    app = App()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit_unread(listener, limits.write_timeout)
    protocol: Any = partial(LimitedProtocol, connections=Connections(limits), **more)
    config = uvicorn.Config(
        around(app), http=protocol, ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=0
    )
    config.timeout_keep_alive = keep_alive  # type: ignore[assignment]
    server = QuietServer(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Running(app, listener.getsockname()[1], server)
    finally:
        server.should_exit = True
        app.slow.set()
        thread.join(LONG)
        listener.close()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)


def send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # refused before all of it was sent
        connection.sendall(data)


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            received += data
    return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", received)]


def next_answer(connection: socket.socket) -> bytes:
    """The next of the app's answers."""
    received = b""
    while not re.search(rb"\r\n\r\n.{8}$", received):
        data = connection.recv(1 << 16)
        if not data:
            raise EOFError(received)
        received += data
    return received


def error_of(received: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(received[received.rindex(b'{"error"') :])["error"]
    return error


# ---- headers --------------------------------------------------------------------------------------

TOO_LARGE = {
    "a header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000,
    "the address": b"GET /" + b"x" * 100_000,
    "a name": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"x" * 100_000,
    "all headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"x" * 40_000 + b"\r\nY: " + b"x" * 40_000,
    "lines": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 201 + b"\r\n",
    "the trailer": CHUNKED + b"1\r\nx\r\n0\r\nX: " + b"x" * 100_000,
    "lines of the trailer": CHUNKED + b"0\r\n" + b"X: y\r\n" * 201 + b"\r\n",
    "a chunk's extension": CHUNKED + b"1;x=" + b"x" * 100_000,
}


@pytest.fixture(scope="module")
def lenient() -> Iterator[Running]:
    """For tests in which no time limit is reached."""
    with running() as server:
        yield server


@pytest.mark.parametrize("what", TOO_LARGE)
def test_headers_over_the_limit_are_refused_and_the_connection_closes(lenient: Running, what: str) -> None:
    answered, received = lenient.answer(TOO_LARGE[what])

    assert answered == [431]
    assert error_of(received)["code"] == "headers_too_large"
    assert "--max-header" in error_of(received)["message"]
    assert b"x-content-type-options: nosniff" in received


def test_headers_that_come_in_pieces_are_counted_together(lenient: Running) -> None:
    with lenient.connect() as connection:
        send(connection, b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
        for _ in range(100):
            send(connection, b"x" * 1000)
        assert statuses(until_closed(connection)) == [431]


def test_an_earlier_request_is_answered_before_one_with_too_large_headers_is_refused(
    lenient: Running,
) -> None:
    assert lenient.answer(GET + GET + TOO_LARGE["lines"])[0] == [200, 200, 431]


def test_a_connection_may_be_used_for_any_number_of_usual_requests(lenient: Running) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"x" * 1000 + b"\r\n" * 2
    with lenient.connect() as connection:
        for _ in range(100):
            connection.sendall(head)
            assert next_answer(connection).startswith(b"HTTP/1.1 200")


def test_a_chunked_body_of_single_bytes_is_read(lenient: Running) -> None:
    body = b"1\r\nx\r\n" * 9_000 + b"0\r\n\r\n"

    answered, received = lenient.answer(
        CHUNKED + body + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    )

    assert answered == [200, 200]
    assert b"    9000" in received


@pytest.mark.parametrize("bytes_", [1, 7])
def test_a_body_of_very_many_tiny_chunks_is_refused_and_one_of_larger_ones_is_read(
    lenient: Running, bytes_: int
) -> None:
    """Each chunk costs the server as much as a kilobyte of a body in one piece."""
    tiny = b"%x\r\n%s\r\n" % (bytes_, b"x" * bytes_)

    answered, received = lenient.answer(CHUNKED + tiny * 200_000 + b"0\r\n\r\n")

    assert answered[-1:] == [400]
    assert "larger ones" in error_of(received)["message"]
    with lenient.connect() as connection:
        connection.sendall(CHUNKED + b"8\r\n8 bytes.\r\n" * 50_000 + b"0\r\n\r\n")
        assert b"  400000" in next_answer(connection)


def test_a_trailer_is_no_header(lenient: Running) -> None:
    with lenient.connect() as connection:
        connection.sendall(CHUNKED + b"1\r\nx\r\n0\r\nOrigin: http://evil.example\r\n\r\n")
        assert next_answer(connection).startswith(b"HTTP/1.1 200")

    assert b"origin" not in dict(lenient.app.seen[-1]["headers"])


def test_more_requests_than_may_wait_on_a_connection_are_not_taken(lenient: Running) -> None:
    before = len(lenient.app.seen)

    answered, _ = lenient.answer(GET * 5000)

    assert answered[-1] == 400
    assert len(lenient.app.seen) - before < 30


def test_what_is_no_http_is_answered_in_the_usual_shape(lenient: Running) -> None:
    answered, received = lenient.answer(b"EHLO there\r\n\r\n")

    assert answered == [400]
    assert error_of(received)["code"] == "invalid_http"


UPGRADE = b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n"
LAST = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize("pieces", [1, 2, 1000], ids=["at once", "the body later", "byte by byte"])
@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n", b""),
        (POST + UPGRADE + b"Content-Length: %d\r\n\r\n" % len(GET), GET),
        (POST + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(GET), GET)),
    ],
    ids=["no body", "a length", "chunks"],
)
def test_a_request_that_asks_for_another_protocol_is_read_as_if_it_had_not(
    lenient: Running, head: bytes, body: bytes, pieces: int
) -> None:
    """Java's client asks so by default. Its body is no request, and the next request is not lost."""
    lenient.app.seen.clear()
    with lenient.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent = {1: [head + body + LAST], 2: [head, body + LAST]}.get(pieces)
        for piece in sent or [bytes([one]) for one in head + body + LAST]:
            connection.sendall(piece)
            time.sleep(0.1 if pieces == 2 else 0.0)
        received = until_closed(connection)

    assert statuses(received) == [200, 200]
    assert len(lenient.app.seen) == 2
    assert (b"%8d" % (len(GET) if body else 0)) in received
    assert b"upgrade" not in dict(lenient.app.seen[0]["headers"])


def test_one_that_asks_for_another_protocol_and_for_the_end_gets_its_answer_and_the_end(
    lenient: Running,
) -> None:
    for head in (b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n", b"Connection: close\r\n" + UPGRADE):
        with lenient.connect() as connection:
            connection.sendall(POST + head + b"Content-Length: 4\r\n\r\nabcd" + GET)
            assert statuses(until_closed(connection)) == [200]


@pytest.mark.parametrize(
    "data",
    [
        POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET,
        POST + UPGRADE + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET,
        POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        POST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
        POST + b"Content-Length: 4, 4\r\n\r\nabcd",
        POST + b"Content-Length: +4\r\n\r\nabcd",
        POST + b"Content-Length: 0x4\r\n\r\nabcd",
        POST + b"Content-Length: " + b"0" * 5000 + b"4\r\n\r\nabcd",
        POST + b"Content-Length : 4\r\n\r\nabcd",
        POST + b"Content-Length: 99999999999999999999\r\n\r\nabcd",
        POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"fffffffffffffffff\r\n{}",
        CHUNKED + b"2\n{}\n0\n\n",
        CHUNKED + b"2;\nxx\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"2\r\n{}xx0\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n: c\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n",
        b"GET http://other/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET HTTP://x@other/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda data: repr(data.replace(b"\r\nHost: x", b""))[2:70],
)
def test_what_a_proxy_may_read_in_another_way_is_refused_and_nothing_after_it_is_read(
    lenient: Running, data: bytes
) -> None:
    answered, received = lenient.answer(data + GET.replace(b"/", b"/smuggled", 1))

    assert answered == [400]
    assert error_of(received)["code"] in ("invalid_http", "host_not_allowed")
    assert not any(scope["path"] == "/smuggled" for scope in lenient.app.seen)


@pytest.mark.parametrize(
    ("status", "code", "data"),
    [
        (505, "http_version_not_supported", b"GET / HTTP/2.0\r\nHost: x\r\n\r\n"),
        (505, "http_version_not_supported", b"GET / HTTP/2.0\r\nHost: x\r\n" + UPGRADE + b"\r\n"),
        (505, "http_version_not_supported", b"GET / HTTP/0.9\r\nHost: x\r\n\r\n"),
        (505, "http_version_not_supported", b"GET /\r\n\r\n"),
        (501, "transfer_coding_not_supported", POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
        (501, "transfer_coding_not_supported", POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        (
            501,
            "transfer_coding_not_supported",
            POST + b"Transfer-Encoding: identity,chunked\r\n\r\n0\r\n\r\n",
        ),
        (501, "transfer_coding_not_supported", POST + b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n"),
        (
            501,
            "transfer_coding_not_supported",
            POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            501,
            "transfer_coding_not_supported",
            POST + UPGRADE + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        ),
        (400, "invalid_http", CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n"),
    ],
)
def test_a_message_of_another_kind_is_refused_and_nothing_after_it_is_read(
    lenient: Running, status: int, code: str, data: bytes
) -> None:
    answered, received = lenient.answer(data + GET.replace(b"/", b"/smuggled", 1))

    assert answered == [status]
    assert error_of(received)["code"] == code
    assert not any(scope["path"] == "/smuggled" for scope in lenient.app.seen)


@pytest.mark.parametrize(
    "data",
    [
        POST + b"transfer-encoding: \tChunked \r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b'02;a=b;c="d;e"\r\n{}\r\n0\r\nContent-Type: x\r\nHost: y\r\n\r\n',
        POST + b"Content-Length: 2\r\nTransfer_Encoding: gzip\r\nContent_Length: 9\r\n\r\n{}",
        b"\r\n" + POST + b"Content-Length: \t2 \r\n\r\n{}",
    ],
)
def test_what_all_read_in_one_way_is_served_as_it_is_meant(lenient: Running, data: bytes) -> None:
    before = len(lenient.app.seen)
    answered, received = lenient.answer(data + LAST)

    assert answered == [200, 200]
    assert b"       2HTTP/1.1" in received
    assert [scope["path"] for scope in lenient.app.seen[before:]] == ["/", "/last"]


# ---- time -----------------------------------------------------------------------------------------

BRIEF = 0.3
UNHURRIED = 1.5
"""For limits that a client of a busy machine must keep."""


def test_a_connection_on_which_nothing_is_asked_is_closed() -> None:
    with running(replace(LIMITS, header_timeout=BRIEF)) as server, server.connect() as connection:
        assert until_closed(connection) == b""


def test_a_connection_is_closed_when_no_other_request_follows() -> None:
    with running(keep_alive=BRIEF) as server:
        assert server.answer(GET)[0] == [200]
        assert server.answer(GET + b"\r\n" * 100)[0] == [200]


def test_headers_that_do_not_end_in_time_are_refused_however_they_trickle() -> None:
    with running(replace(LIMITS, header_timeout=BRIEF)) as server, server.connect() as connection:
        received = trickle(connection, b"GET / HTTP/1.1\r\nHost: x\r\nX: ")

        assert statuses(received) == [408]
        assert "--header-timeout" in error_of(received)["message"]


@pytest.mark.parametrize("head", [POST + b"Content-Length: 100000\r\n\r\n", CHUNKED + b"186a0\r\n"])
def test_a_body_that_trickles_is_refused_and_its_request_ends(head: bytes) -> None:
    with running(replace(LIMITS, body_timeout=BRIEF)) as server, server.connect() as connection:
        received = trickle(connection, head)

        assert statuses(received) == [408]
        assert "--body-timeout" in error_of(received)["message"]
        assert "--min-body-rate" in error_of(received)["message"]
        assert server.app.gone.wait(LONG)


def test_a_body_that_keeps_to_the_least_rate_may_take_longer_than_the_timeout() -> None:
    limits = replace(LIMITS, body_timeout=UNHURRIED, min_body_rate=1)
    with running(limits) as server, server.connect() as connection:
        connection.sendall(POST + b"Content-Length: 40\r\n\r\n")
        for _ in range(40):
            time.sleep(2 * UNHURRIED / 40)
            connection.sendall(b"x")

        assert next_answer(connection).startswith(b"HTTP/1.1 200")


def test_a_client_that_the_server_makes_wait_is_not_too_slow() -> None:
    body = b"x" * 20_000_000
    with running(replace(LIMITS, body_timeout=UNHURRIED)) as server, server.connect() as connection:
        connection.sendall(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
        sender = threading.Thread(target=send, args=(connection, body))
        sender.start()
        time.sleep(2 * UNHURRIED)
        server.app.slow.set()

        assert next_answer(connection).startswith(b"HTTP/1.1 200")
        sender.join()


def test_a_stream_that_says_nothing_for_long_is_not_cut_off() -> None:
    limits = replace(LIMITS, header_timeout=UNHURRIED, body_timeout=UNHURRIED, write_timeout=UNHURRIED)
    with running(limits, keep_alive=UNHURRIED) as server, server.connect() as connection:
        connection.sendall(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
        time.sleep(2 * UNHURRIED)
        server.app.slow.set()

        assert next_answer(connection).startswith(b"HTTP/1.1 200")


def test_a_stream_that_nobody_reads_ends() -> None:
    with running(replace(LIMITS, write_timeout=BRIEF)) as server, server.connect() as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")

        assert server.app.gone.wait(LONG)
        wait_for(lambda: not server.server.server_state.connections)


def test_a_stream_that_is_read_slowly_goes_on() -> None:
    with running(replace(LIMITS, write_timeout=3.0)) as server, server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(40):
            time.sleep(0.1)
            connection.recv(1 << 20)

        assert not server.app.gone.is_set()


def test_a_head_that_arrives_while_an_earlier_request_is_answered_starts_a_request_of_its_own() -> None:
    with running(keep_alive=UNHURRIED) as server, server.connect() as connection:
        connection.sendall(GET + POST)
        next_answer(connection)
        connection.sendall(b"Content-Length: 1\r\n\r\n")
        time.sleep(2 * UNHURRIED)
        connection.sendall(b"x")

        assert next_answer(connection).startswith(b"HTTP/1.1 200")


def trickle(connection: socket.socket, head: bytes) -> bytes:
    """Send one byte after another until the server has had enough; what it says."""
    connection.sendall(head)
    connection.settimeout(0.02)
    received, end = b"", time.monotonic() + LONG
    while time.monotonic() < end:
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            send(connection, b"x")
            continue
        if not data:
            break
        received += data
    return received


# ---- how many -------------------------------------------------------------------------------------


def test_one_connection_too_many_is_told_so_and_another_is_taken_when_one_ends() -> None:
    with running(replace(LIMITS, max_connections=0)) as server, contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(server.connect()) for _ in range(16)]
        for connection in open_ones:
            connection.sendall(GET)
            assert next_answer(connection).startswith(b"HTTP/1.1 200")

        answered, received = server.answer(GET)

        assert answered == [503]
        assert b"retry-after" in received
        assert "--max-connections" in error_of(received)["message"]
        open_ones[0].close()
        wait_for(lambda: server.answer(GET.replace(b"1.1", b"1.0"))[0] == [200])


@pytest.mark.parametrize(
    ("address", "other", "refused"),
    [
        ("203.0.113.7", "203.0.113.7", True),
        ("203.0.113.7", "203.0.113.8", False),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:203.0.113.7", "203.0.113.7", True),
        ("127.0.0.1", "127.0.0.1", False),
        ("::1", "::1", False),
        ("10.0.0.1", "10.0.0.1", False),
        ("10.0.1.1", "10.0.1.1", True),
        ("", "", False),
    ],
)
def test_connections_are_counted_by_address_but_for_loopback_and_proxies(
    address: str, other: str, refused: bool
) -> None:
    connections = Connections(replace(LIMITS, max_connections_per_host=1, trusted_proxy=("10.0.0.0/24",)))

    assert connections.open_connection(address) is None
    assert (connections.open_connection(other) is not None) is refused
    connections.close(address)
    connections.close(other)

    assert not connections.by_host


# ---- answers without the app ----------------------------------------------------------------------

NO = ForbiddenError("no: h\xe9", code="no")
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
ANSWERED = {
    "a plain one": LAST,
    "without a body": b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n" + LAST,
    "an old one": b"GET / HTTP/1.0\r\nHost: x\r\n\r\n",
    "with a body": POST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\nhello" + LAST,
    "with a broken body": CHUNKED + b"zz\r\n",
    "several": GET + b"HEAD /x?y HTTP/1.1\r\nHost: x\r\n\r\n" + GET + LAST,
    "with a broken one": GET + GET + b"G\0T",
    "too many": GET * 40,
    "for another protocol": b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + LAST,
    "with an id": LAST.replace(b"\r\n\r\n", b"\r\nX-Request-Id: 100%d-{me}\r\n\r\n"),
    "in other words": LAST.replace(b"/last", b"/v1/messages"),
    "by way of a proxy": LAST.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n"),
}
ERRORS = [NO, UnauthenticatedError("Who?"), UnavailableError("Later.", code="later", retry_after=1.5)]


def always(error: ApiError) -> Callable[[App], ASGIApp]:
    """An app that answers everything with the error, behind the door as the real one."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await refusal(error)(scope, receive, send)

    return lambda app: CrossSiteMiddleware(answer, Settings(allowed_host=("*",)))


def at_once(error: ApiError) -> Callable[[Scope], ApiError | None]:
    """What the door of an app says that lets nobody in."""

    class Gate:
        def admit_at_once(self, scope: Scope) -> None:
            raise error

    return CrossSiteMiddleware(App(), Settings(allowed_host=("*",)), Gate()).turned_away


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_an_answer_without_the_app_is_the_apps_own_to_the_last_byte_and_line_of_the_log(
    error: ApiError, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "new")
    told: list[dict[str, tuple[bytes, list[str]]]] = []
    for more in ({"around": always(error)}, {"turned_away": at_once(error)}):
        with running(**more) as server, caplog.at_level("INFO", "uvicorn.access"):  # type: ignore[arg-type]
            found = {}
            for name, data in ANSWERED.items():
                caplog.clear()
                received = re.sub(rb"date: [^\r]*\r\n", b"", server.answer(data)[1])
                lines = [re.sub(r":\d+ ", "", line.getMessage()) for line in caplog.records]
                found[name] = received, lines
            told.append(found)

    assert told[0] == told[1]
    assert all(received for received, _ in told[0].values())
    assert told[0]["by way of a proxy"][1][0].startswith("203.0.113.7")
    assert told[0]["with an id"][1][0].endswith(" 100%d-{me}")
    assert b"x-request-id: 100%d-{me}\r\n" in told[0]["with an id"][0]
    assert all(b"x-request-id: req-new\r\n" in told[0][name][0] for name in ("a plain one", "too many"))
    assert b'"type":"error"' in told[0]["in other words"][0]


def test_what_is_turned_away_is_answered_in_its_turn_and_the_app_does_not_run() -> None:
    refused = b" /no HTTP/1.1\r\nHost: x\r\n"
    with running(turned_away=lambda scope: NO if scope["path"] == "/no" else None) as server:
        with server.connect() as connection:
            send(connection, b"POST" + refused + b"Content-Length: 5\r\n\r\nhello" + GET)
            first = next_answer(connection)
            send(connection, GET + b"GET" + refused + b"Connection: close\r\n\r\n")
            second = until_closed(connection)

        assert (statuses(first), statuses(second)) == ([403, 200], [200, 403])
        assert [scope["path"] for scope in server.app.seen] == ["/", "/"]
        assert server.server.server_state.total_requests == 4


def test_an_earlier_listener_gets_no_connection_once_a_later_one_takes_them() -> None:
    with contextlib.ExitStack() as opened:
        earlier = opened.enter_context(bind(Settings(port=0), take_over=False))
        port = earlier.getsockname()[1]
        later = opened.enter_context(bind(Settings(port=port), take_over=True))
        later.listen()
        take_new_connections(later)
        for _ in range(20):
            opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            opened.enter_context(later.accept()[0])
        with pytest.raises(BlockingIOError):
            earlier.accept()
