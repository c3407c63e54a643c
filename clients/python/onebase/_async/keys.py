"""`client.keys`, `client.tenants` and `client.gates`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import to_builtins

from onebase_protocol.common import DeletedAnswer, ListAnswer

from .._core import access
from ..adapter_types import EvaluationGate, GateRule, ProofGate
from ..types import ApiKey, CallerAnswer, NewApiKey, Tenant
from .http import AsyncHttp


class AsyncKeys:
    """`client.keys`: who may use the servers of this registry. A key with the scope `admin` changes them.

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
        """Return all keys that there ever were, newest first: for a key with the scope `admin` of all
        tenants, for one with `adapters` of its own."""
        return (await self._http.ask(access.KEYS, ListAnswer[ApiKey])).data

    async def own(self) -> CallerAnswer:
        """Return the id, the tenant and the scopes of the key that asks."""
        return await self._http.ask(access.OWN_KEY, CallerAnswer)

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
                that have not ended, `training_seconds` in a calendar month (UTC), and `log_days` for which
                the log of requests keeps theirs.

        Raises:
            BadRequestError: no tenant can have such a name or quota.
        """
        return await self._http.ask(access.set_quotas(tenant, quotas), Tenant)


class AsyncGates:
    """`client.gates`: what a version must pass before it answers under a name."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def list(self) -> tuple[GateRule, ...]:
        """Return the rules that apply to the key's tenant; all of them for a key with the scope `admin`."""
        return (await self._http.ask(access.GATES, ListAnswer[GateRule])).data

    async def set(
        self,
        *,
        tenant: str = "*",
        name: str = "*",
        signature: Sequence[str] = (),
        proof: ProofGate = "none",
        evaluation: EvaluationGate | None = None,
        weights: float | None = None,
        approvals: int = 0,
        approvers: Sequence[str] = (),
    ) -> GateRule:
        """Set a rule in place of the one with the same patterns. All rules that match a version apply.

        Args:
            tenant, name: Patterns of the tenant and of the adapter's name, such as `support-*`.
            signature: Patterns of signers, of which one must have signed the version.
            proof: `proved` or `exact`.
            evaluation: How sure it must be that the version is not worse than the active one.
            weights: Largest score of its weights.
            approvals: Number of people who must approve it, other than those who made and who activate it.
            approvers: Ids of the keys that may approve; all of the tenant by default.

        Raises:
            BadRequestError: the rule has no gate, or a field is wrong.
            PermissionDeniedError: the key lacks the scope `admin`.
        """
        body = {
            "tenant": tenant,
            "name": name,
            "signature": list(signature),
            "proof": proof,
            "evaluation": None if evaluation is None else to_builtins(evaluation),
            "weights": weights,
            "approvals": approvals,
            "approvers": list(approvers),
        }
        return await self._http.ask(access.set_gate(body), GateRule)

    async def delete(self, gate_id: str) -> None:
        """Delete a rule.

        Raises:
            NotFoundError: there is no rule of this id.
            PermissionDeniedError: the key lacks the scope `admin`.
        """
        await self._http.ask(access.delete_gate(gate_id), DeletedAnswer)
