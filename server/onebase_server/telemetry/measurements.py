"""Counters and durations of requests, adapters and proofs, which `metrics.py` exports."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from onebase_engine.engine.messages import Grammar, Sampling
from onebase_server.telemetry.histogram import Histogram
from onebase_server.telemetry.tenants import TenantLoads

MOST_ADAPTERS = 200
"""Tenants' adapters that are counted under their names; those that come later are counted together."""
OTHERS = "other"

# Bounds in seconds and tokens, as vLLM has them: dashboards and alerts name some of them.
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
CHOICES = (1, 2, 5, 10, 20)


@dataclass
class TokenUsage:
    """Tokens: `cached` of the prompts' came from the prefix cache, `reasoning` of the others are thoughts."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass
class RequestTimestamps:
    """Timestamps of a request, on the monotonic clock that all processes share; 0: not yet."""

    arrived: float = field(default_factory=time.monotonic)
    submitted: float = 0.0
    """Time at which its adapters were in memory and it was submitted to the engine."""
    started: float = 0.0
    """Time of the first step of the sequence that waited longest."""
    first: float = 0.0
    """Time of its first token."""
    last: float = 0.0
    """Time of its last token, or of the end of a request that only reads."""


class UsedVersion(Protocol):
    """Version of an adapter that a request is answered with."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...


class UsedAdapters(Protocol):
    """Adapters that a request is answered with; none for the base."""

    @property
    def uses(self) -> Sequence[UsedVersion]: ...


class MeasuredRequest(Protocol):
    """Part of a request to the engine that measurements and traces report."""

    @property
    def id(self) -> str: ...

    @property
    def tenant(self) -> str: ...

    @property
    def adapter(self) -> UsedAdapters: ...

    @property
    def choices(self) -> int: ...

    @property
    def background(self) -> bool: ...

    @property
    def sampling(self) -> Sampling: ...

    @property
    def grammar(self) -> Grammar | None: ...

    @property
    def generates(self) -> bool:
        """Return False if it only reads texts: for vectors, classes or scores."""


@dataclass
class AdapterUse:
    """Requests and tokens of one tenant with one adapter since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class RequestMeasurements:
    """Measurements of all requests for text that the engine was given, since the start.

    Sequences of batches wait as long as others run. They would say nothing in the histograms, and are left
    out of these and of `finished`.
    """

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()
        """Choices by how they ended, in vLLM's words: `stop`, `length`, `abort`, `error`."""
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.token_gap = Histogram(TOKEN_SECONDS)
        """Time, in seconds, from one output of a sequence to the next."""
        self.per_token = Histogram(TOKEN_SECONDS)
        """Mean of a request after its first token."""
        self.whole = Histogram(REQUEST_SECONDS)
        self.queue = Histogram(REQUEST_SECONDS)
        self.inference = Histogram(REQUEST_SECONDS)
        self.prefill = Histogram(REQUEST_SECONDS)
        self.decode = Histogram(REQUEST_SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.completion_tokens = Histogram(TOKENS)
        self.max_tokens = Histogram(TOKENS)
        self.choices = Histogram(CHOICES)
        self.broken_answers = 0
        """Answers that had begun well when a request of theirs failed."""
        self.tenants = TenantLoads(FIRST_TOKEN_SECONDS)
        self._uses: dict[tuple[str, str], AdapterUse] = {}

    def ended(
        self, job: MeasuredRequest, usage: TokenUsage, timestamps: RequestTimestamps, finished: Counter[str]
    ) -> None:
        """Record that a request is over. finished: its choices by how they ended."""
        names = {use.name for use in job.adapter.uses} or {""}
        for name in names:
            use = self._use(job.tenant, name)
            use.requests += 1
            use.prompt_tokens += usage.prompt
            use.completion_tokens += usage.completion
        if job.background:
            return
        self.tenants.record(
            job.tenant,
            names,
            failed=bool(finished["error"]),
            prompt=usage.prompt,
            completion=usage.completion,
            first_token=timestamps.first - timestamps.arrived if timestamps.first else None,
            waited=timestamps.started - timestamps.submitted if timestamps.started else None,
        )
        self.finished += finished
        self.prompt_tokens.observe(usage.prompt)
        self.completion_tokens.observe(usage.completion)
        self.choices.observe(job.choices)
        if job.generates:
            self.max_tokens.observe(job.sampling.max_tokens)
        if timestamps.first:
            self.first_token.observe(timestamps.first - timestamps.arrived)
        if timestamps.started:
            self.queue.observe(timestamps.started - timestamps.submitted)
        if finished["abort"] or finished["error"] or not timestamps.last:
            return  # also a stream that was resumed after its last token, for which nothing was computed here
        started = timestamps.started or timestamps.submitted
        self.whole.observe(timestamps.last - timestamps.arrived)
        self.inference.observe(timestamps.last - started)
        self.prefill.observe((timestamps.first or timestamps.last) - started)
        if timestamps.first:
            self.decode.observe(timestamps.last - timestamps.first)
            more = usage.completion / job.choices - 1
            if more > 0:
                self.per_token.observe((timestamps.last - timestamps.first) / more)

    def _use(self, tenant: str, adapter: str) -> AdapterUse:
        key = (tenant, adapter)
        if key not in self._uses and len(self._uses) >= MOST_ADAPTERS:
            key = (OTHERS, OTHERS)
        return self._uses.setdefault(key, AdapterUse())

    def uses(self, known: Callable[[str, str], bool]) -> Iterator[tuple[str, str, AdapterUse]]:
        """Yield uses by tenant and adapter, "" being the base. Those that are not `known` any more are
        dropped."""
        for (tenant, adapter), use in list(self._uses.items()):
            if not adapter or (tenant, adapter) == (OTHERS, OTHERS) or known(tenant, adapter):
                yield tenant, adapter, use
            else:
                del self._uses[tenant, adapter]
