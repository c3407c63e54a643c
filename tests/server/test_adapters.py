"""/v1/adapters: what each route does, with engines and verifiers that take any file."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from .support import CONFIG, PATIENCE, Server, Starter, one_server, upload

LONG = {"prompt": "word", "max_tokens": 90_000, "stream": True}


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("data") / "onebase"
    with serve_scripted("words", "--max-upload", "3MB", data_dir=data_dir) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


def error(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer that must have this status."""
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


def digest_of(answer: httpx2.Response) -> str:
    assert answer.status_code in (200, 202), answer.text
    return str(answer.json()["version"])


# ---- the way of a version ---------------------------------------------------------------------


def test_an_upload_becomes_a_ready_version_with_a_whole_report(http: httpx2.Client) -> None:
    answer = upload(http, "first", b"one")

    version = answer.json()
    assert answer.status_code == 200
    assert version["object"] == "adapter.version"
    assert version["id"] == f"first@{version['version'][:12]}"
    assert (version["state"], version["active"], version["error"]) == ("ready", False, None)
    assert version["base"] == "smollm2-135m-instruct"
    assert version["source"] == {"kind": "upload"}
    assert version["report"]["proof"]["exact"] is True
    assert version["report"]["modules"][0]["name"] == "q_proj"
    assert http.get(f"/v1/adapters/first/versions/{version['version'][:8]}").json() == version
    assert http.get("/v1/adapters/first/versions").json()["data"] == [version]


def test_an_adapter_shows_its_active_version_and_nothing_of_one_that_is_not_active(
    http: httpx2.Client,
) -> None:
    digest = digest_of(upload(http, "shown", b"shown"))

    before = http.get("/v1/adapters/shown").json()
    after = http.post("/v1/adapters/shown/activate", json={"version": digest[:8]}).json()

    assert (before["active"], before["version"], before["state"]) == (False, None, "ready")
    assert (before["rank"], before["kinds"], before["tier"]) == (None, [], None)
    assert (after["active"], after["version"], after["versions"]) == (True, digest, 1)
    assert (after["rank"], after["alpha"], after["kinds"], after["targets"]) == (
        8,
        16.0,
        ["lora"],
        ["q_proj"],
    )
    assert after["tier"] == "host"
    assert after in http.get("/v1/adapters").json()["data"]
    assert after["updated_at"] >= after["created_at"] > 1_600_000_000


def test_the_same_content_is_the_same_version_and_is_answered_at_once(http: httpx2.Client) -> None:
    first = upload(http, "again", b"again")
    second = upload(http, "again", b"again", query="")

    assert second.status_code == 200
    assert second.json() == first.json()
    assert len(http.get("/v1/adapters/again/versions").json()["data"]) == 1


def test_without_wait_the_answer_is_a_version_on_its_way(http: httpx2.Client, server: Server) -> None:
    answer = upload(http, "soon", b"soon", query="activate=true")

    version = answer.json()
    assert answer.status_code == 202
    assert version["state"] in ("validating", "proving")
    server.wait_for(lambda: http.get("/v1/adapters/soon").json()["active"])
    assert http.post("/generate", json={"prompt": "word", "max_tokens": 1, "adapter": "soon"}).json()[
        "adapter"
    ] == (f"soon@{version['version'][:12]}")


@one_server
def test_a_version_may_be_waited_for(http: httpx2.Client, server: Server) -> None:
    digest = upload(http, "waited", b"waited", query="activate=true").json()["version"]
    path = f"/v1/adapters/waited/versions/{digest[:8]}"

    asked = time.monotonic()
    version = http.get(path, params={"wait_seconds": 10}).json()

    assert (version["state"], version["active"]) == ("ready", True) or time.monotonic() - asked >= 10
    server.wait_for(lambda: http.get(path, params={"wait_seconds": 10}).json()["active"])
    version = http.get(path).json()
    assert http.get(path, params={"wait_seconds": 10}).json() == version
    assert error(http.get(path, params={"wait_seconds": 11}), 400)["param"] == "query.wait_seconds"
    assert http.get("/v1/adapters/waited/versions/0123abcd", params={"wait_seconds": 10}).status_code == 404


def test_activate_may_be_a_field_of_the_form_too(http: httpx2.Client) -> None:
    assert upload(http, "formed", b"formed", activate="true").json()["active"] is True


def test_a_version_that_is_not_served_says_why_and_can_be_sent_again(http: httpx2.Client) -> None:
    refused = upload(http, "bad", b"broken 1")

    assert error(refused, 422)["code"] == "broken_weights"
    version = refused.json()["version"]
    assert version["state"] == "failed"
    assert version["error"] == {"code": "broken_weights", "message": "these weights are broken"}
    assert http.get("/v1/adapters/bad").json()["state"] == "failed"
    activation = http.post("/v1/adapters/bad/activate", json={"version": version["version"]})
    assert error(activation, 409)["code"] == "version_not_ready"
    asked = http.post("/generate", json={"prompt": "x", "adapter": f"bad@{version['version']}"})
    assert error(asked, 409)["code"] == "version_not_ready"
    assert upload(http, "bad", b"broken 1").status_code == 422


def test_a_config_that_cannot_be_served_is_refused_before_anything_is_kept(http: httpx2.Client) -> None:
    answer = upload(http, "odd", b"odd", '{"peft_type": "IA3", "r": 8, "lora_alpha": 8}')

    assert error(answer, 422)["code"]
    assert "IA3" in error(answer, 422)["message"]
    assert http.get("/v1/adapters/odd").status_code == 404


def test_an_adapter_of_another_base_is_refused_with_both_names_unless_any_base_is_sent(
    http: httpx2.Client,
) -> None:
    config = json.dumps({**json.loads(CONFIG), "base_model_name_or_path": "meta/Llama-7"})

    refused = error(upload(http, "foreign", b"foreign", config), 409)

    assert refused["code"] == "base_mismatch"
    assert "meta/Llama-7" in refused["message"]
    assert "smollm2-135m-instruct" in refused["message"]
    assert upload(http, "foreign", b"foreign", config, any_base="true").status_code == 200


# ---- which version is active -------------------------------------------------------------------


def two_versions(http: httpx2.Client, name: str) -> tuple[str, str]:
    """Two ready versions, the first of which is active."""
    first = digest_of(upload(http, name, f"{name} 1".encode(), query="wait=true&activate=true"))
    return first, digest_of(upload(http, name, f"{name} 2".encode()))


def used_version(http: httpx2.Client, adapter: str) -> str:
    """What a request gets by this name: `name@digest12`."""
    body = {"prompt": "word", "max_tokens": 1, "adapter": adapter}
    return str(http.post("/generate", json=body).json()["adapter"])


def test_activation_rollback_and_deactivation_move_what_the_name_means(http: httpx2.Client) -> None:
    first, second = two_versions(http, "moves")
    assert used_version(http, "moves") == f"moves@{first[:12]}"

    http.post("/v1/adapters/moves/activate", json={"version": second}).raise_for_status()
    assert used_version(http, "moves") == f"moves@{second[:12]}"
    assert http.post("/v1/adapters/moves/rollback").json()["version"] == first
    assert used_version(http, "moves") == f"moves@{first[:12]}"
    assert error(http.post("/v1/adapters/moves/rollback"), 409)["code"] == "nothing_to_roll_back"
    assert http.post("/v1/adapters/moves/deactivate").json()["active"] is False

    asked = error(http.post("/generate", json={"prompt": "word", "adapter": "moves"}), 404)
    assert "no active version" in asked["message"]
    assert used_version(http, f"moves@{second[:8]}") == f"moves@{second[:12]}"
    history = http.get("/v1/adapters/moves/history").json()["data"]
    assert [(entry["action"], entry["version"], entry["previous"]) for entry in history] == [
        ("deactivate", None, first),
        ("rollback", first, second),
        ("activate", second, first),
        ("activate", first, None),
    ]


def test_an_activation_that_expected_another_version_is_refused_with_the_current_one(
    http: httpx2.Client,
) -> None:
    first, second = two_versions(http, "cas")
    path = "/v1/adapters/cas/activate"

    stale = error(http.post(path, json={"version": second, "expected": second}), 409)
    none = error(http.post(path, json={"version": second, "expected": None}), 409)

    assert (stale["code"], stale["current"]) == ("stale_activation", first)
    assert none["current"] == first
    assert http.post(path, json={"version": second, "expected": first}).json()["version"] == second
    rolled = http.post("/v1/adapters/cas/rollback", json={"expected": first})
    assert error(rolled, 409)["current"] == second


def test_of_concurrent_activations_with_the_same_expectation_one_wins(
    http: httpx2.Client, server: Server
) -> None:
    first = digest_of(upload(http, "race", b"race 0", query="wait=true&activate=true"))
    others = [digest_of(upload(http, "race", f"race {number}".encode())) for number in range(1, 7)]

    def activate(digest: str) -> int:
        with server.client() as mine:
            body = {"version": digest, "expected": first}
            return mine.post("/v1/adapters/race/activate", json=body).status_code

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        statuses = list(pool.map(activate, others))

    assert sorted(statuses) == [200, *[409] * 5]
    assert http.get("/v1/adapters/race").json()["version"] == others[statuses.index(200)]


def test_concurrent_uploads_of_one_name_all_become_versions_and_the_same_content_one(
    http: httpx2.Client, server: Server
) -> None:
    def send(number: int) -> str:
        with server.client() as mine:
            return digest_of(upload(mine, "crowd", f"crowd {number // 2}".encode()))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(send, range(8)))

    assert len(set(digests)) == 4
    versions = http.get("/v1/adapters/crowd/versions").json()["data"]
    assert {version["version"] for version in versions} == set(digests)
    assert {version["state"] for version in versions} == {"ready"}


def test_a_pinned_adapter_is_loaded_and_says_so(http: httpx2.Client) -> None:
    digest_of(upload(http, "pinned", b"pinned", query="wait=true&activate=true"))

    pinned = http.post("/v1/adapters/pinned/pin", json={"pinned": True}).json()
    memory = http.get("/status").json()["host_memory"]
    loose = http.post("/v1/adapters/pinned/pin", json={"pinned": False}).json()

    assert (pinned["pinned"], pinned["tier"], loose["pinned"]) == (True, "host", False)
    assert memory["pinned"] == len(b"pinned")


# ---- the end of versions -----------------------------------------------------------------------


def test_a_deleted_version_is_gone_and_the_active_one_needs_force(http: httpx2.Client) -> None:
    first, second = two_versions(http, "less")
    path = "/v1/adapters/less/versions"

    assert error(http.delete(f"{path}/{first}"), 409)["code"] == "adapter_in_use"
    gone = http.delete(f"{path}/{second[:8]}").json()

    assert gone == {"id": f"less@{second}", "object": "adapter.deleted", "deleted": True}
    assert error(http.get(f"{path}/{second}"), 404)["code"] == "version_not_found"
    assert http.delete(f"{path}/{first}?force=true").status_code == 200
    assert http.get("/v1/adapters/less").status_code == 404


def running_stream(server: Server, adapter: str, into: list[str]) -> threading.Thread:
    """A stream that goes on until it is ended; `into` gets the data of its events."""

    def read() -> None:
        body = {**LONG, "adapter": adapter}
        with server.client() as mine, mine.stream("POST", "/generate", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    into.append(line.removeprefix("data: "))

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def test_what_is_in_use_is_deleted_by_force_only_which_ends_its_rows_and_no_others(
    http: httpx2.Client, server: Server
) -> None:
    first, _ = two_versions(http, "used")
    digest_of(upload(http, "other", b"used 1", query="wait=true&activate=true"))
    ended: list[str] = []
    going: list[str] = []
    threads = [running_stream(server, "used", ended), running_stream(server, "other", going)]
    server.wait_for(lambda: bool(ended and going))

    assert error(http.delete("/v1/adapters/used"), 409)["code"] == "adapter_in_use"
    assert error(http.delete(f"/v1/adapters/used/versions/{first}"), 409)["code"] == "adapter_in_use"
    assert http.delete("/v1/adapters/used?force=true").json()["deleted"] is True
    threads[0].join(PATIENCE)

    assert json.loads(ended[-2])["error"]["code"] == "adapter_deleted"
    assert ended[-1] == "[DONE]"
    assert http.get("/v1/adapters/used").status_code == 404
    seen = len(going)
    server.wait_for(lambda: len(going) > seen + 5)
    assert http.delete("/v1/adapters/other?force=true").status_code == 200
    threads[1].join(PATIENCE)
    server.wait_for(lambda: http.get("/status").json()["requests"] == 0)


def test_deleting_frees_memory_and_the_same_content_can_come_back(
    http: httpx2.Client, server: Server
) -> None:
    digest_of(upload(http, "phoenix", b"phoenix" * 1000, query="wait=true&activate=true"))
    used_version(http, "phoenix")
    full = http.get("/status").json()["host_memory"]["used"]

    http.delete("/v1/adapters/phoenix").raise_for_status()

    server.wait_for(lambda: http.get("/status").json()["host_memory"]["used"] <= full - 7000)
    again = upload(http, "phoenix", b"phoenix" * 1000, query="wait=true&activate=true")
    assert used_version(http, "phoenix") == again.json()["id"]


def test_unknown_names_and_versions_are_404_on_every_route(http: httpx2.Client) -> None:
    for method, path in [
        ("GET", "/v1/adapters/nobody"),
        ("GET", "/v1/adapters/nobody/versions"),
        ("GET", "/v1/adapters/nobody/versions/0123456789"),
        ("GET", "/v1/adapters/nobody/history"),
        ("POST", "/v1/adapters/nobody/rollback"),
        ("POST", "/v1/adapters/nobody/deactivate"),
        ("DELETE", "/v1/adapters/nobody"),
        ("DELETE", "/v1/adapters/nobody/versions/0123456789"),
    ]:
        answer = http.request(method, path)
        assert error(answer, 404)["code"] == "adapter_not_found", (method, path)
    activation = http.post("/v1/adapters/nobody/activate", json={"version": "0123456789"})
    assert error(activation, 404)["code"] == "adapter_not_found"
    assert error(http.post("/v1/adapters/nobody/pin", json={"pinned": True}), 404)


def test_the_data_folder_is_the_owners_alone(server: Server, http: httpx2.Client) -> None:
    folder = Path(server.data_dir)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "registry.db").is_file()
