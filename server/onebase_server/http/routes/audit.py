"""/v1/audit: who changed what, and when."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from onebase_adapters.registry import AUDIT_ACTIONS, AUDIT_KINDS, AuditRecord
from onebase_edge.errors import InvalidRequestError
from onebase_protocol import access as wire
from onebase_protocol.common import PageAnswer, page_of
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, StrictRoute, json_response
from onebase_server.http.views.jobs import number_of
from onebase_server.storage.calls import storage_errors

router = APIRouter(prefix="/v1/audit", route_class=StrictRoute, tags=["audit"])

MOST = 1000
_ID = "audit-"


@router.get("", responses=answer(PageAnswer[wire.AuditEntry]))
@needs("adapters")
async def list_entries(
    services: Provided,
    caller: Calling,
    tenant: Annotated[str | None, Query(max_length=512, description="for admins: of one tenant")] = None,
    action: Annotated[str | None, Query(description="as in adapter.activated, or a kind: job")] = None,
    target: Annotated[str | None, Query(max_length=512, description="an adapter's name, or an id")] = None,
    since: Annotated[float | None, Query(ge=0, allow_inf_nan=False, description="Unix seconds")] = None,
    after: Annotated[str | None, Query(max_length=100, description="the last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 100,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List who changed what, newest first unless `order` is asc. An admin sees every tenant, others their
    own."""
    if action is not None and action not in (*AUDIT_ACTIONS, *AUDIT_KINDS):
        raise InvalidRequestError(
            f"action: there is no {action[:80]!r}. Use a kind ({', '.join(AUDIT_KINDS)}), or one of "
            f"{', '.join(AUDIT_ACTIONS)}.",
            param="action",
        )
    place = None if after is None else number_of(after, _ID)
    if after is not None and place is None:
        raise InvalidRequestError(f"after: {after!r} is no id of an entry.", param="after")
    if not caller.is_admin and tenant not in (None, caller.tenant):
        return json_response(PageAnswer[wire.AuditEntry](data=()))
    storage = services.training.storage
    with storage_errors():
        found = await services.training.threads.run_blocking(
            storage.registry.audit.entries,
            tenant=tenant if caller.is_admin else caller.tenant,
            action=action,
            target=target,
            since=since,
            after=place,
            limit=limit + 1,
            oldest_first=order == "asc",
        )
    return json_response(page_of([_view(entry) for entry in found[:limit]], more=len(found) > limit))


def _view(entry: AuditRecord) -> wire.AuditEntry:
    return wire.AuditEntry(
        id=f"{_ID}{entry.number}",
        at=entry.at,
        tenant=entry.tenant,
        key=entry.key,
        actor=entry.actor,
        action=entry.action,
        target=entry.target,
        version=entry.version,
        base=entry.base,
        server=entry.server,
        request=entry.request,
        details=dict(entry.details),
        base_id=entry.base_id,
        chain=entry.chain,
    )
