"""What a page can make its reader's browser send is refused, and programs that are no browsers are served."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi import Response
from starlette.types import Receive, Scope, Send

from onebase_edge.cross_site import CrossSiteMiddleware
from onebase_edge.settings import Settings

from .access import Keys, bearer
from .support import Server, Starter

FRIEND, EVIL = "https://tools.example", "http://evil.example"
WRITES = [
    ("POST", "/v1/adapters/red/deactivate"),
    ("POST", "/v1/adapters/red/rollback"),
    ("POST", "/v1/adapters"),
    ("POST", "/v1/files"),
    ("DELETE", "/v1/adapters/red"),
    ("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel"),
    ("POST", "/generate"),
]
READS = ["/v1/adapters", "/v1/files", "/v1/models", "/status", "/openapi.json", "/health"]


@pytest.fixture(scope="module")
def open_to_friends(serve_scripted: Starter) -> Iterator[Server]:
    """A server with one name of its own, and one site whose pages may use it."""
    with serve_scripted("words", "--allowed-host", "gpu.example", "--allowed-origin", FRIEND) as server:
        yield server


def code_of(answer: httpx2.Response) -> str:
    code: str = answer.json()["error"]["code"]
    return code


# ---- Host ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "10.0.0.1",
        "0.0.0.0",
        "",
        "a@localhost",
        "localhost:@evil.example",
        "localhost:evil.example",
        "[::1",
        "[::1]evil.example",
        "localhost:1/evil",
    ],
)
def test_a_name_that_is_not_the_servers_is_refused_on_every_route(scripted: Server, host: str) -> None:
    with scripted.client() as http:
        answers = [http.request(method, path, headers={"Host": host}) for method, path in WRITES]
        answers += [http.get(path, headers={"Host": host}) for path in [*READS, "/docs", "/nowhere"]]

    assert {answer.status_code for answer in answers} == {403}
    assert {code_of(answer) for answer in answers} == {"host_not_allowed"}
    assert all("--allowed-host" in answer.json()["error"]["message"] for answer in answers)


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:1234", "localhost.", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"]
)
def test_loopback_names_are_the_servers(scripted: Server, host: str) -> None:
    with scripted.client() as http:
        assert http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_name_may_be_allowed(open_to_friends: Server) -> None:
    with open_to_friends.client() as http:
        assert http.get("/v1/models", headers={"Host": "gpu.example:80"}).status_code == 200
        assert http.get("/v1/models", headers={"Host": "cpu.example"}).status_code == 403


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        (Settings(host="0.0.0.0"), "192.168.1.5:8000", 200),
        (Settings(host="::"), "[fd00::5]:8000", 200),
        (Settings(host="0.0.0.0"), "localhost", 200),
        (Settings(host="0.0.0.0"), "evil.example", 403),
        (Settings(host="gpu.lan"), "gpu.lan", 200),
        (Settings(host="127.0.0.1", allowed_host=("*",)), "evil.example", 200),
        (Settings(allowed_host=("GPU.example:8000", "fd00::5")), "gpu.example", 200),
        (Settings(allowed_host=("GPU.example:8000", "fd00::5")), "[fd00::5]:1", 200),
    ],
)
def test_a_server_for_the_network_goes_by_its_addresses_too(
    settings: Settings, host: str, status: int
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response()(scope, receive, send)

    client = httpx2.AsyncClient(
        transport=httpx2.ASGITransport(CrossSiteMiddleware(app, settings)), base_url="http://x"
    )

    assert asyncio.run(client.get("/", headers={"Host": host})).status_code == status


# ---- who speaks for others -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "headers", "client"),
    [
        ("127.0.0.1", {"x-forwarded-for": "203.0.113.7", "x-forwarded-proto": "https"}, "203.0.113.7 https"),
        ("10.0.0.7", {"x-forwarded-for": "203.0.113.7, 10.0.0.9:80, [::1]"}, "203.0.113.7 http"),
        ("10.0.0.7", {"x-forwarded-for": "10.0.0.9"}, "10.0.0.9 http"),
        ("10.0.0.7", {"x-forwarded-for": "203.0.113.7, me\x1b[2J"}, "10.0.0.7 http"),
        ("10.0.1.7", {"x-forwarded-for": "203.0.113.7", "x-forwarded-proto": "https"}, "10.0.1.7 http"),
        ("10.0.1.7", {"x-forwarded-for": "203.0.113.7", "x-onebase-route": "no"}, "10.0.1.7 http"),
        ("10.0.1.7", {"x-forwarded-for": "203.0.113.7", "x-onebase-route": "secret"}, "203.0.113.7 http"),
    ],
)
def test_only_a_proxy_that_is_known_says_whom_a_request_is_from(
    peer: str, headers: dict[str, str], client: str
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert not [name for name, _ in scope["headers"] if name.startswith(b"x-onebase")]
        await Response(f"{scope['client'][0]} {scope['scheme']}")(scope, receive, send)

    door = CrossSiteMiddleware(
        app, Settings(allowed_host=("x",), trusted_proxy=("10.0.0.7/24",)), secret="secret"
    )
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(door, client=(peer, 1)), base_url="http://x")

    assert asyncio.run(http.get("/", headers=headers)).text == client


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /health HTTP/1.1\r\n", 400),
        ("GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", 400),
        ("GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n", 403),
        ("GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n", 400),
        ("GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n", 200),
        ("GET /health HTTP/1.0\r\n", 200),
        ("GET /health HTTP/1.0\r\nOrigin: null\r\n", 403),
    ],
)
def test_a_request_says_once_whom_it_is_for(scripted: Server, head: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", scripted.port), timeout=60) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode())

        assert connection.recv(1 << 16).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("path", ["/v1/adapters/", "/docs/", "/health/"])
def test_no_answer_leads_anywhere_else(scripted: Server, path: str) -> None:
    with scripted.client() as http:
        answer = http.get(path, follow_redirects=False)

    assert answer.status_code == 404
    assert "location" not in answer.headers


# ---- pages of other sites -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    ],
    ids=str,
)
def test_a_page_of_another_site_neither_changes_nor_reads_anything(
    scripted: Server, headers: dict[str, str]
) -> None:
    with scripted.client() as http:
        answers = [http.request(method, path, headers=headers) for method, path in WRITES]
        answers += [http.get(path, headers=headers) for path in READS]

    assert {answer.status_code for answer in answers} == {403}
    assert {code_of(answer) for answer in answers} == {"origin_not_allowed"}
    assert all("--allowed-origin" in answer.json()["error"]["message"] for answer in answers)
    assert not any("access-control-allow-origin" in answer.headers for answer in answers)


@pytest.mark.parametrize(
    "body",
    [
        {"data": {"name": "x"}, "files": {"files": ("adapter_config.json", b"{}")}},
        {"content": b'{"version": "00000000"}', "headers": {"Content-Type": "text/plain"}},
        {"content": b"a=b", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        {},
    ],
    ids=["multipart", "text", "form", "nothing"],
)
def test_a_form_that_a_browser_sends_without_asking_changes_nothing(
    scripted: Server, body: dict[str, Any]
) -> None:
    with scripted.client() as http:
        http.headers["Origin"] = EVIL
        statuses = {http.request(method, path, **body).status_code for method, path in WRITES}

    assert statuses == {403}


def test_the_servers_own_pages_and_programs_are_served(scripted: Server) -> None:
    own = f"http://127.0.0.1:{scripted.port}"
    with scripted.client() as http:
        assert http.get("/v1/models", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
        assert http.get("/v1/models", headers={"Sec-Fetch-Site": "none"}).status_code == 200
        from_page = http.post("/v1/adapters/nobody/deactivate", headers={"Origin": own})
        from_program = http.post("/v1/adapters/nobody/deactivate")

    assert code_of(from_page) == code_of(from_program) == "adapter_not_found"


def test_a_link_on_another_site_opens_the_reference_and_a_frame_does_not(scripted: Server) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    with scripted.client() as http:
        assert http.get("/docs", headers=link).status_code == 200
        assert http.get("/docs", headers=link | {"Sec-Fetch-Dest": "iframe"}).status_code == 403


def test_an_allowed_site_may_ask_and_read(open_to_friends: Server) -> None:
    asks = {"Origin": FRIEND, "Access-Control-Request-Method": "POST", "Sec-Fetch-Site": "cross-site"}
    with open_to_friends.client() as http:
        preflight = http.options(
            "/generate", headers=asks | {"Access-Control-Request-Headers": "authorization"}
        )
        answer = http.post("/generate", json={"prompt": "a"}, headers={"Origin": FRIEND})
        refused = http.options("/generate", headers=asks | {"Origin": EVIL})

    assert preflight.status_code == answer.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == FRIEND
    assert preflight.headers["access-control-allow-headers"] == "authorization"
    assert answer.headers["access-control-allow-origin"] == FRIEND
    assert refused.status_code == 403


def test_an_allowed_site_is_asked_for_no_more_than_browsers_ask_before_they_send(
    open_to_friends: Server,
) -> None:
    asks = {"Origin": FRIEND, "Access-Control-Request-Headers": "x-api-key", "Sec-Fetch-Site": "cross-site"}
    asks["Access-Control-Request-Private-Network"] = "true"
    with open_to_friends.client() as http:
        for method in ("GET", "HEAD", "POST", "DELETE"):
            answer = http.options("/v1/models/x", headers=asks | {"Access-Control-Request-Method": method})
            assert answer.status_code == 200, answer.text
            assert answer.headers["access-control-allow-private-network"] == "true"
            assert "access-control-allow-credentials" not in answer.headers
        put = http.options("/v1/models/x", headers=asks | {"Access-Control-Request-Method": "PUT"})
    assert put.status_code == 400


def test_an_allowed_site_may_read_refusals_too_and_what_their_headers_say(
    serve_scripted: Starter, keys: Keys
) -> None:
    limited, free = keys.make("generate", quotas={"requests": 1}), keys.make("generate")
    text = {"prompt": "a", "max_tokens": 1}
    options = ("--allowed-origin", FRIEND, "--max-body", "1000")
    with serve_scripted("words", *options, data_dir=keys.file.parent) as server, server.client() as http:
        http.headers["Origin"] = FRIEND
        unknown = http.get("/v1/models")
        http.headers.update(bearer(limited))
        answers = [
            http.post("/generate", json=text),
            http.post("/generate", json=text),
            unknown,
            http.get("/status"),
            http.get("/nowhere"),
            http.put("/generate", json=text),
            http.post("/generate", content=b"{" * 2000, headers=bearer(free)),
            http.get("/v1/usage?format=xml"),
        ]
    assert [answer.status_code for answer in answers] == [200, 429, 401, 403, 404, 405, 413, 400]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == FRIEND
        assert "Origin" in answer.headers["vary"]
        assert "access-control-allow-credentials" not in answer.headers
    shown = {name.lower() for name in answers[1].headers["access-control-expose-headers"].split(", ")}
    assert {"x-request-id", "retry-after", "x-ratelimit-remaining-requests"} <= shown & {*answers[1].headers}
    assert {"www-authenticate"} <= shown & {*answers[2].headers}
    assert {"allow"} <= shown & {*answers[5].headers}


# ---- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/docs", "/redoc", "/docs/swagger-ui.css"])
def test_no_answer_may_be_framed_sniffed_or_extended(scripted: Server, path: str) -> None:
    with scripted.client() as http:
        answers = [http.get(path), http.get(path, headers={"Origin": EVIL})]

    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "'unsafe-eval'" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_reference_loads_nothing_from_other_sites(scripted: Server, page: str) -> None:
    with scripted.client() as http:
        answer = http.get(page)
        loaded = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
        parts = [http.get("/" + part) for part in loaded if not part.startswith("data:")]

    assert len(parts) >= 2
    assert [part.status_code for part in parts] == [200] * len(parts)
    assert all("://" not in part for part in loaded)
    assert "http" not in answer.headers["content-security-policy"]
