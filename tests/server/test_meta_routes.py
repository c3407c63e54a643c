"""What probes and people ask: health, readiness, version, models, adapters, and what is not there."""

from __future__ import annotations

from typing import Any

import pytest

import onebase_server


def test_a_running_server_is_healthy_and_ready(api: Any) -> None:
    assert api.http.get("/health").json()["status"] == "ok"
    assert api.http.get("/ready").status_code == 200
    assert api.http.get("/version").json()["version"] == onebase_server.__version__


def test_the_root_says_what_this_is_and_where_things_are(api: Any) -> None:
    said = api.http.get("/").json()
    assert said["name"] == "OneBase"
    for path in (*said["reference"].values(), said["health"], said["ready"]):
        assert api.http.get(path).status_code == 200
    assert api.http.get(f"{said['base_urls']['openai']}/models").status_code == 200


def test_the_head_of_an_answer_is_that_of_the_whole(api: Any) -> None:
    for path in ("/health", "/v1/models", "/"):
        head, whole = api.http.head(path), api.http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.content))
    assert api.http.head("/nowhere").status_code == 404
    refused = api.http.head("/generate")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert api.http.post("/health").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/models/", "/v1/models"),
        ("/v1/generate", "/generate"),
        ("/nowhere", None),
    ],
)
def test_a_slip_of_the_base_url_is_told(api: Any, path: str, meant: str | None) -> None:
    message = api.http.post(path, json={}).json()["error"]["message"]
    assert (f"Did you mean {meant}?" in message) == (meant is not None)


def test_status_tells_the_memory_of_the_base_and_the_engines_work(api: Any) -> None:
    before = api.http.get("/status").json()

    api.generate(prompt="hi", max_tokens=2)
    after = api.http.get("/status").json()

    assert after["info"]["quantization"] == "nf4"
    assert 100e6 < after["info"]["base_bytes"] < 125e6
    assert after["info"]["gpu_sharing"] == "", "it is on a CPU"
    assert after["stats"]["generated_tokens"] >= before["stats"]["generated_tokens"] + 2


def test_adapters_are_listed_with_version_rank_and_size(api: Any) -> None:
    entries = {entry["id"]: entry for entry in api.http.get("/v1/adapters").json()["data"]}

    assert set(entries) == {"red", "blue"}
    assert entries["red"]["rank"] == 4
    assert entries["blue"]["rank"] == 8
    assert entries["red"]["object"] == "adapter"
    assert entries["red"]["base"] == api.base
    assert entries["red"]["active"] is True
    assert len(entries["red"]["version"]) == 64
    assert entries["red"]["parameters"] > 0
    assert entries["red"]["bytes"] > 0
    assert any("q_proj" in target for target in entries["red"]["targets"])
    alone = api.http.get("/v1/adapters/red").json()
    assert alone | {"tier": "slot"} == entries["red"] | {"tier": "slot"}  # where it is may change meanwhile


def test_models_are_the_base_and_its_adapters(api: Any) -> None:
    models = api.http.get("/v1/models").json()

    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == [api.base, "blue", "red"]
    assert api.http.get(f"/v1/models/{api.base}").json()["object"] == "model"
    assert api.http.get(f"/v1/models/red@{api.digests['red'][:10]}").json()["parent"] == api.base


def test_an_unknown_model_is_not_found(api: Any) -> None:
    answer = api.http.get("/v1/models/gpt-9")

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/generate", 405)])
def test_wrong_paths_and_methods_get_errors_in_the_same_shape(
    api: Any, method: str, path: str, status: int
) -> None:
    answer = api.http.request(method, path)

    assert answer.status_code == status
    assert path in answer.json()["error"]["message"]


def test_the_reference_describes_every_route(api: Any) -> None:
    paths = api.http.get("/openapi.json").json()["paths"]

    assert {"/generate", "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/adapters"} <= set(
        paths
    )
    assert api.http.get("/docs").status_code == 200
