"""The OpenAPI file: who may ask, what each answer looks like, and which errors each route sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from onebase_edge.refusals import is_anthropic
from onebase_protocol.common import Json
from onebase_protocol.errors import AnthropicError, Error
from onebase_server.http.answers import Described, schemas_of
from onebase_server.http.authorization import access_of

ANY = {400, 403, 408, 413, 431, 500}
"""Statuses of any request: one that is malformed, slow or too large, and one that meets a fault."""
KEYED = {401, 503}
"""Statuses of any request that needs a key; 503: the keys cannot be read now."""
_COUNTED = {429}
"""Statuses of a request for text."""
_TOLD = {
    400: "A field, a header or the body must change: `param` names the field",
    401: "No API key, or none that is valid",
    403: "The API key lacks the scope, or the server's operator does not allow it",
    404: "What the request names is not there",
    408: "The request did not arrive in time",
    409: "What the request names is in a state that does not allow it",
    410: "What the request asks for is not kept any more",
    413: "The body, or what it asks for, is over a limit",
    416: "The file does not have this range",
    422: "The version was found not to be fit to be served, or the request ended engines again and again",
    429: "A quota is used up, or too much is waiting",
    431: "The address and headers are over their limit",
    500: "A fault of the server, or of the engine in this request",
    503: "The request cannot be served now",
    507: "The server has no space left",
}
_RETRY_AFTER: Json = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
_WAITING_HELPS = {429, 503}


def describe(app: FastAPI) -> None:
    """Make `app.openapi` say that requests carry a key, what answers look like, and what errors do.

    Open routes say `security: []` themselves.
    """
    plain, making = app.openapi, threading.Lock()

    def described() -> dict[str, Any]:
        with making:
            if app.openapi_schema is None:
                app.openapi_schema = _described(app, plain())
            return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _described(app: FastAPI, schema: Json) -> Json:
    schema["components"]["securitySchemes"] = {
        "api_key": {"type": "http", "scheme": "bearer"},
        "x_api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    schemas = schema["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    places = [place for route in _routes(app) for place in _answers(route, schema)]
    kinds = {repr(kind): kind for _, _, kind in places}
    made, new = schemas_of(list(kinds.values()))
    if twice := schemas.keys() & new.keys():
        raise RuntimeError(f"requests and answers have types of one name: rename {', '.join(twice)}")
    schemas.update(new)
    of_kind = dict(zip(kinds, made, strict=True))
    for place, key, kind in places:
        place[key] = of_kind[repr(kind)]
    for name, one in schemas.items():
        one["title"] = name.replace("_", "")  # generators of types name them by it
    schema["security"] = [{"api_key": []}, {"x_api_key": []}]
    return schema


def _routes(app: FastAPI) -> Iterator[APIRoute]:
    return (route for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema)


def _answers(route: APIRoute, schema: Json) -> Iterator[tuple[Json, str, Any]]:
    """Yield the places in the file that take the types of a route's answers, each with its key and type."""
    error = AnthropicError if is_anthropic({"path": route.path_format}) else Error
    access = access_of(route)
    for method in route.methods or ():
        responses: Json = schema["paths"][route.path_format][method.lower()]["responses"]
        responses.pop("422", None)  # FastAPI's, in another shape
        sent = {status for status in route.responses if isinstance(status, int)} | ANY
        sent |= set() if access == "open" else KEYED
        sent |= _COUNTED if access == "generate" and method == "POST" else set()
        for status in sorted(sent):
            described = route.responses.get(status, {})
            told = responses.setdefault(str(status), {})
            content = told.setdefault("content", {})
            if isinstance(described, Described):
                if described.kind is not None:
                    yield content.setdefault("application/json", {}), "schema", described.kind
                else:
                    content.pop("application/json", None)  # FastAPI's
                if described.event is not None:
                    # No schema: Schemathesis would hold each event to it.
                    content["text/event-stream"] = {}
                    yield content["text/event-stream"], "x-itemSchema", described.event
            elif status >= 400:
                told["description"] = _TOLD[status]
                if status in _WAITING_HELPS:
                    told["headers"] = _RETRY_AFTER
                if status in ANY or not content:
                    yield content.setdefault("application/json", {}), "schema", error
        ordered = {status: responses[status] for status in sorted(responses)}
        responses.clear()
        responses.update(ordered)
