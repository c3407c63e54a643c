"""A thousand registered adapters: listed, activated and used, within the limit of host memory."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from onebase import BadRequestError, Client
from onebase.cli import main
from onebase_adapters.registry import AdapterFiles, Blob, Registry
from onebase_adapters.store.store import Store
from onebase_edge.settings import Settings
from onebase_server.storage.opening import open_storage

from .support import PATIENCE, Server, Starter, make_folder, upload

ADAPTERS = 1000
SIZE = 20_000
RESIDENT = 25
MODULES = [
    {
        "name": f"model.layers.{n}.q_proj",
        "kind": "lora",
        "rank": 8,
        "alpha": 16.0,
        "parameters": 64,
        "norm": 1.0,
    }
    for n in range(50)
]
REPORT = {
    "kinds": ["lora"], "rank": 8, "alpha": 16.0, "rslora": False, "targets": ["q_proj"], "parameters": 64,
    "bytes": SIZE, "base_name": None, "dropped": [], "modules": MODULES,
    "proof": {"modules_changed": 50, "kernels": "torch"},
}  # fmt: skip


def add(store: Store, content: bytes) -> Blob:
    with store.writer() as writer:
        writer.write(content)
        return writer.commit()


def register(registry: Registry, number: int, config: Blob, prepared: Blob) -> None:
    """A version that looks as if it had been proved; nobody reads its weights again."""
    weights = Blob(hashlib.sha256(f"weights {number}".encode()).hexdigest(), 1000)
    files, name = AdapterFiles(config, weights), f"tenant-{number:04}"
    registry.add_version(name, files.digest, files, {"kind": "upload"})
    registry.set_state("default", name, files.digest, "ready", report=REPORT, prepared=prepared)


def copies(database: Path, count: int) -> None:
    """Each adapter and its version `count` times, with other names and digests."""
    other = "lower(hex(randomblob(32)))"
    changed = {
        "adapters": {"id": "id + 10 * k", "name": "printf('tenant-%04d', id - 1 + 10 * k)"},
        "versions": {
            "id": "id + 10 * k",
            "adapter_id": "adapter_id + 10 * k",
            "digest": other,
            "weights_sha256": other,
        },
    }
    with closing(sqlite3.connect(database)) as connection, connection:
        for table, new in changed.items():
            columns = [column for _, column, *_ in connection.execute(f"PRAGMA table_info({table})")]
            values = ", ".join(new.get(column, column) for column in columns)
            connection.execute(
                "WITH RECURSIVE more(k) AS "
                f"(SELECT 1 UNION ALL SELECT k + 1 FROM more WHERE k < {count - 1}) "
                f"INSERT INTO {table} SELECT {values} FROM {table}, more"
            )


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, base_folder: Path, quick_folder: Path) -> Iterator[Server]:
    data_dir = quick_folder / "data"
    storage = open_storage(Settings(data_dir=str(data_dir)), "smollm2-135m-instruct", base_folder)
    config = add(storage.store, b"{}")
    prepared = [add(storage.store, f"{number}".encode().ljust(SIZE)) for number in range(10)]
    for number in range(10):
        register(storage.registry, number, config, prepared[number])
    storage.registry.close()
    copies(data_dir / "registry.db", ADAPTERS // 10)
    options = ["--host-memory", str(RESIDENT * SIZE), "--max-sequences", "16"]
    with serve_scripted("words", *options, data_dir=data_dir) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


def memory(http: httpx2.Client) -> dict[str, int]:
    found: dict[str, int] = http.get("/status").json()["host_memory"]
    return found


def use(http: httpx2.Client, name: str) -> str:
    body = {"prompt": "word", "max_tokens": 1, "adapter": name}
    return str(http.post("/generate", json=body).raise_for_status().json()["adapter"])


def test_all_of_them_are_listed_without_their_long_reports(http: httpx2.Client) -> None:
    answer = http.get("/v1/adapters")

    assert len(answer.json()["data"]) == ADAPTERS
    assert "model.layers" not in answer.text
    whole = http.get("/v1/adapters/tenant-0007/versions").json()["data"][0]
    assert whole["report"]["modules"] == MODULES


def test_any_of_them_is_activated_and_used_and_memory_stays_within_its_limit(http: httpx2.Client) -> None:
    chance = random.Random(7)
    names = [f"tenant-{number:04}" for number in chance.sample(range(ADAPTERS), 80)]
    before = memory(http)
    for name in names:
        version = http.get(f"/v1/adapters/{name}/versions").json()["data"][0]["version"]
        activated = http.post(f"/v1/adapters/{name}/activate", json={"version": version})
        assert activated.json()["tier"] == "host"
        assert use(http, name) == f"{name}@{version[:12]}"
        now = memory(http)
        assert now["used"] <= now["limit"] == RESIDENT * SIZE

    after = memory(http)
    assert after["versions"] == RESIDENT
    assert after["loads"] - before["loads"] == len(names)
    assert after["evictions"] - before["evictions"] == len(names) - RESIDENT
    assert http.get(f"/v1/adapters/{names[-1]}").json()["tier"] in ("host", "slot")
    assert http.get(f"/v1/adapters/{names[0]}").json()["tier"] == "disk"


def test_one_that_is_pinned_or_running_is_never_evicted(http: httpx2.Client, server: Server) -> None:
    for name in ("tenant-0001", "tenant-0002"):
        version = http.get(f"/v1/adapters/{name}/versions").json()["data"][0]["version"]
        http.post(f"/v1/adapters/{name}/activate", json={"version": version}).raise_for_status()
    http.post("/v1/adapters/tenant-0001/pin", json={"pinned": True}).raise_for_status()
    events: list[str] = []
    body = {"prompt": "word", "max_tokens": 90_000, "stream": True, "adapter": "tenant-0002"}

    def stream() -> None:
        with server.client() as mine, mine.stream("POST", "/generate", json=body) as answer:
            for line in answer.iter_lines():
                events.append(line)

    running = threading.Thread(target=stream)
    running.start()
    server.wait_for(lambda: len(events) > 3)
    for number in range(100, 100 + 3 * RESIDENT):
        name = f"tenant-{number:04}"
        version = http.get(f"/v1/adapters/{name}/versions").json()["data"][0]["version"]
        use(http, f"{name}@{version}")

    assert http.get("/v1/adapters/tenant-0001").json()["tier"] != "disk"
    assert http.get("/v1/adapters/tenant-0002").json()["tier"] != "disk"
    assert memory(http)["used"] <= RESIDENT * SIZE
    http.delete("/v1/adapters/tenant-0002?force=true").raise_for_status()
    running.join(PATIENCE)
    assert json.loads(events[-4].removeprefix("data: "))["error"]["code"] == "adapter_deleted"


def test_more_than_fits_is_refused_with_the_limit(http: httpx2.Client) -> None:
    for number in range(200, 200 + RESIDENT - 1):
        name = f"tenant-{number:04}"
        version = http.get(f"/v1/adapters/{name}/versions").json()["data"][0]["version"]
        http.post(f"/v1/adapters/{name}/activate", json={"version": version}).raise_for_status()
        http.post(f"/v1/adapters/{name}/pin", json={"pinned": True}).raise_for_status()
    version = http.get("/v1/adapters/tenant-0300/versions").json()["data"][0]["version"]

    activated = http.post("/v1/adapters/tenant-0300/activate", json={"version": version})
    used = http.post("/generate", json={"prompt": "x", "adapter": f"tenant-0300@{version}"})
    http.post("/v1/adapters/tenant-0200/pin", json={"pinned": False}).raise_for_status()
    http.post("/v1/adapters/tenant-0300/activate", json={"version": version}).raise_for_status()
    http.post("/v1/adapters/tenant-0200/pin", json={"pinned": True}).raise_for_status()
    pinned = http.post("/v1/adapters/tenant-0300/pin", json={"pinned": True})

    for answer in (activated, used, pinned):
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "host_memory_exceeded"
        assert "--host-memory" in answer.json()["error"]["message"]
    assert http.get("/v1/adapters/tenant-0300").json()["pinned"] is False


def test_a_version_without_room_is_kept_and_the_answer_says_which_and_why_it_is_not_active(
    http: httpx2.Client, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pins of the test before fill all but a place that is too small."""
    folder = make_folder(tmp_path, "large")
    weights = b"w" * (SIZE + 1)
    (folder / "adapter_model.safetensors").write_bytes(weights)

    first = upload(http, "large", weights, query="wait=true&activate=true")
    again = upload(http, "large", weights, query="activate=true")
    with Client(server.url) as client, pytest.raises(BadRequestError) as caught:
        client.adapters.upload(folder, name="large")
    status = main(["adapters", "push", str(folder), "--name", "large", "--activate", "--url", server.url])

    for answer in (first, again):
        assert answer.status_code == 400
        kept, error = answer.json()["version"], answer.json()["error"]
        assert (kept["state"], kept["active"], error["code"]) == ("ready", False, "host_memory_exceeded")
        assert error["message"].startswith(f"{kept['id']} is ready and kept, but not active: ")
    assert http.get(f"/v1/adapters/large/versions/{kept['version']}").json()["state"] == "ready"
    assert (caught.value.version, caught.value.message) == (kept["version"], error["message"])
    assert status == 1
    assert error["message"] in capsys.readouterr().err


def put(http: httpx2.Client, name: str, action: str, **body: object) -> httpx2.Response:
    return http.post(f"/v1/adapters/{name}/{action}", json=body)


def activate(http: httpx2.Client, name: str) -> None:
    version = http.get(f"/v1/adapters/{name}/versions").json()["data"][0]["version"]
    put(http, name, "activate", version=version).raise_for_status()


def pin_only(http: httpx2.Client, names: list[str]) -> None:
    for adapter in http.get("/v1/adapters").json()["data"]:
        if adapter["pinned"]:
            put(http, adapter["name"], "pin", pinned=False).raise_for_status()
    for name in names:
        activate(http, name)
        put(http, name, "pin", pinned=True).raise_for_status()


def test_a_rollback_without_room_in_memory_is_done_and_says_so(http: httpx2.Client) -> None:
    pin_only(http, [])
    activate(http, "tenant-0400")
    put(http, "tenant-0400", "deactivate").raise_for_status()
    pin_only(http, [f"tenant-{number:04}" for number in range(500, 500 + RESIDENT)])

    rolled_back = put(http, "tenant-0400", "rollback")
    used = http.post("/generate", json={"prompt": "x", "adapter": "tenant-0400"})

    assert rolled_back.status_code == 200, "a client that reads an error would roll back once more"
    assert rolled_back.json()["active"] is True
    assert rolled_back.json()["tier"] == "disk"
    assert used.json()["error"]["code"] == "host_memory_exceeded"


def test_a_rollback_does_not_wait_for_those_who_hold_the_memory(http: httpx2.Client) -> None:
    pin_only(http, [f"tenant-{number:04}" for number in range(600, 600 + RESIDENT - 1)])
    activate(http, "tenant-0401")
    put(http, "tenant-0401", "deactivate").raise_for_status()
    activate(http, "tenant-0402")
    body = {"prompt": "word", "max_tokens": 90_000, "stream": True, "adapter": "tenant-0402"}
    with http.stream("POST", "/generate", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)

        rolled_back = put(http, "tenant-0401", "rollback")

        assert rolled_back.json()["active"] is True
        assert rolled_back.json()["tier"] == "disk"
        assert next(line for line in lines if line).startswith('data: {"id"')
    assert http.get("/v1/adapters/tenant-0402").json()["tier"] != "disk"
