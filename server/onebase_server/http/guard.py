"""The one place where requests are let in: by their API key, and by the scope that their route declares."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from onebase_adapters.registry import Origin, acting
from onebase_server.access import NOBODY, Access, Caller
from onebase_server.errors import InsufficientScopeError, OneBaseError
from onebase_server.http.deps import CALLER, Services
from onebase_server.http.door import refusal

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")
NO_KEY: Any = {"security": []}
"""`openapi_extra` of a route that needs none."""
_ACCESS = "onebase_access"
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


def describe_keys(app: FastAPI) -> None:
    """Say in the OpenAPI file that requests carry a key. Open routes say `security: []` themselves."""
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        schema = plain()
        schema["components"]["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"api_key": []}]
        return schema

    app.openapi = with_keys  # type: ignore[method-assign]  # as FastAPI's documentation has it


class Guard:
    """Answers requests that may not be served, before anything of their body is read."""

    def __init__(self, app: ASGIApp, api: FastAPI, services: Services) -> None:
        self._app = app
        self._api = api
        self._keys = services.keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"nobody is let in by {scope['type']}")
        try:
            caller = scope[CALLER] = await self._caller(scope)
        except OneBaseError as error:
            await refusal(error)(scope, receive, send)
            return
        with acting(Origin(caller.key, _request_id(scope))):
            await self._app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Caller:
        """Raises UnauthenticatedError, InsufficientScopeError, UnavailableError."""
        access = access_of(self._api, scope)
        if access == "open":
            return NOBODY
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        caller = await self._keys.caller(headers)
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
