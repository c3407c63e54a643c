"""The one place where requests are let in: by their API key, and by the scope that their route declares."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onebase_adapters.registry import Origin, acting
from onebase_server.access import KEY_SECONDS, NOBODY, Access, Caller
from onebase_server.errors import (
    InsufficientScopeError,
    OneBaseError,
    UnauthenticatedError,
    UnavailableError,
)
from onebase_server.http.deps import CALLER, TICKET, BodyError, Services
from onebase_server.http.door import refusal
from onebase_server.quotas import Ticket

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")
NO_KEY: Any = {"security": []}
"""`openapi_extra` of a route that needs none."""
_ACCESS = "onebase_access"
_NOT_ITS_FAULT = (429, 503)
"""Statuses of answers after which a request counts as none."""
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "what is wrong, and the way out"},
                "type": {"type": "string"},
                "param": {**_TEXT_OR_NULL, "description": "the field of the request"},
                "code": {**_TEXT_OR_NULL, "description": "stable, for programs"},
            },
        }
    },
}
_REFUSED = {
    "description": "The request is refused, or cannot be served now",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def needs(access: Access) -> Callable[[Endpoint], Endpoint]:
    """Declares what a route needs: `@needs("train")` under its `@router.get(...)`. Without it: admin."""

    def declare(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _ACCESS, access)
        return endpoint

    return declare


def access_of(app: FastAPI, scope: Scope) -> Access:
    """What the request's route needs; where there is no such route, any key: its holder is told so."""
    for route in app.routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            declared: Access = getattr(getattr(route, "endpoint", None), _ACCESS, "admin")
            return declared
    return "any"


def describe_answers(app: FastAPI) -> None:
    """Say in the OpenAPI file that requests carry a key, and what errors look like.

    Open routes say `security: []` themselves.
    """
    plain = app.openapi

    def described() -> dict[str, Any]:
        schema = plain()
        schema["components"]["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        schema["components"]["schemas"]["Error"] = _ERROR
        schema["security"] = [{"api_key": []}]
        for operation in (one for path in schema["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)  # FastAPI's, in another shape
            for statuses in ("4XX", "5XX"):
                operation["responses"].setdefault(statuses, _REFUSED)
        return schema

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI's documentation has it


class Guard:
    """Answers requests that may not be served, before anything of their body is read."""

    def __init__(self, app: ASGIApp, api: FastAPI, services: Services) -> None:
        self._app = app
        self._api = api
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"nobody is let in by {scope['type']}")
        try:
            access = access_of(self._api, scope)
            scope[CALLER] = caller = await self._caller(scope, access)
            ticket = self._services.limiter.enter(caller) if access == "generate" else None
        except OneBaseError as error:
            await refusal(error)(scope, receive, send)
            return
        receive = self._while_valid(scope[CALLER], receive)
        with acting(Origin(caller.key, _request_id(scope))):
            if ticket is None:
                await self._app(scope, receive, send)
            else:
                await self._metered(ticket, scope, receive, send)

    def _while_valid(self, caller: Caller, receive: Receive) -> Receive:
        """Gives a body that takes long only as long as its caller's key is valid. Raises BodyError."""
        looked, whole = time.monotonic(), caller is NOBODY

        async def checked() -> Message:
            nonlocal looked, whole
            message = await receive()
            if message["type"] == "http.request" and not whole:
                whole = not message.get("more_body", False)
                if time.monotonic() - looked > KEY_SECONDS:
                    looked = time.monotonic()
                    await self._check_again(caller, whole)
            return message

        return checked

    async def _check_again(self, caller: Caller, whole: bool) -> None:
        """`whole`: the body has ended, and will be used now. Raises BodyError."""
        try:
            valid = await self._services.keys.still_valid(caller)
        except UnavailableError as error:
            if whole:
                raise BodyError(error) from error
            return
        if not valid:
            raise BodyError(
                UnauthenticatedError("The API key has expired or was revoked while the body was sent.")
            )

    async def _metered(self, ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
        """A request for text: its answer tells what its quotas leave."""
        scope[TICKET] = ticket

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] in _NOT_ITS_FAULT:
                    ticket.give_back()
                headers = MutableHeaders(scope=message)
                for name, value in ticket.headers().items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, telling)
        finally:
            ticket.close()

    async def _caller(self, scope: Scope, access: Access) -> Caller:
        """Raises UnauthenticatedError, InsufficientScopeError, UnavailableError."""
        if access == "open":
            return NOBODY
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        caller = await self._services.keys.caller(headers)
        if not caller.may(access):
            raise InsufficientScopeError(access, caller.key)
        return caller


def _request_id(scope: Scope) -> str:
    """The X-Request-Id of a request, which a gateway may send; "" without one, or if it is not plain."""
    for name, value in scope["headers"]:
        text: str = value.decode("latin-1")
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(text):
            return text
    return ""
