"""Id by which a request is found again: the caller's own, or a new one."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import MutableMapping
from typing import Any

from onebase_engine.logs import FIELDS

REQUEST_ID = "onebase.request_id"
"""Key of a request's id in its ASGI scope."""
HEADER = "x-request-id"
_PLAIN = re.compile(r"[!-~]{1,128}")


def given_id(scope: Any) -> str:
    """Return the X-Request-Id of a request, which a gateway may send; "" without one, or if it is not
    plain."""
    given = [value.decode("latin-1") for name, value in scope["headers"] if name == HEADER.encode()]
    return given[0] if len(given) == 1 and _PLAIN.fullmatch(given[0]) else ""


def request_id(scope: Any) -> str:
    """Return the id of a request, the same each time. scope: of ASGI; without one, a new id."""
    if scope is None:
        return _new_id()
    known: str | None = scope.get(REQUEST_ID)
    if known is None:
        known = scope[REQUEST_ID] = given_id(scope) or _new_id()
    return known


def _new_id() -> str:
    return f"req-{secrets.token_hex(12)}"


class AccessLog(logging.LoggerAdapter[logging.Logger]):
    """uvicorn's access log of one request: with its id, and without its query, which may hold anything."""

    def __init__(self, logger: logging.Logger, scope: Any) -> None:
        super().__init__(logger)
        self._id = request_id(scope)

    def info(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Log an answer. args: as uvicorn gives them: the client, the method, the path with its query, the
        version of HTTP, the status."""
        client, method, path, version, status = args
        path = str(path).partition("?")[0]
        fields = {"client": client, "method": method, "path": path, "status": status}
        told = {FIELDS: {"request_id": self._id, **fields}}
        super().info("%s %s", msg % (client, method, path, version, status), self._id, extra=told)  # type: ignore[operator]

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs
