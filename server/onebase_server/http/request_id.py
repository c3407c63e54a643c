"""The id by which a request is found again: the caller's own, or a new one."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import MutableMapping
from typing import Any

REQUEST_ID = "onebase.request_id"
"""Key of a request's id in its ASGI scope."""
HEADER = "x-request-id"
_PLAIN = re.compile(r"[!-~]{1,128}")


def given_id(scope: Any) -> str:
    """The X-Request-Id of a request, which a gateway may send; "" without one, or if it is not plain."""
    given = [value.decode("latin-1") for name, value in scope["headers"] if name == HEADER.encode()]
    return given[0] if len(given) == 1 and _PLAIN.fullmatch(given[0]) else ""


def request_id(scope: Any) -> str:
    """The id of a request, the same each time. scope: of ASGI; without one, a new id."""
    if scope is None:
        return _new_id()
    known: str | None = scope.get(REQUEST_ID)
    if known is None:
        known = scope[REQUEST_ID] = given_id(scope) or _new_id()
    return known


def _new_id() -> str:
    return f"req-{secrets.token_hex(12)}"


class RequestLog(logging.LoggerAdapter[logging.Logger]):
    """Ends each line with a request's id."""

    def __init__(self, logger: logging.Logger, scope: Any) -> None:
        super().__init__(logger)
        self._id = request_id(scope)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{msg} {self._id.replace('%', '%%')}", kwargs
