"""Traces, as a collector gets them: from a client's span to the decode, of jobs and proofs, no secrets."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from tests.http_server import StandInServer

from .access import bearer
from .support import PATIENCE, SOURCES, Server, Starter, upload
from .test_logs import BASE, CANARY, about, speak
from .training_support import ended, make_job, openai_client, wait_job

PARTS = ["adapter load", "queue", "prefill", "decode", "stream"]


class Collector:
    """Takes spans by OTLP over HTTP, and keeps them."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.bodies: list[bytes] = []
        self.resource: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                """Nothing."""

        self.server = StandInServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        self.bodies.append(body)
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = attributes(one.resource.attributes)
            self.spans += [span for scope in one.scope_spans for span in scope.spans]

    def wait(self, found: Callable[[Any], bool], count: int = 1) -> list[Any]:
        """The spans for which that holds, once there are so many."""
        end = time.monotonic() + PATIENCE
        while len(some := [span for span in list(self.spans) if found(span)]) < count:
            assert time.monotonic() < end, [span.name for span in self.spans]
            time.sleep(0.05)
        return some

    def within(self, parent: Any) -> dict[str, Any]:
        """The children of a span, by name, in order of their beginning."""
        children = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return {span.name: span for span in sorted(children, key=lambda span: span.start_time_unix_nano)}


def attributes(found: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        whole = getattr(value, kind)
        return [plain(one) for one in whole.values] if kind == "array_value" else whole

    return {one.key: plain(one.value) for one in found}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, collector: Collector) -> Iterator[Server]:
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_RESOURCE_ATTRIBUTES": "deployment=test"}
    options = ("--otlp-endpoint", collector.url, "--log-format", "json", "--access-log")
    with serve_scripted("words", *options, environment=environment) as server:
        with server.client() as http:
            upload(http, "support", b"support", activate="true").raise_for_status()
        yield server


@contextmanager
def client_span() -> Iterator[tuple[dict[str, str], Any]]:
    """A client's own span, and the headers by which it is told, as instrumentation sends them."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    headers: dict[str, str] = {}
    with provider.get_tracer("test").start_as_current_span("a client's call") as span:
        TraceContextTextMapPropagator().inject(headers)
        yield headers, span.get_span_context()
    assert len(exporter.get_finished_spans()) == 1


def of_trace(context: Any) -> Callable[[Any], bool]:
    trace = context.trace_id.to_bytes(16)
    return lambda span: bool(span.trace_id == trace)


def of_request(request: str) -> Callable[[Any], bool]:
    return lambda span: bool(attributes(span.attributes).get("onebase.request_id") == request)


def test_a_trace_leads_from_the_clients_span_to_the_decode(server: Server, collector: Collector) -> None:
    body = {"model": "support", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 5}
    with client_span() as (headers, context), server.client() as http:
        answer = http.post("/v1/chat/completions", json=body | {"stream": True}, headers=headers)
    spans = collector.wait(of_trace(context), 7)

    (outer,) = (span for span in spans if span.parent_span_id == context.span_id.to_bytes(8))
    assert outer.name == "POST /v1/chat/completions"
    assert outer.kind == outer.SPAN_KIND_SERVER
    told = attributes(outer.attributes)
    assert told["http.route"] == "/v1/chat/completions"
    assert told["http.response.status_code"] == 200
    assert told["onebase.request_id"] == answer.headers["x-request-id"]

    ((name, inner),) = collector.within(outer).items()
    assert name == "chat support"
    parts = collector.within(inner)
    assert sorted(parts) == sorted(PARTS)
    times = [parts[one].start_time_unix_nano for one in PARTS[:4]]
    assert times == sorted(times)
    for one in parts.values():
        assert inner.start_time_unix_nano <= one.start_time_unix_nano <= one.end_time_unix_nano
        assert one.end_time_unix_nano <= inner.end_time_unix_nano
    assert parts["decode"].end_time_unix_nano > parts["decode"].start_time_unix_nano
    assert abs(parts["decode"].end_time_unix_nano / 1e9 - time.time()) < 600, "on the clock of the world"


def test_a_span_says_what_the_conventions_ask_for(server: Server, collector: Collector) -> None:
    digest = server.client().get("/v1/adapters/support").json()["version"]
    body = {"model": "support", "prompt": "one two", "max_tokens": 3, "n": 2, "temperature": 0.5}
    with client_span() as (headers, context), server.client() as http:
        answer = http.post("/v1/completions", json=body, headers=headers).json()
    (span,) = collector.wait(lambda one: of_trace(context)(one) and one.name == "text_completion support")

    told = attributes(span.attributes)
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "onebase",
        "gen_ai.request.model": "support",
        "gen_ai.response.model": f"support@{digest[:12]}",
        "gen_ai.response.id": answer["id"],
        "gen_ai.request.choice.count": 2,
        "gen_ai.output.type": "text",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "onebase.tenant": "default",
    }
    assert list(collector.within(span)) == PARTS[:4], "it was not streamed"
    assert collector.resource["service.name"] == "onebase"
    assert collector.resource["deployment"] == "test"


def test_texts_that_are_read_have_a_span_by_their_own_name(server: Server, collector: Collector) -> None:
    with client_span() as (headers, context), server.client() as http:
        http.post("/v1/embeddings", json={"model": BASE, "input": ["a", "b"]}, headers=headers)
    (span,) = collector.wait(lambda one: of_trace(context)(one) and one.name == f"embeddings {BASE}")
    assert attributes(span.attributes)["gen_ai.response.finish_reasons"] == ["stop", "stop"]
    assert "decode" not in collector.within(span)


def test_without_a_callers_context_a_trace_begins_here_and_logs_name_it(
    server: Server, collector: Collector
) -> None:
    with server.client() as http:
        for sent in ("", "00-zz-zz-01", "x" * 500):
            name = f"own-{len(sent)}"
            headers = {"x-request-id": name, "traceparent": sent}
            http.post("/generate", json={"prompt": "x", "max_tokens": 1}, headers=headers)
            (span,) = collector.wait(of_request(name))
            assert span.parent_span_id == b""
            server.wait_for(lambda name=name: about(server, name) != [])
            (logged,) = about(server, name)
            assert logged["trace_id"] == span.trace_id.hex()


def test_what_fails_is_marked_and_probes_leave_no_trace(server: Server, collector: Collector) -> None:
    with client_span() as (headers, context), server.client() as http:
        for path in ("/health", "/ready", "/metrics", "/status"):
            http.get(path, headers=headers)
        http.post("/generate", json={"prompt": "x", "adapter": "none"}, headers=headers)
        body = {"prompt": "x", "max_tokens": 90_000, "stream": True}
        with http.stream("POST", "/generate", json=body, headers=headers) as answer:
            next(answer.iter_lines())
    (left,) = collector.wait(lambda one: of_trace(context)(one) and one.name.startswith("text_completion"))
    assert attributes(left.attributes)["error.type"] == "abort"
    assert left.status.code == left.status.STATUS_CODE_ERROR
    requests = collector.wait(lambda one: of_trace(context)(one) and one.name == "POST /generate", 2)
    statuses = {attributes(one.attributes)["http.response.status_code"] for one in requests}
    assert statuses == {200, 404}
    names = {span.name for span in collector.spans}
    assert not {name for name in names if name.startswith("GET")} & {
        "GET /health", "GET /ready", "GET /metrics", "GET /status",
    }  # fmt: skip


def test_a_proof_is_in_the_trace_of_what_brought_the_version(server: Server, collector: Collector) -> None:
    with client_span() as (headers, context), server.client() as http:
        http.headers.update(headers)
        upload(http, "traced", b"traced").raise_for_status()
    (proof,) = collector.wait(lambda one: of_trace(context)(one) and one.name == "prove")
    assert attributes(proof.attributes)["onebase.adapter"] == "traced"
    (outer,) = collector.wait(lambda one: of_trace(context)(one) and one.name == "POST /v1/adapters")
    assert proof.parent_span_id == outer.span_id


def test_a_job_has_a_trace_with_the_proof_of_what_it_made(server: Server, collector: Collector) -> None:
    client = openai_client(server)
    job = make_job(client, "quick", extra={"name": "made"})
    wait_job(server, client, job.id, ended)
    found = collector.wait(lambda one: attributes(one.attributes).get("onebase.job") == job.id, 2)
    by_name = {span.name: span for span in found}
    assert set(by_name) == {"check job", "train job"}
    told = attributes(by_name["train job"].attributes)
    assert told["onebase.job.state"] == "succeeded"
    assert told["onebase.adapter"] == job.name
    (proof,) = collector.wait(
        lambda one: one.trace_id == by_name["train job"].trace_id and one.name == "prove"
    )
    assert proof.parent_span_id == by_name["train job"].span_id


def test_a_secret_never_comes_out_in_spans(server: Server, collector: Collector) -> None:
    with server.client() as http:
        speak(http, openai_client(server))
        sent = {"tracestate": f"a={CANARY}", "baggage": f"a={CANARY}", **bearer(CANARY)}
        sent["x-request-id"] = "last"
        http.post("/generate", json={"prompt": CANARY, "max_tokens": 2}, headers=sent)
    collector.wait(of_request("last"))
    assert len(collector.spans) > 50
    assert not any(CANARY.encode() in body for body in collector.bodies)


def test_a_collector_that_is_not_there_harms_nothing(serve_scripted: Starter) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with serve_scripted("words", environment=environment) as server, server.client() as http:
        for _ in range(3):
            http.post("/generate", json={"prompt": "x", "max_tokens": 2}).raise_for_status()
        server.process.terminate()
        assert server.exit_status() == 0


def test_the_real_engines_times_come_back_with_the_rows(
    serve_real: Starter, collector: Collector, small_base: Path
) -> None:
    """Whose clock is the api's: parts follow each other."""
    options = ("--base", str(small_base), "--kv-memory", "50MB", "--otlp-endpoint", collector.url)
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
    with (
        serve_real(*options, environment=environment) as server,
        client_span() as (headers, context),
        server.client() as http,
    ):
        http.post("/generate", json={"prompt": "Hello there", "max_tokens": 4}, headers=headers)
        (span,) = collector.wait(
            lambda one: of_trace(context)(one) and one.name.startswith("text_completion")
        )
    parts = collector.within(span)
    assert list(parts) == ["queue", "prefill", "decode"]
    for one, following in zip(list(parts.values()), list(parts.values())[1:], strict=False):
        assert one.end_time_unix_nano == following.start_time_unix_nano
        assert one.end_time_unix_nano > one.start_time_unix_nano


def test_nothing_of_the_sdk_is_loaded_unless_it_is_asked_for() -> None:
    program = (
        "import sys, onebase_server.app.startup, onebase_server.telemetry.traces as traces; traces.Tracing();"
        "print([name for name in sys.modules if name.startswith('opentelemetry.') and '.sdk' in name])"
    )
    run = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": SOURCES, "PATH": "/usr/bin:/bin"}
    out = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(out.replace("'", '"')) == []
