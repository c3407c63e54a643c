"""Spans for OpenTelemetry, if it is configured: one trace per request, job and proof.

Names and attributes follow the conventions for HTTP and for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/), which are still in development. No span holds what a
caller has sent, but for the names of adapters, nor what was generated. Without an endpoint nothing of the
SDK is imported, and all spans are the API's empty ones.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import (
    NoOpTracer,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import onebase_server
from onebase_adapters.names import label
from onebase_edge.settings import OTEL_ENDPOINTS
from onebase_engine.logs import REQUEST
from onebase_server.telemetry.measurements import MeasuredRequest, RequestTimestamps, TokenUsage

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

UNTRACED = ("/health", "/ready", "/metrics", "/status")
"""Routes that probes ask all the time."""
_SERVICE = "onebase"
_FAILED = 500
_CLOSE_SECONDS = 5.0
_CHAT = ("/v1/chat/completions", "/v1/messages", "/v1/responses")
_READING = {
    "embed": "embeddings",
    "classify": "classify",
    "rerank": "rerank",
    "score": "score",
    "decide": "decide",
}


class TracingError(RuntimeError):
    """There can be no traces; the message says why and what to do."""


class Tracing:
    """Makes spans. `endpoint`: where they go by OTLP over HTTP, or the one of OTEL_ENDPOINTS that says it.

    Raises TracingError when the SDK is not installed.
    """

    def __init__(self, endpoint: str = "") -> None:
        self._provider = _provider(endpoint) if endpoint else None
        self._tracer: Tracer = NoOpTracer()
        if self._provider is not None:
            self._tracer = self._provider.get_tracer(_SERVICE, onebase_server.__version__)
        self._contexts = TraceContextTextMapPropagator()

    @property
    def on(self) -> bool:
        return self._provider is not None

    def close(self) -> None:
        """Send what has not been sent, for at most five seconds."""
        if self._provider is not None:
            sending = threading.Thread(target=self._provider.shutdown, daemon=True)  # it tries for longer
            sending.start()
            sending.join(_CLOSE_SECONDS)

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, AttributeValue]) -> Iterator[Span]:
        """Open a span. Spans that begin within it, in tasks too, are its children."""
        with self._tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            yield span

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the app answer within a span, which continues the caller's trace if there is one."""
        if not self.on or scope["path"] in UNTRACED:
            await app(scope, receive, send)
            return
        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        method = scope["method"]
        with self._tracer.start_as_current_span(
            method,
            context=self._contexts.extract(sent),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.scheme": scope["scheme"]},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            told = {**REQUEST.get(), "trace_id": format_trace_id(span.get_span_context().trace_id)}
            REQUEST.set(told)  # of the request's own task
            span.set_attribute("onebase.request_id", told.get("request_id", ""))

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    span.set_attribute("http.response.status_code", status)
                    if status >= _FAILED:
                        failed(span, str(status))
                await send(message)

            try:
                await app(scope, receive, watched)
            finally:
                route = getattr(scope.get("route"), "path_format", "")
                span.update_name(f"{method} {route}".rstrip())
                span.set_attribute("http.route", route)

    def of_request(
        self, job: MeasuredRequest, scope: Scope, base: str, *, stream: bool = False
    ) -> RequestSpans | None:
        """Return the spans of a job that begins now, for the request of this scope. None: there are none."""
        parent = get_current_span()
        if not self.on or not parent.is_recording():
            return None
        route = getattr(scope.get("route"), "path_format", "")
        return RequestSpans(self._tracer, set_span_in_context(parent), job, _operation(route), base, stream)


class RequestSpans:
    """Spans of one request for text, all of them exported once it is over."""

    def __init__(
        self, tracer: Tracer, parent: Context, job: MeasuredRequest, operation: str, base: str, stream: bool
    ) -> None:
        self._tracer = tracer
        self._parent = parent
        self._job = job
        self._operation = operation
        self._base = base
        self._stream = stream

    def ended(self, usage: TokenUsage, timestamps: RequestTimestamps, finished: Counter[str]) -> None:
        """Export one span by the conventions, and in it: adapter load, queue, prefill, decode and stream."""
        now = time.monotonic()
        at = _epoch()
        names = [label(use.name, use.digest) for use in self._job.adapter.uses]
        asked = "+".join(use.name for use in self._job.adapter.uses) or self._base
        attributes = self._attributes(asked, "+".join(names) or self._base)
        attributes |= {
            "gen_ai.response.finish_reasons": sorted(finished.elements()),
            "gen_ai.usage.input_tokens": usage.prompt,
            "gen_ai.usage.output_tokens": usage.completion,
            "gen_ai.usage.cache_read.input_tokens": usage.cached,
        }
        if self._stream and timestamps.first:
            attributes["gen_ai.response.time_to_first_chunk"] = timestamps.first - timestamps.arrived
        span = self._tracer.start_span(
            f"{self._operation} {asked}",
            self._parent,
            attributes=attributes,
            start_time=at(timestamps.arrived),
        )
        for reason in ("error", "abort"):
            if finished[reason]:
                failed(span, reason)
        inside = set_span_in_context(span)
        started = timestamps.started or timestamps.submitted or now
        parts = [
            ("adapter load", timestamps.arrived if names else 0.0, timestamps.submitted or now),
            ("queue", timestamps.submitted, started),
            ("prefill", timestamps.started, timestamps.first or timestamps.last or now),
            ("decode", timestamps.first, timestamps.last),
            ("stream", timestamps.first if self._stream else 0.0, now),
        ]
        for name, start, end in parts:
            if start:
                part = self._tracer.start_span(name, inside, start_time=at(start))
                part.end(at(max(start, end)))
        span.end(at(now if self._stream else timestamps.last or now))

    def _attributes(self, asked: str, answered: str) -> dict[str, AttributeValue]:
        job, sampling = self._job, self._job.sampling
        told: dict[str, AttributeValue] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": _SERVICE,
            "gen_ai.request.model": asked,
            "gen_ai.response.model": answered,
            "gen_ai.response.id": job.id,
            "onebase.tenant": job.tenant,
        }
        if job.choices != 1:
            told["gen_ai.request.choice.count"] = job.choices
        if job.generates:
            told |= {
                "gen_ai.output.type": "json" if job.grammar and job.grammar.kind == "json_schema" else "text",
                "gen_ai.request.stream": self._stream,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": float(sampling.top_k),
                "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
                "gen_ai.request.presence_penalty": sampling.presence_penalty,
            }
        return told


def failed(span: Span, kind: str) -> None:
    """Mark a span. kind: a status, a code or a reason; no message, which might repeat what was sent."""
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _operation(route: str) -> str:
    if route in _CHAT:
        return "chat"
    last = route.rpartition("/")[2]
    return next((told for name, told in _READING.items() if last.startswith(name)), "text_completion")


def _epoch() -> Callable[[float], int]:
    """Return a function from the monotonic clock to nanoseconds since 1970, as the two are now."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda moment: int(moment * 1e9) + offset


def _provider(endpoint: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise TracingError(
            "traces need OpenTelemetry's SDK: pip install 'onebase[otel]', or leave --otlp-endpoint and "
            f"{' and '.join(OTEL_ENDPOINTS)} out"
        ) from error
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in OTELResourceDetector().detect().attributes
    attributes = {"service.version": onebase_server.__version__} | (
        {} if named else {"service.name": _SERVICE}
    )
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    target = None if endpoint in OTEL_ENDPOINTS else f"{endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=target)))
    return provider
