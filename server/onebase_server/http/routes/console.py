"""GET /console: the page that shows a server in a browser, from files that `clients/web` is built into.

The page is open and empty: it asks its reader for a key when the server wants one, as /docs does.
"""

from __future__ import annotations

import asyncio
import hashlib
import html
import re
from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

import onebase_server
from onebase_edge.errors import ConsoleMissingError, UnknownRouteError
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Provided

router = APIRouter(include_in_schema=False)

FOLDER = Path(onebase_server.__file__).with_name("web")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types svelte-trusted-html"
)
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}-[A-Za-z0-9_-]{8}(\.css|\.js|\.svg)")
"""File names that Vite gives what it builds: with a hash of the content, so that it never changes."""
_ENCODINGS = {"br": ".br", "gzip": ".gz"}
"""File suffix of each content coding, the best first."""
_FOR_EVER = "public, max-age=31536000, immutable"


@router.get("/console")
@needs("open")
async def console(request: Request, services: Provided) -> Response:
    """Serve the page. A link to it may say what it shows, behind `#`; being opened asks for nothing.

    The page finds the documents by its own `<link rel="help">`.
    """
    page = await asyncio.to_thread(_read, FOLDER / "index.html")
    if page is None:
        raise ConsoleMissingError
    if url := services.settings.docs_url:
        link = f'</title><link rel="help" href="{html.escape(url)}">'
        page = page.replace(b"</title>", link.encode(), 1)
    tag = f'"{hashlib.sha256(page).hexdigest()[:32]}"'
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "ETag": tag,
    }
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(page, media_type="text/html", headers=headers)


@router.get("/console/")
@needs("open")
async def with_slash() -> Response:
    """Redirect to the address that the page's links are relative to."""
    return RedirectResponse("../console")


@router.get("/console/assets/{name}")
@needs("open")
async def asset(name: str, request: Request) -> Response:
    """Serve a script, a style or a picture of the page, compressed as the browser accepts it."""
    known = _NAME.fullmatch(name)
    coding, content = None, None
    if known is not None:
        coding, content = await asyncio.to_thread(_best, FOLDER / "assets" / name, _accepted(request.headers))
    if known is None or content is None:
        raise UnknownRouteError(f"/console/assets/{name}")
    headers = {"Cache-Control": _FOR_EVER, "Vary": "Accept-Encoding"}
    if coding is not None:
        headers["Content-Encoding"] = coding
    return Response(content, media_type=_TYPES[known[1]], headers=headers)


def _accepted(headers: Mapping[str, str]) -> set[str]:
    """Return the codings that a request's Accept-Encoding names and does not forbid."""
    items = (item.partition(";") for item in headers.get("accept-encoding", "").lower().split(","))
    return {name.strip() for name, _, rest in items if not re.search(r"q=0(\.0*)?$", rest.strip())}


def _best(path: Path, accepted: set[str]) -> tuple[str | None, bytes | None]:
    for coding, suffix in _ENCODINGS.items():
        if coding in accepted:
            content = _read(path.with_name(path.name + suffix))
            if content is not None:
                return coding, content
    return None, _read(path)


def _read(path: Path) -> bytes | None:
    """Return the file's content, or None if there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
