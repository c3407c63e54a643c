"""vLLM's routes to load and unload adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from ..hub_standin import HubStandIn
from .support import CONFIG, Starter, make_folder

WEIGHTS = {"one": b"vllm one", "two": b"vllm two", "bad": b"broken"}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        content = {"adapter_config.json": CONFIG.encode(), "adapter_model.safetensors": b"from the hub"}
        hub.add_repo("acme/support", content)
        hub.add_repo("other/support", content)
        yield hub


@pytest.fixture(scope="module")
def http(
    serve_scripted: Starter, hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx2.Client]:
    """A server on a folder that is empty at the start and holds three adapters later."""
    root = tmp_path_factory.mktemp("root")
    adapters = root / "adapters"
    adapters.mkdir()
    options = ["--adapters-dir", str(adapters), "--hub-allow", "acme/*"]
    environment = hub.environment(tmp_path_factory.mktemp("hf"))
    with serve_scripted("words", *options, environment=environment) as server, server.client() as http:
        for name, content in WEIGHTS.items():
            make_folder(adapters, name).joinpath("adapter_model.safetensors").write_bytes(content)
        make_folder(root, "outside")
        (adapters / "link").symlink_to(root / "outside")
        (adapters / "empty").mkdir()
        http.headers["x-root"] = str(root)
        yield http


def load(http: httpx2.Client, name: str, path: str, **more: object) -> httpx2.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def used_version(http: httpx2.Client, name: str) -> str:
    body = {"model": name, "prompt": "word", "max_tokens": 1}
    http.post("/v1/completions", json=body).raise_for_status()
    return str(http.get(f"/v1/adapters/{name}").json()["version"])


def test_a_folder_is_loaded_served_and_unloaded_as_in_vllm(http: httpx2.Client) -> None:
    loaded = load(http, "sql", f"{http.headers['x-root']}/adapters/one")

    assert (loaded.status_code, loaded.text) == (
        200, "Success: LoRA adapter 'sql' added successfully.",
    )  # fmt: skip
    first = used_version(http, "sql")
    again = load(http, "sql", "two")
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    assert load(http, "sql", "two", load_inplace=True).status_code == 200
    assert used_version(http, "sql") != first
    unloaded = http.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert unloaded.text == "Success: LoRA adapter 'sql' removed successfully."
    assert "sql" not in [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert http.post("/v1/completions", json={"model": "sql", "prompt": "x"}).status_code == 404
    assert load(http, "sql", "one").status_code == 200
    assert used_version(http, "sql") == first


def test_a_repository_that_is_allowed_is_loaded(http: httpx2.Client) -> None:
    assert load(http, "hubbed", "acme/support").status_code == 200
    assert used_version(http, "hubbed")
    refused = load(http, "refused", "other/support")
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "hub_not_allowed"


@pytest.mark.parametrize(
    "path", ["{root}/outside", "../outside", "link", "/etc", "{root}/adapters", "~/x", "."]
)
def test_a_folder_elsewhere_is_not_loaded_however_it_is_written(http: httpx2.Client, path: str) -> None:
    answer = load(http, "escape", path.format(root=http.headers["x-root"]))

    assert answer.status_code in (400, 403), answer.text
    assert answer.json()["error"]["param"] == "lora_path"
    assert http.get("/v1/adapters/escape").status_code == 404


def test_what_cannot_be_served_and_names_that_cannot_be_are_refused(http: httpx2.Client) -> None:
    assert load(http, "bad", "bad").json()["error"]["code"] == "broken_weights"
    assert "adapter_config.json" in load(http, "none", "empty").json()["error"]["message"]
    assert load(http, "a/b", "one").json()["error"]["param"] == "name"
    assert load(http, "nul", "a\0b").status_code == 400
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "x"}).status_code == 400
    missing = http.post("/v1/unload_lora_adapter", json={"lora_name": "nobody"})
    assert missing.status_code == 404
    assert "cannot be found" in missing.json()["error"]["message"]


def test_a_folder_that_came_later_is_not_served_by_itself(http: httpx2.Client, tmp_path: Path) -> None:
    names = [entry["id"] for entry in http.get("/v1/adapters").json()["data"]]
    assert not set(names) & {"one", "two", "link"}
