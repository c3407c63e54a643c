"""GET /v1/models: the base and every adapter, as OpenAI's clients list them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from onebase_server.errors import ConflictError, UnknownAdapterError, UnknownModelError
from onebase_server.http.deps import Calling, Provided, Services, json_response
from onebase_server.http.guard import needs

router = APIRouter(prefix="/v1", tags=["openai"])


def _model(services: Services, name: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": services.started,
        "owned_by": "onebase",
        "parent": parent,
    }


@router.get("/models")
@needs("any")
async def list_models(services: Provided, caller: Calling) -> Response:
    """Everything that `model` may be."""
    base = services.catalog.base_name
    models = [_model(services, base, None)]
    names = services.catalog.of(caller.tenant)
    models += [_model(services, record.name, base) for record in names if record.active]
    return json_response({"object": "list", "data": models})


@router.get("/models/{name:path}")
@needs("any")
async def get_model(name: str, services: Provided, caller: Calling) -> Response:
    """One model; `name` may be an adapter's `name@version`."""
    base = services.catalog.base_name
    if name == base:
        return json_response(_model(services, base, None))
    try:
        services.catalog.of(caller.tenant).find(name, param="model")
    except (UnknownAdapterError, ConflictError) as error:
        raise UnknownModelError(f"{error.message} The base is {base!r}.") from error
    return json_response(_model(services, name, base))
