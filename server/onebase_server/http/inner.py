"""Requests that the server makes to itself: rows of batches, answered by the routes that answer live ones."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message

from onebase_server.access import Caller
from onebase_server.batches.runner import Answer
from onebase_server.http.deps import CALLER, TICKET
from onebase_server.quotas import Ticket


class InnerRequests:
    """Sends requests through the whole app, past the connection alone: the caller is known already."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def post(self, path: str, body: bytes, request_id: str, caller: Caller, ticket: Ticket) -> Answer:
        """What POST `path` answers. request_id: for its `x-request-id`."""
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
            TICKET: ticket,
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

        try:
            await self._app(scope, receive, send)
        except Exception:
            if not pieces:  # else the log has it, and this is the answer that says so
                raise
        return Answer(status, told, b"".join(pieces))
