"""Admission of requests: by their API key, and by the scope that their route declares.

All of it is decided from the address and headers, before anything of the body is read, and without waiting
while the keys in memory are fresh: most of what is refused costs no task and no walk through the app.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onebase_adapters.registry import Origin, RegistryError, acting
from onebase_edge.cross_site import TENANT
from onebase_edge.errors import (
    ApiError,
    BodyTooLargeError,
    ForbiddenError,
    InsufficientScopeError,
    UnauthenticatedError,
    UnavailableError,
    UnknownRouteError,
    WrongMethodError,
)
from onebase_edge.forwarded import CHANGE, NEWEST, forwarded_of
from onebase_edge.forwarded import TENANT as TENANT_HEADER
from onebase_edge.refusals import refusal
from onebase_edge.request_id import given_id
from onebase_server.http.deps import ARRIVED, CALLER, RESERVATION, BodyError, Services
from onebase_server.http.uploads import is_form
from onebase_server.tenancy.access import KEY_SECONDS, NOBODY, Access, Caller
from onebase_server.tenancy.quotas import QuotaReservation

NO_KEY: Any = {"security": []}
"""`openapi_extra` of a route that needs no key."""
SLASH = "%2F"
"""Escaped slash of an adapter's name (`hub:org/repo`), which is one segment of the path."""
_ACCESS = "onebase_access"
_ADAPTERS = "/v1/adapters"
_UPLOADS = (_ADAPTERS, "/v1/files")
PASSES = "/api/v1/forward_backward"
_PASS_LIMITS = 64
_PAST_THE_CATALOG = ("/v1/fine_tuning/", "/v1/keys", "/v1/tenants")
_KEY_HEADERS = (b"authorization", b"x-api-key")
"""Headers that may hold a key, in the order of KeyRing.caller; some of Anthropic's clients send the
second."""
_SHOWN = 100
"""Largest number of characters of a header that an error repeats."""
NOT_ITS_FAULT = (429, 503)
"""Statuses of answers after which a request does not count against quotas."""
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def as_get(scope: Scope) -> Scope:
    """Return the scope of a HEAD request as one of a GET, of whose answer the protocol sends the head."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


def needs(access: Access) -> Callable[[Endpoint], Endpoint]:
    """Declare what a route needs: `@needs("train")` under its `@router.get(...)`. Without it: admin."""

    def declare(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _ACCESS, access)
        return endpoint

    return declare


def access_of(route: BaseRoute) -> Access:
    """Return the access that a route needs."""
    found: Access = getattr(getattr(route, "endpoint", None), _ACCESS, "admin")
    return found


class Routes:
    """Routes of an app. Only those that can match are tried, so that an unknown path costs least."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._paths = re.compile("")
        self._count = 0

    def find(self, scope: Scope) -> tuple[Access, ApiError | None]:
        """Return the access that the request's route needs. Without a route: any key, and the error for its
        holder."""
        methods: set[str] = set()
        asked = as_get(scope)
        for route in self._from_first(scope["path"]):
            match, _ = route.matches(asked)
            if match is Match.FULL:
                return access_of(route), None
            if match is Match.PARTIAL:
                methods |= set(getattr(route, "methods", None) or ())
        if methods:
            methods |= {"HEAD"} if "GET" in methods else set()
            return "any", WrongMethodError(scope["method"], scope["path"], methods)
        return "any", UnknownRouteError(scope["path"], self._meant(asked))

    def _meant(self, scope: Scope) -> str | None:
        """Return a path for which this one may be a slip of the base URL, or None."""
        path: str = scope["path"].rstrip("/")
        others = (path, f"/v1{path}", path.replace("/v1/v1/", "/v1/", 1), path.removeprefix("/v1"))
        for other in others:
            if other and other != scope["path"]:
                there = {**scope, "path": other}
                if any(route.matches(there)[0] is not Match.NONE for route in self._from_first(other)):
                    return other
        return None

    def _from_first(self, path: str) -> Iterable[BaseRoute]:
        """Return the routes from the first one that matches the path."""
        routes = self._app.routes
        if len(routes) != self._count:
            self._count = len(routes)
            paths = (getattr(route, "path_regex", None) for route in routes)
            plain = (re.sub(r"\?P<\w+>", "?:", path.pattern) if path else "" for path in paths)
            self._paths = re.compile("|".join(f"(?P<at{n}>{path})" for n, path in enumerate(plain)))
        found = self._paths.match(path)
        if found is None or found.lastgroup is None:
            return ()
        return islice(routes, int(found.lastgroup.removeprefix("at")), None)


class Authenticator:
    """Decides, from a request's address and headers, who asks and whether it is let in."""

    def __init__(self, app: FastAPI, services: Services) -> None:
        self._routes = Routes(app)
        self._services = services
        self._nowhere = 0
        """Last change that a request asked for and the registry did not have: it may be an older copy."""
        self._looking: asyncio.Task[None] | None = None

    def admit_at_once(self, scope: Scope) -> None:
        """Admit like `admit`, unless that would have to wait: then decide nothing. Raises ApiError."""
        access, lost = self._find(scope)
        if access == "open" or (self._services.keys.fresh and not self._news(scope)):
            self._decide(scope, access, lost)

    async def admit(self, scope: Scope) -> None:
        """Give the scope its CALLER, and its RESERVATION if it asks for text; once. Raises ApiError."""
        if CALLER not in scope:
            access, lost = self._find(scope)
            if access != "open":
                if change := self._news(scope):
                    await self._catch_up(change)
                await self._services.keys.look()
            self._decide(scope, access, lost)

    def _news(self, scope: Scope) -> int:
        """Return the registry's change that the request knows of and this server does not; else 0."""
        change = forwarded_of(scope).change
        return change if change > self._services.catalog.counter and change != self._nowhere else 0

    async def _catch_up(self, change: int) -> None:
        """Refresh from the registry, once for all that wait for it.

        Raises UnavailableError if it cannot be read: what is known here is older than what was answered
        already.
        """
        is_looking = self._looking is not None and not self._looking.done()
        for _ in range(1 if change == NEWEST and not is_looking else 2):  # that look may be too early
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._look())
                self._looking.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(self._looking)
            if change <= self._services.catalog.counter:
                return
        if change != NEWEST:
            self._nowhere = change

    async def _look(self) -> None:
        keys, catalog = self._services.keys, self._services.catalog
        try:
            if await catalog.is_behind():
                keys.doubt()
                await keys.look()
                await catalog.refresh()
        except RegistryError as error:
            raise UnavailableError(
                "The registry has changed and cannot be read now. Try again in a moment.",
                code="registry_unavailable",
                retry_after=1.0,
            ) from error

    def _find(self, scope: Scope) -> tuple[Access, ApiError | None]:
        raw: bytes = scope.get("raw_path") or b""
        if raw.startswith(_ADAPTERS.encode() + b"/"):
            segments = raw.partition(b"?")[0].decode("latin-1").split("/")
            scope["path"] = "/".join(unquote(segment).replace("/", SLASH) for segment in segments)
        access, lost = self._routes.find(scope)
        if access == "metrics":
            access = "open" if self._services.settings.open_metrics else "admin"
        return access, lost

    def _decide(self, scope: Scope, access: Access, lost: ApiError | None) -> None:
        self._check_here(scope)
        caller = self._caller(scope, access)
        asks_for_text = access == "generate" and scope["method"] == "POST"
        reservation = self._services.limiter.enter(caller, resumed=_resumes(scope)) if asks_for_text else None
        limit = self._services.settings.max_body
        if announced_length(scope) > longest_body(scope, limit) and not is_upload(scope):
            lost = BodyTooLargeError(limit)
        if lost is not None:
            if reservation is not None:
                lost.headers = reservation.headers()
                reservation.close()
            raise lost
        scope[CALLER], scope[ARRIVED] = caller, time.monotonic()
        if reservation is not None:
            scope[RESERVATION] = reservation

    def _check_here(self, scope: Scope) -> None:
        """Raise ForbiddenError for what a proxy sends from another machine to a server that needs no keys."""
        afar = forwarded_of(scope).afar
        if afar and self._services.keys.is_open and not self._services.settings.insecure:
            raise ForbiddenError(
                f"This server has no API key and serves this machine alone; the request was forwarded for "
                f"{afar[:_SHOWN]!r}. Make a key with `onebase keys create --scope admin`, or start the "
                "server with --insecure to let everybody do everything.",
                code="key_needed",
            )

    def _caller(self, scope: Scope, access: Access) -> Caller:
        """Return the caller of a request. Raises UnauthenticatedError, InsufficientScopeError."""
        if access == "open":
            return NOBODY
        given: dict[bytes, list[str]] = {name: [] for name in _KEY_HEADERS}
        for name, value in scope["headers"]:
            if name in given:
                given[name].append(value.decode("latin-1"))
        caller = self._services.keys.caller(*given.values())
        if caller is not NOBODY:
            scope[TENANT] = caller.tenant
        if not caller.may(access):
            raise InsufficientScopeError("generate" if access == "feedback" else access, caller.key)
        return caller


class AuthenticationMiddleware:
    """Serves the requests that the authenticator admits."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, services: Services) -> None:
        self._app = app
        self._authenticator = authenticator
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"nobody is let in by {scope['type']}")
        try:
            await self._authenticator.admit(scope)
        except ApiError as error:
            await refusal(error)(scope, receive, send)
            return
        caller: Caller = scope[CALLER]
        reservation: QuotaReservation | None = scope.get(RESERVATION)
        receive = self._while_valid(caller, receive)
        if forwarded_of(scope).by_route:
            send = self._dated(scope, send)
        with acting(Origin(caller.key, given_id(scope))):
            if caller is NOBODY:
                await self._answer(reservation, scope, receive, send)
            else:
                await self._services.pacer.serve(
                    caller.tenant,
                    partial(self._answer, reservation, scope, receive, send),
                    runs=lambda: reservation is not None and reservation.runs,
                    at_once=caller.is_admin,
                )

    async def _answer(
        self, reservation: QuotaReservation | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if reservation is None:
            await self._services.tracing.serve(self._app, as_get(scope), receive, send)
        else:
            await self._with_quotas(reservation, scope, receive, send)

    def _dated(self, scope: Scope, send: Send) -> Send:
        """Add to the answer, for the route, the tenant of its key, if it had one, and which of the registry's
        changes it is as of. Answers about what is not in the catalog may be newer than all that this server
        has read."""
        catalog = self._services.catalog
        caller: Caller = scope[CALLER]
        whose = [] if caller is NOBODY else [(TENANT_HEADER, quote(caller.tenant).encode())]
        reads = scope["path"].startswith(_PAST_THE_CATALOG)

        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                if reads:
                    await catalog.look()
                message["headers"] = [*message["headers"], *whose, (CHANGE, b"%d" % max(0, catalog.counter))]
            await send(message)

        return dated

    def _while_valid(self, caller: Caller, receive: Receive) -> Receive:
        """Accept a slow body only as long as its caller's key is valid. Raises BodyError."""
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
        """Check the caller's key again. `whole`: the body has ended, and will be used now. Raises
        BodyError."""
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

    async def _with_quotas(
        self, reservation: QuotaReservation, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve a request for text; headers of its answer say what its quotas leave."""

        async def send_with_quotas(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] in NOT_ITS_FAULT:
                    reservation.refund_request()
                headers = MutableHeaders(scope=message)
                for name, value in reservation.headers().items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._services.tracing.serve(self._app, scope, receive, send_with_quotas)
        finally:
            reservation.close()


def is_upload(scope: Scope) -> bool:
    """Return True if a route reads the body as a form; as the routes do, by the first Content-Type."""
    kinds = (value for name, value in scope["headers"] if name == b"content-type")
    return scope["method"] == "POST" and scope["path"] in _UPLOADS and is_form(next(kinds, b""))


def longest_body(scope: Scope, limit: int) -> int:
    """Return how many bytes of a body are taken in at most. A pass of a run that is too long is read to its
    end, of which `limit` bytes are kept: they say which place it has in its run's order."""
    is_pass = scope["method"] == "POST" and scope["path"] == PASSES
    return limit * _PASS_LIMITS if is_pass else limit


def _resumes(scope: Scope) -> bool:
    """Return True for a stream that another server began: a transcript follows what the request asks."""
    own = forwarded_of(scope).transcript
    return own is not None and announced_length(scope) > own[0]


def announced_length(scope: Scope) -> int:
    """Return the announced length of the request's body, in bytes; 0 without one."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
