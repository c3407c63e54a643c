"""/v1/requests: the log of requests, and their replay."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field

from onebase_adapters.registry import ErasuresError
from onebase_edge.errors import (
    ForbiddenError,
    InvalidRequestError,
    RequestNotFoundError,
    StateConflictError,
    UnavailableError,
)
from onebase_edge.sse import cancelled_when_gone
from onebase_protocol import request_log as wire
from onebase_protocol.common import PageAnswer, page_of
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import LONG_BODY, Calling, Provided, Services, StrictRoute, json_response
from onebase_server.http.routes.generation import begin
from onebase_server.requests.replay import ROUTES, ReplayPlanner, compare
from onebase_server.requests.request_log import MOST_FOUND, Begun, has_answer
from onebase_server.requests.schemas.generation import MAX_ASKER
from onebase_server.requests.schemas.wire import Wire
from onebase_server.storage.calls import storage_errors
from onebase_server.tenancy.access import Caller

router = APIRouter(prefix="/v1/requests", route_class=StrictRoute, tags=["request log"])
RequestId = Annotated[str, Path(max_length=200)]
Tenant = Annotated[str | None, Query(max_length=200, description="for admins: another tenant's")]


class ReplayRequest(Wire):
    """Body of POST /v1/requests/{id}/replay."""

    version: str | None = Field(
        default=None, max_length=64, description="answer with this version of the adapter instead"
    )
    body: dict[str, Any] | None = Field(
        default=None, description="the request as it was sent, where the log has hashes alone"
    )


@router.get("", responses=answer(PageAnswer[wire.LoggedRequest]))
@needs("adapters")
async def list_requests(
    services: Provided,
    caller: Calling,
    tenant: Tenant = None,
    since: Annotated[float | None, Query(ge=0, allow_inf_nan=False, description="Unix seconds")] = None,
    adapter: Annotated[str | None, Query(max_length=512, description="an adapter's name")] = None,
    user: Annotated[str | None, Query(max_length=MAX_ASKER, description="as requests name it")] = None,
    replayable: Annotated[
        bool,
        Query(
            description="true: only requests for text that were answered; no replays, no samples, and "
            "none of a rollout's shadow or judge"
        ),
    ] = False,
    after: Annotated[str | None, Query(max_length=200, description="the last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_FOUND)] = 100,
) -> Response:
    """List the requests in this server's log that began last, without their texts."""
    whose, log = _tenant(caller, tenant), services.request_log
    with storage_errors():
        hashed = None if user is None else await log.user_hash(whose, user)

    def matches(one: wire.LoggedRequest) -> bool:
        named = adapter is None or any(adapter == used.name for used in one.adapters)
        return named and hashed in (None, one.user) and (not replayable or one.route in ROUTES)

    found = await log.threads.run_for(
        caller.tenant,
        lambda: log.find(whose, matches, since=since, after=after, limit=limit + 1, answered=replayable),
    )
    return json_response(page_of(found[:limit], more=len(found) > limit))


@router.get("/{id}", responses=answer(wire.LoggedRequest, 404))
@needs("adapters")
async def get_request(id: RequestId, services: Provided, caller: Calling, tenant: Tenant = None) -> Response:
    """Return a request in this server's log, with the texts that the log has of it."""
    logged, _ = await _find(services, caller, tenant, id)
    return json_response(logged)


@router.post("/{id}/replay", responses=answer(wire.Replay, 404, 409, 429))
@needs("adapters")
async def replay_request(
    id: RequestId,
    body: ReplayRequest,
    request: Request,
    services: Provided,
    caller: Calling,
    tenant: Tenant = None,
) -> Response:
    """Answer a logged request once more, with the version that answered it, and compare the answers."""
    services.refuse_if_draining()
    since = services.request_log.reads_since(_tenant(caller, tenant))
    logged, line = await _find(services, caller, tenant, id)
    if not has_answer(logged):
        raise StateConflictError(
            f"The request is {logged.state}: there is no answer to compare with.", code="replay_no_answer"
        )
    storage, log = services.training.storage, services.request_log
    with storage_errors():
        key = await log.key_of(logged.tenant)
    reservation = services.limiter.enter(caller)
    generation = None
    try:
        planned = await ReplayPlanner(services.planner, storage.base_id, services.reading).plan(
            logged,
            line,
            _as_tenant(caller, logged.tenant),
            key,
            version=body.version,
            kept=await _body_of(services, caller, line),
            body=body.body,
        )
        run = generation = await begin(request, services, reservation, planned, stream=False, since=since)
        with cancelled_when_gone(request.receive, run):
            choices = await run.collect()
        generation = None
        compared = await services.reading.run_for(caller.tenant, compare, logged, choices, key)
        uses = zip(planned.adapter.uses, planned.adapter.refs, strict=True)
        return json_response(
            wire.Replay(
                id=planned.id,
                request=logged.id,
                adapters=tuple(
                    wire.LoggedAdapter(name=use.name, version=use.digest, weight=ref.weight)
                    for use, ref in uses
                ),
                equal=all(one.equal for one in compared),
                choices=compared,
            )
        )
    finally:
        if generation is not None:
            generation.cancel()
        reservation.close()


@router.delete("", responses=answer(wire.LogErased, 507))
@needs("adapters")
async def erase_requests(
    services: Provided,
    caller: Calling,
    tenant: Tenant = None,
    user: Annotated[str | None, Query(max_length=MAX_ASKER, description="only requests of this user")] = None,
    all: Annotated[bool, Query(description="true: all requests of the tenant")] = False,
) -> Response:
    """Erase the requests of one of the tenant's users, or all of them, from the logs of all servers of the
    registry: here at once, elsewhere within seconds."""
    if all == (user is not None):
        raise InvalidRequestError("user: say whose requests are erased, or all=true, not both.", param="user")
    whose = _tenant(caller, tenant)
    try:
        with storage_errors():
            erased = await services.request_log.erase(whose, user)
    except ErasuresError as error:
        raise InvalidRequestError(f"user: {error}", param="user") from error
    except OSError as error:
        raise UnavailableError(
            f"The log of requests cannot be written now ({error.strerror}). They are erased once it can be.",
            code="request_log_unavailable",
            retry_after=5.0,
        ) from error
    return json_response(wire.LogErased(tenant=whose, user=user, erased=erased))


def _tenant(caller: Caller, tenant: str | None) -> str:
    if tenant not in (None, caller.tenant) and not caller.is_admin:
        raise ForbiddenError(
            "tenant: only a key with the scope 'admin' may see the requests of other tenants. Leave it out.",
            code="insufficient_scope",
            param="tenant",
        )
    return caller.tenant if tenant is None else tenant


def _as_tenant(caller: Caller, tenant: str) -> Caller:
    """Return the caller as one of that tenant, whose names and cached prefixes it then uses."""
    return caller if caller.tenant == tenant else replace(caller, tenant=tenant)


async def _body_of(services: Services, caller: Caller, line: Begun) -> Any:
    """Return the request as the log has it; None if it has not."""
    body = bytes(line.body)
    if len(body) <= LONG_BODY:
        return msgspec.json.decode(body) if body else None
    limits = services.settings.max_body, services.planner.max_length
    return await services.body_readers.decode(caller.tenant, body, *limits)


async def _find(
    services: Services, caller: Caller, tenant: str | None, request_id: str
) -> tuple[wire.LoggedRequest, Begun]:
    """Raises RequestNotFoundError."""
    whose = _tenant(caller, tenant)
    log = services.request_log
    found = await log.threads.run_for(caller.tenant, log.get, whose, request_id)
    if found is None:
        raise RequestNotFoundError(request_id)
    return found
