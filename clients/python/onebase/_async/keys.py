"""`client.keys` and `client.tenants`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onebase_protocol.common import ListAnswer

from .._core import access
from ..types import ApiKey, NewApiKey, Tenant
from .http import AsyncHttp


class AsyncKeys:
    """`client.keys`: who may use the servers of this registry. Only a key with the scope `admin` may ask.

    The first key is made on the server's machine: `onebase keys create --scope admin`.
    """

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def create(
        self,
        scopes: Sequence[str],
        *,
        tenant: str = "default",
        name: str = "",
        expires_in: float | None = None,
        quotas: Mapping[str, int] | None = None,
        priority: int = 0,
    ) -> NewApiKey:
        """Create a key. Its text is in the result's `key`, and nowhere else: keep it.

        Args:
            scopes: What it allows: `generate`, `adapters`, `train`, `admin`.
            tenant: Whose adapters, files and jobs it sees.
            name: For people, in lists.
            expires_in: Seconds until it ends; None is never.
            quotas: Its limits: `requests` and `tokens` in any 60 seconds, `sequences` at once.
            priority: -4 to 4. Each step doubles the share that its requests get of a busy engine.

        Raises:
            BadRequestError: no key can have such a tenant, scope, name or end.
            PermissionDeniedError: there is no key yet, or yours lacks the scope `admin`.
        """
        call = access.create_key(scopes, tenant, name, expires_in, quotas, priority)
        return await self._http.ask(call, NewApiKey)

    async def update(
        self, key_id: str, *, quotas: Mapping[str, int | None] | None = None, priority: int | None = None
    ) -> ApiKey:
        """Change a key: at once on this server, within a second on the others.

        Args:
            quotas: Those to change; None as a value: no limit. What it does not name stays.
            priority: None leaves it as it is.

        Raises:
            BadRequestError: no key can have such a quota or priority.
            NotFoundError: there is no key of this id.
        """
        return await self._http.ask(access.update_key(key_id, quotas, priority), ApiKey)

    async def list(self) -> tuple[ApiKey, ...]:
        """Return all keys that there ever were, of all tenants, the newest first."""
        return (await self._http.ask(access.KEYS, ListAnswer[ApiKey])).data

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key for good: at once on this server, within a second on the others.

        Raises:
            NotFoundError: there is no key of this id.
        """
        return await self._http.ask(access.revoke_key(key_id), ApiKey)


class AsyncTenants:
    """`client.tenants`: whom keys belong to, what they may and what they have."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def list(self) -> tuple[Tenant, ...]:
        """Return all tenants, for a key with the scope `admin`; for others their own."""
        return (await self._http.ask(access.TENANTS, ListAnswer[Tenant])).data

    async def set_quotas(self, tenant: str, quotas: Mapping[str, int | None]) -> Tenant:
        """Change a tenant's quotas: at once on this server, within a second on the others.

        Args:
            quotas: Those to change; None as a value: no limit. What it does not name stays. There are
                `requests` and `tokens` in any 60 seconds, `sequences` at once, `adapters`, `bytes`, `jobs`
                that have not ended, and `training_seconds` in a calendar month (UTC).

        Raises:
            BadRequestError: no tenant can have such a name or quota.
        """
        return await self._http.ask(access.set_quotas(tenant, quotas), Tenant)
