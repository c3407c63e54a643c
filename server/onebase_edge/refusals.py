"""Errors as answers, in the format of the API that was asked: OpenAI's, or Anthropic's on its routes; and the
requests that may be sent again after one."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from onebase_edge.errors import ApiError, error_body, error_headers, status_of
from onebase_edge.request_id import HEADER, request_id

_TEXT = frozenset(
    {
        "/", "/generate", "/generate/many", "/v1/completions", "/v1/chat/completions", "/v1/responses",
        "/v1/conversations", "/v1/responses/input_tokens", "/v1/messages", "/v1/messages/count_tokens",
        "/v1/embeddings", "/v1/classify", "/classify",
        "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/v1/decide", "/tokenize",
        "/detokenize", "/v1/feedback",
        "/v1/fine_tuning/alpha/graders/run", "/v1/fine_tuning/alpha/graders/validate",
    }
)  # fmt: skip
"""Paths of requests that may be sent again to another server, whatever came of the first."""
_CANCELS = re.compile(r"/generate/[^/]+/cancel")
"""Paths of requests that end a text: it ends as well if they come twice, or if its server goes away."""
_REPLAYS = re.compile(r"/v1/requests/[^/]+/replay")
_ANTHROPIC = "/v1/messages"
_ANTHROPIC_HEADER = "request-id"
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's names of errors by status; others are the caller's or the server's."""


def is_anthropic(scope: Any) -> bool:
    """Return True if a request is for one of Anthropic's routes. scope: of ASGI, with a path once that is
    known."""
    path: str = scope.get("path", "")
    return path == _ANTHROPIC or path.startswith(f"{_ANTHROPIC}/")


def may_repeat(path: str) -> bool:
    """Return True if a request that changes something may be sent twice, since nothing of it stays."""
    return path in _TEXT or any(one.fullmatch(path) for one in (_CANCELS, _REPLAYS))


def id_headers(scope: Any) -> dict[str, str]:
    """Return the headers with a request's id, under the names by which clients look for it."""
    told = {HEADER: request_id(scope)}
    if scope is not None and is_anthropic(scope):
        told[_ANTHROPIC_HEADER] = told[HEADER]
    return told


def error_json(error: ApiError, scope: Any) -> bytes:
    """Return the body of an error's answer; `scope` is None if there is no request to speak of."""
    return _encoded(error_body(error), status_of(error)[0], scope)


def refusal(error: ApiError) -> Response:
    """Return an error as an answer."""
    return ErrorAnswer(error_body(error), status_of(error)[0], error_headers(error))


class ErrorAnswer(Response):
    """An error in OpenAI's format, which is sent in that of its request's API."""

    media_type = "application/json"

    def __init__(self, error: dict[str, Any], status: int, headers: dict[str, str]) -> None:
        super().__init__(b"", status, headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body = _encoded(self._error, self.status_code, scope)
        self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def anthropic_error(error: dict[str, Any], status: int, scope: Any) -> dict[str, Any]:
    """Convert an error from OpenAI's format to Anthropic's. What has no place there is among the details."""
    told = dict(error["error"])
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message, code = told.pop("message"), told.pop("code")
    told.pop("type")
    details = {"error_code": code, **told}
    return {
        "type": "error",
        "error": {"type": kind, "message": message, "details": details},
        "request_id": request_id(scope),
    }


def _encoded(error: dict[str, Any], status: int, scope: Any) -> bytes:
    if scope is not None and is_anthropic(scope):
        error = anthropic_error(error, status, scope)
    return msgspec.json.encode(error)
