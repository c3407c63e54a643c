"""Authentication by API key: the caller of a request, and what it may do."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from onebase_adapters.registry import (
    DEFAULT_TENANT,
    ApiKeyRecord,
    ApiKeys,
    Quotas,
    RegistryError,
    Scope,
    TenantRecord,
    Tenants,
)
from onebase_adapters.registry.keys import USED_SECONDS, Callers, id_of, is_key_of
from onebase_edge.background import Threads
from onebase_edge.errors import ForbiddenError, UnauthenticatedError, UnavailableError
from onebase_server.storage.calls import storage_errors

Access = Scope | Literal["any", "open", "metrics", "feedback"]
"""Requirement of a route: a scope, any valid key, or nothing. `metrics` needs no key if the settings say so,
else the scope `admin`. `feedback` needs the scope `generate`, and counts as no request for text."""
KEY_SECONDS = 1.0
"""A server knows of a new, a revoked or another key after this time at the latest."""
_ANSWER_SECONDS = 5.0
"""Limit for one look at the registry's keys."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """The caller of a request. `key` is the key's id, or "" where no keys are needed."""

    key: str
    tenant: str
    scopes: frozenset[Scope]
    priority: int = 0
    """Priority of its requests: each step doubles their share of a busy engine."""
    background: bool = False
    """Whether its requests only use capacity that other requests leave free, as those of a batch do."""

    @property
    def is_admin(self) -> bool:
        """Return True if it operates this server; an admin may do everything that other scopes allow, too."""
        return "admin" in self.scopes

    def tenant_asked(self, tenant: str | None) -> str:
        """Return the tenant that a request asks about: by default the caller's own.

        Raises ForbiddenError if it is another one's and the caller no admin, whether it exists or not.
        """
        if tenant is None or tenant == self.tenant:
            return self.tenant
        if not self.is_admin:
            raise ForbiddenError(
                "tenant: only a key with the scope 'admin' may see what other tenants have. Leave it out.",
                code="insufficient_scope",
                param="tenant",
            )
        return tenant

    def may(self, access: Access) -> bool:
        wanted = "generate" if access == "feedback" else access
        return self.is_admin or wanted in ("any", "open") or wanted in self.scopes


LOCAL = Caller("", DEFAULT_TENANT, frozenset({"admin"}))
"""The caller of every request to a server that needs no keys."""
NOBODY = Caller("", "", frozenset())
"""The caller of an open route."""


class KeyRing:
    """The registry's keys and quotas, in memory, as they were at most KEY_SECONDS ago. For one event loop.

    While the registry cannot be read no key is taken, since it may have been revoked elsewhere.

    Args:
        open_without_keys: whether all may do everything while there has never been a key.
    """

    def __init__(self, keys: ApiKeys, tenants: Tenants, threads: Threads, *, open_without_keys: bool) -> None:
        self._registry = keys
        self._tenants = tenants
        self._threads = threads
        self._open_without_keys = open_without_keys
        self._keys: dict[str, ApiKeyRecord] = {}
        self._quotas: dict[str, Quotas] = {}
        self.has_quotas = False
        """Whether any key or tenant has a quota."""
        self._newest = -1
        self._away = False
        self._looked_at = self._changed_at = -math.inf
        self._looking: asyncio.Task[None] | None = None
        self._used: dict[str, float] = {}
        self._notes: set[asyncio.Task[None]] = set()

    def caller(self, authorization: Sequence[str], api_key: Sequence[str] = ()) -> Caller:
        """Return the caller that a request's `Authorization` and API key headers name, by the keys as last
        read.

        Raises UnauthenticatedError.
        """
        if self.is_open:
            return LOCAL
        key = _given(authorization, api_key)
        record = self._keys.get(id_of(key) or "")
        if not is_key_of(key, record) or record is None:
            raise UnauthenticatedError("This API key is not known here.")
        if not record.valid_at(time.time()):
            ended = "was revoked" if record.revoked_at is not None else "has expired"
            raise UnauthenticatedError(f"The API key {record.id} {ended}.")
        self._note_use(record)
        return _caller(record)

    async def caller_of(self, key_id: str) -> Caller:
        """Return the caller that a key's id names, for work that outlives the request that brought the key.

        "" stands for a caller that needed no key. Raises UnauthenticatedError, UnavailableError.
        """
        if key_id == "":
            return LOCAL
        await self.refresh()
        record = self._keys.get(key_id)
        if record is None or not record.valid_at(time.time()):
            raise UnauthenticatedError(f"The API key {key_id} has expired or was revoked.")
        return _caller(record)

    def quotas_of(self, caller: Caller) -> tuple[Quotas, Quotas]:
        """Return the quotas of the caller's key and of its tenant, as last read."""
        record = self._keys.get(caller.key)
        return Quotas() if record is None else record.quotas, self._quotas.get(caller.tenant, Quotas())

    async def still_valid(self, caller: Caller) -> bool:
        """Return True if a caller whose answer takes long may have the rest of it. Raises
        UnavailableError."""
        if caller.key == "":
            await self.look()
            return self.is_open
        await self.refresh()
        record = self._keys.get(caller.key)
        return record is not None and record.valid_at(time.time())

    async def look(self) -> None:
        """Make `caller` know the keys, unless it is `fresh`. Raises UnavailableError."""
        try:
            await self.refresh()
        except UnavailableError:
            # Who has no keys has nothing to revoke: names stay as they are, and so does this.
            if self._keys or self._newest < 0 or not self._open_without_keys:
                raise

    @property
    def is_open(self) -> bool:
        """Return True if no key is needed, since there has never been one."""
        return self._open_without_keys and not self._keys

    @property
    def has_keys(self) -> bool:
        """Return True if there has ever been a key, as of the last look."""
        return bool(self._keys)

    # ---- for operators -----------------------------------------------------------------------

    async def all(self, tenant: str | None = None) -> list[ApiKeyRecord]:
        """Return all keys that there ever were, or one tenant's, newest first. Raises UnavailableError."""
        with storage_errors():
            return await self._threads.run_blocking(self._registry.all, tenant)

    async def create(
        self,
        tenant: str,
        scopes: Collection[str],
        *,
        name: str,
        expires_at: float | None,
        quotas: Mapping[str, int | None],
        priority: int,
    ) -> tuple[ApiKeyRecord, str]:
        """Create a key, and return it with its text, which is not kept.

        Raises ForbiddenError for the first one: over HTTP anyone who reaches the port could lock the owner
        out. Raises InvalidRequestError, UnavailableError.
        """
        await self.refresh()
        if not self._keys:
            raise ForbiddenError(
                "The first key is made on the server's machine: onebase keys create --scope admin.",
                code="first_key",
            )
        with storage_errors():
            made = await self._threads.run_blocking(
                self._registry.create,
                tenant,
                scopes,
                name=name,
                expires_at=expires_at,
                quotas=quotas,
                priority=priority,
            )
        self.doubt()
        return made

    async def change(
        self, key_id: str, quotas: Mapping[str, int | None] | None, priority: int | None
    ) -> ApiKeyRecord:
        """Change a key as ApiKeys.change does. Raises KeyNotFoundError, InvalidRequestError,
        UnavailableError."""
        with storage_errors():
            changed = await self._threads.run_blocking(self._registry.change, key_id, quotas, priority)
        self.doubt()
        return changed

    async def tenants(self, caller: Caller) -> list[TenantRecord]:
        """Return all tenants, for an admin; for others their own. Raises UnavailableError."""
        with storage_errors():
            if caller.is_admin:
                return await self._threads.run_blocking(self._tenants.all)
            return [await self._threads.run_blocking(self._tenants.one, caller.tenant)]

    async def check_room(self, caller: Caller, more: int) -> None:
        """Raise QuotaExceededError if the tenant may not store so many bytes more. Raises
        UnavailableError."""
        if self.quotas_of(caller)[1].bytes is not None:
            with storage_errors():
                await self._threads.run_blocking(self._tenants.check_bytes, caller.tenant, more)

    async def set_quotas(self, tenant: str, changes: Mapping[str, int | None]) -> TenantRecord:
        """Change a tenant's quotas as Tenants.set_quotas does. Raises InvalidRequestError,
        UnavailableError."""
        with storage_errors():
            changed = await self._threads.run_blocking(self._tenants.set_quotas, tenant, changes)
        self.doubt()
        return changed

    async def revoke(self, key_id: str) -> ApiKeyRecord:
        """Raises KeyNotFoundError, UnavailableError."""
        with storage_errors():
            revoked = await self._threads.run_blocking(self._registry.revoke, key_id)
        self.doubt()
        return revoked

    # ---- keeping up --------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Know the keys as they were at most KEY_SECONDS ago, and after the last change made here.

        Raises UnavailableError.
        """
        oldest = self._oldest()
        while self._looked_at < oldest:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._read())
                self._looking.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(self._looking)

    def doubt(self) -> None:
        """Make the next look read the registry, since it was changed here or elsewhere."""
        self._changed_at = time.monotonic()

    @property
    def fresh(self) -> bool:
        """Return True if the last look is still good, so that `refresh` would not wait."""
        return self._looked_at >= self._oldest()

    def _oldest(self) -> float:
        return max(self._changed_at, time.monotonic() - KEY_SECONDS)

    async def _read(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                newest, callers = await self._threads.run_blocking(self._registry.since, self._newest)
        except (RegistryError, TimeoutError) as error:
            if not self._away:
                _log.error("the registry's API keys cannot be read: %s", error or "no answer in time")
            self._away = True
            raise UnavailableError(
                "The registry cannot be read now, so no API key can be checked. Try again in a moment.",
                code="registry_unavailable",
                retry_after=_ANSWER_SECONDS,
            ) from error
        if callers is not None:
            self._take(newest, callers)
        self._looked_at, self._away = max(self._looked_at, began), False

    def _take(self, newest: int, callers: Callers) -> None:
        self._keys, self._newest = {key.id: key for key in callers.keys}, newest
        self._quotas = callers.tenants
        owners = (*(key.quotas for key in callers.keys), *callers.tenants.values())
        self.has_quotas = any(quotas != Quotas() for quotas in owners)

    def _note_use(self, record: ApiKeyRecord) -> None:
        """Write down, now and then, that a key is in use. Nobody waits for that."""
        now = time.monotonic()
        written = time.time() - (record.last_used_at or 0.0) < USED_SECONDS
        if written or now - self._used.get(record.id, -math.inf) < USED_SECONDS:
            return
        self._used[record.id] = now
        task = asyncio.get_running_loop().create_task(self._write_use(record.id))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _write_use(self, key_id: str) -> None:
        try:
            await self._threads.run_blocking(self._registry.note_use, key_id)
        except RegistryError:
            del self._used[key_id]


def _caller(record: ApiKeyRecord) -> Caller:
    return Caller(record.id, record.tenant, frozenset(record.scopes), record.priority)


def _given(authorization: Sequence[str], api_key: Sequence[str]) -> str:
    """Return the one key that a request has, in the header of either name. Raises UnauthenticatedError."""
    given = {_bearer(authorization)} if authorization else set()
    given |= {key.strip() for key in api_key if key.strip() or not authorization}
    if not given:
        raise UnauthenticatedError("This server needs an API key.", given=False)
    if len(given) > 1:
        raise UnauthenticatedError("The request has two different API keys, and may have one.")
    return given.pop()


def _bearer(authorization: Sequence[str]) -> str:
    """Return the key in a request's Authorization header. Raises UnauthenticatedError."""
    scheme, _, key = authorization[0].strip().partition(" ")
    if len(authorization) > 1 or scheme.lower() != "bearer" or not key.strip():
        raise UnauthenticatedError("The Authorization header cannot be read.")
    return key.strip()
