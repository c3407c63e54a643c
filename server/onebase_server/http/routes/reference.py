"""GET /docs and /redoc: the reference, as pages that ask no other machine for anything."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
}
"""What fastapi-offline ships of Swagger UI and Redoc."""
_START = {
    "swagger.js": "SwaggerUIBundle({url: 'openapi.json', dom_id: '#page', validatorUrl: null})",
    "redoc.js": "Redoc.init('openapi.json', {disableSearch: true}, document.getElementById('page'))",
}
"""In files of their own: the policy below lets no script in a page run."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@router.get("/docs")
async def docs() -> Response:
    """Every request, and a form to try it."""
    return _page('<link rel="stylesheet" href="docs/swagger-ui.css">', "swagger-ui-bundle.js", "swagger.js")


@router.get("/redoc")
async def redoc() -> Response:
    """Every request, to read."""
    return _page("", "redoc.standalone.js", "redoc.js")


@router.get("/docs/{name}")
async def asset(name: str) -> Response:
    """What the pages load."""
    if name in _START:
        return Response(_START[name], media_type="text/javascript")
    if name not in _FILES:
        raise HTTPException(404)
    return FileResponse(_folder() / name, media_type=_FILES[name])


def _page(head: str, *scripts: str) -> Response:
    body = "".join(f'<script src="docs/{script}"></script>' for script in scripts)
    return HTMLResponse(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>OneBase</title>'
        f'<link rel="icon" href="data:,">{head}</head><body><div id="page"></div>{body}</body></html>',
        headers={"Content-Security-Policy": _POLICY},
    )


def _folder() -> Path:
    """Found without importing the package, which is made for another use of its files."""
    spec = find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        raise HTTPException(404)
    return Path(spec.origin).parent / "static"
