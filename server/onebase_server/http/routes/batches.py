"""/v1/batches: files of requests that are answered when there is room for them, as OpenAI's."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from onebase_adapters.registry import BatchRecord
from onebase_protocol import batches as wire
from onebase_protocol.common import PageAnswer, page_of
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, Services, StrictRoute, json_response
from onebase_server.http.schemas.batches import CreateBatchRequest
from onebase_server.http.views.batches import batch_view

router = APIRouter(prefix="/v1/batches", route_class=StrictRoute, tags=["batches"])

MOST = 100
BatchId = Annotated[str, Path(max_length=100)]


@router.post("", responses=answer(wire.Batch, 404, 507))
@needs("generate")
async def create_batch(body: CreateBatchRequest, services: Provided, caller: Calling) -> Response:
    """Answer each request of an uploaded file when the server has room for it."""
    services.refuse_if_draining()
    batch = await services.batches.create(
        caller.tenant,
        input_file=body.input_file_id,
        endpoint=body.endpoint,
        window=body.completion_window,
        seconds=body.seconds,
        labels=body.metadata,
    )
    return _shown(batch, services)


@router.get("", responses=answer(PageAnswer[wire.Batch], 404))
@needs("generate")
async def list_batches(
    services: Provided,
    caller: Calling,
    after: Annotated[str | None, Query(max_length=100, description="the last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 20,
) -> Response:
    """List the batches, newest first."""
    found = await services.batches.find(caller.tenant, after=after, limit=limit + 1)
    views = [batch_view(batch, services.batches.runner.waiting(batch.id)) for batch in found[:limit]]
    return json_response(page_of(views, more=len(found) > limit))


@router.get("/{batch_id}", responses=answer(wire.Batch, 404))
@needs("generate")
async def get_batch(batch_id: BatchId, services: Provided, caller: Calling) -> Response:
    """Return one batch."""
    return _shown(await services.batches.get(caller.tenant, batch_id), services)


@router.post("/{batch_id}/cancel", responses=answer(wire.Batch, 404, 409, 507))
@needs("generate")
async def cancel_batch(batch_id: BatchId, services: Provided, caller: Calling) -> Response:
    """Cancel a batch; what was answered stays."""
    services.refuse_if_draining()
    return _shown(await services.batches.cancel(caller.tenant, batch_id), services)


def _shown(batch: BatchRecord, services: Services) -> Response:
    return json_response(batch_view(batch, services.batches.runner.waiting(batch.id)))
