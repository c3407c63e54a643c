"""/v1/adapters: names, their versions, and which version is active."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from onebase_adapters.hub.pull import HubError, HubReference
from onebase_adapters.registry import UNSET, Unset
from onebase_server.adapters.catalog import check_name
from onebase_server.adapters.service import VersionOptions
from onebase_server.errors import (
    EngineRestartedError,
    InvalidRequestError,
    OneBaseError,
    QueueFullError,
    UnavailableError,
    VersionFailedError,
)
from onebase_server.http.deps import Provided, Services, StrictRoute, json_response
from onebase_server.http.schemas.adapters import (
    ActivateRequest,
    EmptyRequest,
    ExpectedRequest,
    PinRequest,
    PullRequest,
)
from onebase_server.http.uploads import (
    ADAPTER_FIELDS,
    FLAGS,
    AdapterForm,
    boundary_of,
    check_length,
    read_form,
)
from onebase_server.storage import storage_errors

router = APIRouter(prefix="/v1/adapters", route_class=StrictRoute, tags=["adapters"])

SLASH = "%2F"
"""What the app leaves encoded in a path, so that a name with a slash is one segment."""


_INLINE = "#/paths/~1v1~1adapters/post/requestBody/content/application~1json/schema/$defs/{model}"
_FLAG = {"type": "boolean", "default": False}
_ADD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["name", "files"],
                "properties": {
                    "name": {"type": "string"},
                    "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    **dict.fromkeys(FLAGS, _FLAG),
                },
            }
        },
        "application/json": {"schema": PullRequest.model_json_schema(ref_template=_INLINE)},
    },
}
"""For the reference at /docs: the route reads its body by itself."""


def _adapter_name(name: str) -> str:
    return name.replace(SLASH, "/")


AdapterName = Annotated[str, Depends(_adapter_name)]
Force = Annotated[bool, Query(description="end the requests that use it, with an error")]


@router.get("")
async def list_adapters(services: Provided) -> Response:
    """Every adapter: its active version, what that is made of, and where it is."""
    return json_response({"object": "list", "data": services.views.adapters()})


@router.post("", openapi_extra={"requestBody": _ADD_BODY}, status_code=202)
async def add_version(
    request: Request,
    services: Provided,
    activate: Annotated[bool, Query(description="let the name point at it once it is ready")] = False,
    wait: Annotated[bool, Query(description="answer when it is ready or has failed")] = False,
) -> Response:
    """A new version: two files as multipart/form-data, or a Hub repository as JSON.

    Multipart: a field `name`, two parts `files` (adapter_config.json, adapter_model.safetensors), and
    perhaps `activate`, `allow_noop`, `any_base`. The same content is the same version.
    """
    services.refuse_if_draining()
    boundary = boundary_of(request, ADAPTER_FIELDS)
    if boundary is not None:
        return await _upload(request, services, boundary, activate, wait)
    body = await _json(request, PullRequest)
    try:
        reference = HubReference(body.hub.repo, body.hub.revision, body.hub.subfolder)
    except HubError as error:
        raise InvalidRequestError(f"hub: {error}", param="hub", code=error.code) from error
    name = str(reference)
    if body.name is not None and body.name != name:
        name = check_name(body.name, services.catalog.base_name)
    options = VersionOptions(activate or body.activate, body.allow_noop, body.any_base)
    pending = services.hub.pull(name, reference, options)
    if not wait:
        return json_response(services.views.pull(pending), 202)
    version = await pending.arrived()
    return await _finished(services, name, version.digest)


async def _upload(
    request: Request, services: Services, boundary: bytes, activate: bool, wait: bool
) -> Response:
    limit = services.settings.max_upload
    check_length(request, limit, "--max-upload")
    adapters = services.adapters
    with storage_errors():
        form = AdapterForm(adapters.store, boundary, limit)
        try:
            upload = await read_form(request, form, adapters.disk)
            name = check_name(upload.name, services.catalog.base_name)
            flags = {flag: upload.flags.get(flag, False) for flag in FLAGS}
            options = VersionOptions(**flags | {"activate": activate or flags["activate"]})
            await adapters.check_config(name, upload.config, options)
            files = await adapters.disk.run(upload.commit)
        finally:
            await adapters.disk.run(form.close)
    async with _kept(services, name, files.digest):
        version = await adapters.add(name, files, {"kind": "upload"}, options)
    if wait:
        return await _finished(services, name, version.digest)
    if version.finished:
        version = await adapters.version(name, version.digest)
    return json_response(services.views.version(version), 200 if version.finished else 202)


async def _finished(services: Services, name: str, digest: str) -> Response:
    """The answer to `wait`: 200, or 422 with the version next to the error."""
    async with _kept(services, name, digest):
        version = await services.adapters.wait(name, digest)
    shown = services.views.version(version)
    if version.error is not None:
        error = VersionFailedError(version.error.message, code=version.error.code)
        error.body = {"version": shown}
        raise error
    return json_response(shown, 200 if version.finished else 202)


@asynccontextmanager
async def _kept(services: Services, name: str, digest: str) -> AsyncIterator[None]:
    """Adds a ready version to the error of its activation, so that its files are not sent again."""
    try:
        yield
    except (InvalidRequestError, UnavailableError, QueueFullError, EngineRestartedError) as error:
        with suppress(OneBaseError):
            shown = services.views.version(await services.adapters.version(name, digest))
            if shown["state"] == "ready" and not shown["active"] and not error.body:
                error.body = {"version": shown}
                error.message = f"{shown['id']} is ready and kept, but not active: {error.message}"
        raise


@router.get("/{name}/versions")
async def list_versions(name: AdapterName, services: Provided) -> Response:
    """The versions of an adapter, newest first, each with its whole report."""
    data = [services.views.pull(pending) for pending in services.hub.of_name(name)]
    if services.catalog.get(name) is not None or not data:
        data += [services.views.version(version) for version in await services.adapters.versions(name)]
    return json_response({"object": "list", "data": data})


@router.get("/{name}/versions/{version}")
async def get_version(name: AdapterName, version: str, services: Provided) -> Response:
    """One version, by its digest, a beginning of at least 8 digits, or the id of its pull."""
    pending = services.hub.get(name, version)
    if pending is not None and pending.digest is None:
        return json_response(services.views.pull(pending))
    wanted = pending.digest if pending is not None and pending.digest else version
    return json_response(services.views.version(await services.adapters.version(name, wanted)))


@router.delete("/{name}/versions/{version}")
async def delete_version(
    name: AdapterName, version: str, services: Provided, force: Force = False
) -> Response:
    """Delete a version; 409 while it is active or in use, unless forced."""
    services.refuse_if_draining()
    digest = await services.activation.delete_version(name, version, force=force)
    return json_response({"id": f"{name}@{digest}", "object": "adapter.deleted", "deleted": True})


@router.get("/{name}/history")
async def get_history(name: AdapterName, services: Provided) -> Response:
    """What was active when, newest first."""
    history = await services.activation.history(name)
    data = [
        {
            "action": entry.action,
            "version": entry.version,
            "previous": entry.previous,
            "actor": entry.actor,
            "at": entry.at,
        }
        for entry in history
    ]
    return json_response({"object": "list", "data": data})


@router.post("/{name}/activate")
async def activate(name: AdapterName, body: ActivateRequest, services: Provided) -> Response:
    """Let the name point at a version. With `expected`: only if that one is active now, else 409."""
    services.refuse_if_draining()
    async with _kept(services, name, body.version):
        record = await services.activation.activate(name, body.version, expected=_expected(body))
    return json_response(services.views.adapter(record))


@router.post("/{name}/rollback")
async def roll_back(name: AdapterName, services: Provided, body: ExpectedRequest | None = None) -> Response:
    """Back to the version that was active before this one."""
    services.refuse_if_draining()
    record = await services.activation.roll_back(name, expected=_expected(body))
    return json_response(services.views.adapter(record))


@router.post("/{name}/deactivate")
async def deactivate(name: AdapterName, services: Provided, body: EmptyRequest | None = None) -> Response:
    """No version is active from now on; its versions stay, and can be named as `name@digest`."""
    services.refuse_if_draining()
    return json_response(services.views.adapter(await services.activation.deactivate(name)))


@router.post("/{name}/pin")
async def pin(name: AdapterName, body: PinRequest, services: Provided) -> Response:
    """Keep the active version in host memory, whatever else is used, or no longer."""
    services.refuse_if_draining()
    return json_response(services.views.adapter(await services.activation.pin(name, body.pinned)))


@router.get("/{name}")
async def get_adapter(name: AdapterName, services: Provided) -> Response:
    """One adapter."""
    return json_response(services.views.named(name))


@router.delete("/{name}")
async def delete_adapter(name: AdapterName, services: Provided, force: Force = False) -> Response:
    """Delete a name with all its versions; 409 while requests use one of them, unless forced."""
    services.refuse_if_draining()
    await services.activation.delete(name, force=force)
    return json_response({"id": name, "object": "adapter.deleted", "deleted": True})


def _expected(body: ActivateRequest | ExpectedRequest | None) -> str | Unset | None:
    if body is None or "expected" not in body.model_fields_set:
        return UNSET
    return body.expected


async def _json(request: Request, model: type[PullRequest]) -> PullRequest:
    """The body as `model`. Raises RequestValidationError."""
    try:
        data: Any = await request.json()
    except ValueError as error:
        detail = {"type": "json_invalid", "loc": ("body",), "msg": "", "ctx": {"error": str(error)}}
        raise RequestValidationError([detail]) from error
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
