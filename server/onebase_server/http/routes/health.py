"""GET /health, /ready, /version, /status and /metrics: for probes, for people and for Prometheus."""

from __future__ import annotations

import platform

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

import onebase_server
from onebase_engine.engine.messages import BaseInfo, Stats
from onebase_protocol.serving import (
    EngineStatus,
    HealthAnswer,
    LoadHistory,
    LoadPoint,
    QueueWait,
    RouteSecretAnswer,
    ServerVersionAnswer,
    VerifierStatus,
)
from onebase_server.adapters.residency import MemoryUse
from onebase_server.http.answers import answer
from onebase_server.http.authorization import NO_KEY, needs
from onebase_server.http.deps import Calling, Provided, json_response
from onebase_server.http.metrics import CONTENT_TYPE
from onebase_server.processes.supervisor import EngineState

router = APIRouter(tags=["health"])
_HEALTH = answer(HealthAnswer) | answer(HealthAnswer, description="Not now", status=503)
_UNHEALTHY = (EngineState.STALLED, EngineState.FAILED)


class StatusAnswer(msgspec.Struct):
    """Answer of GET /status: bytes, tokens and counts."""

    base: str
    engine: EngineStatus
    info: BaseInfo | None
    stats: Stats | None
    requests: int
    adapters: int
    host_memory: MemoryUse
    verifier: VerifierStatus


def _unavailable(status: str, state: EngineState, retry_after: int) -> Response:
    headers = {"Retry-After": str(retry_after)}
    body = msgspec.json.encode(HealthAnswer(status, state.value))
    return Response(body, status_code=503, media_type="application/json", headers=headers)


@router.get("/health", openapi_extra=NO_KEY, responses=_HEALTH)
@needs("open")
async def health(services: Provided) -> Response:
    """Return 200 while the server makes progress, also when the engine is still loading; 503 after a
    stall."""
    state = services.supervisor.state
    if state in _UNHEALTHY:
        return _unavailable("error", state, 5)
    return json_response(HealthAnswer("ok", state.value))


@router.get("/ready", openapi_extra=NO_KEY, responses=_HEALTH)
@needs("open")
async def ready(services: Provided) -> Response:
    """Return 200 when a request sent now would be served; 503 while loading, restarting, paused or
    stopping."""
    state = services.supervisor.state
    if services.leaving or services.draining:
        return _unavailable("stopping", state, 5)
    if state is not EngineState.READY:
        return _unavailable("not ready", state, 2)
    if services.supervisor.paused:
        return _unavailable("paused", state, 2)
    return json_response(HealthAnswer("ready", state.value))


@router.get("/version", responses=answer(ServerVersionAnswer))
@needs("any")
async def version() -> Response:
    """Return the server's version."""
    return json_response(
        ServerVersionAnswer(version=onebase_server.__version__, python=platform.python_version())
    )


@router.get("/status", responses=answer(StatusAnswer))
@needs("admin")
async def status(services: Provided) -> Response:
    """Return the base's figures (bytes, tokens), and what the engine has done so far."""
    supervisor = services.supervisor
    return json_response(
        StatusAnswer(
            base=services.catalog.base_name,
            engine=EngineStatus(supervisor.state.value, supervisor.restarts),
            info=supervisor.base,
            stats=supervisor.client.stats,
            requests=supervisor.client.open_requests,
            adapters=len(services.catalog),
            host_memory=services.residency.memory,
            verifier=VerifierStatus(services.verifier.pid),
        )
    )


@router.get("/status/history", responses=answer(LoadHistory))
@needs("admin")
async def load_history(services: Provided, caller: Calling) -> Response:
    """Return latency, errors, speed and the machine's load of the last six hours by minute, and of now."""
    loads = services.measured.tenants.snapshot()

    def summed() -> tuple[tuple[QueueWait, ...], tuple[LoadPoint, ...]]:
        return tuple(sorted(loads.queue_waits(), key=_longest_first)), services.load.points()

    waits, points = await services.reading.run_for(caller.tenant, summed)
    return json_response(
        LoadHistory(
            version=onebase_server.__version__,
            started_at=services.started,
            last_hour=services.load.since(3600.0),
            machine=services.load.machine,
            tenants=waits,
            data=points,
        )
    )


def _longest_first(wait: QueueWait) -> tuple[float, str]:
    return -(wait.p95 or 0.0), wait.tenant


@router.get("/route_secret", responses=answer(RouteSecretAnswer))
@needs("admin")
async def route_secret(services: Provided) -> Response:
    """Return the secret with which `onebase route` has its headers believed by this server."""
    services.is_routed = True
    told = json_response(RouteSecretAnswer(services.route_secret))
    told.headers["Cache-Control"] = "no-store"
    return told


@router.get("/metrics", response_class=PlainTextResponse)
@needs("metrics")
async def metrics(services: Provided) -> Response:
    """Return figures of training and serving in Prometheus' text format."""
    return Response(await services.metrics_text(), media_type=CONTENT_TYPE)
