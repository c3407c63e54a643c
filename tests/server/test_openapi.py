"""The OpenAPI file is true: whatever is sent by it or against it gets an answer that it names, and no 500.

A longer look, by hand, at a server that may be spoiled, takes minutes:
`schemathesis run URL/openapi.json -H "Authorization: Bearer KEY" --exclude-checks positive_data_acceptance`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
import jsonschema
import pytest

from .access import Keys, client_with
from .support import CONFIG, Server, Starter, upload

Json = dict[str, Any]
BASE = "smollm2-135m-instruct"

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "ignored_auth",
)
CALLERS = {
    "an operator": ("admin",),
    "a tenant": ("generate", "adapters", "train"),
    "a key that is revoked": (),
}
ALSO = {
    "/v1/adapters/merge": "/v1/adapters/{name}",
    "/v1/responses/input_tokens": "/v1/responses/{response_id}",
}
"""Paths that match another one too, whose name they could be."""
EXAMPLES = {"an operator": 4, "a tenant": 2, "a key that is revoked": 1}
"""Of each operation."""


@pytest.fixture(scope="module")
def callers(keys: Keys) -> dict[str, str]:
    made = {who: keys.make(*scopes or ("admin",), tenant="default") for who, scopes in CALLERS.items()}
    keys.revoke(made["a key that is revoked"])
    return made


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, keys: Keys, callers: dict[str, str]) -> Iterator[Server]:
    with serve_scripted("flood", "--request-log", "text", data_dir=keys.file.parent) as server:
        yield server


@pytest.mark.parametrize(
    "who", ["a tenant", *(pytest.param(who, marks=pytest.mark.full) for who in CALLERS if who != "a tenant")]
)
def test_what_the_reference_allows_and_forbids_gets_an_answer_that_it_names(
    server: Server, callers: dict[str, str], keys: Keys, who: str
) -> None:
    schema = keys.file.parent / "openapi.json"
    if not schema.exists():
        with server.client() as http:
            key = {"Authorization": f"Bearer {callers['an operator']}"}
            schema.write_text(http.get("/openapi.json", headers=key).text)
    options = {
        "--url": server.url,
        "--header": f"Authorization: Bearer {callers[who]}",
        "--phases": "fuzzing",
        "--max-examples": str(EXAMPLES[who]),
        "--checks": ",".join(CHECKS),
        "--request-timeout": "100",
    }
    left_out = ["/api/v1/forward_backward"]  # Schemathesis cannot write protocol buffers
    if who == "an operator":
        left_out.append("/pause")  # after which every request waits
    options["--exclude-path-regex"] = "^(" + "|".join(left_out) + ")$"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(schema)),
            *(part for pair in options.items() for part in pair),
            *("--generation-deterministic", "--no-color", "--continue-on-failure", "--no-shrink"),
        ],
        capture_output=True,
        text=True,
        cwd=keys.file.parent,
    )

    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
    cases = re.search(r"(\d+) generated, \1 passed", run.stdout)
    assert cases is not None, run.stdout[-2_000:]
    assert int(cases[1]) >= 60


@pytest.fixture(scope="module")
def spec(server: Server, callers: dict[str, str]) -> Json:
    with client_with(server, callers["an operator"]) as http:
        described: Json = http.get("/openapi.json").json()
    assert len(described["paths"]) > 40
    return described


def operations(spec: Json) -> Iterator[tuple[str, Json]]:
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_every_route_says_what_its_answers_look_like(spec: Json) -> None:
    for name, operation in operations(spec):
        assert operation["responses"], name
        for status, response in operation["responses"].items():
            kinds = response.get("content", {})
            told = [kind.get("schema") or kind.get("x-itemSchema") for kind in kinds.values()]
            assert all([kinds, *told]), (
                f"{name} does not say what its answer {status} looks like: give its router decorator "
                "`responses=answer(...)`, with a struct of onebase_protocol"
            )


def test_every_reference_leads_somewhere_and_nothing_is_there_for_nobody(spec: Json) -> None:
    used = set()

    def follow(part: Any) -> None:
        if isinstance(part, list):
            for item in part:
                follow(item)
        elif isinstance(part, dict):
            target = part.get("$ref")
            if isinstance(target, str):
                used.add(target)
            for item in part.values():
                follow(item)

    follow(spec)
    known = {f"#/components/schemas/{name}" for name in spec["components"]["schemas"]}
    assert used == known
    twice = [name for name in known if "__" in name]
    assert not twice, "generators of types want names of which there is one: rename one of the two classes"


class Walk:
    """Sends requests, and compares each answer with what the reference says of it, with no field more."""

    def __init__(self, http: httpx2.Client, spec: Json) -> None:
        self._http = http
        self._spec = {**_closed(spec), "$schema": "https://json-schema.org/draft/2020-12/schema"}
        paths = sorted(spec["paths"], key=lambda path: path.count("{"))
        self._paths = {re.compile(re.sub(r"\{\w+\}", "[^/]+", path)): path for path in paths}
        self.seen: set[str] = set()

    def __call__(self, method: str, path: str, status: int = 200, **how: Any) -> Any:
        answer = self._http.request(method, path, **how)
        assert answer.status_code == status, answer.text
        bare = path.partition("?")[0]
        template = next(found for pattern, found in self._paths.items() if pattern.fullmatch(bare))
        operation = self._spec["paths"][template][method.lower()]
        kind = answer.headers["content-type"].partition(";")[0]
        described = operation["responses"]
        told = described[str(status)]["content"][kind]
        self.seen.add(f"{method} {template}")
        if kind == "text/event-stream":
            for line in answer.text.split("\n"):
                if line.startswith("data: ") and line != "data: [DONE]":
                    self._validate(json.loads(line.removeprefix("data: ")), told["x-itemSchema"])
            return answer.text
        if kind != "application/json":
            return answer.text
        found = answer.json()
        self._validate(found, told["schema"])
        return found

    def _validate(self, found: Any, schema: Json) -> None:
        jsonschema.validate(found, {**self._spec, **schema}, jsonschema.Draft202012Validator)


def _closed(part: Any) -> Any:
    """A schema whose objects have only what it says they have."""
    if isinstance(part, list):
        return [_closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    made = {key: _closed(value) for key, value in part.items()}
    if made.get("type") == "object" and isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    return made


def test_what_routes_answer_is_what_the_reference_says_and_no_more(
    server: Server, callers: dict[str, str], spec: Json
) -> None:
    with client_with(server, callers["an operator"]) as http:
        walk = Walk(http, spec)
        _ask(walk)
        _walk_through_an_adapter(walk, http)
        _walk_through_a_job(walk, http, server)
        _walk_through_a_batch(walk, http, server)
        _walk_through_keys(walk)
        _walk_through_live_training(walk)
        _walk_through_the_log(walk, server)
        for path in ("/health", "/ready", "/version", "/status", "/metrics", "/v1/audit", "/tokenizer_info"):
            walk("GET", path)
        for method, path in (("POST", "/pause"), ("GET", "/is_paused"), ("POST", "/resume")):
            walk(method, path)
        for path in (
            "/server_info",
            "/status/history",
            "/route_secret",
            "/get_world_size",
            "/v1/load",
            "/v1/usage",
            "/v1/usage?format=csv&group_by=day",
        ):
            walk("GET", path)
    folders = {"POST /v1/load_lora_adapter"}  # needs a folder under --adapters-dir
    missed = {name for name, _ in operations(spec)} - walk.seen - folders
    assert not missed, "let this test send these once, and see what they answer"


def _ask(walk: Walk) -> None:
    grader = {"type": "string_check", "name": "c", "input": "x", "reference": "x", "operation": "eq"}
    walk("POST", "/v1/fine_tuning/alpha/graders/validate", json={"grader": grader})
    walk("POST", "/v1/fine_tuning/alpha/graders/run", json={"grader": grader, "model_sample": "x"})
    short = {"max_tokens": 2}
    messages = [{"role": "user", "content": "word"}]
    walk("POST", "/generate", json={"prompt": "word", "n": 2, "logprobs": 2, "echo": True, **short})
    details = {"details": True, "top_n_tokens": 2, "max_new_tokens": 2}
    walk("POST", "/", json={"inputs": "word", "parameters": details})
    asked: Json = {"model": BASE, **short}
    ids = {"return_token_ids": True}
    walk("POST", "/v1/completions", json={**asked, **ids, "prompt": ["a", "b"], "logprobs": 1})
    walk("POST", "/v1/completions", json={**asked, "prompt": "a b c", "prompt_logprobs": 1})
    choice = {"logprobs": True, "top_logprobs": 2}
    walk("POST", "/v1/chat/completions", json={**asked, **ids, **choice, "messages": messages})
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    streamed = {"stream": True, "max_tokens": 4}
    for more in ({"stream_options": {"include_usage": True}}, {"tools": [tool], "tool_choice": "required"}):
        body = {**asked, **ids, **choice, **streamed, "messages": messages, "n": 2, **more}
        walk("POST", "/v1/chat/completions", json=body)
    walk("POST", "/v1/completions", json={**asked, **ids, **streamed, "prompt": "a", "logprobs": 1})
    walk("POST", "/generate", json={"prompt": "word", "n": 2, "logprobs": 2, "echo": True, **streamed})
    parts = [
        {"prompt": "word", "n": 2, "logprobs": 2, "max_tokens": 4},
        {"prompt": "word", "adapter": "nobody"},
    ]
    walk("POST", "/generate/many", json={"requests": parts})
    walk("POST", "/generate/gen-nothing/cancel", 404)  # of what runs, its own test has the answer
    walk("POST", "/", json={"inputs": "word", "stream": True, "parameters": details})
    used = {"name": "now", "input_schema": {"type": "object"}}
    called: dict[str, object] = {"stream": True, "tools": [used], "tool_choice": {"type": "any"}}
    for options in ({}, {"stream": True}, called):
        walk("POST", "/v1/messages", json={**asked, "messages": messages, **options})
    walk("POST", "/v1/messages/count_tokens", json={"model": BASE, "messages": messages})
    walk("POST", "/v1/responses/input_tokens", json={"model": BASE, "input": "word"})
    body = {"model": BASE, "input": "word", "max_output_tokens": 16, "top_logprobs": 1}
    response = walk("POST", "/v1/responses", json=body)["id"]
    flat = {"type": "function", "name": "now", "parameters": {"type": "object"}}
    for more in ({}, {"tools": [flat], "tool_choice": "required"}):
        walk("POST", "/v1/responses", json={**body, "stream": True, **more})
    call = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
    said = {"role": "user", "content": "word"}
    gave = {"type": "function_call_output", "call_id": "c", "output": "noon"}
    more = {**body, "previous_response_id": response, "input": [said, call, gave]}
    response = walk("POST", "/v1/responses", json=more)["id"]
    walk("GET", f"/v1/responses/{response}")
    walk("GET", f"/v1/responses/{response}/input_items")
    walk("DELETE", f"/v1/responses/{response}")
    talk = walk("POST", "/v1/conversations", json={"items": [said], "metadata": {"topic": "noon"}})["id"]
    walk("POST", "/v1/responses", json={**body, "conversation": talk})
    walk("GET", f"/v1/conversations/{talk}")
    walk("POST", f"/v1/conversations/{talk}", json={"metadata": {}})
    items = walk("POST", f"/v1/conversations/{talk}/items", json={"items": [said, call, gave]})["data"]
    walk("GET", f"/v1/conversations/{talk}/items")
    walk("GET", f"/v1/conversations/{talk}/items/{items[0]['id']}")
    walk("DELETE", f"/v1/conversations/{talk}/items/{items[0]['id']}")
    walk("DELETE", f"/v1/conversations/{talk}")
    tokens = walk("POST", "/tokenize", json={"prompt": "word", "return_token_strs": True})["tokens"]
    walk("POST", "/detokenize", json={"tokens": tokens})
    walk("POST", "/v1/embeddings", json={"input": ["a", "b"]})
    walk("POST", "/v1/embeddings", json={"input": "a", "encoding_format": "base64"})
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        walk("POST", path, json={"query": "a", "documents": ["b", "c"]})
    for path in ("/score", "/v1/score"):
        walk("POST", path, json={"text_1": "a", "text_2": ["b", "c"]})
    walk("POST", "/v1/decide", json={"prompt": "a", "choices": ["b", "c"], "prior": "d"})


def _walk_through_an_adapter(walk: Walk, http: httpx2.Client) -> None:
    first = upload(http, "shop", b"one").json()["version"]
    second = upload(http, "shop", b"two").json()["version"]
    files = [
        ("files", ("adapter_config.json", CONFIG)),
        ("files", ("adapter_model.safetensors", b"three")),
    ]
    walk("POST", "/v1/adapters", 202, data={"name": "slow"}, files=files)
    walk("POST", "/v1/adapters?wait=true", data={"name": "slow"}, files=files)
    walk("POST", "/v1/adapters/shop/activate", json={"version": first})
    walk("POST", "/v1/adapters/shop/activate", json={"version": second})
    for action in ("rollback", "deactivate", "rollback"):
        walk("POST", f"/v1/adapters/shop/{action}")
    for path in ("", "/shop", "/shop/versions", f"/shop/versions/{first}", "/shop/history"):
        walk("GET", f"/v1/adapters{path}")
    walk("GET", f"/v1/adapters/shop/versions/{first}/files")
    walk("GET", f"/v1/adapters/shop/versions/{first}/files/adapter_config.json")
    _walk_through_gates(walk, second)
    _walk_through_a_rollout(walk, second)
    terms = [{"name": f"shop@{version}", "weight": 0.5} for version in (first, second)]
    merge = {"name": "mixed", "adapters": terms, "method": "dare_ties", "density": 0.5}
    walk("POST", "/v1/adapters/merge", 202, json=merge)
    walk("POST", "/v1/adapters/merge?wait=true", json=merge)
    walk("GET", "/v1/adapters/mixed/versions")
    walk("POST", "/v1/adapters/shop/pin", json={"pinned": True})
    walk("POST", "/v1/adapters/shop/share", json={"shared": True})
    walk("POST", "/generate", json={"prompt": "word", "max_tokens": 1, "adapter": terms})
    for path, name in (("/classify", "sorts"), ("/v1/classify", "tags")):
        upload(http, name, name.encode(), query="wait=true&activate=true")
        walk("POST", path, json={"model": name, "input": ["a", "b"]})
    walk("GET", "/v1/models")
    walk("GET", "/v1/models/shop")
    walk("POST", "/v1/unload_lora_adapter", json={"lora_name": "shop"})
    walk("DELETE", f"/v1/adapters/shop/versions/{second}")
    walk("DELETE", "/v1/adapters/slow")
    walk("DELETE", "/v1/models/shop")


def _walk_through_gates(walk: Walk, version: str) -> None:
    place = f"/v1/adapters/shop/versions/{version}"
    gate = walk("POST", "/v1/gates", json={"name": "shop", "proof": "exact", "evaluation": {}, "weights": 9})
    walk("GET", "/v1/gates")
    scores = [{"slice": "de", "rows": 9, "sum": 1.5, "squares": 3.5}]
    other = walk("POST", "/v1/keys", json={"scopes": ["adapters"]})["key"]
    headers = {"Authorization": f"Bearer {other}"}
    walk("POST", f"{place}/evaluation", json={"metric": "word_f1", "slices": scores}, headers=headers)
    walk("POST", f"{place}/approval", headers=headers)
    walk("GET", f"{place}/gates")
    walk("DELETE", f"{place}/approval", headers=headers)
    walk("GET", f"{place}/bom")
    walk("DELETE", f"/v1/gates/{gate['id']}")


def _walk_through_a_rollout(walk: Walk, candidate: str) -> None:
    place = "/v1/adapters/shop/rollout"
    judge = {"adapter": "shop", "percent": 0.5}
    walk("POST", place, json={"version": candidate, "percent": 100, "shadow": 5, "judge": judge})
    made = walk("POST", "/generate", json={"prompt": "word", "max_tokens": 2, "adapter": "shop"})["id"]
    walk("POST", "/v1/feedback", json={"id": made, "score": 0.5})
    walk("POST", f"{place}/share", json={"percent": 50})
    walk("GET", place)
    walk("POST", f"{place}/rollback")
    walk("POST", place, json={"version": candidate, "shadow": 5})
    walk("POST", f"{place}/promote")
    walk("GET", f"{place}s")
    walk("POST", "/v1/adapters/shop/rollback")


def _walk_through_a_job(walk: Walk, http: httpx2.Client, server: Server) -> None:
    def job_of(content: str, **more: bool) -> str:
        sent = {"file": ("a.jsonl", content.encode())}
        file = walk("POST", "/v1/files", data={"purpose": "fine-tune"}, files=sent)["id"]
        body = {"model": BASE, "training_file": file, "metadata": {"team": "x"}, **more}
        made: str = walk("POST", "/v1/fine_tuning/jobs", json=body)["id"]
        return made

    def is_now(job: str, status: str) -> bool:
        return bool(http.get(f"/v1/fine_tuning/jobs/{job}").json()["status"] == status)

    def steps_of(job: str) -> int:
        progress = http.get(f"/v1/fine_tuning/jobs/{job}").json()["progress"] or {}
        return int(progress.get("step") or 0)

    done, broken, slow = job_of("rows"), job_of("broken"), job_of("slow")
    server.wait_for(lambda: is_now(done, "succeeded") and is_now(broken, "failed"))
    server.wait_for(lambda: is_now(slow, "running"))
    for job in (done, broken, slow):
        told = walk("GET", f"/v1/fine_tuning/jobs/{job}")
        for rest in ("/events", "/checkpoints"):
            walk("GET", f"/v1/fine_tuning/jobs/{job}{rest}")
    walk("GET", f"/v1/fine_tuning/jobs/{done}/events?stream=true")
    walk("POST", f"/v1/fine_tuning/jobs/{slow}/pause")
    server.wait_for(lambda: is_now(slow, "paused"))
    enough, held = job_of("slow"), job_of("rows", hold=True)
    server.wait_for(lambda: is_now(held, "paused") and steps_of(enough) > 0)
    walk("GET", f"/v1/fine_tuning/jobs/{held}")
    walk("POST", f"/v1/fine_tuning/jobs/{enough}/stop")
    server.wait_for(lambda: is_now(enough, "succeeded"))
    walk("GET", f"/v1/fine_tuning/jobs/{enough}")
    walk("POST", f"/v1/fine_tuning/jobs/{slow}/resume")
    walk("POST", f"/v1/fine_tuning/jobs/{slow}/cancel")
    walk("GET", "/v1/fine_tuning/jobs")
    walk("GET", "/v1/files")
    file = told["training_file"]
    walk("GET", f"/v1/files/{file}")
    walk("GET", f"/v1/files/{file}/content")
    walk("GET", f"/v1/files/{file}/content", 206, headers={"Range": "bytes=0-1"})
    walk("GET", f"/v1/files/{file}/content", 206, headers={"Range": "bytes=0-0,2-3"})
    walk("GET", f"/v1/files/{file}/content", 416, headers={"Range": "bytes=99-"})
    server.wait_for(lambda: is_now(slow, "cancelled"))
    walk("DELETE", f"/v1/files/{file}")


def _walk_through_a_batch(walk: Walk, http: httpx2.Client, server: Server) -> None:
    def batch_of(*urls: str) -> str:
        rows = [
            {"custom_id": str(number), "method": "POST", "url": url, "body": {"input": "a"}}
            for number, url in enumerate(urls)
        ]
        sent = {"file": ("b.jsonl", "\n".join(map(json.dumps, rows)).encode())}
        file = walk("POST", "/v1/files", data={"purpose": "batch"}, files=sent)["id"]
        body = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        made: str = walk("POST", "/v1/batches", json={**body, "metadata": {"team": "x"}})["id"]
        server.wait_for(lambda: http.get(f"/v1/batches/{made}").json()["status"] in ("completed", "failed"))
        return made

    for batch in (batch_of("/v1/embeddings"), batch_of("/v1/embeddings", "/elsewhere")):
        walk("GET", f"/v1/batches/{batch}")
    walk("GET", "/v1/batches")
    walk("POST", f"/v1/batches/{batch}/cancel", 409)


def _walk_through_the_log(walk: Walk, server: Server) -> None:
    request = walk("POST", "/generate", json={"prompt": "once more", "max_tokens": 3})["id"]
    server.wait_for(lambda: walk("GET", "/v1/requests")["data"][0]["id"] == request)
    server.wait_for(lambda: walk("GET", f"/v1/requests/{request}")["state"] == "done")
    walk("POST", f"/v1/requests/{request}/replay", json={})
    walk("DELETE", "/v1/requests?all=true")


def _walk_through_keys(walk: Walk) -> None:
    wanted = {"tenant": "acme", "scopes": ["generate"], "expires_in_s": 60, "quotas": {"sequences": 2}}
    key = walk("POST", "/v1/keys", json=wanted)["id"]
    walk("POST", f"/v1/keys/{key}", json={"priority": 1})
    walk("GET", "/v1/key")
    walk("POST", "/v1/tenants/acme", json={"quotas": {"requests": 10}})
    walk("GET", "/v1/tenants")
    walk("DELETE", f"/v1/keys/{key}")
    walk("GET", "/v1/keys")


def _walk_through_live_training(walk: Walk) -> None:
    """Without a trainer: nothing of what is accepted is done."""
    api = "/api/v1"
    walk("POST", f"{api}/client/config", json={"sdk_version": "0.38.0"})
    walk("POST", f"{api}/client/dynamic_config", json={"sdk_version": "0.38.0"})
    walk("GET", f"{api}/healthz")
    walk("GET", f"{api}/get_server_capabilities")
    walk("POST", f"{api}/telemetry", json={"events": [], "platform": "Linux"})
    said = {"tags": ["a"], "user_metadata": {"b": "c"}, "sdk_version": "0.38.0", "display_name": "d"}
    session = walk("POST", f"{api}/create_session", json=said)["session_id"]
    walk("POST", f"{api}/session_heartbeat", json={"session_id": session})
    wanted = {"session_id": session, "base_model": BASE, "lora_config": {"rank": 4}}
    run = walk("POST", f"{api}/create_model", json={**wanted, "model_seq_id": 0})["model_id"]
    walk("POST", f"{api}/get_info", json={"model_id": run})
    binary = {"content-type": "application/x-protobuf"}
    walk("POST", f"{api}/forward_backward", 404, content=b"", headers=binary)
    place = {"model_id": run, "seq_id": 1}
    walk("POST", f"{api}/optim_step", json={**place, "adam_params": {"learning_rate": 0.1}})
    walk("POST", f"{api}/save_weights", json={**place, "seq_id": 2, "path": "a"})
    walk("POST", f"{api}/save_weights_external", json={**place, "seq_id": 3, "path": "a"})
    walk("POST", f"{api}/save_weights_for_sampler", json={**place, "seq_id": 4, "sampling_session_seq_id": 0})
    path = f"tinker://{run}/weights/a"
    walk("POST", f"{api}/load_weights", json={**place, "seq_id": 5, "path": path, "optimizer": False})
    walk("POST", f"{api}/weights_info", 404, json={"tinker_path": path})
    made = {"session_id": session, "sampling_session_seq_id": 1, "base_model": BASE}
    walk("POST", f"{api}/create_sampling_session", json=made)
    sampler = f"{session}:sample:0"
    walk("POST", f"{api}/join_sampling_session", json={"sampling_session_id": sampler})
    walk("GET", f"{api}/samplers/{sampler}")
    walk("GET", f"{api}/sessions")
    walk("GET", f"{api}/sessions/{session}")
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    asked = {"sampling_params": {"max_tokens": 2}, "sampling_session_id": sampler, "seq_id": 0}
    sample = walk("POST", f"{api}/asample", json={**asked, "prompt": prompt})["request_id"]
    walk("POST", f"{api}/retrieve_future", json={"request_id": sample})  # its weights are not saved
    walk("POST", f"{api}/cancel_future", json={"request_id": sample})
    walk("GET", f"{api}/training_runs")
    walk("GET", f"{api}/training_runs/{run}")
    walk("GET", f"{api}/training_runs/{run}/checkpoints")
    walk("GET", f"{api}/checkpoints")
    walk("DELETE", f"{api}/training_runs/{run}/checkpoints/weights/a", 404)
    walk("PUT", f"{api}/training_runs/{run}/checkpoints/weights/a/ttl", 404, json={"ttl_seconds": 7200})
    walk("GET", f"{api}/audit?day=2026-12-01")
    walk("GET", f"{api}/audit?event_type=checkpoints")
    walk("GET", f"{api}/billing/usage/checkpoints/current")
    walk("GET", f"{api}/auth/apikey/me")
    external = f"{api}/training_runs/{run}/checkpoints/external_weights/a"
    walk("GET", f"{external}/external_weights_urls", 404)
    walk("GET", f"{api}/external_weights/{run}/a/adapter_config.json?expires=1&signature=a", 403)
    walk("POST", f"{api}/sessions/{session}/finish", json={"reason": {"type": "success"}})


def test_a_method_that_is_not_possible_is_answered_with_all_that_are(
    server: Server, callers: dict[str, str], spec: Json
) -> None:
    with client_with(server, callers["an operator"]) as http:
        for path, methods in spec["paths"].items():
            possible = {method.upper() for method in methods} | ({"GET"} if path == "/" else set())
            for named, also in ALSO.items():
                if path == named:
                    possible |= {method.upper() for method in spec["paths"][also]}
            possible |= {"HEAD"} if "GET" in possible else set()
            answer = http.patch(re.sub(r"\{\w+\}", "x", path))
            assert answer.status_code == 405
            assert answer.headers["allow"] == ", ".join(sorted(possible)), path


def test_the_head_of_what_can_be_got_is_answered_without_a_body(
    server: Server, callers: dict[str, str], spec: Json
) -> None:
    with client_with(server, callers["an operator"]) as http:
        for path in ("/", "/docs", "/redoc", "/openapi.json", *spec["paths"]):
            if path not in spec["paths"] or "get" in spec["paths"][path]:
                there = re.sub(r"\{\w+\}", "x", path)
                head, whole = http.head(there), http.get(there)
                assert (head.status_code, head.content) == (whole.status_code, b""), path
                assert head.headers["content-type"] == whole.headers["content-type"], path
