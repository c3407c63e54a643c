"""What one tenant has, another neither sees, uses nor changes: it is told what it is told of nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from msgspec import to_builtins
from tests.adapters.registry.conftest import files

from onebase_adapters.registry import VersionRecord
from onebase_server.http.views.adapters import AdapterViews

from .access import Keys, client_with
from .support import Server, Starter, upload

BASE = "smollm2-135m-instruct"
SCOPES = ("generate", "adapters", "train")
NOTHING = {
    "acme-private": "acme-missing",
    "digest": "f" * 64,
    "file": "file-" + "f" * 24,
    "job": "ftjob-" + "f" * 24,
    "event": "ftevent-1",
    "checkpoint": "ftckpt-1",
    "pull": "pull-" + "f" * 24,
    "response": "resp_" + "f" * 24,
}
"""What a tenant has, and what nobody has, which looks alike."""


@dataclass(frozen=True)
class Tenants:
    """Two tenants of one server, with the same scopes, and its operator."""

    server: Server
    keys: Keys
    one: httpx2.Client
    other: httpx2.Client
    operator: httpx2.Client


@pytest.fixture(scope="module")
def tenants(serve_scripted: Starter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    keys = Keys(tmp_path_factory.mktemp("data"))
    made = [keys.make(*SCOPES, tenant=name) for name in ("one", "other")]
    operator = keys.make("admin")
    with serve_scripted("words", data_dir=keys.file.parent) as server:
        clients = [client_with(server, key) for key in (*made, operator)]
        for client in clients:
            client.headers["X-Request-Id"] = "same"
        yield Tenants(server, keys, *clients)
        for client in clients:
            client.close()
    keys.close()


@pytest.fixture(scope="module")
def private(tenants: Tenants) -> dict[str, str]:
    """What tenant `one` has: an adapter with two versions, a file, a job that has ended, and a response."""
    http = tenants.one
    upload(http, "acme-private", b"first", query="wait=true&activate=true")
    digest = upload(http, "acme-private", b"second", query="wait=true").json()["version"]
    file = http.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b'{"text": "rows"}')}
    ).json()["id"]
    body = {"model": BASE, "training_file": file, "name": "acme-trained"}
    job = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    status = f"/v1/fine_tuning/jobs/{job}"
    tenants.server.wait_for(lambda: http.get(status).json()["status"] == "succeeded")
    things = {"acme-private": "acme-private", "digest": digest, "file": file, "job": job}
    for kind, path in (("event", "events"), ("checkpoint", "checkpoints")):
        data = http.get(f"{status}/{path}").json()["data"]
        things[kind] = data[0]["id"] if data else NOTHING[kind]
    asked = {"model": BASE, "input": "hello", "max_output_tokens": 2}
    response = http.post("/v1/responses", json=asked).json()["id"]
    return {**things, "pull": "pull-" + "e" * 24, "response": response}


@pytest.fixture(scope="module")
def own(tenants: Tenants) -> str:
    """What the one who looks has: an adapter `own`. Returns the id of a file."""
    for http in (tenants.other, tenants.operator):
        upload(http, "own", b"of its own", query="wait=true&activate=true")
    rows = {"file": ("a.jsonl", b'{"text": "rows"}')}
    return str(tenants.other.post("/v1/files", data={"purpose": "fine-tune"}, files=rows).json()["id"])


HELLO = [{"role": "user", "content": "hello"}]
REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/adapters/{acme-private}", None),
    ("GET", "/v1/adapters/{acme-private}/versions", None),
    ("GET", "/v1/adapters/{acme-private}/versions/{digest}", None),
    ("GET", "/v1/adapters/{acme-private}/history", None),
    ("POST", "/v1/adapters/{acme-private}/activate", {"version": "{digest}"}),
    ("POST", "/v1/adapters/{acme-private}/activate", {"version": "{digest}", "expected": None}),
    ("POST", "/v1/adapters/{acme-private}/rollback", None),
    ("POST", "/v1/adapters/{acme-private}/deactivate", None),
    ("DELETE", "/v1/adapters/{acme-private}/versions/{digest}", None),
    ("DELETE", "/v1/adapters/{acme-private}/versions/{digest}?force=true", None),
    ("DELETE", "/v1/adapters/{acme-private}", None),
    ("DELETE", "/v1/adapters/{acme-private}?force=true", None),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "{acme-private}"}),
    ("GET", "/v1/models/{acme-private}", None),
    ("GET", "/v1/models/{acme-private}@{digest}", None),
    ("DELETE", "/v1/models/{acme-private}", None),
    ("DELETE", "/v1/models/{acme-private}?force=true", None),
    ("DELETE", "/v1/models/{acme-private}@{digest}?force=true", None),
    ("DELETE", "/v1/models/own@{digest}?force=true", None),
    ("POST", "/tokenize", {"model": "{acme-private}", "prompt": "hello"}),
    ("POST", "/v1/messages/count_tokens", {"model": "{acme-private}", "messages": HELLO}),
    ("POST", "/v1/messages", {"model": "{acme-private}@{digest}", "max_tokens": 2, "messages": HELLO}),
    ("POST", "/generate", {"prompt": "hello", "max_tokens": 2, "adapter": "{acme-private}"}),
    ("POST", "/generate", {"prompt": "hello", "max_tokens": 2, "adapter": "{acme-private}@{digest}"}),
    (
        "POST",
        "/generate",
        {"prompt": "hello", "max_tokens": 2, "adapter": [{"name": "{acme-private}", "weight": 1}]},
    ),
    (
        "POST",
        "/generate",
        {"prompt": "hello", "max_tokens": 2, "adapter": "{acme-private}", "stream": True},
    ),
    ("POST", "/v1/completions", {"model": "{acme-private}", "prompt": "hello"}),
    (
        "POST",
        "/v1/chat/completions",
        {"model": "{acme-private}", "messages": [{"role": "user", "content": "hello"}]},
    ),
    (
        "POST",
        "/generate",
        {"prompt": "a", "max_tokens": 2, "adapter": [{"name": "own"}, {"name": "{acme-private}"}]},
    ),
    ("POST", "/v1/completions", {"model": "{acme-private}", "prompt": "hello", "stream": True, "n": 2}),
    ("POST", "/v1/completions", {"model": BASE, "prompt": "hello", "adapter": "{acme-private}"}),
    ("POST", "/v1/completions", {"model": "{acme-private}@{digest}", "prompt": "hello"}),
    (
        "POST",
        "/v1/chat/completions",
        {"model": "{acme-private}@{digest}", "messages": [{"role": "user", "content": "hello"}]},
    ),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "{acme-private}"}),
    ("GET", "/v1/adapters/own/versions/{digest}", None),
    ("POST", "/v1/adapters/own/activate", {"version": "{digest}"}),
    ("POST", "/v1/adapters/own/rollback", {"expected": "{digest}"}),
    ("DELETE", "/v1/adapters/own/versions/{digest}?force=true", None),
    ("GET", "/v1/adapters/{acme-private}/versions/{pull}", None),
    ("GET", "/v1/models/own@{digest}", None),
    ("POST", "/generate", {"prompt": "hello", "max_tokens": 2, "adapter": "own@{digest}"}),
    ("GET", "/v1/files/{file}", None),
    ("GET", "/v1/files/{file}/content", None),
    ("GET", "/v1/files?after={file}", None),
    ("DELETE", "/v1/files/{file}", None),
    ("POST", "/v1/fine_tuning/jobs", {"model": BASE, "training_file": "{file}"}),
    (
        "POST",
        "/v1/fine_tuning/jobs",
        {"model": BASE, "training_file": "{own-file}", "validation_file": "{file}"},
    ),
    ("GET", "/v1/fine_tuning/jobs/{job}", None),
    ("GET", "/v1/fine_tuning/jobs?after={job}", None),
    ("POST", "/v1/fine_tuning/jobs/{job}/cancel", None),
    ("POST", "/v1/fine_tuning/jobs/{job}/pause", None),
    ("POST", "/v1/fine_tuning/jobs/{job}/resume", None),
    ("POST", "/v1/fine_tuning/jobs/{job}/stop", None),
    ("GET", "/v1/fine_tuning/jobs/{job}/events", None),
    ("GET", "/v1/fine_tuning/jobs/{job}/events?stream=true", None),
    ("GET", "/v1/fine_tuning/jobs/{job}/events?after={event}", None),
    ("GET", "/v1/fine_tuning/jobs/{job}/checkpoints", None),
    ("GET", "/v1/fine_tuning/jobs/{job}/checkpoints?after={checkpoint}", None),
    ("GET", "/v1/responses/{response}", None),
    ("GET", "/v1/responses/{response}/input_items", None),
    ("DELETE", "/v1/responses/{response}", None),
    ("POST", "/v1/responses", {"model": BASE, "input": "hello", "previous_response_id": "{response}"}),
    ("POST", "/v1/responses", {"model": "{acme-private}", "input": "hello"}),
]
FOR_OPERATORS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/adapters/{acme-private}/pin", {"pinned": True}),
    ("POST", "/v1/adapters/{acme-private}/share", {"shared": True}),
]


def sent(http: httpx2.Client, request: tuple[str, str, Any], things: dict[str, str]) -> httpx2.Response:
    """The answer to a request about these things."""
    method, path, body = request
    text = json.dumps(body)
    for name, thing in things.items():
        path, text = path.replace(f"{{{name}}}", thing), text.replace(f"{{{name}}}", thing)
    return http.request(method, path, json=None if body is None else json.loads(text))


def neutral(answer: httpx2.Response, things: dict[str, str]) -> tuple[int, str, list[tuple[str, str]]]:
    """Status, body and headers, with the names of the things left out."""
    text = answer.text
    for name, thing in things.items():
        text = text.replace(thing[:80], f"<{name}>")
    headers = sorted((name, value) for name, value in answer.headers.items() if name != "date")
    return answer.status_code, text, [one for one in headers if one[0] != "content-length"]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: f"{one[0]} {one[1]} {sorted(one[2] or {})}")
def test_another_tenants_thing_and_one_that_does_not_exist_get_the_same_answer(
    tenants: Tenants, private: dict[str, str], own: str, request_: tuple[str, str, Any]
) -> None:
    things = {"own-file": own}
    theirs = neutral(sent(tenants.other, request_, things | private), private)
    nothing = neutral(sent(tenants.other, request_, things | NOTHING), NOTHING)

    assert theirs == nothing
    assert 400 <= theirs[0] < 500
    if "own-file" not in str(request_):
        assert neutral(sent(tenants.operator, request_, private), private)[0] == theirs[0]


@pytest.mark.parametrize("request_", FOR_OPERATORS, ids=lambda one: one[1])
def test_an_operator_of_another_tenant_is_told_what_it_is_told_of_nothing(
    tenants: Tenants, private: dict[str, str], request_: tuple[str, str, Any]
) -> None:
    theirs = neutral(sent(tenants.operator, request_, private), private)

    assert theirs == neutral(sent(tenants.operator, request_, NOTHING), NOTHING)
    assert theirs[0] == 404


def test_after_all_that_was_tried_the_owner_still_has_everything(
    tenants: Tenants, private: dict[str, str]
) -> None:
    http = tenants.one
    adapter = http.get("/v1/adapters/acme-private").json()
    assert (adapter["tenant"], adapter["active"], adapter["versions"]) == ("one", True, 2)
    assert http.get(f"/v1/files/{private['file']}/content").text == '{"text": "rows"}'
    assert http.get(f"/v1/fine_tuning/jobs/{private['job']}").json()["status"] == "succeeded"
    events = http.get(f"/v1/fine_tuning/jobs/{private['job']}/events?stream=true").text
    assert "event: done" in events
    assert http.get("/v1/adapters/acme-trained").json()["active"] is True
    job = http.get(f"/v1/fine_tuning/jobs/{private['job']}").json()
    assert http.get(f"/v1/files/{job['result_files'][0]}/content").text.startswith("step,")
    assert tenants.other.get(f"/v1/files/{job['result_files'][0]}").status_code == 404


def test_lists_show_what_is_the_tenants_own(tenants: Tenants, private: dict[str, str]) -> None:
    for path in ("/v1/adapters", "/v1/models", "/v1/files", "/v1/fine_tuning/jobs"):
        mine, theirs = tenants.one.get(path), tenants.other.get(path)
        assert any(thing in mine.text for thing in private.values()), path
        for thing in (*private.values(), "acme-trained"):
            assert thing not in theirs.text, path


def test_two_tenants_have_adapters_of_one_name_and_each_gets_its_own(tenants: Tenants) -> None:
    digests = {}
    for tenant, http in (("one", tenants.one), ("other", tenants.other), ("default", tenants.operator)):
        answer = upload(http, "support", f"of {tenant}".encode(), query="wait=true&activate=true")
        digests[tenant] = answer.json()["version"]
        assert answer.json()["tenant"] == tenant
    assert len(set(digests.values())) == 3

    for tenant, http in (("one", tenants.one), ("other", tenants.other), ("default", tenants.operator)):
        body = {"prompt": "hello", "max_tokens": 1, "adapter": "support"}
        assert http.post("/generate", json=body).json()["adapter"] == f"support@{digests[tenant][:12]}"
        assert http.get("/v1/adapters/support").json()["version"] == digests[tenant]

    assert tenants.one.delete("/v1/adapters/support").status_code == 200
    assert tenants.one.get("/v1/adapters/support").status_code == 404
    assert tenants.other.get("/v1/adapters/support").json()["version"] == digests["other"]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_prefix_that_another_tenant_sent_is_not_in_the_cache(tenants: Tenants, path: str) -> None:
    """The real engine's keys are tested in tests/engine; here: that the tenant gets there."""
    text = f"something secret for {path}"

    def cached(http: httpx2.Client) -> int:
        body: dict[str, Any] = {"prompt": text, "max_tokens": 1, "model": BASE}
        if path == "/generate":
            del body["model"]
        if path == "/v1/chat/completions":
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        usage = http.post(path, json=body).json()["usage"]
        return int(usage.get("cached_tokens", usage.get("prompt_tokens_details", {}).get("cached_tokens")))

    assert cached(tenants.one) == 0
    assert cached(tenants.other) == 0
    assert cached(tenants.operator) == 0
    assert cached(tenants.one) > 0


def test_changes_are_written_down_with_the_key_that_made_them(tenants: Tenants) -> None:
    version = upload(tenants.other, "noted", b"noted", query="wait=true&activate=true").json()
    history = tenants.other.get("/v1/adapters/noted/history").json()["data"]

    key = tenants.other.headers["authorization"].removeprefix("Bearer ")
    assert key.startswith(version["created_by"] + "-")
    assert history[0]["actor"] == version["created_by"]


def test_only_the_operator_loads_the_folders_and_private_repositories_of_the_server(
    tenants: Tenants,
) -> None:
    for path in ("/etc", "./anything", "acme/private-repo"):
        body = {"lora_name": "mine", "lora_path": path}
        assert tenants.other.post("/v1/load_lora_adapter", json=body).status_code == 403
    answer = tenants.other.post("/v1/adapters", json={"name": "mine", "hub": {"repo": "acme/private-repo"}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "hub_not_allowed")


def test_content_that_another_tenant_has_is_proved_again_and_is_nobodys_but_the_senders(
    tenants: Tenants,
) -> None:
    first = upload(tenants.one, "twin", b"the same bytes", query="wait=true").json()

    for http in (tenants.other, tenants.operator):
        again = upload(http, "twin", b"the same bytes", query="wait=false")
        assert (again.status_code, again.json()["version"]) == (202, first["version"])
        assert again.json()["state"] != "ready"
        assert upload(http, "twin", b"the same bytes").json()["report"]["proof"] is not None
    assert tenants.one.delete("/v1/adapters/twin").status_code == 200
    body = {"prompt": "hello", "max_tokens": 1, "adapter": f"twin@{first['version']}"}
    assert tenants.other.post("/generate", json=body).status_code == 200


def test_events_of_other_tenants_jobs_come_to_nobody_whatever_id_is_the_last_one_known(
    tenants: Tenants, private: dict[str, str], own: str
) -> None:
    http = tenants.other
    job = http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": own}).json()["id"]
    status = f"/v1/fine_tuning/jobs/{job}"
    tenants.server.wait_for(lambda: http.get(status).json()["status"] == "succeeded")

    for known in (private["event"], "ftevent-1", "ftevent-999999999999"):
        page = http.get(f"{status}/events?after={known}")
        live = http.get(f"{status}/events?stream=true", headers={"Last-Event-ID": known})
        assert page.status_code == live.status_code == 200
        for text in (page.text, live.text):
            assert not any(thing in text for thing in (private["job"], private["file"], "acme"))


def test_an_adapter_that_is_shared_no_longer_is_as_unknown_as_before_and_a_stream_on_it_ends_well(
    tenants: Tenants,
) -> None:
    digest = upload(tenants.operator, "lent", b"lent", query="wait=true&activate=true").json()["version"]
    tenants.operator.post("/v1/adapters/lent/share", json={"shared": True})
    body = {"prompt": "hello there", "max_tokens": 60, "adapter": "lent", "stream": True}
    with tenants.other.stream("POST", "/generate", json=body) as stream:
        assert stream.status_code == 200
        tenants.operator.post("/v1/adapters/lent/share", json={"shared": False})
        assert "[DONE]" in stream.read().decode()

    for request_ in REQUESTS:
        if "{acme-private}" in str(request_) and "own-file" not in str(request_):
            things = {**NOTHING, "digest": digest}
            gone = sent(tenants.other, request_, {**things, "acme-private": "lent"})
            never = sent(tenants.other, request_, {**things, "acme-private": "tnel"})
            assert neutral(gone, {"x": "lent"}) == neutral(never, {"x": "tnel"}), request_


# ---- shared adapters ----------------------------------------------------------------------------


def test_a_shared_adapter_is_used_and_read_by_all_and_changed_by_its_owner_alone(tenants: Tenants) -> None:
    digest = upload(tenants.operator, "house", b"house", query="wait=true&activate=true").json()["version"]
    assert tenants.one.post("/v1/adapters/house/share", json={"shared": True}).status_code == 403
    shared = tenants.operator.post("/v1/adapters/house/share", json={"shared": True}).json()
    assert shared["shared"] is True

    for http in (tenants.one, tenants.other):
        body = {"prompt": "hello", "max_tokens": 1, "adapter": "house"}
        assert http.post("/generate", json=body).json()["adapter"] == f"house@{digest[:12]}"
        assert "house" in [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert http.get("/v1/adapters/house").json()["version"] == digest
        assert http.get("/v1/adapters/house/versions").json()["data"][0]["version"] == digest
        assert http.get(f"/v1/adapters/house/versions/{digest[:9]}").json()["active"] is True
        assert http.get("/v1/adapters/house/history").json()["data"]
        whole = http.get("/v1/adapters/house/versions").json()["data"][0]
        single = http.get(f"/v1/adapters/house/versions/{digest}").json()
        entry = http.get("/v1/adapters/house/history").json()["data"][0]
        assert (whole["created_by"], single["created_by"], entry["actor"]) == ("", "", ""), "whose key it was"
    own = tenants.operator.get("/v1/adapters/house/history").json()["data"][0]["actor"]
    assert own.startswith("ob-")
    for method, path, body in (
        ("POST", "activate", {"version": digest}),
        ("POST", "rollback", None),
        ("POST", "deactivate", None),
        ("DELETE", f"versions/{digest}?force=true", None),
        ("DELETE", "?force=true", None),
    ):
        place = f"/v1/adapters/house/{path}".replace("/?", "?")
        answer = tenants.one.request(method, place, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "adapter_read_only"), place
    rows = {"file": ("a.jsonl", b'{"text": "rows"}')}
    file = tenants.one.post("/v1/files", files=rows, data={"purpose": "fine-tune"}).json()["id"]
    further = tenants.one.post("/v1/fine_tuning/jobs", json={"model": "house", "training_file": file})
    assert (further.status_code, further.json()["error"]["code"]) == (403, "adapter_read_only")


def test_of_what_a_shared_adapter_was_trained_others_read_nothing(tenants: Tenants) -> None:
    http, rows = tenants.operator, {"file": ("a.jsonl", b'{"text": "rows"}')}
    file = http.post("/v1/files", data={"purpose": "fine-tune"}, files=rows).json()["id"]
    for name, model in (("secret-draft", BASE), ("published", "secret-draft")):
        body = {"model": model, "training_file": file, "name": name, "activate": "always"}
        job = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        status = f"/v1/fine_tuning/jobs/{job}"
        tenants.server.wait_for(lambda path=status: http.get(path).json()["status"] == "succeeded")
    http.post("/v1/adapters/published/share", json={"shared": True})

    mine, theirs = (one.get("/v1/adapters/published/versions").json() for one in (http, tenants.other))
    assert mine["data"][0]["source"]["parent"]["name"] == "secret-draft"
    assert theirs["data"][0]["source"] == {"kind": "training"}


def test_another_tenant_reads_only_listed_fields_of_a_shared_versions_source_and_signature() -> None:
    secret: Any = {
        "job": "ftjob-1",
        "step": 8,
        "parent": {"name": "private", "version": "e" * 64},
        "parents": [{"name": "private", "version": "e" * 64, "weight": 1.0}],
        "checkpoint": "secret",
        "path": "secret",
        "options": {"activate": True},
    }
    statement = {"recipe": {"sample_prompts": ["secret"]}, "data": {"training": {"sha256": "f" * 64}}}
    source = {
        "kind": "training",
        "signature": {"status": "verified", "signer": "server", "statement": statement, "bundle": "secret"},
        **secret,
    }
    both = files("1")
    digest = both.digest
    version = VersionRecord("acme", "a", digest, "ready", both, None, None, source, None, 0.0, "ob-1", 0.0)
    catalog = SimpleNamespace(
        base_name="base", of=lambda tenant: SimpleNamespace(own=lambda name: SimpleNamespace(active=digest))
    )
    views: Any = AdapterViews
    shown = views(SimpleNamespace(catalog=catalog), None, None, None).version(version, "others")
    assert to_builtins(shown)["source"] == {"kind": "training"}
    assert to_builtins(shown)["signature"] == {"status": "verified", "signer": "server"}
    assert shown.created_by == ""
    own = views(SimpleNamespace(catalog=catalog), None, None, None).version(version, "acme")
    assert own.signature.statement == statement


def test_a_tenants_own_adapter_comes_before_a_shared_one_of_its_name(tenants: Tenants) -> None:
    theirs = upload(tenants.operator, "both", b"shared", query="wait=true&activate=true").json()["version"]
    tenants.operator.post("/v1/adapters/both/share", json={"shared": True})
    own = upload(tenants.one, "both", b"own", query="wait=true&activate=true").json()["version"]

    body = {"prompt": "hello", "max_tokens": 1, "adapter": "both"}
    assert tenants.one.post("/generate", json=body).json()["adapter"] == f"both@{own[:12]}"
    assert tenants.other.post("/generate", json=body).json()["adapter"] == f"both@{theirs[:12]}"
    names = [one["name"] for one in tenants.one.get("/v1/adapters").json()["data"]]
    assert names.count("both") == 1

    tenants.operator.post("/v1/adapters/both/share", json={"shared": False})
    assert tenants.other.post("/generate", json=body).status_code == 404
    assert tenants.one.post("/generate", json=body).json()["adapter"] == f"both@{own[:12]}"
