"""A route between clients that send anything and servers that answer anything, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

from onebase_edge.cross_site import CrossSiteMiddleware
from onebase_edge.forwarded import NEWEST
from onebase_edge.listener import QuietServer, bind, uvicorn_config
from onebase_edge.refusals import may_repeat
from onebase_edge.settings import Settings
from onebase_route import proxy
from onebase_route.proxy import Route, read_needs, read_report, target_in
from onebase_route.resumption import WaitingRoom

from .support import PATIENCE, told_statuses
from .test_route import wait

METRICS = b'vllm:num_requests_running{model_name="base"} 0\nonebase_max_sequences 16\n'
SECRET = b"5" * 64
Answer = Callable[["Behind", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(content: bytes, head: bytes = b"content-type: application/json", status: int = 200) -> bytes:
    head += b"\r\nx-onebase-change: 0"
    return b"HTTP/1.1 %d X\r\n%s\r\ncontent-length: %d\r\n\r\n%s" % (status, head, len(content), content)


class Behind:
    """A server that speaks as it is told: by path, what it writes, or what it does."""

    def __init__(self, answers: dict[str, bytes | Answer]) -> None:
        self.answers: dict[str, bytes | Answer] = {
            "/ready": answer(b"{}"),
            "/metrics": answer(METRICS),
            "/route_secret": answer(b'{"secret": "%s"}' % SECRET),
        } | answers
        self.heads: list[bytes] = []
        self.gone = 0
        """Clients that left while they were to wait."""
        self.url = ""

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._answer_all(reader, writer)
        finally:
            writer.close()

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ")[1].decode().partition("?")[0]
            looks = b"x-onebase-change: %d\r\n" % NEWEST in head
            if path not in ("/ready", "/metrics", "/route_secret") and not looks:
                self.heads.append(head)
            told = self.answers.get(path, answer(b"{}"))
            if not isinstance(told, bytes):
                await told(self, reader, writer)
                break
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length or 0))
            writer.write(told)
            if b"\r\n\r\n" not in told or b"connection: close" in told:
                await writer.drain()
                break


async def never(behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1 << 16):
        pass
    behind.gone += 1


class Running:
    """A route in a thread, before servers."""

    def __init__(self, behind: list[Behind], nobody: str | None, options: dict[str, Any]) -> None:
        self.behind = behind
        self._nobody = [] if nobody is None else [nobody]
        self._options = options
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._started.wait(PATIENCE)

    async def _run(self) -> None:
        servers = [await one.start() for one in self.behind]
        self.route = Route(
            [*(one.url for one in self.behind), *self._nobody], key=None, max_body=100_000, **self._options
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        settings = Settings(port=self.port)
        self._server = QuietServer(uvicorn_config(CrossSiteMiddleware(self.route, settings), settings))
        await asyncio.gather(*map(self.route.look, self.route.replicas.values()))
        following = asyncio.create_task(self.route.follow())
        self._started.set()
        await self._server.serve(sockets=[listener])
        following.cancel()
        await self.route.close()
        for one in servers:
            one.close()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def say(self, data: bytes) -> bytes:
        """What is answered to these bytes, until the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def ask(self, line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
        heads = [line + b" HTTP/1.1", b"Host: localhost", b"Connection: close", *headers]
        return self.say(b"\r\n".join(heads) + b"\r\n\r\n" + body)

    def heads(self) -> list[bytes]:
        """Of the requests that servers got since the last time."""
        found = [head for one in self.behind for head in one.heads]
        for one in self.behind:
            one.heads.clear()
        return found

    def open_requests(self) -> int:
        return sum(one.sequences for one in self.route.placement._replicas.values())


@contextlib.contextmanager
def before(*answers: dict[str, Any], nobody: str | None = None, **options: Any) -> Iterator[Running]:
    """Run a route before servers. nobody: an address where there is no server. options: of `Route`."""
    running = Running([Behind(one) for one in answers], nobody, options)
    try:
        yield running
    finally:
        running.stop()


ODD = {
    "/cut": b"HTTP/1.1 200 X\r\ncontent-length: 9\r\nconnection: close\r\n\r\n{}",
    "/half": b"HTTP/1.1 200 X\r\ncontent-t",
    "/busy": answer(b"{}", status=503),
    "/unknown": answer(b'{"error":{"code":"adapter_not_found"}}', status=404),
    "/kept": answer(b'{"error":{"code":"response_not_found"}}', status=404),
    "/never": never,
    "/same": b"HTTP/1.1 304 X\r\ncontent-length: 20\r\n\r\n",
    "/odd": answer(
        b"{}",
        "x-euro: €\r\nset-cookie: a\r\nset-cookie: b\r\ndate: then\r\nx-hop: 1\r\nconnection: x-hop".encode(),
    ),
}


@pytest.fixture(scope="module")
def odd() -> Iterator[Running]:
    with before(*[ODD] * 5) as running:
        yield running


@pytest.mark.parametrize("target", [b"*@127.0.0.1:%d/x", b"*.127.0.0.1:%d/x", b"*"])
def test_no_address_makes_a_request_go_to_another_server(odd: Running, target: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        refused = odd.ask(b"GET " + (target % other.getsockname()[1] if b"%" in target else target))

        assert refused.startswith(b"HTTP/1.1 400")
        with pytest.raises(BlockingIOError):
            other.accept()
    assert not odd.heads()


@pytest.mark.parametrize(
    "target", [b"/v1/../pause", b"//host/x", b"/a%2Fb%00%zz", b'/a?q="{|}^`<>%zz', b"/%2e%2e/a?b?c"]
)
def test_servers_get_the_address_as_it_was_sent(odd: Running, target: bytes) -> None:
    assert odd.ask(b"GET " + target).startswith(b"HTTP/1.1 200")
    (head,) = odd.heads()
    assert head.startswith(b"GET " + target + b" HTTP/1.1\r\n")


def test_headers_of_a_connection_a_page_or_another_proxy_end_at_the_route(odd: Running) -> None:
    sent = [
        b"Authorization: Bearer key \t", "X-Name: é".encode(), b"Connection: X-Hop", b"X-Hop: 1",
        b"Proxy-Connection: keep-alive", b"X-Forwarded-For: 10.1.1.1, 10.2.2.2", b"X-Forwarded-Host: evil",
        b"Forwarded: for=10.3.3.3", b"Origin: http://localhost", b"Sec-Fetch-Site: same-origin",
        b"X-Request-Id: mine",
    ]  # fmt: skip
    assert odd.ask(b"POST /x", *sent, b"Expect: 100-continue", b"Content-Length: 2", body=b"{}")
    (head,) = odd.heads()
    got = [line for line in head.decode().lower().split("\r\n")[1:] if line]
    named = {line.partition(": ")[0] for line in got}

    assert {
        "authorization: bearer key",
        "x-name: é",
        "x-forwarded-for: 10.2.2.2",
        "x-request-id: mine",
    } <= set(got)
    assert named == {
        "host", "authorization", "x-name", "x-request-id", "x-forwarded-for", "x-forwarded-proto",
        "content-length", "x-onebase-change", "x-onebase-route",
    }  # fmt: skip


def test_headers_of_an_answer_pass_byte_for_byte_but_for_those_of_its_connection(odd: Running) -> None:
    head = odd.ask(b"GET /odd").partition(b"\r\n\r\n")[0]

    assert head.startswith(b"HTTP/1.1 200")
    assert "x-euro: €".encode() in head
    assert head.count(b"set-cookie: ") == 2
    assert head.count(b"\r\ndate: ") == 1
    assert b"x-hop" not in head
    assert odd.ask(b"GET /same").startswith(b"HTTP/1.1 304")


@pytest.mark.parametrize(("path", "most"), [("/busy", 3), ("/unknown", 3), ("/kept", 5), ("/half", 2)])
def test_a_request_is_sent_on_to_few_servers(odd: Running, path: str, most: int) -> None:
    odd.heads()
    odd.ask(b"GET " + path.encode())
    assert len(odd.heads()) == most


KEPT = {"/x": ODD["/kept"]}


@pytest.mark.parametrize("code", [b"queue_full", b"server_stopping"])
def test_what_a_server_without_room_may_have_is_not_said_to_be_nowhere(code: bytes) -> None:
    full = answer(b'{"error":{"code":"%s"}}' % code, b"retry-after: 7", status=503)
    with before({"/x": full}, KEPT, KEPT) as running:
        for _ in range(8):  # which is asked first is drawn
            told = running.ask(b"GET /x")
            assert told.startswith(b"HTTP/1.1 503"), told
            assert code in told
            assert b"retry-after: 7" in told


STOPPING = answer(b'{"error":{"code":"server_stopping"}}', status=503)


@pytest.mark.parametrize("head", [b"POST /generate", b"POST /v1/adapters/a/activate"])
def test_a_request_waits_while_its_only_server_is_replaced(head: bytes) -> None:
    path = head.split()[1].decode()
    body = (b"Content-Type: application/json", b"Content-Length: 2")
    with before({path: STOPPING}) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.ask, head, *body, body=b"{}")
        assert wait(lambda: len(running.behind[0].heads) >= 2), "it is asked again"
        assert wait(lambda: b"onebase_route_waiting 1.0" in running.ask(b"GET /metrics"))
        running.behind[0].answers[path] = answer(b"{}")
        assert first.result().startswith(b"HTTP/1.1 200")
        assert b"onebase_route_waiting 0.0" in running.ask(b"GET /metrics")


def test_a_request_that_has_waited_gives_its_place_up_while_a_server_has_it() -> None:
    begun, released = threading.Event(), threading.Event()

    async def compute(behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun.set()
        await asyncio.to_thread(released.wait)
        writer.write(answer(b"{}"))

    with before({"/x": STOPPING}) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.ask, b"GET /x")
        try:
            assert wait(lambda: b"onebase_route_waiting 1.0" in running.ask(b"GET /metrics"))
            running.behind[0].answers["/x"] = compute
            assert begun.wait(PATIENCE)
            assert b"onebase_route_waiting 0.0" in running.ask(b"GET /metrics")
        finally:
            released.set()
        assert first.result().startswith(b"HTTP/1.1 200")


def test_a_request_does_not_wait_where_the_route_is_told_so_or_no_server_was_ever_ready() -> None:
    with before({"/x": STOPPING}, wait=0.0) as running:
        assert b"server_stopping" in running.ask(b"GET /x")
    with before({"/ready": STOPPING}) as running:
        assert b"no_replica" in running.ask(b"GET /x")


def test_a_server_without_room_is_not_waited_for_because_another_is_stopping() -> None:
    full = answer(b'{"error":{"code":"queue_full"}}', status=503)
    with before({"/x": STOPPING}, {"/x": full}) as running:
        for _ in range(4):  # which is asked first is drawn
            assert running.ask(b"GET /x").startswith(b"HTTP/1.1 503")
        assert len(running.heads()) == 8


def test_those_who_wait_are_told_apart_by_the_tenants_that_servers_name() -> None:
    named = answer(b"{}", b"x-onebase-tenant: acme%2Fone")
    with before({"/x": named}) as running:
        running.ask(b"GET /x", b"Authorization: Bearer first")
        running.ask(b"GET /x", b"X-API-Key: second")

        def tenant(*headers: tuple[bytes, bytes]) -> str:
            scope = {"type": "http", "client": ("192.0.2.7", 1), "headers": list(headers)}
            return running.route.tenant_of(Request(scope))

        assert tenant((b"authorization", b"Bearer first")) == tenant((b"x-api-key", b"second"))
        assert tenant((b"authorization", b"Bearer made up")) == tenant() == "address 192.0.2.7"


def test_an_empty_tenant_is_nobodys() -> None:
    with before({"/x": answer(b"{}", b"x-onebase-tenant: ")}) as running:
        running.ask(b"GET /x", b"Authorization: Bearer made up")
        headers = [(b"authorization", b"Bearer made up")]
        scope = {"type": "http", "client": ("192.0.2.7", 1), "headers": headers}
        assert running.route.tenant_of(Request(scope)) == "address 192.0.2.7"


def test_a_tenant_that_waits_leaves_half_of_the_places_and_bytes_to_others() -> None:
    places = WaitingRoom(16, 1000)
    assert sum(places.enter("first", 1) for _ in range(16)) == 8
    assert sum(places.enter("second", 1) for _ in range(16)) == 4
    assert sum(places.enter("third", 1) for _ in range(16)) == 2
    assert len(places) == 14
    for _ in range(8):
        places.leave("first", 1)
    assert places.enter("second", 1)

    room = WaitingRoom(16, 1000)
    assert not room.enter("first", 1001)
    assert room.enter("first", 500)
    assert not room.enter("first", 1)
    assert room.enter("second", 250)
    room.leave("first", 500)
    assert room.enter("second", 250)


def test_what_a_server_that_breaks_may_have_is_not_said_to_be_nowhere() -> None:
    with before({"/x": ODD["/half"]}, KEPT, KEPT) as running:
        told = running.ask(b"GET /x")
        assert told.startswith(b"HTTP/1.1 503"), told
        assert b"replica_lost" in told


def test_what_may_have_been_done_is_not_sent_twice(odd: Running) -> None:
    odd.heads()
    refused = odd.ask(b"POST /half", b"Content-Type: application/json", b"Content-Length: 2", body=b"{}")
    assert b"replica_lost" in refused
    assert b"Send `GET /half` to find out" in refused
    assert b"`GET /half` to find out, where 404 means that it was" in odd.ask(b"DELETE /half")
    assert len(odd.heads()) == 2


@pytest.mark.parametrize(("code", "most"), [("registry_unavailable", 1), ("merges_busy", 2)])
def test_a_change_goes_to_another_server_only_after_a_refusal_that_precedes_it(code: str, most: int) -> None:
    full = answer(b'{"error":{"code":"%s"}}' % code.encode(), status=503)
    with before(*[{"/v1/files": full}] * 2) as running:
        head = (b"Content-Type: application/json", b"Content-Length: 2")
        assert code.encode() in running.ask(b"POST /v1/files", *head, body=b"{}")
        assert len(running.heads()) == most
        assert code.encode() in running.ask(b"DELETE /v1/files")
        assert len(running.heads()) == most


def test_a_server_whose_secret_cannot_be_had_now_is_asked_again() -> None:
    told = [answer(b"{}", status=500), answer(b'{"secret": "%s"}' % SECRET)]

    async def recovers(behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(told.pop(0))
        await writer.drain()

    with before({"/route_secret": recovers}) as running:
        assert wait(lambda: not running.route.without_secret())


def test_a_connection_that_the_routes_own_limit_of_files_refuses_is_no_failure_of_the_server() -> None:
    class WithoutFiles(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            try:
                return await transport.handle_async_request(request)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with before({"/x": answer(b"{}")}, {"/x": answer(b"{}")}) as running, running.client() as http:
        transport = httpx2.AsyncHTTPTransport(trust_env=False)
        assert http.get("/health").status_code == 200  # over the connection that is used below
        ways = {one: one.way for one in running.route.replicas.values()}
        for one in ways:
            one.way = WithoutFiles()  # type: ignore[assignment]
        refused = http.get("/x")
        for one, way in ways.items():
            one.way = way
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        assert http.get("/x").status_code == 200
        assert b"onebase_route_retries_total 0.0" in running.ask(b"GET /metrics")


def test_a_route_accepts_only_as_many_connections_as_it_has_files_for_with_their_servers() -> None:
    script = (
        "import resource; from onebase_edge import listener; from onebase_edge.settings import Settings;"
        "limits = [listener._connection_limits(Settings(), each).max_connections for each in (1, 2)];"
        "print(*limits, resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    for limit, expected in (("-n 164", "100 50 164"), ("-Sn 164", "4096 4096 8256")):
        shell = f'ulimit {limit}; exec "$@"'
        made = subprocess.run(["sh", "-c", shell, "sh", sys.executable, "-c", script], capture_output=True)
        assert made.stdout.decode().strip() == expected, made.stderr


def test_of_each_request_that_changes_something_another_tells_whether_it_was_carried_out() -> None:
    methods: dict[str, set[str]] = {}
    for pattern, by_method in told_statuses():
        methods.setdefault(pattern.pattern, set()).update(by_method)
    readable = [re.compile(pattern) for pattern, found in methods.items() if "GET" in found]
    examples = [re.sub(r"\(\?P<\w+>[^)]+\)", "x", pattern).strip("^$") for pattern in methods]
    changing = [
        path
        for path, found in zip(examples, methods.values(), strict=True)
        if found - {"GET"} and not may_repeat(path) and path not in proxy._OF_ONE_SERVER
        if not path.startswith(proxy._LIVE)
    ]
    assert len(changing) > 15
    for path in changing:
        assert any(one.fullmatch(target_in(path)) for one in readable), (path, target_in(path))


def test_an_answer_that_is_cut_off_is_seen_to_be_and_is_one_line_in_the_log(
    odd: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with odd.client() as http, pytest.raises(httpx2.TransportError):
        http.get("/cut")

    assert wait(lambda: "broke in an answer" in caplog.text)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert wait(lambda: odd.open_requests() == 0)


@pytest.mark.parametrize(
    "head", ["GET /never", "POST /never\nContent-Type: application/json", "POST /never\nContent-Type: a/b"]
)
def test_a_client_that_leaves_before_the_answer_ends_its_request(odd: Running, head: str) -> None:
    def gone() -> int:
        return sum(one.gone for one in odd.behind)

    before = gone()
    odd.heads()
    line, *more = head.encode().split(b"\n")
    body = b"{}" if more else b""
    heads = [line + b" HTTP/1.1", b"Host: localhost", b"Content-Length: %d" % len(body), *more]
    with socket.create_connection(("127.0.0.1", odd.port)) as connection:
        connection.sendall(b"\r\n".join(heads) + b"\r\n\r\n" + body)
        assert wait(lambda: bool(odd.heads()))
        assert odd.open_requests() == 1

    assert wait(lambda: gone() == before + 1)
    assert wait(lambda: odd.open_requests() == 0)


def test_an_upload_to_a_server_that_is_not_there_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "LOOK_SECONDS", 600.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with before({}, nobody=nobody) as running, running.client() as http:
        for _ in range(50):  # which of the two is asked first is drawn
            running.route.placement.lost(nobody)  # and with it what failed there
            running.route.placement.record_report(nobody, read_report(METRICS.decode())[0])
            for _ in range(2):
                assert http.post("/v1/files", files={"file": b"abc"}).status_code == 200
            if "onebase_route_retries_total 0.0" not in http.get("/metrics").text:
                return
        pytest.fail("no upload was sent again")


@pytest.mark.parametrize(
    "metrics",
    [
        b"vllm:num_requests_running +Inf\n",
        METRICS + b'vllm:lora_adapter_loaded{level="gpu"} 1\n',
        b"vllm:num_requests_running{{\n",
        b"\xff\xfe",
        b"#" * 20_000_000,
        "slow",
    ],
)
def test_a_server_whose_metrics_are_none_is_away_and_the_others_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, metrics: Any
) -> None:
    async def slow(behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99999\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"#")
            await asyncio.sleep(0.05)

    monkeypatch.setattr(proxy, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(proxy, "_LOOK_TIMEOUT", 1.0)
    with before({}, {}) as running, running.client() as http:
        bad, good = running.behind
        bad.answers["/metrics"] = slow if metrics == "slow" else answer(metrics)
        assert wait(lambda: http.get("/ready").json()["servers"] == 1)
        good.answers["/ready"] = answer(b"{}", status=503)
        assert wait(lambda: http.get("/ready").json()["servers"] == 0)


def test_servers_that_keep_keys_and_values_in_unlike_numbers_are_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def kept(dtype: bytes) -> dict[str, bytes | Answer]:
        return {"/metrics": answer(METRICS + b'vllm:cache_config_info{cache_dtype="%s"} 1\n' % dtype)}

    for dtypes, told in (((b"bfloat16", b"int8"), 1), ((b"int8", b"int8"), 0), ((b"int8", b""), 0)):
        caplog.clear()
        with before(*map(kept, dtypes)) as running, running.client() as http:
            assert wait(lambda: http.get("/ready").json()["servers"] == 2)
        said = [one.getMessage() for one in caplog.records if "--kv-dtype" in one.getMessage()]
        assert len(said) == told, said
        assert all("'int8'" in one and "'bfloat16'" in one for one in said)


def test_small_pieces_are_not_held_back_until_earlier_ones_are_acknowledged() -> None:
    async def held_back() -> bool:
        listener = bind(Settings(port=0))
        made: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        server = await asyncio.start_server(lambda _, writer: made.put(writer), sock=listener)
        async with server:
            _, ours = await asyncio.open_connection(*listener.getsockname())
            theirs = await made.get()
            option = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for one in (ours, theirs):
                one.close()
            return not option

    assert not asyncio.run(held_back())


def test_long_answers_do_not_make_a_server_look_slow() -> None:
    now = [0.0]

    async def long(behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        now[0] += 5.0
        writer.write(answer(b"{}", b"connection: close"))

    with before({}, {}, {"/generate": long}, clock=lambda: now[0]) as running, running.client() as http:
        for number in range(40):
            assert http.post("/generate", json={"prompt": f"{number}"}).status_code == 200
        late = running.behind[2]
        before_that = len(late.heads)
        for number in range(120):  # which server is asked depends on the prompt
            http.post("/generate", json={"prompt": f"{number}"})
        assert len(late.heads) - before_that >= 5


def test_a_server_whose_streams_begin_late_is_left_out_for_a_while() -> None:
    now, numbers = [0.0], count()
    stream = answer(b"data: a\n\n", b"content-type: text/event-stream")

    async def late(behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        now[0] += 1.0
        writer.write(stream.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
        await writer.drain()

    def ask(http: httpx2.Client, times: int) -> None:
        for _ in range(times):
            body = {"prompt": f"{next(numbers)}", "stream": True}  # the same would go to the same server
            assert http.post("/generate", json=body).text == "data: a\n\n"

    others = [{"/generate": stream}] * 2
    with before({"/generate": late}, *others, clock=lambda: now[0]) as running, running.client() as http:
        slow = running.behind[0]
        for _ in range(20):
            asked_before = len(slow.heads)
            ask(http, 12)
            if asked_before and len(slow.heads) == asked_before:
                break
        assert 3 <= len(slow.heads) <= 24, "it was asked until it was known to be late"
        ask(http, 20)
        assert len(slow.heads) == asked_before
        now[0] += 60.0
        ask(http, 20)
        assert len(slow.heads) > asked_before, "and again after a while"


def test_no_more_than_the_beginning_of_a_name_is_remembered() -> None:
    for name in ("x" * 90_000, [{"name": "x" * 600}] * 100):
        adapter = read_needs(json.dumps({"adapter": name}).encode(), frozenset()).adapter
        assert adapter is not None
        assert len(adapter) <= 512
