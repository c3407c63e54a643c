"""What the server logs: one JSON object a line with the request's id, and nothing that somebody has sent."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from starlette.requests import Request

from onebase_engine.logs import JsonFormatter, TextFormatter
from onebase_server.http import app

from .access import Keys, bearer
from .conftest import make_adapter
from .support import CONFIG, Server, Starter, upload
from .test_batch_files import line
from .training_support import ended, make_job, wait_job

BASE = "smollm2-135m-instruct"
CANARY = "canary0f3ab77Zq"
"""Secret. It stands in whatever a caller can send, but for names, which are no secrets."""


def lines(server: Server) -> list[dict[str, Any]]:
    """Every whole line of the log; each must be an object."""
    log = server.log
    return [json.loads(line) for line in log[: log.rfind("\n") + 1].splitlines()]


def about(server: Server, request: str) -> list[dict[str, Any]]:
    return [line for line in lines(server) if line.get("request_id") == request]


@pytest.fixture(scope="module")
def logging_json(serve_scripted: Starter) -> Iterator[Server]:
    with serve_scripted("words", "--log-format", "json", "--access-log") as server:
        yield server


def test_each_line_is_an_object_that_says_who_speaks(logging_json: Server) -> None:
    logging_json.wait_for(lambda: "is ready at" in logging_json.log)
    found = lines(logging_json)
    for one in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", one["time"])
        assert one["level"] in ("debug", "info", "warning", "error", "critical")
        assert {"process", "pid", "logger", "message"} <= one.keys()
    assert any("is ready at http://127.0.0.1:" in one["message"] for one in found)


def test_the_access_log_says_what_was_asked_without_the_query(logging_json: Server) -> None:
    with logging_json.client() as http:
        http.get("/v1/models?secret=x", headers={"x-request-id": "mine-1"})
        http.get("/nowhere", headers={"x-request-id": "mine-2"})
    # A line is written after its answer.
    logging_json.wait_for(lambda: all(about(logging_json, name) for name in ("mine-1", "mine-2")))
    (one,), (other,) = about(logging_json, "mine-1"), about(logging_json, "mine-2")
    assert (one["method"], one["path"], one["status"]) == ("GET", "/v1/models", 200)
    assert one["client"].startswith("127.0.0.1:")
    assert (other["path"], other["status"]) == ("/nowhere", 404)
    assert "secret" not in logging_json.log


def test_what_is_logged_later_for_a_request_has_its_id(serve_scripted: Starter) -> None:
    """A proof that begins with an upload, and whose verifier dies."""
    with serve_scripted("words,dies", "--log-format", "json") as server, server.client() as http:
        upload(http, "some", b"some", query="wait=false")
        http.post(
            "/v1/adapters",
            data={"name": "other"},
            files=[
                ("files", ("adapter_config.json", CONFIG.encode(), "application/json")),
                ("files", ("adapter_model.safetensors", b"other", "application/octet-stream")),
            ],
            headers={"x-request-id": "upload-7"},
        )
        server.wait_for(lambda: any("verifier" in one["message"] for one in about(server, "upload-7")))


def test_text_ends_with_the_id_too(serve_scripted: Starter) -> None:
    with serve_scripted("words", "--access-log") as server, server.client() as http:
        http.get("/version?secret=x", headers={"x-request-id": "mine-3"})
        server.wait_for(lambda: "mine-3" in server.log)
        assert re.search(r'INFO uvicorn.access: \S+ - "GET /version HTTP/1.1" 200 mine-3\n', server.log)


REFUSALS: list[Exception] = [
    RuntimeError("can't start new thread"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libx.so: failed to map segment from shared object"),
    ImportError("libx.so: cannot map zero-fill pages"),
    OSError("libx.so: failed to map segment from shared object"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
    RuntimeError("std::bad_alloc"),
    ExceptionGroup("tasks", [MemoryError(), RuntimeError("can't start new thread")]),
]
"""Errors by which the system refuses memory or threads."""


@pytest.mark.parametrize(
    "error",
    REFUSALS,
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    "formatter", [TextFormatter("%(message)s"), JsonFormatter("api")], ids=["text", "json"]
)
def test_memory_or_threads_that_are_refused_are_logged_with_the_remedy_and_without_a_traceback(
    error: Exception, formatter: logging.Formatter
) -> None:
    def logged(cause: Exception) -> str:
        try:
            raise ValueError("it cannot be followed") from cause
        except ValueError:
            return formatter.format(record())

    said = logged(error)
    assert "following failed" in said
    assert "the system refuses more memory or threads" in said
    assert "ulimit -v and -d" in said
    assert "ulimit -u" in said
    assert "Traceback" not in said
    assert "Traceback" in logged(BlockingIOError(errno.EAGAIN, "a lock is held"))
    assert "Traceback" in logged(torch.OutOfMemoryError("CUDA out of memory"))
    assert "Traceback" in logged(ExceptionGroup("tasks", [MemoryError(), KeyError("a bug")]))
    assert "Traceback" in logged(
        ImportError("libx.so: failed to map segment from shared object: Not permitted")
    )


def _answer(error: Exception, method: str, path: str) -> Any:
    request = Request({"type": "http", "method": method, "path": path, "headers": []})
    return asyncio.run(app._answer_unexpected(request, error))


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_request_whose_memory_or_thread_is_refused_is_to_be_sent_again(error: Exception) -> None:
    for method, path in (("POST", "/generate/many"), ("GET", "/v1/fine_tuning/jobs")):
        answer = _answer(error, method, path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert _answer(ValueError("a fault"), "POST", "/generate/many").status_code == 500


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/fine_tuning/jobs"), ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/orders")],
)
def test_nobody_sends_a_request_again_that_may_have_been_carried_out_when_memory_was_refused(
    method: str, path: str
) -> None:
    answer = _answer(MemoryError(), method, path)
    client = openai.OpenAI(api_key="none")
    told = httpx2.Response(answer.status_code, headers=dict(answer.headers))
    assert not client._should_retry(told)  # type: ignore[arg-type]
    assert answer.status_code == 500, "our own client and the route repeat a 503"
    assert "may have carried the request out" in answer._error["error"]["message"]


def record() -> logging.LogRecord:
    return logging.LogRecord("x", logging.ERROR, "", 0, "following failed", (), sys.exc_info())


def test_refused_memory_is_logged_with_its_place() -> None:
    try:
        bytearray(sys.maxsize)
    except MemoryError:
        said = TextFormatter("%(message)s").format(record())
    assert re.search(rf"at {re.escape(__file__)}:\d+$", said)


@pytest.mark.parametrize("suppressed", [True, False])
def test_a_bug_in_what_handles_refused_memory_keeps_its_traceback(suppressed: bool) -> None:
    try:
        try:
            raise MemoryError
        except MemoryError:
            if suppressed:
                raise ValueError("a bug") from None
            raise ValueError("a bug")  # noqa: B904 (what is tested)
    except ValueError:
        said = TextFormatter("%(message)s").format(record())
    assert "Traceback" in said
    assert "ulimit" not in said


def test_errors_that_are_each_others_cause_are_logged() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, ExceptionGroup("tasks", [one])
    try:
        raise one
    except ValueError:
        assert "Traceback" in TextFormatter("%(message)s").format(record())


def test_a_start_that_fails_says_why_in_json(serve_scripted: Starter) -> None:
    options = ("--log-format", "json", "--host", "0.0.0.0")
    with serve_scripted("words", *options, ready=False) as server:
        assert server.exit_status() == 2
        assert "there is no API key yet" in lines(server)[-1]["message"]


# ---- the canary ---------------------------------------------------------------------------------------


def speak(http: httpx2.Client, client: openai.OpenAI) -> None:
    """Send the secret by every way that leads into the server."""
    schema = {"type": "object", "properties": {CANARY: {"const": CANARY}}, "description": CANARY}
    tool = {"type": "function", "function": {"name": CANARY, "description": CANARY, "parameters": schema}}
    messages = [{"role": "system", "content": CANARY}, {"role": "user", "content": f"Say {CANARY}"}]
    bodies: list[tuple[str, Any]] = [
        ("/generate", {"prompt": CANARY, "max_tokens": 4, "stop": [CANARY]}),
        ("/generate", {"prompt": CANARY, "max_tokens": -1}),
        ("/generate", {"prompt": CANARY, "temperature": CANARY}),
        ("/generate", {"prompt": CANARY, CANARY: CANARY, "max_tokens": 2}),
        ("/generate", {"prompt": CANARY, "adapter": "none", "max_tokens": 2}),
        ("/generate", {"prompt": CANARY, "guided_regex": f"({CANARY}", "max_tokens": 2}),
        ("/generate", {"prompt": CANARY, "guided_grammar": f"start: {CANARY} nothing", "max_tokens": 2}),
        ("/generate", {"prompt": CANARY, "guided_json": {"type": CANARY}, "max_tokens": 2}),
        ("/generate", {"prompt": CANARY, "max_tokens": 4, "guided_json": schema}),
        ("/v1/chat/completions", {"model": BASE, "messages": messages, "max_tokens": 4, "user": CANARY}),
        ("/v1/chat/completions", {"model": BASE, "messages": messages, "max_tokens": 4, "tools": [tool]}),
        ("/v1/chat/completions", {"model": BASE, "messages": [{"role": CANARY, "content": CANARY}]}),
        ("/v1/messages", {"model": BASE, "messages": messages[1:], "max_tokens": 4, "system": CANARY}),
        ("/v1/responses", {"model": BASE, "input": CANARY, "max_output_tokens": 4, "store": True}),
        ("/v1/embeddings", {"model": BASE, "input": [CANARY]}),
        ("/v1/decide", {"model": BASE, "prompt": CANARY, "choices": [CANARY, "b"]}),
        ("/tokenize", {"prompt": CANARY}),
        ("/v1/batches", {"input_file_id": "file-0", "endpoint": CANARY, "completion_window": CANARY}),
        ("/v1/fine_tuning/jobs", {"model": BASE, "training_file": "file-0", "metadata": {"a": CANARY}}),
    ]
    for path, body in bodies:
        http.post(path, json=body)
        http.post(path, content=json.dumps(body).encode()[:-1])
    http.post("/generate", json={"prompt": CANARY, "stream": True, "max_tokens": 3}).read()
    for headers in (bearer(CANARY), bearer(f"ob-0123456789abcdef.{CANARY}"), {"x-api-key": CANARY}):
        http.post("/generate", json={"prompt": "x", "max_tokens": 1}, headers=headers)
    odd = {
        "cookie": CANARY,
        "user-agent": CANARY,
        "x-custom": CANARY,
        "referer": CANARY,
        "host": f"{CANARY}.x",
    }
    for name, value in odd.items():
        http.get("/v1/models", headers={name: value})
    http.get("/v1/models", params={"api_key": CANARY})
    http.get("/v1/audit", params={"action": CANARY})
    rows_of_files(client)


def rows_of_files(client: openai.OpenAI) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": CANARY}], "max_tokens": 2}
    rows = [
        line("a", body=body),
        line("b", body=body | {"temperature": CANARY}),
        f'{{"custom_id": "{CANARY}"',
    ]
    for some in (rows[:2], rows):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in some)
        file = client.files.create(file=("rows.jsonl", text.encode()), purpose="batch")
        with suppress(openai.APIStatusError):
            client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )


def adapters(http: httpx2.Client, folder: Path) -> None:
    """Good and bad ones, with the secret in every field and in a file that is not asked for."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    named = config | {"revision": CANARY, "peft_version": CANARY}
    for number, changed in enumerate(
        (
            named,
            named | {CANARY: CANARY},
            config | {"base_model_name_or_path": CANARY},
            config | {"target_modules": [CANARY]},
            config | {"task_type": CANARY},
            config | {"r": CANARY},
            config | {"auto_mapping": {"base_model_class": CANARY, "parent_library": CANARY}},
        )
    ):
        files = [
            ("files", ("adapter_config.json", json.dumps(changed).encode(), "application/json")),
            ("files", ("adapter_model.safetensors", weights, "application/octet-stream")),
            ("files", ("README.md", f"# {CANARY}".encode(), "text/markdown")),
        ]
        for some in (files, files[:2]):
            data = {"name": f"adapter-{number}", "any_base": "true"}
            http.post("/v1/adapters", params={"wait": "true"}, data=data, files=some)
    upload(http, "not-safe", CANARY.encode())


def others_see_nothing(http: httpx2.Client) -> None:
    """What requests are told that did not send it."""
    for path in (
        "/metrics",
        "/status",
        "/v1/usage",
        "/v1/adapters",
        "/v1/models",
        "/nowhere",
        "/v1/batches/x",
    ):
        assert CANARY not in http.get(path).text, path
    for body in ({"prompt": "x", "max_tokens": 0.5}, {"prompt": "x", "adapter": "none"}, {}):
        assert CANARY not in http.post("/generate", json=body).text


def test_a_secret_never_comes_out_in_logs_metrics_or_the_errors_of_others(
    serve_real: Starter, keys: Keys, small_base: Path, tmp_path: Path
) -> None:
    key = keys.make("generate", "adapters", "train", "admin")
    options = ("--base", str(small_base), "--kv-memory", "50MB", "--max-sequences", "4", "--threads", "1")
    options += ("--log-format", "json", "--log-level", "debug", "--access-log")
    environment = {"HF_TOKEN": CANARY, "ONEBASE_TEST_SECRET": CANARY}
    folder = make_adapter(small_base, tmp_path / "adapter", 1, 4)
    with (
        serve_real(*options, data_dir=keys.file.parent, environment=environment) as server,
        httpx2.Client(base_url=server.url, timeout=120, headers=bearer(key)) as http,
    ):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)
        speak(http, client)
        adapters(http, folder)
        job = train(server, client)
        in_the_middle(server, http)

        others_see_nothing(http)
        assert job.status in ("succeeded", "failed")
        statuses = {one["status"] for one in lines(server) if "status" in one}
        assert {200, 400, 401, 404, 422} <= statuses, "each way was tried"
        processes = {one["process"] for one in lines(server)}
        assert {"api", "engine"} <= processes
        assert CANARY not in server.log
        assert key not in server.log
        assert key not in http.get("/metrics").text


def train(server: Server, client: openai.OpenAI) -> Any:
    """A job with a bad line, then one that trains."""
    row = {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": CANARY}]}
    settings = {"max_steps": 1, "batch_size": 1, "r": 2, "max_length": 64}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": settings}}
    bad = json.dumps(row) + "\n" + json.dumps({"messages": CANARY}) + f'\n{{"{CANARY}\n'
    first = make_job(client, bad, method=method, extra={"name": "bad"})
    wait_job(server, client, first.id, ended)
    job = make_job(client, (json.dumps(row) + "\n") * 4, method=method, extra={"name": "good"})
    return wait_job(server, client, job.id, ended)


def in_the_middle(server: Server, http: httpx2.Client) -> None:
    """The engine dies while it computes on the secret, and the log says what ran."""
    body = {"prompt": CANARY, "max_tokens": 4000, "stream": True, "ignore_eos": True}
    for deaths in (1, 2):
        with suppress(httpx2.TransportError), http.stream("POST", "/generate", json=body) as answer:
            rest = answer.iter_lines()
            next(rest, None)
            os.kill(server.engine_pid(), signal.SIGKILL)
            list(rest)
        server.wait_for(lambda deaths=deaths: http.get("/status").json()["engine"]["restarts"] == deaths)
        server.wait_ready()


def test_it_does_not_come_out_of_a_log_for_people_either(serve_scripted: Starter, keys: Keys) -> None:
    key = keys.make("generate", "adapters", "train", "admin", tenant="other")
    options = ("--log-level", "debug", "--access-log")
    with (
        serve_scripted("flood", *options, data_dir=keys.file.parent) as server,
        httpx2.Client(base_url=server.url, timeout=60, headers=bearer(key)) as http,
    ):
        speak(http, openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60))
        others_see_nothing(http)
        server.wait_for(lambda: '"POST /generate HTTP/1.1" 200' in server.log)
        assert CANARY not in server.log
        assert key not in server.log
