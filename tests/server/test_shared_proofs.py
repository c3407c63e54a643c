"""Two servers on one registry and one store: what one has proved and activated, the other only loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .support import CONFIG, Server, Starter, upload


@pytest.fixture(scope="module")
def pair(
    serve_scripted: Starter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """Both serve the same folder from their start on, and prove slowly."""
    shared = tmp_path_factory.mktemp("shared")
    folder = shared / "adapters" / "given"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(CONFIG)
    (folder / "adapter_model.safetensors").write_bytes(b"given")
    options = [
        "--registry", f"sqlite:///{shared / 'registry.db'}", "--store", str(shared / "store"),
        "--adapters-dir", str(shared / "adapters"), "--sync-seconds", "0.1",
    ]  # fmt: skip
    with ExitStack() as stack:
        servers = [stack.enter_context(serve_scripted("words,slow", *options, ready=False)) for _ in range(2)]
        for server in servers:
            server.wait_ready()
        yield servers[0], servers[1]


def value(server: Server, name: str, **labels: str) -> float:
    """The sum of the samples of a metric that have these labels."""
    with server.client() as http:
        text = http.get("/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def proofs(server: Server) -> int:
    return int(value(server, "onebase_proof_seconds_count"))


def active(server: Server) -> tuple[str, bool]:
    """The version of `acme` that this server knows as active, and whether it is in its memory."""
    with server.client() as http:
        found = http.get("/v1/adapters/acme").json()
    return found["version"], found["tier"] != "disk"


def test_what_both_are_given_at_their_start_one_of_them_proves(pair: tuple[Server, Server]) -> None:
    assert sum(map(proofs, pair)) == 1
    for server in pair:
        with server.client() as http:
            assert (
                http.post("/generate", json={"prompt": "a", "adapter": "given", "max_tokens": 1}).status_code
                == 200
            )


def test_a_version_that_both_get_at_once_is_proved_once_and_served_by_both(
    pair: tuple[Server, Server],
) -> None:
    one, other = pair
    before = sum(map(proofs, pair))
    with one.client() as first, other.client() as second:
        begun = upload(first, "twice", b"sent twice", query="wait=false")
        assert begun.status_code == 202
        done = upload(second, "twice", b"sent twice", query="wait=true&activate=true")
        assert done.json()["state"] == "ready"
        assert sum(map(proofs, pair)) == before + 1
        for http in (first, second):
            assert (
                http.post("/generate", json={"prompt": "a", "adapter": "twice", "max_tokens": 1}).status_code
                == 200
            )


def test_an_activation_reaches_the_memory_of_the_server_that_had_the_last_version_and_of_no_other(
    pair: tuple[Server, Server],
) -> None:
    one, other = pair
    with one.client() as first, other.client() as second:
        digests = [
            upload(first, "acme", content, query=f"wait=true&activate={activate}").json()["version"]
            for content, activate in ((b"old", "true"), (b"new", "false"), (b"newest", "false"))
        ]
        made, loads = proofs(other), value(other, "onebase_adapter_loads_total")
        first.post("/v1/adapters/acme/activate", json={"version": digests[1]}).raise_for_status()
        other.wait_for(lambda: active(other) == (digests[1], False))
        asked = {"prompt": "a", "adapter": "acme", "max_tokens": 1}
        second.post("/generate", json=asked).raise_for_status()
        first.post("/v1/adapters/acme/activate", json={"version": digests[2]}).raise_for_status()
        other.wait_for(lambda: active(other) == (digests[2], True))
        second.post("/generate", json=asked).raise_for_status()
        assert value(other, "onebase_adapter_loads_total") == loads + 2
        assert proofs(other) == made
