"""The composition root: one function that makes the ASGI app out of its parts."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import onebase_server
from onebase_edge.errors import ApiError, BodyTooLargeError, UnavailableError, error_dict
from onebase_edge.refusals import ErrorAnswer, may_repeat, refusal
from onebase_edge.request_id import request_id
from onebase_engine.logs import REQUEST
from onebase_engine.machine import find_refusal
from onebase_server.http.authorization import AuthenticationMiddleware, Authenticator, is_upload, longest_body
from onebase_server.http.deps import (
    ARRIVED,
    CALLER,
    CUT,
    RESERVATION,
    BodyError,
    Services,
    refusal_of,
    server_stopping,
)
from onebase_server.http.openapi import describe
from onebase_server.http.routes import (
    adapters,
    anthropic,
    audit,
    batches,
    console,
    conversations,
    files,
    fine_tuning,
    gates,
    generation,
    health,
    keys,
    models,
    pooling,
    reference,
    request_log,
    responses,
    rollouts,
    tinker,
    usage,
    vllm,
)
from onebase_server.tenancy.access import Caller
from onebase_server.tenancy.quotas import InnerAnswer, QuotaReservation

_log = logging.getLogger(__name__)
SLOWLY_REFUSED = frozenset({"queue_full", "too_many_values"})
"""Codes of errors that are answered after REFUSAL_SECONDS: a client that sends the like again at once would
take the core that other tenants' streams need."""
REFUSAL_SECONDS = 0.5
_NO_TELEMETRY: Any = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def create_app(services: Services) -> FastAPI:
    """Return the HTTP application; `state.authenticator` is its Authenticator. It does not start the engine:
    `run_server` does."""
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
    app.state.authenticator = Authenticator(app, services)
    routes = (
        generation, responses, conversations, anthropic, pooling, models, adapters, gates, rollouts, vllm,
        files, batches, fine_tuning, tinker, keys, usage, audit, request_log, health, reference, console,
    )  # fmt: skip
    for route in routes:
        app.router.routes.extend(route.router.routes)  # flat, so that the authentication sees each of them
    describe(app)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)
    app.add_middleware(BodyLimit, limit=services.settings.max_body)
    app.add_middleware(AuthenticationMiddleware, authenticator=app.state.authenticator, services=services)
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


class InnerRequests:
    """Sends requests through the whole app without a connection; their caller is known already."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def post(
        self, path: str, body: bytes, request_id: str, caller: Caller, reservation: QuotaReservation
    ) -> InnerAnswer:
        """Return what POST `path` answers. request_id: for its `x-request-id`."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"x-request-id", request_id.encode()),
            ],
            "client": None,
            "server": None,
            CALLER: caller,
            ARRIVED: time.monotonic(),
            RESERVATION: reservation,
        }
        unread, status = True, 500
        told: dict[str, str] = {}
        pieces: list[bytes] = []

        async def receive() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.get_running_loop().create_future()  # it never hangs up
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"]
                told.update(
                    {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
                )
            else:
                pieces.append(message.get("body", b""))

        of_request = REQUEST.set({"request_id": request_id})
        try:
            await self._app(scope, receive, send)
        except Exception:
            if not pieces:  # else the log has it, and this is the answer that says so
                raise
        finally:
            REQUEST.reset(of_request)
        return InnerAnswer(status, told, b"".join(pieces))


class BodyLimit:
    """Refuses bodies over `limit` bytes while they come in; the authenticator does by their announced length.

    Uploads, which go straight to disk, have limits of their own (`uploads.FormReader`). Starlette's own
    middleware does the same but answers in plain text, which OpenAI's clients cannot read.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_upload(scope):
            await self._app(scope, receive, send)
            return
        size, longest = 0, longest_body(scope, self._limit)

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > longest:
                raise BodyError(BodyTooLargeError(self._limit))
            if size > self._limit:
                scope[CUT], body = True, message["body"]
                return {**message, "body": body[: max(0, len(body) + self._limit - size)]}
            return message

        await self._app(scope, counted, send)


async def _refuse(error: ApiError) -> Response:
    if error.code in SLOWLY_REFUSED:
        await asyncio.sleep(REFUSAL_SECONDS)
    return refusal(error)


async def _answer_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return await _refuse(error)


async def _answer_validation(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    return refusal(refusal_of(error))


async def _answer_http(request: Request, error: Exception) -> Response:
    if isinstance(error, BodyError):
        return await _refuse(error.error)
    if not isinstance(error, HTTPException):
        raise error
    body = error_dict(str(error.detail), "invalid_request_error", f"http_{error.status_code}")
    return ErrorAnswer(body, error.status_code, dict(error.headers or {}))


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    _log.error(
        "%s %s (%s) failed", request.method, request.url.path, request_id(request.scope), exc_info=error
    )
    message, headers = "The server failed on this request; its log says why. Please report it.", {}
    if find_refusal(error) is not None:
        refused = "The machine refuses the server more memory or threads now."
        remedy = "if it goes on, the server's log says what to raise."
        if request.method in ("GET", "HEAD") or may_repeat(request.url.path):
            message = f"{refused} Send the request again; {remedy}"
            return refusal(UnavailableError(message, code="memory_refused", retry_after=1.0))
        # Clients and the route send again what is answered by 503.
        message = (
            f"{refused} It may have carried the request out: send it again only if you see that it was not; "
            f"{remedy}"
        )
        headers = {"x-should-retry": "false"}
    return ErrorAnswer(error_dict(message, "server_error", "internal_error"), 500, headers)
