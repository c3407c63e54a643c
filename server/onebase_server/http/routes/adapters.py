"""/v1/adapters: names, their versions, and which version is active."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from msgspec.structs import replace
from pydantic import ValidationError

import onebase_server
from onebase_adapters.hub.pull import HubError, HubReference
from onebase_adapters.registry import SIGNATURE, UNSET, Unset, VersionRecord
from onebase_adapters.signatures import Checked, SentFiles
from onebase_edge.errors import (
    ApiError,
    EngineRestartedError,
    InvalidRequestError,
    JobNotFoundError,
    QueueFullError,
    UnavailableError,
    UnconfirmedChangeError,
    VersionFailedError,
)
from onebase_protocol.adapters import READY, Activation, Adapter, AdapterVersion, VersionFiles
from onebase_protocol.common import DeletedAnswer, Json, ListAnswer
from onebase_server.adapters.bom import bill_of_materials
from onebase_server.adapters.catalog import check_name
from onebase_server.adapters.merging import RANDOM, SIGNED, MergeSettings
from onebase_server.adapters.service import VersionOptions
from onebase_server.http.answers import answer, written_out
from onebase_server.http.authorization import SLASH, needs
from onebase_server.http.deps import Calling, Provided, Services, StrictRoute, json_response
from onebase_server.http.routes.files import CONTENT
from onebase_server.http.schemas.adapters import (
    ActivateRequest,
    EmptyRequest,
    ExpectedRequest,
    MergeRequest,
    PinRequest,
    PullRequest,
    ShareRequest,
)
from onebase_server.http.uploads import (
    ADAPTER_FIELDS,
    DEFAULTS_FORM_FIELD,
    FLAGS,
    AdapterForm,
    SignatureRefusedError,
    boundary_of,
    check_length,
    read_form,
)
from onebase_server.jobs.delivery import training_facts
from onebase_server.storage.calls import storage_errors
from onebase_server.tenancy.access import Caller

router = APIRouter(prefix="/v1/adapters", route_class=StrictRoute, tags=["adapters"])

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
                    DEFAULTS_FORM_FIELD: {"type": "string", "description": "JSON, as in onebase.json"},
                    **dict.fromkeys(FLAGS, _FLAG),
                },
            }
        },
        "application/json": {"schema": written_out(PullRequest.model_json_schema())},
    },
}
"""Schema of the body for the reference at /docs: the route reads its body by itself."""
_ADDED = answer(AdapterVersion, 404, 409, 422, 429, 507, description="It is ready") | answer(
    AdapterVersion, description="It is under way", status=202
)


async def _adapter_name(name: str) -> str:
    return name.replace(SLASH, "/")


_DELETED = "adapter.deleted"
AdapterName = Annotated[str, Depends(_adapter_name)]
_LONGEST_WAIT = 10.0
"""Longest wait, in seconds: a request that waits delays a stop of the server."""
Force = Annotated[bool, Query(description="end the requests that use it, with an error")]


@router.get("", responses=answer(ListAnswer[Adapter]))
@needs("adapters")
async def list_adapters(
    services: Provided,
    caller: Calling,
    tenant: Annotated[str | None, Query(max_length=200, description="for admins: of another tenant")] = None,
) -> Response:
    """List every adapter: its active version, what that is made of, and where it is."""
    found = services.views.adapters(caller.tenant_asked(tenant))
    return json_response(ListAnswer(data=tuple(found)))


@router.post("", openapi_extra={"requestBody": _ADD_BODY}, status_code=202, responses=_ADDED)
@needs("adapters")
async def add_version(
    request: Request,
    services: Provided,
    caller: Calling,
    activate: Annotated[bool, Query(description="let the name point at it once it is ready")] = False,
    wait: Annotated[bool, Query(description="answer when it is ready or has failed")] = False,
) -> Response:
    """Add a version: two files as multipart/form-data, or a Hub repository as JSON.

    Multipart: a field `name`, two parts `files` (adapter_config.json, adapter_model.safetensors), and
    optionally `activate`, `allow_noop`, `any_base`. A classifier may have a third part, config.json, whose
    label names are added to adapter_config.json, and any adapter a part model.sig, its signature. The same
    content is the same version.
    """
    services.refuse_if_draining()
    boundary = boundary_of(request, ADAPTER_FIELDS)
    if boundary is not None:
        return await _upload(request, services, caller, boundary, activate, wait)
    body = await _json(request, PullRequest)
    try:
        reference = HubReference(body.hub.repo, body.hub.revision, body.hub.subfolder)
    except HubError as error:
        raise InvalidRequestError(f"hub: {error}", param="hub", code=error.code) from error
    if not caller.is_admin:  # the Hub's token here is the operator's
        services.hub.check_allowed(reference, "hub")
    name = str(reference)
    if body.name is not None and body.name != name:
        name = check_name(body.name, services.catalog.base_name)
    options = VersionOptions(activate or body.activate, body.allow_noop, body.any_base)
    pending = services.hub.pull(caller.tenant, name, reference, options, caller.key)
    if not wait:
        return json_response(services.views.pull(pending), 202)
    version = await pending.arrived()
    return await _finished(services, version)


async def _upload(
    request: Request, services: Services, caller: Caller, boundary: bytes, activate: bool, wait: bool
) -> Response:
    limit = services.settings.max_upload
    await services.keys.check_room(caller, check_length(request, limit, "--max-upload"))
    adapters = services.adapters
    with storage_errors():

        def check(name: str, sent: SentFiles) -> Checked | None:
            check_name(name, services.catalog.base_name)
            return adapters.signatures.check(caller.tenant, name, sent)

        form = AdapterForm(adapters.store, boundary, limit, adapters.vocabulary, check)
        try:
            upload = await read_form(request, form, adapters.disk)
            name = check_name(upload.name, services.catalog.base_name)
            flags = {flag: upload.flags.get(flag, False) for flag in FLAGS}
            options = VersionOptions(**flags | {"activate": activate or flags["activate"]})
            await adapters.check_config(name, upload.config, options)
            files = await adapters.disk.run_blocking(upload.commit)
        except SignatureRefusedError as error:
            await adapters.note_refusal(caller.tenant, error.name, error.reason, actor=caller.key)
            raise VersionFailedError(str(error), code=error.reason.code, param="files") from error
        finally:
            await adapters.disk.run_blocking(form.close)
    async with _kept(services, caller.tenant, name, files.digest):
        version = await adapters.add(
            caller.tenant,
            name,
            files,
            {"kind": "upload"},
            options,
            checked=upload.checked,
            actor=caller.key,
        )
    if wait:
        return await _finished(services, version)
    if version.finished:
        version = await adapters.version(caller.tenant, name, version.digest)
    return json_response(services.views.version(version), 200 if version.finished else 202)


@router.post("/merge", status_code=202, responses=_ADDED)
@needs("adapters")
async def merge_adapters(
    body: MergeRequest,
    services: Provided,
    caller: Calling,
    wait: Annotated[bool, Query(description="answer when it is ready or has failed")] = False,
) -> Response:
    """Merge adapters into a new version by PEFT's add_weighted_adapter; it is proved like any other."""
    services.refuse_if_draining()
    name = check_name(body.name, services.catalog.base_name)
    parents = services.merging.parents(caller.tenant, [(term.name, term.weight) for term in body.adapters])
    await services.keys.check_room(caller, services.merging.check_parents(parents, body.method))
    recipe = MergeSettings(
        body.method,
        body.density,
        (body.sign or "total") if body.method in SIGNED else None,
        (body.seed or 0) if body.method in RANDOM else None,
    )
    options = VersionOptions(body.activate, body.allow_noop, any_base=True)
    version = await services.merging.merge(caller.tenant, name, parents, recipe, options, actor=caller.key)
    if wait:
        return await _finished(services, version)
    if version.finished:
        version = await services.adapters.version(caller.tenant, name, version.digest)
    return json_response(services.views.version(version), 200 if version.finished else 202)


async def _finished(services: Services, added: VersionRecord) -> Response:
    """Return the answer to `wait`: 200, or 422 with the version next to the error."""
    async with _kept(services, added.tenant, added.name, added.digest):
        version = await services.adapters.wait(added.tenant, added.name, added.digest)
    shown = services.views.version(version)
    if version.error is not None:
        error = VersionFailedError(version.error.message, code=version.error.code)
        error.body = {"version": shown}
        raise error
    return json_response(shown, 200 if version.finished else 202)


@asynccontextmanager
async def _kept(services: Services, tenant: str, name: str, digest: str) -> AsyncIterator[None]:
    """Add a ready version to the error of its activation, so that its files are not sent again."""
    try:
        yield
    except UnconfirmedChangeError:
        raise  # what is known of the version may be older than its activation
    except (InvalidRequestError, UnavailableError, QueueFullError, EngineRestartedError) as error:
        with suppress(ApiError):
            shown = services.views.version(await services.adapters.version(tenant, name, digest))
            if shown.state == READY and not shown.active and not error.body:
                error.body = {"version": shown}
                error.message = f"{shown.id} is ready and kept, but not active: {error.message}"
        raise


@router.get("/{name}/versions", responses=answer(ListAnswer[AdapterVersion], 404))
@needs("adapters")
async def list_versions(name: AdapterName, services: Provided, caller: Calling) -> Response:
    """List the versions of an adapter, newest first, each with its whole report."""
    names = services.catalog.of(caller.tenant)
    data = [services.views.pull(pending) for pending in services.hub.of_name(caller.tenant, name)]
    if names.get(name) is not None or not data:
        found = await services.adapters.versions(names.owner(name), name)
        data += [services.views.version(version, caller.tenant) for version in found]
    return json_response(ListAnswer(data=tuple(data)))


@router.get("/{name}/versions/{version}", responses=answer(AdapterVersion, 404))
@needs("adapters")
async def get_version(
    name: AdapterName,
    version: str,
    services: Provided,
    caller: Calling,
    wait_seconds: Annotated[
        float,
        Query(
            ge=0,
            le=_LONGEST_WAIT,
            description="answer when it has failed or is ready (and active, if asked for), but not later",
        ),
    ] = 0.0,
) -> Response:
    """Return one version, by its digest, a prefix of at least 8 digits, or the id of its pull."""
    due = time.monotonic() + wait_seconds
    owner = services.catalog.of(caller.tenant).owner(name)
    pending = services.hub.get(caller.tenant, name, version)
    if pending is not None and pending.task is not None and wait_seconds:
        await asyncio.wait({pending.task}, timeout=wait_seconds)
    if pending is not None and pending.digest is None:
        return json_response(services.views.pull(pending))
    wanted = pending.digest if pending is not None and pending.digest else version
    found = await services.adapters.version(owner, name, wanted)
    if wait_seconds and await services.adapters.settle(found, due - time.monotonic()):
        found = await services.adapters.version(owner, name, wanted)
    return json_response(services.views.version(found, caller.tenant))


@router.get("/{name}/versions/{version}/files", responses=answer(VersionFiles, 404))
@needs("adapters")
async def list_version_files(
    name: AdapterName, version: str, services: Provided, caller: Calling
) -> Response:
    """List a version's two files, with their sizes and SHA-256 sums, and the base that they belong to."""
    found = await _own_version(services, caller, name, version)
    return json_response(services.views.files(found))


@router.get("/{name}/versions/{version}/files/{file}", response_class=FileResponse, responses=CONTENT)
@needs("adapters")
async def get_version_file(
    name: AdapterName,
    version: str,
    file: Literal["adapter_config.json", "adapter_model.safetensors"],
    services: Provided,
    caller: Calling,
) -> Response:
    """Download one of the two files, byte for byte as it was sent or trained, except for label names."""
    found = await _own_version(services, caller, name, version)
    with storage_errors(name):
        path = await services.adapters.disk.run_blocking(
            services.adapters.store.local, found.files.of(file).sha256
        )
    return FileResponse(path, media_type="application/octet-stream", filename=file)


@router.get("/{name}/versions/{version}/bom", responses=answer(Json, 404))
@needs("adapters")
async def get_bill_of_materials(
    name: AdapterName, version: str, services: Provided, caller: Calling
) -> Response:
    """Return a version's bill of materials (CycloneDX 1.6): files, base, data, recipe, proof, signature,
    evaluations."""
    found = await _own_version(services, caller, name, version)
    gates = await services.activation.gates(caller.tenant, name, found.digest)
    bom = bill_of_materials(
        found,
        services.views.base,
        await _training_facts(services, found),
        gates.evaluations,
        onebase_server.__version__,
    )
    return JSONResponse(bom)


async def _training_facts(services: Services, version: VersionRecord) -> Mapping[str, Any]:
    """Return what a job of this server trained a version on: as it was signed, or else as it is known."""
    statement = (version.source.get(SIGNATURE) or {}).get("statement")
    if statement:
        return dict(statement)
    if version.source.get("kind") != "training":
        return {}
    try:
        job = await services.training.jobs.get(version.tenant, str(version.source.get("job")))
    except JobNotFoundError:
        return {}
    return await training_facts(job, services.training.files)


async def _own_version(services: Services, caller: Caller, name: str, version: str) -> VersionRecord:
    """Return a version whose files the caller may have: shared adapters of others are for use only."""
    services.catalog.of(caller.tenant).check_own(name, "take its files elsewhere")
    return await services.adapters.version(caller.tenant, name, version)


@router.delete("/{name}/versions/{version}", responses=answer(DeletedAnswer, 404, 409, 507))
@needs("adapters")
async def delete_version(
    name: AdapterName, version: str, services: Provided, caller: Calling, force: Force = False
) -> Response:
    """Delete a version; 409 while it is active or in use, unless forced."""
    services.refuse_if_draining()
    digest = await services.activation.delete_version(
        caller.tenant, name, version, force=force, actor=caller.key
    )
    return json_response(DeletedAnswer(id=f"{name}@{digest}", object=_DELETED))


@router.get("/{name}/history", responses=answer(ListAnswer[Activation], 404))
@needs("adapters")
async def get_history(name: AdapterName, services: Provided, caller: Calling) -> Response:
    """List the changes of the active version, newest first."""
    owner = services.catalog.of(caller.tenant).owner(name)
    history = await services.activation.history(owner, name)
    if owner != caller.tenant:
        history = [replace(entry, actor="") for entry in history]
    return json_response(ListAnswer(data=tuple(history)))


@router.post("/{name}/activate", responses=answer(Adapter, 404, 409, 422, 429, 507))
@needs("adapters")
async def activate(name: AdapterName, body: ActivateRequest, services: Provided, caller: Calling) -> Response:
    """Activate a version. With `expected`: only if that one is active now, else 409."""
    services.refuse_if_draining()
    async with _kept(services, caller.tenant, name, body.version):
        record = await services.activation.activate(
            caller.tenant, name, body.version, expected=_expected(body), actor=caller.key
        )
    return json_response(services.views.adapter(record))


@router.post("/{name}/rollback", responses=answer(Adapter, 404, 409, 507))
@needs("adapters")
async def roll_back(
    name: AdapterName, services: Provided, caller: Calling, body: ExpectedRequest | None = None
) -> Response:
    """Activate the version that was active before this one."""
    services.refuse_if_draining()
    record = await services.activation.roll_back(
        caller.tenant, name, expected=_expected(body), actor=caller.key
    )
    return json_response(services.views.adapter(record))


@router.post("/{name}/deactivate", responses=answer(Adapter, 404, 507))
@needs("adapters")
async def deactivate(
    name: AdapterName, services: Provided, caller: Calling, body: EmptyRequest | None = None
) -> Response:
    """Deactivate an adapter: no version is active any more; its versions can be named as `name@digest`."""
    services.refuse_if_draining()
    record = await services.activation.deactivate(caller.tenant, name, actor=caller.key)
    return json_response(services.views.adapter(record))


@router.post("/{name}/pin", responses=answer(Adapter, 404, 507))
@needs("admin")
async def pin(name: AdapterName, body: PinRequest, services: Provided, caller: Calling) -> Response:
    """Pin the active version in host memory, which all tenants share, or unpin it."""
    services.refuse_if_draining()
    record = await services.activation.pin(caller.tenant, name, body.pinned)
    return json_response(services.views.adapter(record))


@router.post("/{name}/share", responses=answer(Adapter, 404, 507))
@needs("admin")
async def share(name: AdapterName, body: ShareRequest, services: Provided, caller: Calling) -> Response:
    """Share an adapter with all tenants for use, or stop sharing it. A tenant's own of that name comes
    first."""
    services.refuse_if_draining()
    record = await services.activation.share(caller.tenant, name, body.shared)
    return json_response(services.views.adapter(record))


@router.get("/{name}", responses=answer(Adapter, 404))
@needs("adapters")
async def get_adapter(name: AdapterName, services: Provided, caller: Calling) -> Response:
    """Return one adapter."""
    return json_response(services.views.named(caller.tenant, name))


@router.delete("/{name}", responses=answer(DeletedAnswer, 404, 409, 507))
@needs("adapters")
async def delete_adapter(
    name: AdapterName, services: Provided, caller: Calling, force: Force = False
) -> Response:
    """Delete a name with all its versions; 409 while requests use one of them, unless forced."""
    services.refuse_if_draining()
    await services.activation.delete(caller.tenant, name, force=force)
    return json_response(DeletedAnswer(id=name, object=_DELETED))


def _expected(body: ActivateRequest | ExpectedRequest | None) -> str | Unset | None:
    if body is None or "expected" not in body.model_fields_set:
        return UNSET
    return body.expected


async def _json(request: Request, model: type[PullRequest]) -> PullRequest:
    """Return the body as `model`. Raises RequestValidationError."""
    try:
        data: Any = await request.json()
    except ValueError as error:
        detail = {"type": "json_invalid", "loc": ("body",), "msg": "", "ctx": {"error": str(error)}}
        raise RequestValidationError([detail]) from error
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
