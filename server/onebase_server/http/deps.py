"""Services that the routes work with, wired once by the composition root."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar, get_type_hints
from weakref import WeakValueDictionary

import msgspec
from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope

from onebase_adapters.registry import RegistryError
from onebase_edge.background import Threads, TurnBudget
from onebase_edge.errors import ApiError, InvalidRequestError, UnavailableError, status_of
from onebase_edge.forwarded import forwarded_of
from onebase_edge.settings import Settings
from onebase_server.adapters.activation import ActivationService
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.merging import Merging
from onebase_server.adapters.residency import Residency
from onebase_server.adapters.service import AdapterService
from onebase_server.adapters.sources import Folders, HubAdapters
from onebase_server.batches.service import BatchService
from onebase_server.http.metrics import MetricsCollector, render
from onebase_server.http.views.adapters import AdapterViews
from onebase_server.inference.generation import GenerationRun
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.jobs.checkpoints import CheckpointModels
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders
from onebase_server.jobs.grading import Grading
from onebase_server.jobs.job_run import TrainerPool
from onebase_server.jobs.scheduler import JobScheduler
from onebase_server.jobs.service import JobService
from onebase_server.live.sampling import Samples
from onebase_server.live.service import LiveTraining
from onebase_server.processes.live_client import LiveTrainer
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.processes.verifier_client import VerifierClient
from onebase_server.requests import strict_json
from onebase_server.requests.planner import Planner
from onebase_server.requests.pooling import ReadingPlanner
from onebase_server.requests.request_log import RequestLog
from onebase_server.requests.rollouts import RolloutService
from onebase_server.requests.schemas.wire import validation_error
from onebase_server.requests.stored_responses import StoredResponses
from onebase_server.storage.opening import Storage
from onebase_server.telemetry.history import LoadRecorder
from onebase_server.telemetry.measurements import RequestMeasurements
from onebase_server.telemetry.traces import Tracing
from onebase_server.tenancy.access import Caller, KeyRing
from onebase_server.tenancy.pacing import RequestPacer
from onebase_server.tenancy.peers import Peers, QuotaSharing
from onebase_server.tenancy.quotas import Limiter, QuotaReservation
from onebase_server.tenancy.usage import TenantUsageRecorder

P = ParamSpec("P")
T = TypeVar("T")

LONG_BODY = 16 * 1024
"""Bytes of bodies that one turn of the event loop reads and validates, for all requests together (about
5 ms). The rest goes to threads: a long conversation takes a third of a second, in which no stream would go
on."""
VERY_LONG_BODY = 128 * 1024
"""Bytes of a body above which a process apart reads it: a thread would hold up the event loop for 3 ms."""
READ_THREADS = 2
COUNT_SECONDS = 5.0
"""Time limit, in seconds, for the registry's figures; after it the others are given alone."""

CALLER = "onebase.caller"
"""Key of a request's Caller in its ASGI scope."""
ARRIVED = "onebase.arrived"
"""Key of the time (monotonic) at which a request was admitted, before its body is read, in its scope."""
RESERVATION = "onebase.reservation"
"""Key of the QuotaReservation in the ASGI scope of a request for text."""
CUT = "onebase.cut"
"""Key that says that a body was too long, and only its beginning is kept."""
TRANSCRIPT = "onebase.transcript"
"""Key of the transcript that came with the body, once that was read; None if its stream is to have none."""


class ResumeState(NamedTuple):
    """Transcript of a request so far, empty at first, and the seconds since the request first came."""

    lines: bytes
    seconds: float


def server_stopping() -> UnavailableError:
    return UnavailableError(
        "The server is stopping. Send the request to another one, or again later.",
        code="server_stopping",
        retry_after=5.0,
    )


@dataclass
class Training:
    """Parts of training that the routes and the server's start and end use."""

    files: TrainingFiles
    jobs: JobService
    scheduler: JobScheduler
    checkpoints: CheckpointModels
    storage: Storage
    threads: Threads
    folders: JobFolders
    peers: Peers
    pool: TrainerPool

    async def counts(self) -> tuple[dict[str, int] | None, dict[str, int] | None]:
        """Return how many jobs and batches there are in each state; None while the registry is away."""
        registry = self.storage.registry
        try:
            async with asyncio.timeout(COUNT_SECONDS):
                return (
                    await self.threads.run_blocking(registry.training.counts),
                    await self.threads.run_blocking(registry.batches.counts),
                )
        except (RegistryError, TimeoutError):
            return None, None


@dataclass
class Services:
    """One server's parts."""

    settings: Settings
    keys: KeyRing
    limiter: Limiter
    sharing: QuotaSharing
    usage: TenantUsageRecorder
    catalog: Catalog
    tokenizer: BaseTokenizer
    supervisor: EngineSupervisor
    planner: Planner
    read_planner: ReadingPlanner
    responses: StoredResponses
    residency: Residency
    adapters: AdapterService
    hub: HubAdapters
    merging: Merging
    activation: ActivationService
    rollouts: RolloutService
    folders: Folders
    views: AdapterViews
    verifier: VerifierClient
    training: Training
    live: LiveTrainer
    live_training: LiveTraining
    samples: Samples
    grading: Grading
    batches: BatchService
    request_log: RequestLog
    measured: RequestMeasurements
    tracing: Tracing
    metrics: MetricsCollector
    answers: Counter[tuple[str, int]]
    """Number of answers since the start, by route and status."""
    load: LoadRecorder
    pacer: RequestPacer
    reading: Threads
    """Threads for bodies and answers that are long; tenants take turns."""
    body_readers: strict_json.BodyReaders = field(default_factory=strict_json.BodyReaders)
    running: WeakValueDictionary[tuple[str, str], GenerationRun] = field(default_factory=WeakValueDictionary)
    """Texts that are being generated, by tenant and id, so that each can be cancelled."""
    read_inline: TurnBudget = field(default_factory=lambda: TurnBudget(LONG_BODY))
    started: int = field(default_factory=lambda: int(time.time()))
    leaving: bool = False
    """Whether a signal has come: `/ready` answers 503."""
    draining: bool = False
    """Whether nothing new begins any more, and what runs may end."""
    route_secret: str = field(default_factory=lambda: secrets.token_hex(32))
    """Secret with which `onebase route` has its headers believed. Each process has another one."""
    is_routed: bool = False
    """Whether a route has asked for that secret."""

    async def metrics_text(self) -> bytes:
        """Return the metrics for Prometheus; without counts of jobs and batches while the registry is
        away."""
        collected = self.metrics.collect(*await self.training.counts())
        return await asyncio.to_thread(render, collected)

    def refuse_if_draining(self) -> None:
        if self.draining:
            raise server_stopping()


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope[CALLER]
    return caller


def _provide(find: Callable[[Request], Any]) -> Any:
    """Return the dependency that gives a route what `find` returns of its request. FastAPI would call a plain
    function in a thread, for each request again."""

    async def provide(request: Request) -> Any:
        return find(request)

    return Depends(provide)


def resume_state_of(request: Request) -> ResumeState | None:
    """Return the transcript of a request whose stream is to send one, else None."""
    state: ResumeState | None = request.scope.get(TRANSCRIPT)
    return state


Provided = Annotated[Services, _provide(_services)]
Calling = Annotated[Caller, _provide(_caller)]
"""Caller of the request."""
Admitted = Annotated[QuotaReservation, _provide(lambda request: request.scope[RESERVATION])]
"""Quota reservation of the request, on a route that needs the scope `generate`."""


class BodyError(HTTPException):
    """A body that is refused while it is read: FastAPI's reader hides every other exception."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(status_of(error)[0])
        self.error = error


class _StrictRequest(Request):
    """A request with a strict reader of its body. kind: the body's type; None if the route reads it by
    itself."""

    def __init__(self, scope: Scope, receive: Receive, kind: TypeAdapter[Any] | None) -> None:
        super().__init__(scope, receive)
        self._kind = kind

    async def body(self) -> bytes:
        """Return the body without the transcript that may follow it."""
        if TRANSCRIPT not in self.scope:
            whole, own = await super().body(), forwarded_of(self.scope).transcript
            self.scope[TRANSCRIPT] = None if own is None else ResumeState(whole[own[0] :], own[1])
            self._body = whole if own is None else whole[: own[0]]
        return await super().body()

    async def json(self) -> Any:
        """Return the body's value. One that is read in a thread is validated there too; FastAPI takes it as
        it is."""
        services, body = _services(self), await self.body()
        most = services.settings.max_body
        try:
            if services.read_inline.try_spend(len(body)):
                return strict_json.decode(body, most)
            tenant = _caller(self).tenant
            if len(body) <= VERY_LONG_BODY:
                return await services.reading.run_for(tenant, self._read, body, most)
            value = await services.body_readers.decode(tenant, body, most, _max_length(services))
            return await services.reading.run_for(tenant, self._validated, value)
        except ApiError as error:
            raise BodyError(error) from error

    def _read(self, body: bytes, most: int) -> Any:
        return self._validated(strict_json.decode(body, most))

    def _validated(self, value: Any) -> Any:
        if self._kind is None:
            return value
        try:
            return self._kind.validate_python(value)
        except ValidationError as error:
            message, param = validation_error(error.errors(include_url=False))
            raise InvalidRequestError(message, param=param) from error


def _max_length(services: Services) -> int:
    try:
        return services.planner.max_length
    except UnavailableError:  # the engine is away; a route that needs it says so
        return 2**63 - 1


async def off_loop(request: Request, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what the call makes of the request's body, computed in a thread unless this turn of the event
    loop has room for a body of this length."""
    services = _services(request)
    if services.read_inline.try_spend(len(await request.body())):
        return call(*args, **kwargs)
    return await services.reading.run_for(_caller(request).tenant, call, *args, **kwargs)


class StrictRoute(APIRoute):
    """Reads bodies strictly: Python's own JSON reader takes NaN, 1e999, fields given twice and any depth."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        body = get_type_hints(self.endpoint, include_extras=True).get("body")
        kind: TypeAdapter[Any] | None = None if body is None else TypeAdapter(body)

        async def strict(request: Request) -> Response:
            asked = _StrictRequest(request.scope, request.receive, kind)
            try:
                return await handler(asked)
            except (ApiError, BodyError, RequestValidationError) as error:
                return await self.refused(asked, error)

        return strict

    async def refused(self, request: Request, error: Exception) -> Response:
        """Answer a request that was refused for a reason that its sender can change."""
        raise error


def refusal_of(error: Exception) -> ApiError:
    """Return what refuses a request, as an error of this server. Raises what is none."""
    if isinstance(error, RequestValidationError):
        message, param = validation_error(error.errors())
        return InvalidRequestError(message, param=param)
    if isinstance(error, BodyError):
        return error.error
    if not isinstance(error, ApiError):
        raise error
    return error


def json_response(data: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json")
