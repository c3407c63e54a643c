"""GET /metrics: for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response

from onebase_server.http.deps import Provided
from onebase_server.metrics import CONTENT_TYPE

router = APIRouter(tags=["health"])


@router.get("/metrics")
async def metrics(services: Provided) -> Response:
    """Figures of training and serving in Prometheus' text format."""
    return Response(await services.training.metrics_text(services.supervisor), media_type=CONTENT_TYPE)
