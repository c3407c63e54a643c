"""Refusal of what a web page sends from its reader's browser, before anything looks at it.

A browser sends requests on behalf of any page: to a name that the page's owner has pointed at this machine
(DNS rebinding: `Host` gives it away), or straight to localhost (`Origin` and `Sec-Fetch-Site` do). Programs
that are not browsers send neither of the latter.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onebase_edge.errors import ApiError, ForbiddenError, InvalidRequestError, status_of
from onebase_edge.forwarded import ForwardedHeaders
from onebase_edge.refusals import id_headers, refusal
from onebase_edge.request_id import request_id
from onebase_edge.settings import Settings, ip_address, is_loopback
from onebase_engine.logs import REQUEST

PAGES = ("/console", "/console/", "/docs", "/redoc")
"""Pages that a link on another site may open: they do nothing by being opened."""
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every answer; a page brings a Content-Security-Policy of its own."""
_ANY = "*"
_HOST = re.compile(r"(?:\[[^][]*\]|[^][:@/?#\s]+)(?::[0-9]*)?")
ADAPTER_HEADER = "x-onebase-adapter"
"""Header of an answer of one text: the version that made it."""
_EXPOSED = (
    ADAPTER_HEADER,
    "Allow",
    "Retry-After",
    "WWW-Authenticate",
    "x-should-retry",
    "x-request-id",
    "request-id",
    *(f"x-ratelimit-{fact}-requests" for fact in ("limit", "remaining", "reset")),
    *(f"x-ratelimit-{fact}-tokens" for fact in ("limit", "remaining", "reset")),
)
NO_ROUTE = "none"
"""Name under which answers that no route gave are counted."""
TENANT = "onebase.tenant"
"""Key of a request's scope for the tenant of its API key, once that is known."""
_WAITS = "onebase.refusal_waits"
"""Key of a request's scope, if it waits to be refused: whose refusal it is."""
_SHOWN = 200
"""Largest number of characters of a header that an error repeats."""


class _Authenticator(Protocol):
    def admit_at_once(self, scope: Scope) -> None: ...


class _Pacer(Protocol):
    def refuse(self, tenant: str | None) -> bool: ...

    async def wait_to_refuse(self, tenant: str | None) -> None: ...


class CrossSiteMiddleware:
    """The outermost part of the app: refuses foreign hosts and pages, and adds the headers of every answer.

    authenticator: decides within the app which requests are admitted. answers: counts them by route and
    status. secret: by which headers of `onebase route` are believed; "" if there is none. pacer: decides when
    a request is refused."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        authenticator: _Authenticator | None = None,
        answers: Counter[tuple[str, int]] | None = None,
        secret: str = "",
        pacer: _Pacer | None = None,
    ) -> None:
        self.closing = False
        """Whether each answer is the last on its connection, since the process ends soon."""
        self._forwarded = ForwardedHeaders(settings.trusted_proxy, secret)
        self._authenticator = authenticator
        self._pacer = pacer
        self._answers = Counter() if answers is None else answers
        names = (*settings.allowed_host, settings.host)
        self._hosts = {name if ip_address(name) else host_name(name) for name in names}
        self._any_address = not is_loopback(settings.host)
        self._origins = {origin.lower() for origin in settings.allowed_origin}
        if self._origins:
            app = CORSMiddleware(
                app,
                allow_origins=sorted(self._origins),
                allow_methods=("GET", "HEAD", "POST", "DELETE"),
                allow_headers=("*",),
                allow_private_network=True,
                expose_headers=_EXPOSED,
            )
        self._app = app

    def turned_away(self, scope: Scope) -> ApiError | None:
        """Return the app's error for a request, if that is plain before any of the app runs; else None, also
        if it has to wait for its turn."""
        try:
            asked_by_page = self._check(scope)
            if self._authenticator is not None and not (
                asked_by_page and self._origins
            ):  # CORS may add to the answer
                self._authenticator.admit_at_once(scope)
        except ApiError as error:
            tenant = scope.get(TENANT)
            if self._pacer is not None and not self._pacer.refuse(tenant):
                scope[_WAITS] = (tenant,)
                return None
            self._answers[NO_ROUTE, status_of(error)[0]] += 1
            return error
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waits = scope.pop(_WAITS, None)
        if self._pacer is not None and waits is not None:
            await self._pacer.wait_to_refuse(*waits)
        await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        REQUEST.set({"request_id": request_id(scope)})  # of the request's own task

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answers[_route(scope), message["status"]] += 1
                headers = MutableHeaders(scope=message)
                for name, value in (SECURITY_HEADERS | id_headers(scope)).items():
                    headers.setdefault(name, value)
                if self.closing and message["status"] < 400:  # a refused body may still be on its way
                    headers["connection"] = "close"
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await refusal(error)(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)

    def _check(self, scope: Scope) -> bool:
        """Check host and origin. Return True if there is an `Origin`. Raises ForbiddenError,
        InvalidRequestError."""
        self._forwarded.read(scope)
        headers: dict[bytes, list[str]] = {b"host": [], b"origin": [], b"sec-fetch-site": []}
        for name, value in scope["headers"]:
            if name in headers:
                headers[name].append(value.decode("latin-1"))
        host = self._checked_host(scope, headers[b"host"])
        origins = headers[b"origin"]
        for origin in origins:
            own = bool(host) and origin.lower().partition("://")[2] == host
            if not own and origin.lower() not in self._origins:
                raise ForbiddenError(
                    f"Origin: pages of {origin[:_SHOWN]!r} may not use this server. If they should, start it "
                    "with --allowed-origin and that site.",
                    code="origin_not_allowed",
                )
        site = (headers[b"sec-fetch-site"] or ["none"])[0]
        if site not in ("none", "same-origin") and not origins and not _opens_page(scope):
            raise ForbiddenError(
                f"Sec-Fetch-Site: a page of another site asks ({site[:_SHOWN]}), and may not. If it should, "
                "start the server with --allowed-origin and that site, and let the page send an Origin.",
                code="origin_not_allowed",
            )
        return bool(origins)

    def _checked_host(self, scope: Scope, given: list[str]) -> str:
        """Return the name and port by which this server was called; "" if HTTP/1.0 leaves it out."""
        if len(given) != 1:
            if not given and scope["http_version"] == "1.0":
                return ""
            raise InvalidRequestError(
                f"Host: it is given {len(given)} times. Send it once.", code="host_not_allowed"
            )
        name = host_name(given[0])
        allowed = name in self._hosts or _ANY in self._hosts or is_loopback(name)
        allowed = allowed or (self._any_address and ip_address(name) is not None)
        if not allowed or _HOST.fullmatch(given[0]) is None:
            raise ForbiddenError(
                f"Host: this server does not go by the name of {given[0][:_SHOWN]!r}. Call it localhost, or "
                "start it with --allowed-host and that name.",
                code="host_not_allowed",
            )
        return given[0].lower()


def _route(scope: Scope) -> str:
    """Return the route's path with placeholders for names, so that there are as many as the app has
    routes."""
    path: str = getattr(scope.get("route"), "path_format", NO_ROUTE)
    return path


def host_name(host: str) -> str:
    """Return `localhost` for `LocalHost.:8000`, `::1` for `[::1]:8000`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _opens_page(scope: Scope) -> bool:
    """Return True if the reader follows a link to one of the server's own pages, in a tab of its own."""
    headers = Headers(scope=scope)
    return (
        scope["method"] in ("GET", "HEAD")
        and scope["path"] in PAGES
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )
