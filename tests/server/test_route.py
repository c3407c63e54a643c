"""`onebase route`: one address for several servers, as a process before three of them."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from onebase_route.placement import order_of
from onebase_route.proxy import RequestNeeds, read_needs, read_report

from .access import Keys, client_with
from .support import PATIENCE, Server, Starter, as_route, upload

BASE = "smollm2-135m-instruct"
NAMES = [f"shop{number}" for number in range(4)]


@pytest.fixture(scope="module")
def servers(serve_scripted: Starter) -> Iterator[list[Server]]:
    with contextlib.ExitStack() as running:
        made = [running.enter_context(serve_scripted("words")) for _ in range(3)]
        for server in made:
            with server.client() as http:
                for name in NAMES:
                    upload(http, name, name.encode(), query="wait=true&activate=true").raise_for_status()
        yield made


@pytest.fixture(scope="module")
def route(
    routing: Starter, servers: list[Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with routing(servers, tmp_path_factory.mktemp("route"), "--max-body", "100KB") as made:
        yield made


@pytest.fixture
def http(route: Server) -> Iterator[httpx2.Client]:
    with route.client() as client:
        yield client


def counted(http: httpx2.Client, name: str) -> dict[str, float]:
    """A counter of the route by replica, or of none."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                found[sample.labels.get("replica", "")] = sample.value
    return found


def generate(http: httpx2.Client, adapter: Any = None, **body: Any) -> httpx2.Response:
    named = {} if adapter is None else {"adapter": adapter}
    return http.post("/generate", json={"prompt": "one two", "max_tokens": 3, **named, **body})


def test_an_adapters_requests_go_to_its_homes_and_the_bases_to_all(
    http: httpx2.Client, servers: list[Server]
) -> None:
    where: dict[str | None, Counter[str]] = {}
    for name in (*NAMES, None):
        before = counted(http, "onebase_route_requests_total")
        for number in range(8 if name else 40):  # the same beginning would go to the same server
            answer = generate(http, name, prompt=f"{number} one two")
            assert answer.status_code == 200, answer.text
            assert (answer.json()["adapter"] or "").partition("@")[0] == (name or "")
        after = counted(http, "onebase_route_requests_total")
        where[name] = Counter({url: int(after[url] - before.get(url, 0)) for url in after})

    same = {server.url: 1 for server in servers}
    for name in NAMES:
        homes = order_of(name, same)[:2]
        assert sum(where[name][url] for url in homes) >= 7, (where[name], homes)  # a slow one is left out
    assert len(+where[None]) == 3


def test_an_adapter_is_activated_where_its_requests_go(http: httpx2.Client, servers: list[Server]) -> None:
    same = {server.url: 1 for server in servers}
    at_home = 0.0
    for name in NAMES:
        version = http.get(f"/v1/adapters/{name}").json()["version"]
        before = counted(http, "onebase_route_requests_total")
        for _ in range(4):
            http.post(f"/v1/adapters/{name}/activate", json={"version": version}).raise_for_status()
        after = counted(http, "onebase_route_requests_total")
        at_home += sum(after[url] - before.get(url, 0) for url in order_of(name, same)[:2])
    assert at_home >= 4 * len(NAMES) - 1  # a slow one is left out


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "a b", "adapter": "shop1", "max_tokens": 4}),
        ("/v1/completions", {"model": "shop1", "prompt": "a b", "max_tokens": 4}),
        (
            "/v1/chat/completions",
            {"model": BASE, "messages": [{"role": "user", "content": "a b"}], "max_tokens": 4},
        ),
        ("/v1/messages", {"model": BASE, "messages": [{"role": "user", "content": "a b"}], "max_tokens": 4}),
        ("/", {"inputs": "a b", "parameters": {"max_new_tokens": 4}}),
    ],
)
def test_a_stream_passes_with_the_same_events(
    http: httpx2.Client, servers: list[Server], path: str, body: dict[str, Any]
) -> None:
    def events(client: httpx2.Client) -> list[list[str]]:
        found = []
        with client.stream("POST", path, json={"stream": True, **body}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            found = [line for line in answer.iter_lines() if line]
        return [sorted(json.loads(line[6:])) if line[5:7] == " {" else [line] for line in found]

    with servers[0].client() as direct:
        assert events(http) == events(direct)


def test_errors_limits_and_heads_are_the_servers_own(http: httpx2.Client, servers: list[Server]) -> None:
    with servers[0].client() as direct:
        for wrong in ({"prompt": 7}, {"prompt": "a", "temperature": 9}, {"prompt": "a", "adapter": "none"}):
            ours, theirs = http.post("/generate", json=wrong), direct.post("/generate", json=wrong)
            assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json())
        assert http.get("/nothing").json() == direct.get("/nothing").json()
        assert (
            http.head("/v1/models").headers["content-length"]
            == (direct.head("/v1/models").headers["content-length"])
        )
        assert http.get("/v1/adapters").json()["object"] == "list"
        encoded = "/v1/adapters/hub%3Aorg%2Frepo"
        assert http.get(encoded).json() == direct.get(encoded).json()
    broken = http.post("/generate", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_value")
    large = generate(http, prompt="x" * 200_000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "payload_too_large")
    alone = http.post("/pause")
    assert (alone.status_code, alone.json()["error"]["code"]) == (503, "of_one_server")
    training = http.post("/api/v1/create_session", json={})
    assert (training.status_code, training.json()["error"]["code"]) == (400, "of_one_server")


def test_a_page_that_comes_from_the_route_may_use_it(http: httpx2.Client, route: Server) -> None:
    from_page = {"Origin": route.url, "Sec-Fetch-Site": "same-origin"}
    assert http.post("/generate", json={"prompt": "a", "max_tokens": 1}, headers=from_page).status_code == 200
    foreign = http.post("/generate", json={"prompt": "a"}, headers={"Origin": "https://evil.example"})
    assert foreign.json()["error"]["code"] == "origin_not_allowed"


def test_an_upload_passes_through_and_is_found_where_it_went(http: httpx2.Client) -> None:
    answer = upload(http, "routed", b"routed", query="wait=true&activate=true")

    assert answer.status_code == 200
    assert answer.json()["state"] == "ready"
    for number in range(6):  # these servers share no registry
        assert generate(http, "routed", prompt=f"{number}").status_code == 200


def test_a_response_is_found_on_the_server_that_has_it(http: httpx2.Client) -> None:
    body = {"model": BASE, "input": "a b", "max_output_tokens": 16}
    known = [http.post("/v1/responses", json=body).json()["id"] for _ in range(3)]

    for number, response in enumerate(known):
        assert http.get(f"/v1/responses/{response}").json()["id"] == response
        more = http.post("/v1/responses", json={**body, "previous_response_id": response})
        assert more.status_code == 200, (number, more.text)
    for response in known:
        assert http.delete(f"/v1/responses/{response}").status_code == 200
    missing = http.get("/v1/responses/resp_none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "response_not_found")


def test_a_server_that_dies_is_left_out_and_the_last_one_ends_its_streams_with_an_error(
    routing: Starter, serve_scripted: Starter, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as running:
        behind = [running.enter_context(serve_scripted("words")) for _ in range(2)]
        route = running.enter_context(routing(behind, tmp_path, "--resume", "1", "--wait", "0"))
        http = running.enter_context(route.client())
        streams = [
            running.enter_context(
                http.stream("POST", "/generate", json={"prompt": "a b", "max_tokens": 80_000, "stream": True})
            )
            for _ in range(2)
        ]
        lines = [stream.iter_lines() for stream in streams]
        for one in lines:
            assert next(one).startswith("data: ")
        behind[0].signal(signal.SIGKILL)

        # Asked at once, before anybody has looked: what cannot be reached is tried elsewhere.
        for _ in range(6):
            assert generate(http).status_code == 200
        assert wait(lambda: "is away" in route.log)
        for one in lines:
            assert sum(line.startswith("data: ") for line, _ in zip(one, range(200), strict=False)) >= 100
        behind[1].signal(signal.SIGKILL)
        for one in lines:
            (lost,) = [line for line in one if "replica_lost" in line]
            assert json.loads(lost.removeprefix("data: "))["error"]["type"] == "service_unavailable"
        assert wait(lambda: http.get("/ready").status_code == 503)
        refused = generate(http)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
        assert refused.headers["retry-after"] == "2"
        assert counted(http, "onebase_route_lost_total") == {"": 2}


def test_a_server_that_stops_gets_nothing_more_and_a_route_that_stops_ends_what_it_has(
    routing: Starter, serve_scripted: Starter, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as running:
        behind = [running.enter_context(serve_scripted("words")) for _ in range(2)]
        route = running.enter_context(routing(behind, tmp_path))
        http = running.enter_context(route.client())
        behind[0].signal(signal.SIGTERM)
        for _ in range(10):
            assert generate(http).status_code == 200

        body = {"prompt": "a b", "max_tokens": 60, "stream": True}
        with http.stream("POST", "/generate", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            route.signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]" or "data: [DONE]" in rest
        assert route.exit_status() == 0


def test_a_stream_that_outlasts_the_drain_of_its_server_goes_on_at_another(
    routing: Starter, serve_scripted: Starter, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as running:
        behind = [running.enter_context(serve_scripted("words", "--drain-timeout", "0.1")) for _ in range(2)]
        http = running.enter_context(running.enter_context(routing(behind, tmp_path)).client())
        body = {"prompt": "a b", "max_tokens": 80_000, "stream": True}
        streams = [running.enter_context(http.stream("POST", "/generate", json=body)) for _ in range(4)]
        lines = [stream.iter_lines() for stream in streams]
        for one in lines:
            assert next(one).startswith("data: ")
        has = counted(http, "onebase_route_requests_total")[behind[0].url]
        behind[0].signal(signal.SIGTERM)
        assert behind[0].exit_status() == 0
        for one in lines:
            assert not [line for line in islice(one, 400) if '"error"' in line]
        assert wait(lambda: counted(http, "onebase_route_resumed_total")[""] == has)


def test_an_address_that_a_route_has_is_refused_to_another_that_does_not_name_it(
    routing: Starter, servers: list[Server], tmp_path: Path
) -> None:
    with routing(servers[:1], tmp_path) as first:
        again = ["--port", str(first.port), "--replica", servers[0].url]
        refusals = (
            ((), r"exited with 1:(?s:.*)already in use"),
            (("--take-over", "4194304"), "exited with 2:"),
        )
        for options, says in refusals:
            refused = routing(servers[:1], tmp_path, *again, *options)
            with pytest.raises(RuntimeError, match=says):
                refused.__enter__()


def test_servers_come_and_go_by_a_file_and_a_request_waits_for_the_first(
    routing: Starter, servers: list[Server], tmp_path: Path
) -> None:
    names = tmp_path / "replicas"
    names.touch()
    with (
        routing([], tmp_path, "--replicas", str(names), "--wait", "60") as route,
        route.client() as http,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(generate, http, NAMES[0])
        assert wait(lambda: counted(http, "onebase_route_waiting") == {"": 1})
        names.write_text(f"# the first\n{servers[0].url}\n")
        assert first.result().status_code == 200

        body = {"prompt": "a b", "max_tokens": 80, "stream": True}
        with http.stream("POST", "/generate", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            names.write_text(f"{servers[1].url}\n")
            assert wait(lambda: counted(http, "onebase_route_ready") == {servers[1].url: 1})
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "what was sent to one that is taken out goes on there"
        assert len(rest) >= 79

        names.write_text("http://me:secret@a:1\n")
        assert wait(lambda: "is not used" in route.log)
        assert "secret" not in route.log
        assert generate(http, NAMES[0]).status_code == 200
        names.write_text(f"{servers[1].url}\n{servers[0].url}\n")
        assert wait(lambda: len(counted(http, "onebase_route_ready")) == 2)


def wait(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_an_address_for_the_network_needs_servers_with_keys_or_insecure(
    routing: Starter, serve_scripted: Starter, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    names = tmp_path / "replicas"
    names.touch()
    everywhere = ("--host", "0.0.0.0", "--replicas", str(names))
    afar = {"X-Forwarded-For": "203.0.113.9"}
    with serve_scripted("words", data_dir=data) as server:
        refused_start = pytest.raises(RuntimeError, match=r"exited with 1:(?s:.*)onebase keys create --scope")
        with refused_start, routing([server], tmp_path, "--host", "0.0.0.0"):
            pass
        with routing([server], tmp_path, *everywhere, "--insecure") as route, route.client() as http:
            assert http.get("/v1/key").status_code == 200
            refused = http.get("/v1/key", headers=afar)  # the server has not agreed
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "key_needed")
            assert http.get("/v1/key", headers={"X-Real-IP": "203.0.113.9"}).status_code == 403

        keys = Keys(data)
        with routing([], tmp_path, *everywhere, "--wait", "60") as route, route.client() as http:
            names.write_text(f"{server.url}\n")
            assert wait(lambda: f"{server.url} is not used: it has no API key" in route.log)
            assert counted(http, "onebase_route_ready") == {server.url: 0}
            key = keys.make("admin")
            assert wait(lambda: "/metrics answers 401" in route.log or server.status_of("/version") == 401)
        (tmp_path / "key").write_text(key)
        with (
            routing([], tmp_path, *everywhere, "--key-file", str(tmp_path / "key")) as route,
            client_with(route, key) as http,
        ):
            assert http.get("/v1/key", headers=afar).status_code == 200
        keys.close()


def test_a_route_without_an_admin_key_says_what_is_missing_and_passes_requests_on(
    routing: Starter, serve_scripted: Starter, keys: Keys, tmp_path: Path
) -> None:
    admin, own = keys.make("admin"), keys.make("generate")
    with (
        serve_scripted("words", "--open-metrics", data_dir=keys.file.parent) as server,
        routing([server], tmp_path) as route,
        client_with(route, own) as http,
    ):
        assert generate(http).status_code == 200
        told = http.post("/generate", json={"prompt": "a", "max_tokens": 2, "stream": True})
        assert told.text.endswith("data: [DONE]\n\n")
        assert wait(lambda: "gives this route no secret" in route.log and "--key-file" in route.log)
        assert client_with(route, admin).get("/route_secret").json()["error"]["code"] == "of_one_server"


def test_a_client_behind_the_route_learns_nothing_of_what_it_and_its_servers_say_to_each_other(
    http: httpx2.Client,
) -> None:
    for answer in (http.get("/v1/models"), http.get("/v1/adapters/none"), generate(http, stream=True)):
        assert not [name for name in answer.headers if name.startswith("x-onebase")]


@pytest.mark.parametrize("address", ["me:s3cr3t@a:1", "http://me:s3cr3t@a:1/v1", "http://me:s3cr3t@a:99999"])
def test_a_wrong_address_is_refused_without_its_password(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from onebase_route.cli import route

    with pytest.raises(SystemExit):
        route(["--replica", address])
    assert "s3cr3t" not in capsys.readouterr().err


def test_wrong_addresses_are_refused(tmp_path: Path) -> None:
    from onebase_route.cli import route

    for wrong in (
        "10.0.0.7:8000", "http://", "ftp://a", "http://a/v1", "http://me:secret@a:1", "http://a:99999",
        "http://a:b", "http://a:0", "http://[::1", "http://a b", "http://a#x", "http://a:80:90",
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            route(["--replica", wrong])
        assert caught.value.code == 2
    with pytest.raises(SystemExit):
        route(["--replica", "http://a:1", "--key-file", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        route([])


@pytest.mark.parametrize(
    ("body", "adapter"),
    [
        ({"model": "shop@abc"}, "shop"),
        ({"model": BASE}, None),
        ({"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}, None),
        ({"model": "ft:smollm2:acme:shop:0123"}, "shop"),
        ({"adapter": [{"name": "b", "weight": 1}, {"name": "a@x", "weight": 2}]}, "a+b"),
        ({"adapter_id": "shop", "model": BASE}, "shop"),
        ({"inputs": "x", "parameters": {"adapter_id": "shop"}}, "shop"),
        ({"adapter": "hub:org/repo@main"}, "hub:org/repo@main"),
        ({"adapter": {}, "model": 7}, None),
        ({"requests": [{"prompt": "x", "adapter": "shop@abc"}, {"prompt": "x"}]}, "shop"),
        ({"requests": [7]}, None),
        ([], None),
    ],
)
def test_the_adapter_of_a_request_is_read_off_its_body(body: Any, adapter: str | None) -> None:
    assert read_needs(json.dumps(body).encode(), frozenset({BASE})).adapter == adapter


@given(st.binary(max_size=200))
def test_a_body_that_cannot_be_read_is_left_to_a_server(body: bytes) -> None:
    assert isinstance(read_needs(body, frozenset()), RequestNeeds)


def test_deep_bodies_do_no_harm() -> None:
    assert read_needs(b"[" * 100_000, frozenset()) == RequestNeeds()


def test_a_servers_metrics_are_its_report(servers: list[Server]) -> None:
    with servers[0].client() as http:
        report, bases = read_report(http.get("/metrics").text)

    assert bases == {BASE}
    assert report.sequences >= 1
    assert report.slots >= 1
    assert set(report.in_slots) <= {*NAMES, "routed"}
    with pytest.raises(ValueError, match="num_requests_running"):
        read_report("")


@given(names=st.sets(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5))
def test_names_of_any_characters_are_read_as_they_are_written(names: set[str]) -> None:
    known = CollectorRegistry()
    Gauge("vllm:num_requests_running", "", ["model_name"], registry=known).labels("base").set(2)
    loaded = Gauge("vllm:lora_adapter_loaded", "", ["adapter_name", "level"], registry=known)
    for name in names:
        loaded.labels(name, "gpu").set(1)

    report, bases = read_report(generate_latest(known).decode())
    assert (set(report.in_slots), report.running, bases) == (names, 2, {"base"})


def test_no_answer_is_older_than_one_before_whichever_server_gives_it(
    routing: Starter, serve_scripted: Starter, keys: Keys, tmp_path: Path
) -> None:
    admin = keys.make("admin")
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text(admin)
    data = keys.file.parent
    seldom = ("--sync-seconds", "60")  # by itself a server would see what others change far too late
    shared = ("--registry", f"sqlite:///{keys.file}", "--store", str(data / "store"))
    with (
        serve_scripted("words", *seldom, data_dir=data) as first,
        serve_scripted("words", *seldom, *shared) as second,
        routing([first, second], tmp_path, "--key-file", str(tmp_path / "key")) as route,
        client_with(route, admin) as http,
    ):
        for content in (b"one", b"two", b"three"):
            made = upload(http, "acme", content, query="wait=true&activate=true")
            version = f"acme@{made.json()['version'][:12]}"
            answers = [generate(http, "acme", prompt=f"{number} one") for number in range(8)]
            assert {answer.json()["adapter"] for answer in answers} == {version}
            seen = {http.get("/v1/adapters/acme").json()["version"] for _ in range(4)}
            assert seen == {made.json()["version"]}
            made = http.post("/v1/keys", json={"scopes": ["generate"]})
            with client_with(route, made.json()["key"]) as new:
                assert {generate(new, "acme").status_code for _ in range(4)} == {200}
                http.delete(f"/v1/keys/{made.json()['id']}").raise_for_status()
                assert {generate(new, "acme").status_code for _ in range(4)} == {401}
        # A number that no change has is looked for and forgotten.
        with client_with(first, admin) as direct:
            for change in ("999999999", "-1", "9" * 30, "x"):
                headers = {"x-onebase-change": change, **as_route(direct)}
                answer = direct.get("/v1/adapters/acme", headers=headers)
                assert answer.status_code == 200
                assert 0 < int(answer.headers["x-onebase-change"]) < 999999999
