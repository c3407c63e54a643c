"""/v1/models: the base and every adapter, as OpenAI's clients list them, and as they delete one."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter, Response

from onebase_adapters.names import label
from onebase_adapters.registry import VersionRecord
from onebase_edge.errors import AdapterNotFoundError, ForbiddenError, StateConflictError, UnknownModelError
from onebase_protocol.common import DeletedAnswer, PageAnswer
from onebase_protocol.serving import Model
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, Services, json_response
from onebase_server.http.routes.adapters import Force
from onebase_server.tenancy.access import Caller

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models", responses=answer(PageAnswer[Model]))
@needs("any")
async def list_models(services: Provided, caller: Calling) -> Response:
    """List everything that `model` may be, in one page, with the fields that OpenAI's, vLLM's and Anthropic's
    clients read."""
    names = services.catalog.of(caller.tenant)
    versions = ((record.name, record.active_version) for record in names)
    models = [_model(services, services.catalog.base_name, None)]
    models += [_model(services, name, version) for name, version in versions if version is not None]
    return json_response(PageAnswer(data=tuple(models), first_id=models[0].id, last_id=models[-1].id))


@router.get("/models/{name:path}", responses=answer(Model, 404))
@needs("any")
async def get_model(name: str, services: Provided, caller: Calling) -> Response:
    """Return one model; `name` may be an adapter's `name@version`."""
    return json_response(_model(services, name, find_model(services, caller, name)))


@router.delete("/models/{name:path}", responses=answer(DeletedAnswer, 404, 409, 507))
@needs("adapters")
async def delete_model(name: str, services: Provided, caller: Calling, force: Force = False) -> Response:
    """Delete an adapter with all its versions, or `name@version`: by the rules of DELETE /v1/adapters."""
    services.refuse_if_draining()
    if name == services.catalog.base_name:
        raise ForbiddenError(
            f"model: {name!r} is the base, which this server is for. Adapters can be deleted.",
            code="base_not_deletable",
            param="model",
        )
    names = services.catalog.of(caller.tenant)
    name = names.ours(name)
    adapter, version = name, ""
    if names.names_version(name):
        adapter, _, version = name.rpartition("@")
    try:
        if version:
            await services.activation.delete_version(
                caller.tenant, adapter, version, force=force, actor=caller.key
            )
        else:
            await services.activation.delete(caller.tenant, adapter, force=force)
    except AdapterNotFoundError as error:
        raise UnknownModelError(error.message) from error
    return json_response(DeletedAnswer(id=name, object="model"))


def find_model(services: Services, caller: Caller, name: str) -> VersionRecord | None:
    """Return the version that a model's name means; None is the base. Raises UnknownModelError."""
    base = services.catalog.base_name
    if services.catalog.means_base(caller.tenant, name):
        return None
    try:
        return services.catalog.of(caller.tenant).find(name, param="model")
    except (AdapterNotFoundError, StateConflictError) as error:
        raise UnknownModelError(f"{error.message} The base is {base!r}.") from error


def _model(services: Services, name: str, version: VersionRecord | None) -> Model:
    """Return OpenAI's fields, vLLM's (where it comes from, and how long a prompt with its answer may be), and
    Anthropic's."""
    base, supervisor = services.catalog.base_name, services.supervisor
    created = supervisor.loaded_at or services.started if version is None else _since(services, version)
    return Model(
        id=name,
        created=int(created),
        created_at=datetime.fromtimestamp(int(created), UTC).isoformat(),
        display_name=name,
        owned_by="onebase",
        root=base if version is None else label(version.name, version.digest),
        parent=None if version is None else base,
        max_model_len=supervisor.base.max_length if supervisor.base is not None else None,
    )


def _since(services: Services, version: VersionRecord) -> float:
    """Return the time when a version became active, or when it was added if it is not active."""
    record = services.catalog.of(version.tenant).own(version.name)
    if record is None or record.active != version.digest or record.activated_at is None:
        return version.created_at
    return record.activated_at
