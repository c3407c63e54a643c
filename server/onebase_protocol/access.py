"""API keys, tenants, what they use, and who changed what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from onebase_protocol.common import Json, Sparse


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """An API key as the server knows it. Times are Unix seconds."""

    object: Literal["api_key"] = "api_key"
    id: str
    """The public beginning of the key."""
    tenant: str
    name: str
    scopes: tuple[str, ...]
    """Scopes of the key: `generate`, `adapters`, `train`, `admin`."""
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    """Time of the last use, to the hour."""
    quotas: dict[str, int] = {}
    """`requests` and `tokens` in any 60 seconds, `sequences` at once; what is missing is not limited."""
    used: dict[str, int] = {}
    """Amount that counts against each of `quotas` now."""
    priority: int = 0
    """-4 to 4: each step doubles the share that its requests get of a busy engine."""


class NewApiKey(ApiKey, frozen=True, kw_only=True):
    """A key that was just made."""

    key: str
    """The key itself, which nobody can read again. It is not in the object's repr."""

    def __repr__(self) -> str:
        return f"NewApiKey(id={self.id!r}, tenant={self.tenant!r}, name={self.name!r}, ...)"


class CallerAnswer(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["caller"] = "caller"
    key: str
    """The key's id; "" where no keys are needed."""
    tenant: str
    scopes: tuple[str, ...]


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Owner of keys, with its quotas and what it uses."""

    object: Literal["tenant"] = "tenant"
    tenant: str
    quotas: dict[str, int]
    """Quotas as those of a key, and `adapters`, `bytes`, `jobs`, `training_seconds` in a month (UTC), and
    `log_days`."""
    used: dict[str, int] = {}
    """Amount that counts now against each of `quotas` that a key can have, too."""
    adapters: int
    bytes: int
    """Size of its versions, as they were sent or trained, of its files, and of the rows of unended jobs."""
    jobs: int = 0
    """Training jobs that have not ended, or failed and can be resumed."""
    training_seconds: float
    """Training time in this calendar month (UTC), in seconds."""


class TenantUsage(Sparse, frozen=True, kw_only=True):
    """Usage by the fields that it is grouped by. The other fields are None, and summed."""

    day: str | None = None
    """Day in UTC, as 2026-11-26."""
    tenant: str | None = None
    base: str | None = None
    adapter: str | None = None
    """`""` is the base itself, `a+b` a sum of adapters."""
    requests: int
    prompt_tokens: int
    """Tokens of prompts, including those that the prefix cache had."""
    cached_tokens: int
    """Tokens of `prompt_tokens` that the prefix cache had."""
    completion_tokens: int
    training_seconds: float
    training_tokens: int


class UsageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    group_by: tuple[str, ...] = ()
    data: tuple[TenantUsage, ...]


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One change that somebody made on the server."""

    object: Literal["audit.entry"] = "audit.entry"
    id: str
    at: float
    """Unix time in seconds."""
    tenant: str
    """Tenant that owns the adapter, file, job or key."""
    key: str
    """The id of the API key that asked; empty where none is needed."""
    actor: str
    """Agent that acted for it, where that was no request: `job ftjob-...`, `startup`."""
    action: str
    """Such as `adapter.activated`."""
    target: str
    """The adapter's name, or the id of the file, job or key."""
    version: str | None
    """The digest of the adapter's version."""
    base: str | None
    server: str
    request: str
    """The `X-Request-Id` that came with the request."""
    details: Json
    base_id: str | None = None
    """Identity of the base."""
    chain: str = ""
    """SHA-256 (hex) over this entry and the one before it: see `audit_chain`."""


def audit_chain(
    before: str,
    *,
    at: float,
    tenant: str,
    key: str,
    actor: str,
    action: str,
    target: str,
    version: str | None,
    base_id: str | None,
    server: str,
    request: str,
    details: Mapping[str, Any],
) -> str:
    """Return the `chain` of an entry of the audit log, from that of the entry before it ("" for the first).

    It is the SHA-256 of a JSON array of all arguments in their order, without blanks, in UTF-8, with the keys
    of objects sorted. So no entry can be changed, added or left out without another `chain` of all that
    follow.
    """
    fields = [before, at, tenant, key, actor, action, target, version, base_id, server, request, details]
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
