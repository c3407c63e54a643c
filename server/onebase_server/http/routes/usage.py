"""/v1/usage and /v1/tenants: what tenants use, and what they may."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field, StrictInt

from onebase_adapters.registry import TenantRecord
from onebase_protocol.access import Tenant, TenantUsage, UsageAnswer
from onebase_protocol.common import ListAnswer
from onebase_protocol.serving import TenantLoad
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, StrictRoute, json_response
from onebase_server.requests.schemas.wire import Wire
from onebase_server.tenancy.quotas import Limiter
from onebase_server.tenancy.usage import usage_csv

router = APIRouter(prefix="/v1", route_class=StrictRoute, tags=["usage"])
CSV = "text/csv"
Limits = Annotated[dict[str, StrictInt | None], Field(max_length=16)]


class QuotasRequest(Wire):
    """Body of POST /v1/tenants/{tenant}. A quota that is left out does not change; null is no limit."""

    quotas: Limits


@router.get("/tenants", responses=answer(ListAnswer[Tenant]))
@needs("any")
async def list_tenants(services: Provided, caller: Calling) -> Response:
    """List tenants, their quotas and what they have: all of them for an admin, for others their own."""
    found = await services.keys.tenants(caller)
    return json_response(ListAnswer(data=tuple(_tenant_view(one, services.limiter) for one in found)))


@router.post("/tenants/{tenant}", responses=answer(Tenant, 507))
@needs("admin")
async def set_quotas(
    tenant: Annotated[str, Path(max_length=200)], body: QuotasRequest, services: Provided
) -> Response:
    """Change a tenant's quotas, at once here and within a second on other servers."""
    changed = await services.keys.set_quotas(tenant, body.quotas)
    return json_response(_tenant_view(changed, services.limiter))


@router.get("/usage", responses=answer(UsageAnswer, also=(CSV,)))
@needs("any")
async def get_usage(
    request: Request,
    services: Provided,
    caller: Calling,
    start: Annotated[str | None, Query(max_length=32)] = None,
    end: Annotated[str | None, Query(max_length=32)] = None,
    group_by: Annotated[str, Query(max_length=100)] = "day,tenant,adapter",
    tenant: Annotated[str | None, Query(max_length=200)] = None,
    format: Literal["json", "csv"] | None = None,
) -> Response:
    """Return requests, tokens and training: of all tenants for an admin, for others their own."""
    if not caller.is_admin:
        tenant = caller.tenant_asked(tenant)
    columns, rows = await services.usage.find(start, end, group_by, tenant=tenant)
    wants_csv = CSV in request.headers.get("accept", "") if format is None else format == "csv"
    if wants_csv:
        return Response(usage_csv(columns, rows), media_type=CSV, headers={"Cache-Control": "no-store"})
    data = tuple(TenantUsage(**{**names, **asdict(figures)}) for names, figures in rows)
    return json_response(UsageAnswer(group_by=tuple(columns), data=data))


@router.get("/load", responses=answer(TenantLoad))
@needs("any")
async def get_load(
    services: Provided,
    caller: Calling,
    tenant: Annotated[str | None, Query(max_length=200)] = None,
    adapter: Annotated[str | None, Query(max_length=512, description='one adapter; "" is the base')] = None,
) -> Response:
    """Return requests, errors and latencies of a tenant on this server in the last six hours.

    It is the caller's tenant, or any for an admin. Without `adapter` all of its requests count, except those
    of batches.
    """
    tenant = caller.tenant_asked(tenant)
    loads = services.measured.tenants.snapshot(tenant, adapter)

    def summed() -> TenantLoad:
        return TenantLoad(
            tenant=tenant,
            adapter=adapter,
            started_at=services.started,
            last_hour=loads.last_hour(tenant, adapter),
            data=loads.points(tenant, adapter),
        )

    return json_response(await services.reading.run_for(caller.tenant, summed))


def _tenant_view(record: TenantRecord, limiter: Limiter) -> Tenant:
    return Tenant(
        tenant=record.tenant,
        quotas=record.quotas.given(),
        used=limiter.used("tenant", record.tenant, record.quotas),
        adapters=record.adapters,
        bytes=record.bytes,
        jobs=record.jobs,
        training_seconds=record.training_seconds,
    )
