"""The composition root: one function that makes the ASGI app out of its parts."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from urllib.parse import unquote

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import onebase_server
from onebase_server.errors import (
    InvalidRequestError,
    OneBaseError,
    PayloadTooLargeError,
    error_dict,
)
from onebase_server.http.deps import BodyError, Services, server_stopping
from onebase_server.http.door import refusal
from onebase_server.http.guard import Guard, describe_answers
from onebase_server.http.routes import (
    adapters,
    audit,
    files,
    fine_tuning,
    generation,
    health,
    keys,
    models,
    reference,
    usage,
    vllm,
)
from onebase_server.http.schemas.generation import validation_error
from onebase_server.http.uploads import is_form

_ADAPTERS = "/v1/adapters"
_UPLOADS = (_ADAPTERS, "/v1/files")
_log = logging.getLogger(__name__)
_NO_TELEMETRY: Any = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def create_app(services: Services) -> FastAPI:
    """The HTTP application. It does not start the engine: `run_server` does."""
    app = FastAPI(
        title="OneBase",
        version=onebase_server.__version__,
        summary=onebase_server.SUMMARY,
        telemetry=_NO_TELEMETRY,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    routes = (
        generation, models, adapters, vllm, files, fine_tuning, keys, usage, audit, health, reference,
    )  # fmt: skip
    for route in routes:
        app.router.routes.extend(route.router.routes)  # flat, so that the guard sees each of them
    describe_answers(app)
    app.add_exception_handler(OneBaseError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)
    app.add_middleware(BodyLimit, limit=services.settings.max_body)
    app.add_middleware(Guard, api=app, services=services)
    app.add_middleware(QuotedNames)
    app.add_middleware(StoppedRequests, services=services)
    return app


class StoppedRequests:
    """Answers requests that the server's end cancels before their answer began; uvicorn would say 500."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = False

        async def watched(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            if answering or not self._services.draining:
                raise
            await refusal(server_stopping())(scope, receive, send)


class BodyLimit:
    """Refuses bodies over `limit` bytes: by their announced length at once, else while they come in.

    Uploads, which go straight to disk, have limits of their own (`multipart.FormReader`).
    Starlette's own middleware does the same but answers in plain text, which OpenAI's clients cannot read.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_upload(scope):
            await self._app(scope, receive, send)
            return
        if _announced_length(scope) > self._limit:
            await refusal(PayloadTooLargeError(self._limit))(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise BodyError(PayloadTooLargeError(self._limit))
            return message

        await self._app(scope, counted, send)


class QuotedNames:
    """Keeps slashes in an adapter's name (`hub:org/repo`) encoded: it is one segment of the path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope.get("raw_path") or b""
        if scope["type"] == "http" and raw.startswith(_ADAPTERS.encode() + b"/"):
            segments = raw.partition(b"?")[0].decode("latin-1").split("/")
            scope["path"] = "/".join(unquote(segment).replace("/", adapters.SLASH) for segment in segments)
        await self._app(scope, receive, send)


def _is_upload(scope: Scope) -> bool:
    """Whether a route reads the body as a form; as the routes do, by the first Content-Type."""
    kinds = (value for name, value in scope["headers"] if name == b"content-type")
    return scope["method"] == "POST" and scope["path"] in _UPLOADS and is_form(next(kinds, b""))


def _announced_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


async def _answer_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, OneBaseError):
        raise error
    return refusal(error)


async def _answer_validation(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    message, param = validation_error(error.errors())
    return refusal(InvalidRequestError(message, param=param))


async def _answer_http(request: Request, error: Exception) -> Response:
    if isinstance(error, BodyError):
        return refusal(error.error)
    if not isinstance(error, HTTPException):
        raise error
    messages = {
        404: f"There is nothing at {request.url.path}. GET /docs lists what there is.",
        405: f"{request.method} is not possible at {request.url.path}. GET /docs lists what is.",
    }
    body = error_dict(
        messages.get(error.status_code, str(error.detail)),
        "invalid_request_error",
        f"http_{error.status_code}",
    )
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods(request))
    return _json(body, error.status_code, headers)


def _methods(request: Request) -> list[str]:
    """What is possible at the request's path, by any route: Starlette names those of the first one."""
    matching = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in matching for method in getattr(route, "methods", None) or ()})


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    message = "The server failed on this request; its log says why. Please report it."
    return _json(error_dict(message, "server_error", "internal_error"), 500, {})


def _json(body: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json", headers=headers)
