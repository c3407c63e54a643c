"""vLLM's routes to load and unload adapters and to ask for tokens, and the models that there are."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from onebase_server.inference.tokenization import BaseTokenizer, TemplateInput

from ..hub_standin import HubStandIn
from .support import CONFIG, Starter, make_folder

BASE = "smollm2-135m-instruct"
HELLO = [{"role": "user", "content": "hello"}]
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


# ---- tokens -------------------------------------------------------------------------------------


def test_a_prompt_and_messages_are_tokenized_as_for_an_answer_and_back(
    http: httpx2.Client, tokenizer: BaseTokenizer
) -> None:
    whole = http.post(
        "/tokenize", json={"model": BASE, "prompt": "The <|im_end|>é", "return_token_strs": True}
    )
    ids = tokenizer.encode("The <|im_end|>é")
    assert whole.json() == {
        "count": len(ids),
        "max_model_len": http.get("/v1/models").json()["data"][0]["max_model_len"],
        "tokens": ids,
        "token_strs": tokenizer.names(ids),
    }
    assert "<|im_end|>" in tokenizer.names(ids)
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "The <|im_end|>é"}
    messages = [{"role": "user", "content": "Where?"}]
    for more in ({}, {"add_generation_prompt": False}):
        made = http.post("/tokenize", json={"messages": messages, **more}).json()
        assert made["tokens"] == tokenizer.encode_chat(TemplateInput(messages, None, more))
        assert made["token_strs"] is None
    answer = http.post("/v1/chat/completions", json={"model": BASE, "messages": messages, "max_tokens": 1})
    count = http.post("/tokenize", json={"messages": messages}).json()["count"]
    assert answer.json()["usage"]["prompt_tokens"] == count


def test_tokens_that_the_base_adds_can_be_left_out(tokenizer: BaseTokenizer, monkeypatch: Any) -> None:
    assert tokenizer.encode("a", special=False) == tokenizer.encode("a")
    monkeypatch.setattr(tokenizer, "_letters", True)
    monkeypatch.setattr(tokenizer, "_before", [7])
    assert tokenizer.encode("a") == [7, *tokenizer.encode("a", special=False)]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("/tokenize", {"prompt": "x", "temperature": 1}, "temperature"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        (
            "/tokenize",
            {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/detokenize", {"tokens": [1] * 100_001}, "tokens"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(
    http: httpx2.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_another_machine_learns_what_it_needs_to_write_prompts(
    http: httpx2.Client, tokenizer: BaseTokenizer
) -> None:
    info = http.get("/tokenizer_info").json()
    assert info["chat_template"] == tokenizer.chat_template
    assert info["eos_token"] == "<|im_end|>"
    assert "/" not in json.dumps(info | {"chat_template": ""})


# ---- models --------------------------------------------------------------------------------------


def test_a_model_says_since_when_it_is_there_and_what_it_is_made_of(http: httpx2.Client) -> None:
    before = int(time.time())
    assert load(http, "dated", "one").status_code == 200
    base, *adapters = http.get("/v1/models").json()["data"]
    (dated,) = (model for model in adapters if model["id"] == "dated")
    digest = http.get("/v1/adapters/dated").json()["version"]
    assert (base["root"], base["parent"], base["max_model_len"]) == (BASE, None, 100_000)
    assert base["created"] <= before <= dated["created"] <= time.time()
    assert (dated["root"], dated["parent"]) == (f"dated@{digest[:12]}", BASE)
    assert dated == http.get("/v1/models/dated").json()


def test_the_openai_client_deletes_adapters_and_versions_but_not_the_base(http: httpx2.Client) -> None:
    load(http, "gone", "one")
    first = used_version(http, "gone")
    load(http, "gone", "two", load_inplace=True)
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.ConflictError):
            client.models.delete(f"gone@{used_version(http, 'gone')}")
        old = client.models.delete(f"gone@{first[:12]}")
        assert (old.deleted, old.object) == (True, "model")
        assert len(http.get("/v1/adapters/gone/versions").json()["data"]) == 1
        assert client.models.delete("gone").id == "gone"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.delete("gone")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.PermissionDeniedError):
            client.models.delete(BASE)


def test_a_folder_that_came_later_is_not_served_by_itself(http: httpx2.Client, tmp_path: Path) -> None:
    names = [entry["id"] for entry in http.get("/v1/adapters").json()["data"]]
    assert not set(names) & {"one", "two", "link"}
