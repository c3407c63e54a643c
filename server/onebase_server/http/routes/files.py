"""/v1/files: what jobs learn from, and the curves that they leave, as OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from onebase_server.errors import InvalidRequestError
from onebase_server.http.deps import Calling, Provided, StrictRoute, json_response
from onebase_server.http.guard import REFUSED, needs
from onebase_server.http.schemas.answers import DeletedAnswer, FileAnswer, PageAnswer, Responses, answer
from onebase_server.http.uploads import (
    FILE_FIELDS,
    FILE_OPTION,
    FORM_BYTES,
    FileForm,
    boundary_of,
    check_length,
    read_form,
)
from onebase_server.http.views.jobs import file_view, page
from onebase_server.storage import storage_errors

router = APIRouter(prefix="/v1/files", route_class=StrictRoute, tags=["training"])

MOST = 10_000
_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["purpose", "file"],
                "properties": {
                    "purpose": {"type": "string", "enum": ["fine-tune"]},
                    "file": {"type": "string", "format": "binary"},
                },
            }
        }
    },
}
"""For the reference at /docs: the route reads its body by itself."""
_BYTES: Any = {"schema": {"type": "string", "format": "binary"}}
CONTENT: Responses = {
    200: {"content": {"application/octet-stream": _BYTES}},
    206: {
        "description": "What a header Range asks for",
        "content": {"application/octet-stream": _BYTES, "multipart/byteranges": _BYTES},
    },
    "4XX": {**REFUSED, "content": {**REFUSED["content"], "text/plain": {"schema": {"type": "string"}}}},
}
"""Of a Range that cannot be had, the reason is told as text."""


@router.post("", openapi_extra={"requestBody": _BODY}, responses=answer(FileAnswer))
@needs("train")
async def add_file(request: Request, services: Provided, caller: Calling) -> Response:
    """Upload rows: a field `purpose` (fine-tune) and a part `file` (.jsonl, .json, .csv, .parquet)."""
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
            kept = await files.keep(caller.tenant, upload.writer, upload.filename, "fine-tune")
        finally:
            await files.disk.run(form.close)
    return json_response(file_view(kept))


@router.get("", responses=answer(PageAnswer[FileAnswer]))
@needs("train")
async def list_files(
    services: Provided,
    caller: Calling,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = MOST,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The files, newest first unless `order` is asc."""
    found = await services.training.files.find(
        caller.tenant, purpose=purpose, after=after, limit=limit + 1, oldest_first=order == "asc"
    )
    return json_response(page([file_view(file) for file in found[:limit]], more=len(found) > limit))


@router.get("/{file_id}", responses=answer(FileAnswer))
@needs("train")
async def get_file(file_id: str, services: Provided, caller: Calling) -> Response:
    """One file's name, size and purpose."""
    return json_response(file_view(await services.training.files.get(caller.tenant, file_id)))


@router.get("/{file_id}/content", response_class=FileResponse, responses=CONTENT)
@needs("train")
async def get_content(file_id: str, services: Provided, caller: Calling) -> Response:
    """What is in it."""
    files = services.training.files
    file = await files.get(caller.tenant, file_id)
    path = await files.local(file)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


@router.delete("/{file_id}", responses=answer(DeletedAnswer))
@needs("train")
async def delete_file(file_id: str, services: Provided, caller: Calling) -> Response:
    """Delete it; 409 while a job that has not ended needs it."""
    services.refuse_if_draining()
    await services.training.files.delete(caller.tenant, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})
