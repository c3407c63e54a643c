"""The life of an adapter, with the real base, engine and verifier and the real example adapters."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ..hub_standin import HubStandIn
from .conftest import make_adapter
from .support import PATIENCE, ROOT, Server, Starter, upload, upload_folder

ORDERS, PIRATE = (ROOT / "examples" / "adapters" / name for name in ("orders", "pirate"))
OPTIONS = ["--kv-memory", "300MB", "--max-sequences", "16", "--threads", "1", "--hub-allow", "acme/*"]
PROMPTS = [f"Order {number}: {number} jars of honey for" for number in range(4)]
LONG = 64
"""Tokens of a text that still runs when others have been asked for."""


def body(prompt: str, adapter: str | None, tokens: int = 8) -> dict[str, Any]:
    return {"prompt": prompt, "adapter": adapter, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def answer_of(http: httpx2.Client, prompt: str, adapter: str | None, tokens: int = 8) -> tuple[str, Any]:
    """The text, and which version it came from."""
    answer = http.post("/generate", json=body(prompt, adapter, tokens))
    data = answer.raise_for_status().json()
    return data["choices"][0]["text"], data["adapter"]


def answers_of(server: Server, prompts: list[str], adapter: str, tokens: int) -> list[tuple[str, Any]]:
    """The same for several prompts at once."""

    def ask(prompt: str) -> tuple[str, Any]:
        with server.client() as http:
            return answer_of(http, prompt, adapter, tokens)

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


class Stream:
    """One streamed answer, read in a thread of its own."""

    def __init__(self, server: Server, prompt: str, adapter: str, tokens: int) -> None:
        self.text = ""
        self.label: str | None = None
        self.error: Any = None
        self.begun = threading.Event()
        self._request = body(prompt, adapter, tokens) | {"stream": True}
        self._thread = threading.Thread(target=self._read, args=(server,))
        self._thread.start()

    def _read(self, server: Server) -> None:
        with server.client() as http, http.stream("POST", "/generate", json=self._request) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                self.text += event.get("text", "")
                self.label = event.get("adapter", self.label)
                self.error = event.get("error", self.error)
                self.begun.set()

    def ended(self) -> tuple[str, Any]:
        """The whole text and the version, once the stream has ended well."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        assert self.error is None
        return self.text, self.label


def started(server: Server, prompts: list[str], adapter: str, tokens: int) -> list[Stream]:
    streams = [Stream(server, prompt, adapter, tokens) for prompt in prompts]
    for stream in streams:
        assert stream.begun.wait(PATIENCE)
    return streams


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("life")


@pytest.fixture(scope="module")
def server(serve_real: Starter, hub: HubStandIn, place: Path) -> Iterator[Server]:
    environment = hub.environment(place / "hf")
    with serve_real(*OPTIONS, data_dir=place / "data", environment=environment) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def versions(server: Server) -> tuple[str, str]:
    """Digests of `shop`'s two versions, uploaded and proved: orders, which is active, and pirate."""
    with server.client() as http:
        first = upload_folder(http, "shop", ORDERS, "wait=true&activate=true").raise_for_status().json()
        second = upload_folder(http, "shop", PIRATE).raise_for_status().json()
    assert (first["state"], first["active"]) == ("ready", True)
    assert (second["state"], second["active"]) == ("ready", False)
    return first["version"], second["version"]


def test_the_report_says_what_was_found_in_every_module(
    http: httpx2.Client, versions: tuple[str, str]
) -> None:
    report = http.get(f"/v1/adapters/shop/versions/{versions[0]}").json()["report"]

    assert report["base_name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (report["kinds"], report["rank"], report["alpha"]) == (["lora"], 16, 32.0)
    assert len(report["modules"]) == 120
    assert all(module["norm"] > 0 for module in report["modules"])
    proof = report["proof"]
    assert proof["exact"] is True
    assert proof["base_unchanged"] is True
    assert proof["modules_compared"] >= proof["modules_changed"] == 120
    assert proof["tokens_compared"] > 0


def test_rows_that_run_while_another_version_is_activated_end_on_the_one_they_began_with(
    server: Server, http: httpx2.Client, versions: tuple[str, str]
) -> None:
    first, second = versions
    before = answers_of(server, PROMPTS, "shop", LONG)
    other = answer_of(http, PROMPTS[0], f"shop@{second}", LONG)
    assert {label for _, label in before} == {f"shop@{first[:12]}"}

    streams = started(server, PROMPTS, "shop", LONG)
    activated = http.post("/v1/adapters/shop/activate", json={"version": second, "expected": first})
    during = http.get("/status").json()["stats"]["sequences_running"]
    after = answer_of(http, PROMPTS[0], "shop", LONG)

    assert activated.json()["version"] == second
    assert during > 0
    assert [stream.ended() for stream in streams] == before
    assert after == other
    assert after[0] != before[0][0]
    assert http.post("/v1/adapters/shop/rollback", json={"expected": second}).json()["version"] == first
    assert answer_of(http, PROMPTS[0], "shop", LONG) == before[0]


def test_an_adapter_on_the_hub_is_proved_and_served_on_first_use(
    http: httpx2.Client, hub: HubStandIn, versions: tuple[str, str]
) -> None:
    files = {path.name: path.read_bytes() for path in ORDERS.iterdir()}
    hub.add_repo("acme/orders", files)

    text, label = answer_of(http, PROMPTS[1], "hub:acme/orders")

    assert (text, label) == (answer_of(http, PROMPTS[1], "shop")[0], f"hub:acme/orders@{versions[0][:12]}")


def test_a_verifier_killed_under_streams_disturbs_none_and_its_version_is_proved_all_the_same(
    server: Server, http: httpx2.Client, versions: tuple[str, str]
) -> None:
    before = answers_of(server, PROMPTS, "shop", LONG)
    config = json.loads((ORDERS / "adapter_config.json").read_text()) | {"lora_alpha": 8}
    weights = (ORDERS / "adapter_model.safetensors").read_bytes()
    pending = upload(http, "third", weights, json.dumps(config), query="activate=true").json()
    path = f"/v1/adapters/third/versions/{pending['version']}"
    server.wait_for(lambda: http.get(path).json()["state"] == "proving")
    streams = started(server, PROMPTS, "shop", LONG)

    verifier = server.verifier_pid()
    os.kill(verifier, signal.SIGKILL)

    assert [stream.ended() for stream in streams] == before
    server.wait_for(lambda: http.get(path).json()["state"] not in ("validating", "proving"))
    assert http.get(path).json()["state"] == "ready"
    assert server.verifier_pid() != verifier
    server.wait_for(lambda: http.get("/v1/adapters/third").json()["active"])
    assert answer_of(http, PROMPTS[0], "third")[0] != answer_of(http, PROMPTS[0], "shop")[0]


def test_a_version_that_changes_nothing_and_one_that_is_no_adapter_are_refused(http: httpx2.Client) -> None:
    config = (ORDERS / "adapter_config.json").read_text()

    refused = upload(http, "none", b"these are no safetensors", config)

    assert refused.status_code == 422
    assert refused.json()["version"]["state"] == "failed"
    assert refused.json()["error"]["message"]


def test_a_sum_over_an_adapter_that_does_not_compose_is_the_callers_to_change(
    http: httpx2.Client, base_folder: Path, place: Path
) -> None:
    folder = make_adapter(base_folder, place / "dora", 1, 4, use_dora=True, layers_to_transform=[0])
    upload_folder(http, "dora", folder, "wait=true&activate=true").raise_for_status()
    half = {**body(PROMPTS[0], None), "adapter": [{"name": "dora", "weight": 0.5}]}

    refused = http.post("/generate", json=half)

    assert refused.status_code == 409
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "adapter_not_composable")
    assert answer_of(http, PROMPTS[0], "dora")


def test_adapters_come_back_when_the_engine_is_killed(
    server: Server, http: httpx2.Client, versions: tuple[str, str]
) -> None:
    before = answer_of(http, PROMPTS[2], "shop")
    http.post("/v1/adapters/shop/pin", json={"pinned": True}).raise_for_status()
    restarts = http.get("/status").json()["engine"]["restarts"]

    os.kill(server.engine_pid(), signal.SIGKILL)
    server.wait_for(lambda: http.get("/status").json()["engine"]["restarts"] == restarts + 1)
    server.wait_ready()

    assert http.get("/v1/adapters/shop").json()["tier"] == "host"
    assert answer_of(http, PROMPTS[2], "shop") == before
    assert answer_of(http, PROMPTS[2], f"shop@{versions[1]}") != before


def test_a_restart_after_a_kill_forgets_nothing_and_proves_nothing_again(
    serve_real: Starter, server: Server, place: Path, hub: HubStandIn, versions: tuple[str, str]
) -> None:
    first, second = versions
    with server.client() as http:
        before = answer_of(http, PROMPTS[3], "shop")
        shown = http.get("/v1/adapters").json()["data"]
        history = http.get("/v1/adapters/shop/history").json()
        http.delete(f"/v1/adapters/shop/versions/{second}").raise_for_status()
    server.signal(signal.SIGKILL)
    server.exit_status()

    environment = hub.environment(place / "hf", HF_HUB_OFFLINE="1")
    with (
        serve_real(*OPTIONS, data_dir=place / "data", environment=environment) as again,
        again.client() as http,
    ):
        assert answer_of(http, PROMPTS[3], "shop") == before
        assert answer_of(http, PROMPTS[3], "hub:acme/orders")[0] == before[0]
        assert http.get("/v1/adapters/shop/history").json() == history
        assert http.get(f"/v1/adapters/shop/versions/{second}").status_code == 404
        names = {entry["id"]: entry["version"] for entry in http.get("/v1/adapters").json()["data"]}
        assert names == {entry["id"]: entry["version"] for entry in shown}
        assert names["shop"] == first
