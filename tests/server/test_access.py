"""Every route is closed: who has no key, or not the right one, is told so, and nothing is done."""

from __future__ import annotations

import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from fastapi import APIRouter
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.routing import Match

from onebase import AuthenticationError, Client, PermissionDeniedError
from onebase_adapters.registry import SCOPES
from onebase_edge.errors import UnknownRouteError, WrongMethodError
from onebase_server.http.app import create_app
from onebase_server.http.authorization import Routes, access_of, as_get, needs
from onebase_server.http.routes import tinker

from .access import Keys, bearer, client_with
from .support import Server, Starter, as_route

NOBODY: Any = SimpleNamespace(settings=SimpleNamespace(max_body=1000))
APP = create_app(NOBODY)
SIGNED = "/api/v1/external_weights/thing/thing/thing"
OPEN = {"/health", "/ready", SIGNED}
PAGES = {"/", "/console", "/console/", "/console/assets/thing", "/docs", "/redoc", "/docs/thing"}
"""Static: what they show, they fetch with a key that they ask for."""

NOT_SERVED = {f"/api/v1{re.sub(r'{[^}]*}', 'thing', path)}" for _, path in tinker._NOT_SERVED}
"""Routes of the Tinker API that only say what to do instead."""


def request_of(method: str, path: str) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "headers": [], "root_path": ""}


def routes() -> list[tuple[str, str, str]]:
    """Method, path and scope of every route of the app."""
    found, known = [], Routes(APP)
    for route in APP.routes:
        path = re.sub(r"{[^}]*}", "thing", route.path)  # type: ignore[attr-defined]
        for method in sorted(route.methods or ()):  # type: ignore[attr-defined]
            access = known.find(request_of(method, path))[0]
            found.append((method, path, "admin" if access == "metrics" else access))
    return found


ROUTES = routes()


@pytest.fixture(scope="module")
def admin(keys: Keys) -> str:
    return keys.make("admin")


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, keys: Keys, admin: str) -> Iterator[Server]:
    with serve_scripted("words", "--access-log", data_dir=keys.file.parent) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


def refused(answer: httpx2.Response, status: int, code: str) -> str:
    error = answer.json()["error"]
    given = error["code"] if "code" in error else error["details"]["error_code"]
    assert (answer.status_code, given) == (status, code), answer.text
    assert answer.headers["www-authenticate"].startswith("Bearer ")
    return str(answer.json()["error"]["message"])


# ---- every route --------------------------------------------------------------------------------


def test_the_routes_are_the_ones_that_are_meant_and_probes_and_static_pages_alone_are_open() -> None:
    assert len(ROUTES) >= 45
    assert {path for _, path, access in ROUTES if access == "open"} == OPEN | PAGES
    any_key = {path for _, path, access in ROUTES if access == "any"}
    assert [method for method, path, _ in ROUTES if path.startswith("/v1/models/")] == ["GET", "DELETE"]
    assert any_key == {
        "/version", "/v1/key", "/v1/models", "/v1/models/thing", "/openapi.json", "/v1/usage", "/v1/tenants",
        "/tokenizer_info", "/v1/load", "/v1/files", "/v1/files/thing", "/v1/files/thing/content",
        "/api/v1/client/config", "/api/v1/client/dynamic_config", "/api/v1/healthz",
        "/api/v1/get_server_capabilities", "/api/v1/create_session", "/api/v1/session_heartbeat",
        "/api/v1/sessions", "/api/v1/sessions/thing", "/api/v1/sessions/thing/finish", "/api/v1/telemetry",
        "/api/v1/join_sampling_session", "/api/v1/samplers/thing", "/api/v1/retrieve_future",
        "/api/v1/cancel_future", "/api/v1/auth/apikey/me", *NOT_SERVED,
    }  # fmt: skip
    for scope, beginnings in {
        "generate": (
            "/generate",
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/responses",
            "/v1/conversations",
            "/v1/batches",
            "/v1/messages",
            "/tokenize",
            "/detokenize",
            "/v1/embeddings",
            "/classify",
            "/v1/classify",
            "/rerank",
            "/v1/rerank",
            "/v2/rerank",
            "/score",
            "/v1/score",
            "/v1/decide",
            "/api/v1/create_sampling_session",
            "/api/v1/asample",
            "/v1/fine_tuning/alpha/graders/run",
        ),
        "adapters": (
            "/v1/adapters",
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
            "/v1/audit",
            "/v1/keys",
            "/v1/models/",
            "/v1/gates",
            "/v1/requests",
            "/api/v1/audit",
        ),
        "train": ("/v1/fine_tuning", "/api/v1/"),
    }.items():
        found = {path for _, path, access in ROUTES if access == scope}
        assert all(path.startswith(beginnings) for path in found - {"/"})
        assert all(any(path.startswith(one) for path in found) for one in beginnings)
    assert [(method, access) for method, path, access in ROUTES if path == "/"] == [
        ("POST", "generate"), ("GET", "open"),
    ]  # fmt: skip
    for path in (
        "/status",
        "/status/history",
        "/metrics",
        "/v1/keys/thing",
        "/v1/tenants/thing",
        "/v1/adapters/thing/pin",
        "/v1/adapters/thing/share",
    ):
        assert {access for _, other, access in ROUTES if other == path} == {"admin"}
    assert ("POST", "/v1/keys", "admin") in ROUTES


def test_the_openapi_file_says_which_requests_need_a_key() -> None:
    schema = create_app(NOBODY).openapi()

    schemes = [schema["components"]["securitySchemes"][name] for (name,) in schema["security"]]
    assert schemes == [
        {"type": "http", "scheme": "bearer"},
        {"type": "apiKey", "in": "header", "name": "x-api-key"},
    ]
    open_paths = (
        path for path, methods in schema["paths"].items() if methods.get("get", {}).get("security") == []
    )
    free = {re.sub(r"{[^}]*}", "thing", path) for path in open_paths}
    assert free == OPEN


def test_a_route_that_declares_nothing_is_for_admins_however_it_came_to_the_app() -> None:
    app, router = create_app(NOBODY), APIRouter(prefix="/later")
    app.get("/new")(lambda: "secret")
    router.get("/new")(lambda: "secret")
    known = Routes(app)
    assert known.find(request_of("GET", "/later/new"))[0] == "any"
    app.include_router(router)

    for path in ("/new", "/later/new"):
        assert known.find(request_of("GET", path))[0] == "admin", path


SEGMENTS = sorted({part for route in APP.routes for part in route.path.split("/")})  # type: ignore[attr-defined]


@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "HEAD", "PUT"]),
    parts=st.lists(st.sampled_from([*SEGMENTS, "1.5", "x\n", "v1\n"]), max_size=7),
)
@example(method="GET", parts=["number", "1.5"])
@example(method="GET", parts=["v1", "models\n"])
@example(method="POST", parts=["health"])
def test_a_path_leads_to_the_route_that_trying_them_all_finds(method: str, parts: list[str]) -> None:
    app = create_app(NOBODY)
    app.get("/number/{value:float}")(needs("train")(lambda value: value))
    app.get("/number/{value}")(needs("adapters")(lambda value: value))
    request = request_of(method, "/" + "/".join(parts))
    matches = [(route.matches(as_get(request))[0], route) for route in app.routes]
    first: Any = next((route for match, route in matches if match is Match.FULL), None)

    access, lost = Routes(app).find(request)

    if first is not None:
        assert (access, lost) == (access_of(first), None)
    else:
        known = any(match is Match.PARTIAL for match, _ in matches)
        assert (access, type(lost)) == ("any", WrongMethodError if known else UnknownRouteError)


def test_a_browser_without_a_key_gets_pages_that_say_nothing_and_a_key_of_any_scope_fills_them(
    http: httpx2.Client, server: Server, keys: Keys
) -> None:
    for page in ("/docs", "/redoc"):
        answer = http.get(page)
        parts = [http.get(f"/{part}") for part in re.findall(r'src="([^"]+)"', answer.text)]
        assert [part.status_code for part in parts] == [200, 200, 200]
        own = answer.text + "".join(part.text for part in parts if len(part.text) < 10_000)
        assert "Authorization" in own
        assert not any(word in own for word in ("/v1/", "localStorage", "sessionStorage", "cookie"))
    assert http.get("/openapi.json").status_code == 401

    key = keys.make("generate")
    server.wait_for(lambda: http.get("/openapi.json", headers=bearer(key)).status_code == 200)


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, "needs an API key"),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, "cannot be read"),
        ({"Authorization": "Bearer"}, "cannot be read"),
        ({"Authorization": "Bearer one two"}, "not known"),
        ({"Authorization": "Bearer ob-0123456789abcdef-" + "A" * 43}, "not known"),
        ({"Authorization": "Bearer " + "k" * 4000}, "not known"),
        ({"Authorization": "Bearer ob-\xff"}, "not known"),
        ({"x-api-key": "ob-0123456789abcdef-" + "A" * 43}, "not known"),
        ({"x-api-key": ""}, "not known"),
        ({"x-api-key": "one", "Authorization": "Bearer two"}, "two different"),
        ({"x-api-key": "one", "Authorization": "Basic dXNlcjpwYXNz"}, "cannot be read"),
    ],
    ids=[
        "none",
        "another scheme",
        "no key",
        "two words",
        "a made-up key",
        "a long one",
        "not ASCII",
        "a made-up x-api-key",
        "an empty x-api-key",
        "two keys",
        "a key beside another scheme",
    ],
)
def test_without_a_key_that_is_known_every_route_that_is_not_open_answers_401(
    http: httpx2.Client, headers: dict[str, str], problem: str
) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for method, path, access in ROUTES:
        answer = http.request(method, path, headers=raw)
        if access == "open":
            known = (404,) if path.endswith("/thing") else (307,) if path == "/console/" else (200,)
            known = (403,) if path == SIGNED else known  # its key is in its address
            assert answer.status_code in known or (path == "/console" and "make console" in answer.text)
        else:
            assert problem in refused(answer, 401, "invalid_api_key"), (method, path)
    assert http.get("/nothing/there", headers=raw).status_code == 401


def test_a_key_whose_secret_is_wrong_gets_the_answer_of_a_key_that_does_not_exist(
    http: httpx2.Client, admin: str
) -> None:
    wrong = admin[:-3] + ("AAA" if not admin.endswith("AAA") else "BBB")
    unknown = "ob-0123456789abcdef" + admin[len("ob-0123456789abcdef") :]
    for method, path, access in ROUTES:
        if access != "open":
            one, other = (
                http.request(method, path, headers=bearer(key) | {"X-Request-Id": "same"})
                for key in (wrong, unknown)
            )
            assert one.status_code == other.status_code == 401
            assert one.content == other.content


def test_an_expired_and_a_revoked_key_open_nothing(http: httpx2.Client, keys: Keys, server: Server) -> None:
    expired, revoked = keys.make("admin"), keys.make("admin")
    server.wait_for(lambda: http.get("/version", headers=bearer(revoked)).status_code == 200)
    keys.expire(expired)
    keys.revoke(revoked)
    server.wait_for(lambda: http.get("/version", headers=bearer(revoked)).status_code == 401)

    for key, problem in ((expired, "has expired"), (revoked, "was revoked")):
        for method, path, access in ROUTES:
            if access != "open":
                answer = http.request(method, path, headers=bearer(key))
                assert problem in refused(answer, 401, "invalid_api_key"), (method, path)


def test_a_key_without_the_scope_of_a_route_is_told_which_one_it_lacks(
    http: httpx2.Client, keys: Keys, server: Server
) -> None:
    lacking = {scope: keys.make(*(one for one in SCOPES if one not in (scope, "admin"))) for scope in SCOPES}
    server.wait_for(lambda: http.get("/version", headers=bearer(lacking["admin"])).status_code == 200)
    for method, path, access in ROUTES:
        if access in SCOPES:
            answer = http.request(method, path, headers=bearer(lacking[access]))
            assert f"scope {access!r}" in refused(answer, 403, "insufficient_scope"), (method, path)
            assert f'scope="{access}"' in answer.headers["www-authenticate"]
        else:
            assert http.request(method, path, headers=bearer(lacking["admin"])).status_code in (
                200,
                307,
                400,
                404,
                403,
            )


def test_a_key_with_the_scope_or_with_admin_gets_past_the_door(
    http: httpx2.Client, keys: Keys, server: Server, admin: str
) -> None:
    narrow = {scope: keys.make(scope) for scope in SCOPES}
    server.wait_for(lambda: http.get("/version", headers=bearer(narrow["admin"])).status_code == 200)
    for method, path, access in ROUTES:
        for key in (admin, narrow.get(access, narrow["generate"])):
            answer = http.request(method, path, headers=bearer(key))
            refusals = (401,) if path == SIGNED else (401, 403)  # its key is in its address
            assert answer.status_code not in refusals, (method, path, answer.text)


def test_nothing_of_a_body_is_read_before_the_key_is_checked(http: httpx2.Client) -> None:
    for body in (b"{", b'{"prompt": 3}', b"x" * 9_000_000):
        headers = {"Content-Type": "application/json"}
        refused(http.post("/generate", content=body, headers=headers), 401, "invalid_api_key")


def test_two_authorization_headers_are_refused(http: httpx2.Client, admin: str) -> None:
    headers = [("Authorization", f"Bearer {admin}"), ("Authorization", f"Bearer {admin}")]
    refused(http.get("/version", headers=headers), 401, "invalid_api_key")


def test_a_key_may_stand_in_either_header_or_in_both(http: httpx2.Client, admin: str) -> None:
    for headers in ({"x-api-key": admin}, {"x-api-key": admin} | bearer(admin)):
        assert http.get("/version", headers=headers).status_code == 200
    other = admin[:-3] + ("AAA" if not admin.endswith("AAA") else "BBB")
    for one, two in ((admin, other), (other, admin)):
        answer = http.get("/version", headers={"x-api-key": one} | bearer(two))
        assert "two different API keys" in refused(answer, 401, "invalid_api_key")


def test_the_anthropic_client_works_with_a_key_in_either_header_and_says_what_is_wrong_without(
    server: Server, admin: str, keys: Keys
) -> None:
    ask: Any = {
        "model": "smollm2-135m-instruct",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": "hi"}],
    }
    for more in (
        {"api_key": admin},
        {"api_key": None, "default_headers": {"x-api-key": admin}},
    ):
        with anthropic.Anthropic(base_url=server.url, max_retries=0, **more) as client:
            client.messages.count_tokens(model=ask["model"], messages=ask["messages"])
    train = keys.make("train")
    server.wait_for(
        lambda: httpx2.get(f"{server.url}/version", headers=bearer(train), timeout=60).status_code == 200
    )
    for key, error, kind in (
        ("ob-wrong", anthropic.AuthenticationError, "authentication_error"),
        (train, anthropic.PermissionDeniedError, "permission_error"),
    ):
        with (
            anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as client,
            pytest.raises(error) as refusal,
        ):
            client.messages.create(**ask)
        assert refusal.value.type == kind
        assert refusal.value.request_id == refusal.value.response.headers["x-request-id"]


def test_the_openai_client_works_with_a_key_and_says_what_is_wrong_without(
    server: Server, admin: str
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=admin, max_retries=0) as client:
        answer = client.completions.create(model="smollm2-135m-instruct", prompt="hello there", max_tokens=4)
        assert answer.choices[0].text
        assert "smollm2-135m-instruct" in [model.id for model in client.models.list()]
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as wrong,
    ):
        client.models.list()
    assert wrong.value.code == "invalid_api_key"


def test_the_sdk_works_with_a_key_and_an_operator_makes_others_through_it(server: Server, admin: str) -> None:
    with Client(server.url, api_key=admin) as operator:
        made = operator.keys.create(["generate"], tenant="sdk", name="from the SDK", expires_in=60)
        assert made.id in [key.id for key in operator.keys.list()]
        with Client(server.url, api_key=made.key, max_retries=0) as client:
            assert client.generate("hello there", max_tokens=2).text
            with pytest.raises(PermissionDeniedError) as refused_scope:
                client.adapters.list()
            assert refused_scope.value.code == "insufficient_scope"
            operator.keys.revoke(made.id)
            with pytest.raises(AuthenticationError, match="was revoked"):
                client.generate("hello there", max_tokens=2)
    with Client(server.url, max_retries=0) as client:
        with pytest.raises(AuthenticationError, match="needs an API key"):
            client.models.list()
        assert client.health().ok
        assert client.ready().ok


BODIES = {
    "/v1/files": (
        "multipart/form-data; boundary=B",
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n',
    ),
    "/generate": ("application/json", b'{"prompt": "hello'),
}


@pytest.mark.parametrize("path", BODIES)
def test_a_body_that_takes_long_is_cut_off_when_its_key_is_revoked(
    http: httpx2.Client, server: Server, keys: Keys, path: str
) -> None:
    key, (kind, beginning) = keys.make("generate", "train"), BODIES[path]
    server.wait_for(lambda: http.get("/version", headers=bearer(key)).status_code == 200)
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        connection.sendall(f"{head}Content-Type: {kind}\r\nContent-Length: 1000000\r\n\r\n".encode())
        connection.sendall(beginning)
        keys.revoke(key)
        for _ in range(600):
            connection.sendall(b"x" * 100)
            with suppress(TimeoutError):
                received += connection.recv(1 << 16)
            if b"while the body was sent" in received:
                break

    assert received.startswith(b"HTTP/1.1 401 ")
    assert b"www-authenticate: Bearer" in received
    assert not list((server.data_dir / "store").rglob("*.part*"))


# ---- keys over HTTP -----------------------------------------------------------------------------


def test_an_admin_makes_lists_and_revokes_keys_and_nothing_tells_their_secrets(
    http: httpx2.Client, server: Server, admin: str
) -> None:
    body = {"tenant": "acme", "scopes": ["train", "generate"], "name": "ci", "expires_in_s": 3600}
    answer = http.post("/v1/keys", headers=bearer(admin), json=body)
    made = answer.json()
    key = made.pop("key")

    assert answer.headers["cache-control"] == "no-store"
    assert (made["tenant"], made["scopes"], made["name"]) == ("acme", ["generate", "train"], "ci")
    assert made["expires_at"] - made["created_at"] == pytest.approx(3600, abs=5)
    assert http.get("/version", headers=bearer(key)).status_code == 200
    listed = http.get("/v1/keys", headers=bearer(admin))
    assert made["id"] in [one["id"] for one in listed.json()["data"]]
    assert key not in listed.text
    assert key not in server.log

    gone = http.delete(f"/v1/keys/{made['id']}", headers=bearer(admin))
    assert gone.json()["revoked_at"] is not None
    refused(http.get("/version", headers=bearer(key)), 401, "invalid_api_key")
    unknown = http.delete("/v1/keys/ob-0", headers=bearer(admin))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "key_not_found")


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "../etc"},
        {"tenant": ""},
        {"scopes": []},
        {"scopes": ["root"]},
        {"name": "a\nb"},
        {"expires_in_s": 0},
        {"expires_in_s": -1},
        {"key": "mine"},
    ],
)
def test_a_key_that_cannot_be_made_is_refused_by_the_field(
    http: httpx2.Client, admin: str, change: dict[str, Any]
) -> None:
    answer = http.post("/v1/keys", headers=bearer(admin), json={"scopes": ["train"], **change})

    assert answer.status_code == 400
    assert next(iter(change)) in answer.json()["error"]["message"]


def test_the_registry_says_when_a_key_was_last_used(http: httpx2.Client, keys: Keys, server: Server) -> None:
    key = keys.make("generate")
    assert keys.record(key).last_used_at is None

    server.wait_for(lambda: http.get("/version", headers=bearer(key)).status_code == 200)

    server.wait_for(lambda: keys.record(key).last_used_at is not None)


# ---- with and without keys ----------------------------------------------------------------------


def test_a_key_holds_on_every_server_of_the_registry_and_ends_there_too(
    server: Server, serve_scripted: Starter, keys: Keys
) -> None:
    other = serve_scripted("words", "--registry", f"sqlite:///{keys.file}")
    with other as second, httpx2.Client(timeout=60) as http:
        key = keys.make("generate")
        places = [f"{one.url}/version" for one in (server, second)]

        def statuses() -> list[int]:
            return [http.get(place, headers=bearer(key)).status_code for place in places]

        server.wait_for(lambda: statuses() == [200, 200])
        keys.revoke(key)
        server.wait_for(lambda: statuses() == [401, 401])


def test_the_first_key_closes_a_server_that_runs_and_is_not_made_over_http(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words", data_dir=tmp_path) as server, server.client() as http:
        assert http.get("/status").status_code == 200
        body = {"scopes": ["admin"]}
        assert http.post("/v1/keys", json=body).json()["error"]["code"] == "first_key"
        assert http.get("/status", headers=bearer("none")).status_code == 200

        keys = Keys(tmp_path)
        key = keys.make("admin")

        server.wait_for(lambda: http.get("/status").status_code == 401)
        assert http.get("/status", headers=bearer(key)).status_code == 200
        keys.revoke(key)
        server.wait_for(lambda: http.get("/status", headers=bearer(key)).status_code == 401)
        assert http.get("/status").status_code == 401  # what was closed once stays closed
        keys.close()


def test_no_key_is_taken_while_the_registry_cannot_be_read(serve_scripted: Starter, tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    key = keys.make("admin")
    with serve_scripted("words", data_dir=tmp_path) as server, client_with(server, key) as http:
        assert http.get("/version").status_code == 200
        with closing(sqlite3.connect(keys.file)) as database:
            database.execute("ALTER TABLE api_keys RENAME TO away")

        server.wait_for(lambda: http.get("/version").status_code == 503)

        answer = http.get("/version")
        assert answer.json()["error"]["code"] == "registry_unavailable"
        assert "retry-after" in answer.headers
        assert http.get("/health").status_code == 200
    keys.close()


def test_another_host_needs_a_key_or_insecure(serve_scripted: Starter, tmp_path: Path) -> None:
    with serve_scripted("words", "--host", "0.0.0.0", data_dir=tmp_path, ready=False) as server:
        assert server.exit_status() == 2
        assert "onebase keys create --scope admin" in server.log
        assert "--insecure" in server.log

    keys = Keys(tmp_path)
    key = keys.make("admin")
    keys.close()
    with serve_scripted("words", "--host", "0.0.0.0", data_dir=tmp_path) as server:
        assert server.status_of("/version") == 401
        with client_with(server, key) as http:
            assert http.get("/version").status_code == 200
        server.wait_for(lambda: "each request needs one" in server.log)


FROM_AFAR = [
    {"X-Forwarded-For": "203.0.113.9"},
    {"X-Forwarded-For": "203.0.113.9, 127.0.0.1"},
    {"X-Forwarded-For": "127.0.0.1, [2001:db8::1]:443"},
    {"X-Forwarded-For": "unknown"},
    {"Forwarded": "proto=http; For=203.0.113.9;by=127.0.0.1"},
    {"Forwarded": 'for=127.0.0.1, for="[2001:db8::1]:443"'},
    {"Forwarded": "for=_hidden"},
    {"X-Real-IP": "203.0.113.9"},
    {"True-Client-IP": "203.0.113.9"},
    {"CF-Connecting-IP": "::ffff:203.0.113.9"},
]


def test_a_server_without_keys_serves_nobody_whom_a_proxy_brings_from_another_machine(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    here = {
        "X-Forwarded-For": "127.0.0.1, [::1]:7, 127.0.0.1:80, ::ffff:127.0.0.1",
        "Forwarded": 'for="[::1]:80";by=10.0.0.1;host=x',
        "X-Real-IP": "127.8.8.8",
    }
    with serve_scripted("words", data_dir=tmp_path) as server, server.client() as http:
        for headers in FROM_AFAR:
            for path in ("/v1/key", "/route_secret", "/nowhere"):
                answer = http.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "key_needed"), headers
            assert "onebase keys create --scope admin" in answer.json()["error"]["message"]
        assert http.get("/v1/key", headers=here).json()["scopes"] == ["admin"]

        keys = Keys(tmp_path)
        key = keys.make("generate")
        keys.close()
        server.wait_for(lambda: http.get("/v1/key", headers=FROM_AFAR[0]).status_code == 401)
        assert http.get("/v1/key", headers=FROM_AFAR[0] | bearer(key)).status_code == 200
    with serve_scripted("words", "--insecure") as server, server.client() as http:
        assert http.get("/v1/key", headers=FROM_AFAR[0]).status_code == 200


def test_a_route_is_told_the_tenant_of_a_key_and_nobodys_of_none(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    keys = Keys(tmp_path)
    admin, user = keys.make("admin"), keys.make("generate", tenant="acme")
    keys.close()
    with serve_scripted("words", data_dir=tmp_path) as server, client_with(server, admin) as http:
        route = as_route(http)
        with server.client() as stranger:
            for headers in ({}, bearer("made-up")):
                answer = stranger.get("/health", headers=route | headers)
                assert answer.status_code == 200
                assert "x-onebase-tenant" not in answer.headers
            named = stranger.get("/v1/key", headers=route | bearer(user))
            assert named.headers["x-onebase-tenant"] == "acme"


def test_a_change_that_somebody_names_costs_no_look_at_the_registry(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words", data_dir=tmp_path) as server, server.client() as http:
        known = {"x-onebase-change": "999999"}
        as_known = known | as_route(http)
        with closing(sqlite3.connect(tmp_path / "registry.db")) as database:
            database.execute("ALTER TABLE change_counter RENAME TO away")
        assert http.get("/version", headers=known).status_code == 200
        assert http.get("/health", headers=as_known).status_code == 200  # nothing there changes
        answer = http.get("/version", headers=as_known)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "registry_unavailable")


def test_a_stream_of_a_job_ends_when_its_key_is_revoked_and_an_answer_goes_on(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    keys = Keys(tmp_path)
    key = keys.make("generate", "train")
    with serve_scripted("words", data_dir=tmp_path) as server, client_with(server, key) as http:
        file = http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b"slow")}
        ).json()
        body = {"model": "smollm2-135m-instruct", "training_file": file["id"]}
        job = http.post("/v1/fine_tuning/jobs", json={**body, "seed": 1}).json()
        long = {"prompt": "word", "max_tokens": 60, "stream": True}
        with (
            http.stream("GET", f"/v1/fine_tuning/jobs/{job['id']}/events?stream=true") as events,
            http.stream("POST", "/generate", json=long) as answer,
        ):
            assert events.status_code == answer.status_code == 200
            keys.revoke(key)
            assert "[DONE]" in answer.read().decode()
            assert "event: done" not in list(events.iter_lines())  # the job trains on
    keys.close()


def test_no_log_line_error_or_figure_tells_a_key(http: httpx2.Client, server: Server, admin: str) -> None:
    wrong = admin[:-4] + "AAAA"
    told = ""
    for method, path, _ in ROUTES:
        for key in (admin, wrong, f"{admin} {admin}"):
            for headers in (bearer(key), bearer(key) | {"Content-Type": "multipart/form-data"}):
                answer = http.request(method, path, headers=headers, content=b"{nonsense")
                told += answer.text + str(answer.headers)

    told += (
        http.get("/metrics", headers=bearer(admin)).text + http.get("/v1/keys", headers=bearer(admin)).text
    )
    for key in (admin, wrong):
        secret = key.removeprefix(key[:20])
        assert len(secret) == 43
        assert secret not in told + server.log


def test_figures_are_open_where_the_operator_says_so_and_nothing_else_is(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    keys = Keys(tmp_path)
    keys.make("admin")
    keys.close()
    with serve_scripted("words", "--open-metrics", data_dir=tmp_path) as server, server.client() as http:
        assert "vllm:num_requests_running" in http.get("/metrics").text
        for path in ("/status", "/v1/models", "/openapi.json"):
            assert http.get(path).status_code == 401


def test_every_answer_has_the_callers_id_if_that_is_plain_and_else_a_new_one(
    http: httpx2.Client, server: Server, admin: str
) -> None:
    for path in ("/version", "/health", "/nowhere", "/v1/models/none", "/docs"):
        for key in ({}, bearer(admin)):
            given = http.get(path, headers={**key, "X-Request-Id": "gate:17/%d{x}"})
            assert given.headers["x-request-id"] == "gate:17/%d{x}", (path, key)
            made = [http.get(path, headers=key).headers["x-request-id"] for _ in range(2)]
            assert len(set(made)) == 2
    for bad in (b"", b"a b", b"x" * 129, b"\xe9", b"a\tb"):
        other = http.get("/version", headers=[(b"X-Request-Id", bad), (b"Authorization", b"Bearer x")])
        assert re.fullmatch(r"req-[0-9a-f]{24}", other.headers["x-request-id"])
    twice = http.get("/version", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
    assert twice.headers["x-request-id"].startswith("req-")
    body = {"prompt": "hello", "max_tokens": 1, "stream": True}
    streamed = http.post("/generate", json=body, headers=bearer(admin) | {"X-Request-Id": "s"})
    assert streamed.headers["x-request-id"] == "s"
    server.wait_for(lambda: '"POST /generate HTTP/1.1" 200 s\n' in server.log)
    server.wait_for(lambda: '"GET /nowhere HTTP/1.1" 401 gate:17/%d{x}\n' in server.log)


def test_the_access_log_has_a_line_for_each_request_that_is_served_and_that_is_refused(
    http: httpx2.Client, server: Server, admin: str
) -> None:
    http.get("/version?x", headers=bearer(admin) | {"x-request-id": "served"})
    http.get("/version?x", headers={"x-request-id": "refused"})

    for asked, status in (("served", 200), ("refused", 401)):
        server.wait_for(lambda line=f'"GET /version HTTP/1.1" {status} {asked}\n': line in server.log)  # type: ignore[misc]


def test_a_key_is_told_whose_it_is_and_what_it_may_do(
    http: httpx2.Client, keys: Keys, server: Server
) -> None:
    key = keys.make("train", "generate", tenant="acme")
    server.wait_for(lambda: http.get("/v1/key", headers=bearer(key)).status_code == 200)

    assert http.get("/v1/key", headers=bearer(key)).json() == {
        "object": "caller", "key": keys.record(key).id, "tenant": "acme", "scopes": ["generate", "train"],
    }  # fmt: skip


def test_without_keys_everybody_is_told_to_be_an_admin_of_the_default_tenant(scripted: Server) -> None:
    with scripted.client() as http:
        told = http.get("/v1/key").json()

    assert told == {"object": "caller", "key": "", "tenant": "default", "scopes": ["admin"]}
