"""Adapters from the Hub: explicit pulls and pulls on first use, from a stand-in that speaks its HTTP API."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from ..hub_standin import Faults, HubStandIn
from .access import Keys, client_with
from .support import CONFIG, PATIENCE, Server, Starter, one_server, upload

ALLOW = ("--hub-allow", "acme/*", "--hub-allow", "solo/one", "--max-upload", "1MB")


def files(content: bytes, folder: str = "") -> dict[str, bytes]:
    return {
        f"{folder}adapter_config.json": CONFIG.encode(),
        f"{folder}adapter_model.safetensors": content,
        f"{folder}README.md": b"not wanted",
    }


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.fixture(scope="module")
def server(
    serve_scripted: Starter, hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    environment = hub.environment(tmp_path_factory.mktemp("hf"))
    with serve_scripted("words", *ALLOW, environment=environment) as server:
        yield server


@pytest.fixture
def http(server: Server, hub: HubStandIn) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client
    hub.faults = Faults()


def generate(http: httpx2.Client, adapter: Any, **body: Any) -> httpx2.Response:
    return http.post("/generate", json={"prompt": "word", "max_tokens": 2, "adapter": adapter, **body})


def error(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer that must have this status."""
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


def pull(http: httpx2.Client, repo: str, query: str = "wait=true", **body: Any) -> httpx2.Response:
    return http.post(f"/v1/adapters?{query}", json={"hub": {"repo": repo}, **body})


def test_a_pull_names_the_commit_and_takes_only_the_two_files(http: httpx2.Client, hub: HubStandIn) -> None:
    commit = hub.add_repo("acme/explicit", files(b"explicit", "nested/"))

    answer = http.post(
        "/v1/adapters?wait=true&activate=true",
        json={"name": "pulled", "hub": {"repo": "acme/explicit", "subfolder": "nested"}},
    )

    version = answer.json()
    assert answer.status_code == 200
    assert (version["name"], version["state"], version["active"]) == ("pulled", "ready", True)
    assert version["source"] == {
        "kind": "hub", "repo": "acme/explicit", "commit": commit, "subfolder": "nested",
    }  # fmt: skip
    assert not [path for path in hub.requests() if "README" in path]
    assert generate(http, "pulled").json()["adapter"] == version["id"]


@one_server
def test_an_explicit_pull_is_seen_while_it_runs_under_its_own_id(
    http: httpx2.Client, hub: HubStandIn, server: Server
) -> None:
    hub.add_repo("acme/visible", files(b"v" * 100_000))
    hub.faults.pause, hub.faults.piece = 0.05, 4096

    answer = pull(http, "acme/visible", "activate=true", name="visible")

    pending = answer.json()
    assert answer.status_code == 202
    assert pending["version"].startswith("pull-")
    assert (pending["state"], pending["progress"]["stage"]) == ("pulling", "pulling")
    assert http.get("/v1/adapters/visible").json()["state"] == "pulling"
    assert "visible" in [entry["id"] for entry in http.get("/v1/adapters").json()["data"]]
    path = f"/v1/adapters/visible/versions/{pending['version']}"
    fractions: list[float] = []

    def ready() -> bool:
        seen = http.get(path).json()
        fractions.append(seen["progress"]["fraction"] if seen["progress"] else 1.0)
        return bool(seen["state"] == "ready")

    server.wait_for(ready)
    assert any(0 < fraction < 1 for fraction in fractions)
    assert len(http.get(path).json()["version"]) == 64


def test_the_first_use_pulls_proves_and_serves_and_the_next_one_asks_nobody(
    http: httpx2.Client, hub: HubStandIn
) -> None:
    commit = hub.add_repo("acme/first", files(b"first"), ("main", "v1"))
    name = "hub:acme/first@v1"

    first = generate(http, name)
    asked = len(hub.log)
    second = generate(http, name)

    assert first.status_code == 200
    assert first.json()["adapter"].startswith(f"{name}@")
    assert second.json()["adapter"] == first.json()["adapter"]
    assert len(hub.log) == asked
    quoted = f"/v1/adapters/{quote(name, safe='')}"
    adapter = http.get(quoted).json()
    version = http.get(f"{quoted}/versions/{adapter['version']}").json()
    assert (adapter["name"], adapter["active"]) == (name, True)
    assert (version["source"]["revision"], version["source"]["commit"]) == ("v1", commit)
    assert name in [model["id"] for model in http.get("/v1/models").json()["data"]]
    chat = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200


def test_the_pin_is_the_commit_of_the_first_use_until_it_is_pulled_again(
    http: httpx2.Client, hub: HubStandIn
) -> None:
    hub.add_repo("acme/moving", files(b"moving 1"))
    name = "hub:acme/moving"
    first = generate(http, name).json()["adapter"]

    newer = hub.add_repo("acme/moving", files(b"moving 2"))
    still = generate(http, name).json()["adapter"]
    pulled = pull(http, "acme/moving", "wait=true&activate=true").json()

    assert still == first
    assert (pulled["name"], pulled["source"]["commit"]) == (name, newer)
    assert generate(http, name).json()["adapter"] == pulled["id"] != first


def test_concurrent_first_uses_share_one_pull(http: httpx2.Client, hub: HubStandIn, server: Server) -> None:
    hub.add_repo("acme/shared", files(b"s" * 50_000))
    hub.faults.pause, hub.faults.piece = 0.02, 4096
    before = len(hub.requests("GET", "/cdn/"))

    def use(number: int) -> Any:
        with server.client() as mine:
            return generate(mine, "hub:acme/shared").json()["adapter"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        labels = set(pool.map(use, range(8)))

    assert len(labels) == 1
    assert len(hub.requests("GET", "/cdn/")) == before + 1


def test_a_weighted_sum_may_name_repositories(http: httpx2.Client, hub: HubStandIn) -> None:
    hub.add_repo("acme/left", files(b"left"))
    hub.add_repo("acme/right", files(b"right"))

    answer = generate(
        http, [{"name": "hub:acme/left", "weight": 0.5}, {"name": "hub:acme/right", "weight": 0.5}]
    )

    assert [term["name"].partition("@")[0] for term in answer.json()["adapter"]] == [
        "hub:acme/left", "hub:acme/right",
    ]  # fmt: skip


@pytest.mark.parametrize("repo", ["other/repo", "solo/two", "acmeX/repo"])
def test_what_hub_allow_does_not_name_is_not_pulled_for_a_request(
    http: httpx2.Client, hub: HubStandIn, repo: str
) -> None:
    hub.add_repo(repo, files(repo.encode()))
    before = len(hub.log)

    refused = error(generate(http, f"hub:{repo}"), 403)

    assert refused["code"] == "hub_not_allowed"
    assert f"--hub-allow '{repo}'" in refused["message"]
    assert len(hub.log) == before


@pytest.mark.parametrize(
    "name", ["hub:", "hub:acme", "hub:acme/x/y", "hub:../x", "hub:acme/x@", "hub:acme/x:../y"]
)
def test_a_name_that_is_no_reference_is_refused(http: httpx2.Client, name: str) -> None:
    assert error(generate(http, name), 400)["code"] == "hub_invalid"


@pytest.mark.parametrize(
    ("repo", "prepare", "status", "code"),
    [
        ("acme/missing", lambda hub: None, 404, "hub_not_found"),
        ("acme/gated", lambda hub: hub.add_repo("acme/gated", files(b"g"), gated=True), 403, "hub_gated"),
        ("acme/empty", lambda hub: hub.add_repo("acme/empty", {"x": b"x"}), 422, "hub_no_adapter"),
        ("acme/large", lambda hub: hub.add_repo("acme/large", files(b"l" * 2_000_000)), 413, "hub_too_large"),
        ("acme/broken", lambda hub: hub.add_repo("acme/broken", files(b"broken")), 422, "broken_weights"),
    ],
)
def test_what_cannot_be_had_or_served_is_refused_with_the_reason(
    http: httpx2.Client, hub: HubStandIn, repo: str, prepare: Any, status: int, code: str
) -> None:
    prepare(hub)

    assert error(generate(http, f"hub:{repo}"), status)["code"] == code
    assert error(pull(http, repo, name="refused"), status)["code"] == code


def test_a_repository_that_was_not_served_is_not_pulled_again_at_once(
    http: httpx2.Client, hub: HubStandIn
) -> None:
    hub.add_repo("acme/bad", files(b"broken again"))
    first = error(generate(http, "hub:acme/bad"), 422)
    asked = len(hub.log)

    second = error(generate(http, "hub:acme/bad"), 422)

    assert second["code"] == first["code"] == "broken_weights"
    assert len(hub.log) == asked


@pytest.mark.parametrize(("code", "status"), [("hub_not_found", 404), ("hub_gated", 403)])
def test_the_hub_is_not_asked_again_at_once_for_what_it_does_not_have_or_give(
    http: httpx2.Client, hub: HubStandIn, code: str, status: int
) -> None:
    if code == "hub_gated":
        hub.add_repo(f"acme/no-{code}", files(b"gated"), gated=True)
    first = error(generate(http, f"hub:acme/no-{code}"), status)
    asked = len(hub.log)

    again = [error(generate(http, f"hub:acme/no-{code}"), status) for _ in range(20)]

    assert first["code"] == code
    assert again == [first] * 20
    assert len(hub.log) == asked


@one_server
def test_what_was_gated_is_asked_for_again_once_another_token_is_stored(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with HubStandIn() as hub:
        hub.add_repo("acme/granted", files(b"granted"), gated=True)
        environment = hub.environment(tmp_path / "hf")
        with serve_scripted("words", *ALLOW, environment=environment) as server, server.client() as http:
            assert error(generate(http, "hub:acme/granted"), 403)["code"] == "hub_gated"
            (tmp_path / "hf" / "token").write_text(hub.token)
            assert generate(http, "hub:acme/granted").status_code == 200


@one_server
def test_names_that_one_tenant_has_looked_up_in_vain_hold_up_no_first_use_of_another(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    names = [f"acme/held{number}" for number in range(12)]
    with HubStandIn() as hub:
        hub.add_repo("acme/sound", files(b"sound"))
        hub.faults.held = frozenset(names)
        keys = Keys(tmp_path / "data")
        one, other = (keys.make("generate", tenant=tenant) for tenant in ("one", "other"))
        environment = hub.environment(tmp_path / "hf")
        with (
            serve_scripted("words", *ALLOW, data_dir=tmp_path / "data", environment=environment) as server,
            client_with(server, one) as flood,
            client_with(server, other) as http,
            concurrent.futures.ThreadPoolExecutor(len(names)) as pool,
        ):
            waiting = [pool.submit(generate, flood, f"hub:{name}", timeout_s=60) for name in names]
            server.wait_for(lambda: len(asked_about(hub, names)) == 2)
            assert generate(http, "hub:acme/sound").status_code == 200
            asked = len(asked_about(hub, names))
            # A pull ends five seconds after the last word of the Hub, and a first use may take longer.
            ended = sum(request.done() for request in waiting)
            assert ended < len(names)
            assert asked <= 2 + ended
            hub.stop()
        keys.close()


def asked_about(hub: HubStandIn, repos: list[str]) -> set[str]:
    """The repositories that the Hub was asked about, each by a process of its own."""
    return {repo for repo in repos if any(f"/{repo}/" in f"{path}/" for path in hub.requests())}


def test_a_failed_pull_says_why_under_its_id(http: httpx2.Client, hub: HubStandIn, server: Server) -> None:
    pending = pull(http, "acme/never", "", name="never").json()
    path = f"/v1/adapters/never/versions/{pending['version']}"

    server.wait_for(lambda: http.get(path).json()["state"] == "failed")

    assert http.get(path).json()["error"]["code"] == "hub_not_found"


def test_an_adapter_of_another_base_on_the_hub_is_a_conflict(http: httpx2.Client, hub: HubStandIn) -> None:
    config = json.dumps({**json.loads(CONFIG), "base_model_name_or_path": "meta/Llama-7"})
    hub.add_repo("acme/foreign", files(b"foreign") | {"adapter_config.json": config.encode()})

    refused = error(generate(http, "hub:acme/foreign"), 409)

    assert refused["code"] == "base_mismatch"
    assert pull(http, "acme/foreign", name="foreign", any_base=True).status_code == 200


def test_a_slow_hub_holds_up_nobody_else_and_the_request_as_long_as_its_timeout_says(
    http: httpx2.Client, hub: HubStandIn, server: Server
) -> None:
    upload(http, "local", b"local", query="wait=true&activate=true").raise_for_status()
    events: list[str] = []
    stop = threading.Event()

    def stream() -> None:
        body = {"prompt": "word", "max_tokens": 90_000, "stream": True, "adapter": "local"}
        with server.client() as mine, mine.stream("POST", "/generate", json=body) as answer:
            for line in answer.iter_lines():
                events.append(line)
                if stop.is_set():
                    return

    streaming = threading.Thread(target=stream)
    streaming.start()
    for number in range(6):
        hub.add_repo(f"acme/slow{number}", files(b"slow" * 1000))
    hub.faults.pause, hub.faults.piece = 1.0, 16
    with contextlib.ExitStack() as open_requests:
        clients = [open_requests.enter_context(server.client()) for _ in range(6)]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            waiting = [
                pool.submit(generate, client, f"hub:acme/slow{number}", timeout_s=7)
                for number, client in enumerate(clients)
            ]
            time.sleep(0.5)
            seen = len(events)
            assert generate(http, "local").status_code == 200
            assert upload(http, "meanwhile", b"meanwhile").status_code == 200
            assert http.get("/v1/adapters").status_code == 200
            server.wait_for(lambda: len(events) > seen)
            assert not any(request.done() for request in waiting)
            refused = [error(request.result(), 503) for request in waiting]
    stop.set()
    streaming.join(PATIENCE)

    assert {one["code"] for one in refused} == {"adapter_timeout"}


def test_offline_what_was_pulled_is_served_and_the_rest_says_why(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    data_dir, hf_home = tmp_path / "data", tmp_path / "hf"
    with HubStandIn() as hub:
        hub.add_repo("acme/kept", files(b"kept"))
        online = hub.environment(hf_home)
        with (
            serve_scripted("words", *ALLOW, data_dir=data_dir, environment=online) as server,
            server.client() as http,
        ):
            kept = generate(http, "hub:acme/kept").json()["adapter"]

    offline = {**online, "HF_HUB_OFFLINE": "1"}
    with (
        serve_scripted("words", *ALLOW, data_dir=data_dir, environment=offline) as server,
        server.client() as http,
    ):
        assert generate(http, "hub:acme/kept").json()["adapter"] == kept
        assert error(generate(http, "hub:acme/unknown"), 503)["code"] == "hub_offline"
