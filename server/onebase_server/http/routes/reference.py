"""GET /docs, /redoc and /openapi.json: the reference, and pages that ask no other machine for anything.

A browser sends no key when its reader opens a page. So the pages are open and empty: they ask the reader for
a key, keep it in their memory alone, and fetch the reference with it.
"""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse

from onebase_edge.errors import UnknownRouteError
from onebase_server.http.authorization import needs
from onebase_server.http.deps import json_response

router = APIRouter(include_in_schema=False)

_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
}
"""Files of Swagger UI and Redoc that fastapi-offline ships, with their media types."""
_KEY = """
async function reference(show) {
  for (let key = ''; ;) {
    try {
      const headers = key ? {Authorization: 'Bearer ' + key} : {}
      const answer = await fetch('openapi.json', {headers})
      const said = await answer.json()
      if (answer.ok) return show(said, key)
      key = await asked(answer.status === 401 && !key ? '' : said.error.message)
    } catch (error) {
      key = await asked(String(error))
    }
  }
}
function asked(problem) {
  const form = document.createElement('form'), label = document.createElement('label')
  const field = document.createElement('input'), button = document.createElement('button')
  const said = document.createElement('p')
  label.textContent = 'API key of this server: '
  field.type = 'password'
  field.autocomplete = 'off'
  button.textContent = 'Open the reference'
  said.textContent = problem || 'This page keeps it in its memory, until you close or reload it.'
  label.append(field)
  form.append(label, button, said)
  form.style.cssText = 'font: 16px sans-serif; margin: 3em'
  document.getElementById('page').replaceChildren(form)
  field.focus()
  return new Promise(resolve => form.addEventListener('submit', event => {
    event.preventDefault()
    resolve(field.value.trim())
  }))
}
"""
_START = {
    "key.js": _KEY,
    "swagger.js": """
reference((spec, key) => {
  const show = () => { if (key) page.preauthorizeApiKey('api_key', key) }
  const page = SwaggerUIBundle({spec, dom_id: '#page', validatorUrl: null, onComplete: show})
})
""",
    "redoc.js": """
reference(spec => Redoc.init(spec, {disableSearch: true}, document.getElementById('page')))
""",
}
"""Scripts in files of their own: the policy below lets no script in a page run."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@router.get("/openapi.json")
@needs("any")
async def openapi(request: Request) -> Response:
    """Return the reference, for programs."""
    return json_response(await asyncio.to_thread(request.app.openapi))  # the first time it takes long


@router.get("/")
@needs("open")
async def root() -> Response:
    """Return what this server is, and where its pages and APIs are."""
    return json_response(
        {
            "object": "server",
            "name": "OneBase",
            "console": "/console",
            "reference": {"page": "/docs", "openapi": "/openapi.json"},
            "base_urls": {"openai": "/v1", "anthropic": "/"},
            "health": "/health",
            "ready": "/ready",
        }
    )


@router.get("/docs")
@needs("open")
async def docs() -> Response:
    """Serve the page with every request and a form to try it."""
    return _page(
        '<link rel="stylesheet" href="docs/swagger-ui.css">', "swagger-ui-bundle.js", "key.js", "swagger.js"
    )


@router.get("/redoc")
@needs("open")
async def redoc() -> Response:
    """Serve the page with every request, to read."""
    return _page("", "redoc.standalone.js", "key.js", "redoc.js")


@router.get("/docs/{name}")
@needs("open")
async def asset(name: str) -> Response:
    """Serve a file that the pages load."""
    if name in _START:
        return Response(_START[name], media_type="text/javascript")
    folder = _folder()
    if name not in _FILES or folder is None:
        raise UnknownRouteError(f"/docs/{name}")
    return FileResponse(folder / name, media_type=_FILES[name])


def _page(head: str, *scripts: str) -> Response:
    body = "".join(f'<script src="docs/{script}"></script>' for script in scripts)
    return HTMLResponse(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>OneBase</title>'
        f'<link rel="icon" href="data:,">{head}</head><body><div id="page"></div>{body}</body></html>',
        headers={"Content-Security-Policy": _POLICY},
    )


def _folder() -> Path | None:
    """Return the folder of the files, found without importing the package, which is made for another use of
    them."""
    spec = find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "static"
