"""/v1/load and its counts: each tenant's requests by adapter and time, seen by nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from onebase_edge.background import Threads
from onebase_server.http.routes.health import load_history
from onebase_server.http.routes.usage import get_load
from onebase_server.telemetry import tenants
from onebase_server.telemetry.tenants import TenantLoads

from .access import Keys, client_with
from .support import Server, Starter, make_folder, upload


def record(
    loads: TenantLoads, tenant: str, *adapters: str, failed: bool = False, waited: float = 0.2
) -> None:
    loads.record(
        tenant, adapters or ("",), failed=failed, prompt=5, completion=2, first_token=0.3, waited=waited
    )


class Clock:
    def __init__(self) -> None:
        self.now = 300.0 * 1000 + 30

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loads(clock: Clock) -> TenantLoads:
    return TenantLoads((0.1, 0.5, 1.0), clock)


def test_requests_are_counted_by_step_tenant_and_adapter(loads: TenantLoads, clock: Clock) -> None:
    record(loads, "acme", "orders")
    clock.now += 600
    record(loads, "acme", "orders", failed=True)
    record(loads, "acme")
    record(loads, "beta", waited=2.0)

    points = loads.points("acme", None)
    assert [(one.requests, one.errors, one.prompt_tokens, one.generated_tokens) for one in points] == [
        (1, 0, 5, 2), (0, 0, 0, 0), (2, 1, 10, 4),
    ]  # fmt: skip
    assert [one.seconds for one in points] == [270, 300, 30]
    assert points[1].first_token_p50 is points[1].queue_p95 is None
    assert [one.requests for one in loads.points("acme", "orders")] == [1, 0, 1]
    hour = loads.last_hour("acme", "orders")
    assert (hour.requests, hour.errors, hour.seconds) == (2, 1, 600)
    assert 0.1 < (hour.first_token_p50 or 0) <= 0.5
    assert {wait.tenant: wait.requests for wait in loads.queue_waits()} == {"acme": 3, "beta": 1}
    assert [1.0 < (wait.p50 or 0) <= 2.5 for wait in loads.queue_waits()] == [False, True]
    clock.now += 3600
    assert list(loads.queue_waits()) == []
    assert loads.points("nobody", None)[0].requests == 0


def test_six_hours_are_kept(loads: TenantLoads, clock: Clock) -> None:
    for _ in range(tenants.MOST_STEPS + 4):
        record(loads, "acme")
        clock.now += tenants.STEP_SECONDS
    assert [one.requests for one in loads.points("acme", None)] == [*[1] * (tenants.MOST_STEPS - 1), 0]


def test_a_tenant_with_many_adapters_takes_the_place_of_its_own_alone(
    loads: TenantLoads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "MOST_SERIES", 8)
    monkeypatch.setattr(tenants, "MOST_TENANTS", 2)
    record(loads, "quiet", "its")
    for number in range(30):
        record(loads, "crowd", f"a{number}")
    record(loads, "third")

    assert loads.last_hour("quiet", "its").requests == loads.last_hour("quiet", None).requests == 1
    assert loads.last_hour("crowd", "a29").requests == 1
    assert loads.last_hour("crowd", "a0").requests == 0
    assert loads.last_hour("crowd", None).requests == 30
    assert len(loads._series) == 8
    assert set(loads.waits) == {"quiet", "crowd", tenants.OTHERS}


def test_a_snapshot_does_not_change_while_another_thread_reads_it(loads: TenantLoads, clock: Clock) -> None:
    record(loads, "acme", "orders")
    all_tenants, one = loads.snapshot(), loads.snapshot("acme", "orders")
    clock.now += tenants.STEP_SECONDS
    record(loads, "acme", "orders")
    record(loads, "beta")

    assert [wait.tenant for wait in all_tenants.queue_waits()] == ["acme"]
    assert one.last_hour("acme", "orders").requests == 1
    assert one.last_hour("acme", None).requests == 0


def test_loads_are_summed_outside_the_event_loop() -> None:
    threads: list[int] = []

    def clock() -> float:
        threads.append(threading.get_ident())
        return 300.0 * 1000

    loads = TenantLoads((0.1, 0.5, 1.0), clock)
    record(loads, "acme")
    reading = Threads("reading", 1)
    minutes = SimpleNamespace(since=lambda seconds: None, machine=None, points=lambda: clock() and ())
    services: Any = SimpleNamespace(
        measured=SimpleNamespace(tenants=loads), load=minutes, reading=reading, started=0.0
    )
    caller: Any = SimpleNamespace(tenant="acme", tenant_asked=lambda tenant: "acme")

    for route in (get_load, load_history):
        threads.clear()
        answered = asyncio.run(route(services, caller))
        assert b'"requests":1' in answered.body
        assert threads
        assert threading.get_ident() not in threads


# ---- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def admin(keys: Keys) -> str:
    return keys.make("admin")


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, keys: Keys, admin: str) -> Iterator[Server]:
    with serve_scripted("words", data_dir=keys.file.parent) as server:
        yield server


def client_of(server: Server, key: str) -> httpx2.Client:
    """Return a client with the key, once the server knows of it."""
    with client_with(server, key) as http:
        server.wait_for(lambda: http.get("/v1/key").status_code == 200)
    return client_with(server, key)


def test_a_tenants_key_sees_what_its_own_tenant_did_and_nothing_of_others(
    server: Server, keys: Keys, admin: str
) -> None:
    theirs = keys.make("generate", "adapters", "train", tenant="acme", name="web")
    others = keys.make("generate", "adapters", "train", tenant="beta", name="spy")
    with client_of(server, theirs) as acme, client_of(server, others) as beta, client_of(server, admin) as op:
        upload(acme, "shop", b"shop", query="wait=true&activate=true")
        for adapter in ("shop", None):
            asked = acme.post("/generate", json={"prompt": "a b", "adapter": adapter, "max_tokens": 3})
            assert asked.status_code == 200
        load = acme.get("/v1/load").json()
        assert (load["tenant"], load["adapter"]) == ("acme", None)
        assert (load["last_hour"]["requests"], load["last_hour"]["errors"]) == (2, 0)
        assert load["last_hour"]["queue_p95"] is not None
        assert sum(point["requests"] for point in load["data"]) == 2
        assert acme.get("/v1/load", params={"adapter": "shop"}).json()["last_hour"]["requests"] == 1
        assert acme.get("/v1/load", params={"adapter": ""}).json()["last_hour"]["requests"] == 1
        assert acme.get("/v1/load", params={"tenant": "acme"}).json()["data"]

        assert beta.get("/v1/load").json()["last_hour"]["requests"] == 0
        assert beta.get("/v1/load", params={"adapter": "shop"}).json()["last_hour"]["requests"] == 0
        for tenant in ("acme", "nobody"):  # whether it exists is not said
            for path in ("/v1/load", "/v1/usage", "/v1/adapters", "/v1/fine_tuning/jobs"):
                refused = beta.get(path, params={"tenant": tenant})
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        assert {key["tenant"] for key in beta.get("/v1/keys").json()["data"]} == {"beta"}
        assert [key["name"] for key in beta.get("/v1/keys").json()["data"]] == ["spy"]
        assert "acme" not in beta.get("/v1/keys").text + beta.get("/v1/tenants").text

        of_acme = op.get("/v1/load", params={"tenant": "acme"}).json()
        assert of_acme["last_hour"]["requests"] == 2
        assert [one["name"] for one in op.get("/v1/adapters", params={"tenant": "acme"}).json()["data"]] == [
            "shop"
        ]
        assert op.get("/v1/fine_tuning/jobs", params={"tenant": "acme"}).json()["data"] == []
        assert {"acme", "beta"} <= {key["tenant"] for key in op.get("/v1/keys").json()["data"]}
        waits = {one["tenant"]: one for one in op.get("/status/history").json()["tenants"]}
        assert (waits["acme"]["requests"], waits["acme"]["p95"] is None) == (2, False)
        assert "beta" not in waits
        text = op.get("/metrics").text
        assert 'onebase_tenant_queue_seconds_count{tenant="acme"} 2.0' in text


def test_keys_that_may_only_ask_for_text_list_none(server: Server, keys: Keys) -> None:
    with client_of(server, keys.make("generate", "train", tenant="acme")) as http:
        assert http.get("/v1/keys").status_code == 403


def test_an_answer_that_breaks_off_is_one_error_however_many_choices_it_had(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    (make_folder(tmp_path, "ill") / "adapter_model.safetensors").write_bytes(b"sick")
    with serve_scripted("words", "--adapters-dir", str(tmp_path)) as server, server.client() as http:
        whole = http.post("/generate", json={"prompt": "a b", "adapter": "ill", "n": 4, "max_tokens": 3})
        assert whole.status_code >= 500
        requests = [{"prompt": "a b", "adapter": "ill", "n": 3, "max_tokens": 3} for _ in range(3)]
        many = http.post("/generate/many", json={"requests": requests})
        assert many.status_code == 200
        hour = http.get("/status/history").json()["last_hour"]
        assert (hour["answers"], hour["errors"]) == (2, 2)
        assert http.get("/v1/load").json()["last_hour"]["errors"] == 4
