# Generated from _async/request_log.py by tools/generate_sync.py; do not edit.
"""`client.requests`: the server's log of requests, and their replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebase_protocol.common import PageAnswer

from .._core import access
from ..types import LogErased, LoggedRequest, Replay
from .http import Http


class Requests:
    """`client.requests`: the log of requests of a server that keeps one (`--request-log`), and their replay.

    Raises PermissionDeniedError without the scope `adapters` or `admin`. Only `admin` may name a tenant.

    Examples:
        >>> for request in client.requests.list(replayable=True):  # doctest: +SKIP
        ...     print((client.requests.replay(request.id)).equal)
    """

    def __init__(self, http: Http) -> None:
        self._http = http

    def list(
        self,
        *,
        since: float | None = None,
        adapter: str | None = None,
        user: str | None = None,
        tenant: str | None = None,
        replayable: bool = False,
        limit: int | None = 100,
    ) -> tuple[LoggedRequest, ...]:
        """Return requests without their texts, the last that began first.

        Args:
            since: Unix seconds; nothing from before.
            adapter: The name of one that answered.
            user: As the requests named it.
            tenant: Whose requests; by default your own.
            replayable: Only requests for text that were answered: no replays, no samples, and none of a
                rollout's shadow or judge.
            limit: The largest number of requests; None: all.
        """
        return self._http.collect(
            lambda last, size: access.logged_requests(tenant, since, adapter, user, replayable, last, size),
            PageAnswer[LoggedRequest],
            limit,
        )

    def retrieve(self, request_id: str, *, tenant: str | None = None) -> LoggedRequest:
        """Return a request, with what was sent and answered if the server keeps texts.

        Raises:
            NotFoundError: this server's log has no such request.
        """
        return self._http.ask(access.logged_request(request_id, tenant), LoggedRequest)

    def replay(
        self,
        request_id: str,
        *,
        version: str | None = None,
        body: Mapping[str, Any] | None = None,
        tenant: str | None = None,
    ) -> Replay:
        """Have a request answered once more, with the version that answered it, and compare the answers.

        Args:
            version: The version of the adapter that answers instead.
            body: The request as it was sent, where the server keeps hashes alone.

        Raises:
            NotFoundError: this server's log has no such request.
            ConflictError: it cannot be replayed; `code` and the message say why.
        """
        return self._http.ask(access.replay(request_id, version, body, tenant), Replay)

    def erase(
        self, *, user: str | None = None, everything: bool = False, tenant: str | None = None
    ) -> LogErased:
        """Erase the requests of one user, or all of the tenant, on every server of the registry: at once on
        the one that answers, within seconds on the others.

        Args:
            user: As the requests named it.
            everything: All requests, and the key of their hashes.
        """
        return self._http.ask(access.erase_requests(user, everything, tenant), LogErased)
