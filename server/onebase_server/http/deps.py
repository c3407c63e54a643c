"""What the routes work with, wired once by the composition root."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from onebase_adapters.registry import RegistryError
from onebase_server.access import Caller, KeyRing
from onebase_server.adapters.activation import Activation
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.residency import Residency
from onebase_server.adapters.service import AdapterService
from onebase_server.adapters.sources import Folders, HubAdapters
from onebase_server.background import Threads
from onebase_server.errors import OneBaseError, UnavailableError, status_of
from onebase_server.generation.kept_responses import KeptResponses
from onebase_server.generation.planner import Planner
from onebase_server.generation.reading import ReadingPlanner
from onebase_server.generation.tokenization import BaseTokenizer
from onebase_server.http import strict_json
from onebase_server.http.views.adapters import AdapterViews
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.scheduler import JobScheduler
from onebase_server.jobs.service import JobService
from onebase_server.metrics import Metrics
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.processes.verifier_client import VerifierClient
from onebase_server.quotas import Limiter, Ticket
from onebase_server.settings import Settings
from onebase_server.storage import Storage
from onebase_server.usage import UsageMeter

COUNT_SECONDS = 5.0
"""Limit for the registry's figures; after it the others are given alone."""

CALLER = "onebase.caller"
"""Key of a request's Caller in its ASGI scope."""
TICKET = "onebase.ticket"
"""Key of a Ticket there, of a request for text."""


def server_stopping() -> UnavailableError:
    return UnavailableError(
        "The server is stopping. Send the request to another one, or again later.",
        code="server_stopping",
        retry_after=5.0,
    )


@dataclass
class Training:
    """What the routes and the server's life need of training."""

    files: TrainingFiles
    jobs: JobService
    scheduler: JobScheduler
    storage: Storage
    threads: Threads

    async def metrics_text(self, supervisor: EngineSupervisor) -> bytes:
        """For Prometheus; without the jobs while the registry is away."""
        try:
            counts = await asyncio.wait_for(
                self.threads.run(self.storage.registry.training.counts), COUNT_SECONDS
            )
        except (RegistryError, TimeoutError):
            counts = None
        return await asyncio.to_thread(Metrics(supervisor, self.scheduler).render, counts)


@dataclass
class Services:
    """One server's parts. `draining` is set by SIGTERM: what runs may end, nothing new begins."""

    settings: Settings
    keys: KeyRing
    limiter: Limiter
    usage: UsageMeter
    catalog: Catalog
    tokenizer: BaseTokenizer
    supervisor: EngineSupervisor
    planner: Planner
    reading: ReadingPlanner
    responses: KeptResponses
    residency: Residency
    adapters: AdapterService
    hub: HubAdapters
    activation: Activation
    folders: Folders
    views: AdapterViews
    verifier: VerifierClient
    training: Training
    started: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    def refuse_if_draining(self) -> None:
        if self.draining:
            raise server_stopping()


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope[CALLER]
    return caller


def _ticket(request: Request) -> Ticket:
    ticket: Ticket = request.scope[TICKET]
    return ticket


Provided = Annotated[Services, Depends(_services)]
Calling = Annotated[Caller, Depends(_caller)]
"""Whom the request comes from."""
Admitted = Annotated[Ticket, Depends(_ticket)]
"""What it may take, where a route needs the scope `generate`."""


class BodyError(HTTPException):
    """A body that is refused while it is read: FastAPI's reader hides every other exception."""

    def __init__(self, error: OneBaseError) -> None:
        super().__init__(status_of(error)[0])
        self.error = error


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return strict_json.decode(await self.body(), _services(self).settings.max_body)
        except OneBaseError as error:
            raise BodyError(error) from error


class StrictRoute(APIRoute):
    """Reads bodies strictly: Python's own JSON reader takes NaN, 1e999, fields given twice and any depth."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def json_response(data: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json")
