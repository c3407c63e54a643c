"""/v1/keys, /v1/key: who may use this registry's servers. The first key is made by `onebase keys create`."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Response
from msgspec.structs import asdict
from pydantic import Field, StrictInt

from onebase_adapters.registry import DEFAULT_TENANT, ApiKeyRecord, Scope
from onebase_protocol import access as wire
from onebase_protocol.common import ListAnswer
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, StrictRoute, json_response
from onebase_server.http.routes.usage import Limits
from onebase_server.requests.schemas.wire import Wire
from onebase_server.tenancy.quotas import Limiter

router = APIRouter(prefix="/v1", route_class=StrictRoute, tags=["keys"])


class CreateKeyRequest(Wire):
    """Body of POST /v1/keys."""

    tenant: Annotated[str, Field(max_length=200)] = DEFAULT_TENANT
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=8)]
    name: Annotated[str, Field(max_length=1000)] = Field(default="", description="for people, in lists")
    expires_in_s: Annotated[float, Field(gt=0, le=3e9)] | None = Field(
        default=None, description="seconds from now; null: it does not expire"
    )
    quotas: Limits = Field(
        default={}, description="requests, tokens (in any 60 seconds), sequences (at once)"
    )
    priority: StrictInt = Field(
        default=0, description="-4 to 4; each step doubles its share of a busy engine"
    )


class ChangeKeyRequest(Wire):
    """Body of POST /v1/keys/{key_id}. A field that is left out does not change; a quota of null is no
    limit."""

    quotas: Limits = Field(default={})
    priority: StrictInt | None = None


@router.get("/key", responses=answer(wire.CallerAnswer))
@needs("any")
async def own_key(caller: Calling) -> Response:
    """Return the key, the tenant and the scopes of the caller."""
    scopes = tuple(sorted(caller.scopes))
    return json_response(wire.CallerAnswer(key=caller.key, tenant=caller.tenant, scopes=scopes))


@router.post("/keys", responses=answer(wire.NewApiKey, 507))
@needs("admin")
async def create_key(body: CreateKeyRequest, services: Provided) -> Response:
    """Create a key. Its text is in this answer alone."""
    expires_at = None if body.expires_in_s is None else time.time() + body.expires_in_s
    made, key = await services.keys.create(
        body.tenant,
        body.scopes,
        name=body.name,
        expires_at=expires_at,
        quotas=body.quotas,
        priority=body.priority,
    )
    answer = json_response(wire.NewApiKey(**asdict(_view(made, services.limiter)), key=key))
    answer.headers["Cache-Control"] = "no-store"
    return answer


@router.get("/keys", responses=answer(ListAnswer[wire.ApiKey]))
@needs("adapters")
async def list_keys(services: Provided, caller: Calling) -> Response:
    """List all keys that there ever were, newest first: of all tenants for an admin, for others their own."""
    found = await services.keys.all(None if caller.is_admin else caller.tenant)
    return json_response(ListAnswer(data=tuple(_view(key, services.limiter) for key in found)))


@router.post("/keys/{key_id}", responses=answer(wire.ApiKey, 404, 507))
@needs("admin")
async def change_key(key_id: str, body: ChangeKeyRequest, services: Provided) -> Response:
    """Change a key's quotas and priority, at once here and within a second on other servers."""
    changed = await services.keys.change(key_id, body.quotas, body.priority)
    return json_response(_view(changed, services.limiter))


@router.delete("/keys/{key_id}", responses=answer(wire.ApiKey, 404, 507))
@needs("admin")
async def revoke_key(key_id: str, services: Provided) -> Response:
    """Revoke a key, at once here and within a second on other servers."""
    return json_response(_view(await services.keys.revoke(key_id), services.limiter))


def _view(key: ApiKeyRecord, limiter: Limiter) -> wire.ApiKey:
    return wire.ApiKey(
        id=key.id,
        tenant=key.tenant,
        name=key.name,
        scopes=key.scopes,
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        last_used_at=key.last_used_at,
        quotas=key.quotas.given(),
        used=limiter.used("key", key.id, key.quotas),
        priority=key.priority,
    )
