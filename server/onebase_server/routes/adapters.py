"""GET /v1/adapters: what is served besides the base."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from onebase_server.catalog import AdapterVersion
from onebase_server.services import Provided, Services, json_response

router = APIRouter(prefix="/v1", tags=["adapters"])


def _adapter(services: Services, version: AdapterVersion) -> dict[str, Any]:
    loaded = services.catalog.loaded(version)
    return {
        "id": version.name,
        "object": "adapter",
        "version": version.digest,
        "rank": loaded.rank if loaded else None,
        "targets": loaded.targets if loaded else [],
        "parameters": loaded.parameters if loaded else None,
        "bytes": loaded.bytes if loaded else None,
        "base": services.catalog.base_name,
        "active": loaded is not None,
    }


@router.get("/adapters")
async def list_adapters(services: Provided) -> Response:
    """Each adapter with its version (the SHA-256 of its files), its rank and its size in bytes."""
    data = [_adapter(services, version) for version in services.catalog]
    return json_response({"object": "list", "data": data})


@router.get("/adapters/{name}")
async def get_adapter(name: str, services: Provided) -> Response:
    """One adapter; `name` may be `name@version`."""
    return json_response(_adapter(services, services.catalog.find(name)))
