"""/v1/files: what jobs and batches read, and what they leave, as OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from onebase_adapters.registry import UPLOADED, FileRecord, Purpose
from onebase_edge.errors import InsufficientScopeError, InvalidRequestError
from onebase_protocol import training as wire
from onebase_protocol.common import DeletedAnswer, PageAnswer, page_of
from onebase_server.http.answers import Responses, answer, refused
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, Services, StrictRoute, json_response
from onebase_server.http.uploads import (
    FILE_FIELDS,
    FILE_OPTION,
    FORM_BYTES,
    FileForm,
    boundary_of,
    check_length,
    read_form,
)
from onebase_server.http.views.jobs import file_view
from onebase_server.jobs.files import SCOPES
from onebase_server.storage.calls import storage_errors
from onebase_server.tenancy.access import Caller

router = APIRouter(prefix="/v1/files", route_class=StrictRoute, tags=["files"])

MOST = 10_000
_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["purpose", "file"],
                "properties": {
                    "purpose": {"type": "string", "enum": list(UPLOADED)},
                    "file": {"type": "string", "format": "binary"},
                },
            }
        }
    },
}
"""Schema of the body for the reference at /docs: the route reads its body by itself."""
_BYTES: Any = {"schema": {"type": "string", "format": "binary"}}
_TEXT: Any = {"schema": {"type": "string"}}
CONTENT: Responses = refused(404) | {
    200: {"content": {"application/octet-stream": _BYTES}},
    206: {
        "description": "What a header Range asks for",
        "content": {"application/octet-stream": _BYTES, "multipart/byteranges": _BYTES},
    },
    400: {"content": {"text/plain": _TEXT}},
    416: {"content": {"text/plain": _TEXT}},
}
"""Responses of a route for a file's content; the error of a Range that cannot be served is plain text."""


@router.post("", openapi_extra={"requestBody": _BODY}, responses=answer(wire.TrainingFile, 429, 507))
@needs("any")
async def add_file(request: Request, services: Provided, caller: Calling) -> Response:
    """Upload a file: a field `purpose` and a part `file`: .jsonl for a batch, for fine-tune .json, .csv and
    .parquet too."""
    _allowed(caller)
    services.refuse_if_draining()
    boundary = boundary_of(request, FILE_FIELDS)
    if boundary is None:
        raise InvalidRequestError(
            f"Send the file as multipart/form-data. {FILE_FIELDS}", code="invalid_multipart"
        )
    files = services.training.files
    length = check_length(request, files.limit + FORM_BYTES, FILE_OPTION)
    await services.keys.check_room(caller, length)
    with storage_errors():
        form = FileForm(files, boundary)
        try:
            upload = await read_form(request, form, files.disk)
            _check_scope(caller, upload.purpose)
            kept = await files.store_file(caller.tenant, upload.writer, upload.filename, upload.purpose)
        finally:
            await files.disk.run_blocking(form.close)
    return json_response(file_view(kept))


@router.get("", responses=answer(PageAnswer[wire.TrainingFile], 404))
@needs("any")
async def list_files(
    services: Provided,
    caller: Calling,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    sha256: Annotated[str | None, Query(max_length=64, description="of the content")] = None,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = MOST,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List the files, newest first unless `order` is asc."""
    allowed = _allowed(caller)
    found = await services.training.files.find(
        caller.tenant,
        purposes=[each for each in allowed if purpose in (None, each)],
        sha256=sha256,
        after=after,
        limit=limit + 1,
        oldest_first=order == "asc",
    )
    return json_response(page_of([file_view(file) for file in found[:limit]], more=len(found) > limit))


@router.get("/{file_id}", responses=answer(wire.TrainingFile, 404))
@needs("any")
async def get_file(file_id: str, services: Provided, caller: Calling) -> Response:
    """Return one file's name, size and purpose."""
    return json_response(file_view(await _file(file_id, services, caller)))


@router.get("/{file_id}/content", response_class=FileResponse, responses=CONTENT)
@needs("any")
async def get_content(file_id: str, services: Provided, caller: Calling) -> Response:
    """Download a file's content."""
    file = await _file(file_id, services, caller)
    path = await services.training.files.local(file)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


@router.delete("/{file_id}", responses=answer(DeletedAnswer, 404, 409, 507))
@needs("any")
async def delete_file(file_id: str, services: Provided, caller: Calling) -> Response:
    """Delete a file; 409 while a job or a batch that has not ended needs it."""
    services.refuse_if_draining()
    await _file(file_id, services, caller)
    await services.training.files.delete(caller.tenant, file_id)
    return json_response(DeletedAnswer(id=file_id, object="file"))


async def _file(file_id: str, services: Services, caller: Caller) -> FileRecord:
    """Return a file of the caller's. Raises TrainingFileNotFoundError, InsufficientScopeError."""
    _allowed(caller)
    file = await services.training.files.get(caller.tenant, file_id)
    _check_scope(caller, file.purpose)
    return file


def _allowed(caller: Caller) -> list[Purpose]:
    """Return the purposes whose files a caller may use. Raises InsufficientScopeError if there are none."""
    allowed = [purpose for purpose, scope in SCOPES.items() if caller.may(scope)]
    if not allowed:
        raise InsufficientScopeError(SCOPES["fine-tune"], caller.key)
    return allowed


def _check_scope(caller: Caller, purpose: Purpose) -> None:
    """Raise InsufficientScopeError unless the caller may use files of this purpose."""
    if not caller.may(SCOPES[purpose]):
        raise InsufficientScopeError(SCOPES[purpose], caller.key)
