"""Calls about API keys, tenants, what they use, the audit log and the log of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, Final
from urllib.parse import quote

from .requests import Body, Call, encode
from .training import query_of

KEYS: Final = Call("GET", "/v1/keys")
OWN_KEY: Final = Call("GET", "/v1/key")
TENANTS: Final = Call("GET", "/v1/tenants")
GATES: Final = Call("GET", "/v1/gates")


def create_key(
    scopes: Sequence[str],
    tenant: str,
    name: str,
    expires_in: float | None,
    quotas: Mapping[str, int] | None,
    priority: int,
) -> Call:
    """Return the request for a new key. It is not idempotent: sent twice, it makes two keys."""
    if isinstance(scopes, str):
        raise ValueError(f"scopes must be a list, such as ['generate'], not {scopes!r}")
    body: Body = {"scopes": list(scopes), "tenant": tenant, "name": name, "expires_in_s": expires_in}
    if quotas:
        body["quotas"] = dict(quotas)
    if priority:
        body["priority"] = priority
    return Call("POST", "/v1/keys", encode(body))


def update_key(key_id: str, quotas: Mapping[str, int | None] | None, priority: int | None) -> Call:
    body: Body = {"quotas": dict(quotas or {}), "priority": priority}
    return Call("POST", _place(key_id), encode(body), idempotent=True)


def revoke_key(key_id: str) -> Call:
    return Call("DELETE", _place(key_id), idempotent=True)


def _place(key_id: str) -> str:
    if not key_id:
        raise ValueError("the id of a key is empty")
    return f"/v1/keys/{quote(key_id, safe='')}"


def set_quotas(tenant: str, quotas: Mapping[str, int | None]) -> Call:
    if not tenant:
        raise ValueError("the name of a tenant is empty")
    place = f"/v1/tenants/{quote(tenant, safe='')}"
    return Call("POST", place, encode({"quotas": dict(quotas)}), idempotent=True)


def set_gate(rule: Body) -> Call:
    """Idempotent: it takes the place of the rule with the same patterns."""
    return Call("POST", "/v1/gates", encode(rule), idempotent=True)


def delete_gate(gate_id: str) -> Call:
    if not gate_id:
        raise ValueError("the id of a gate is empty")
    return Call("DELETE", f"/v1/gates/{quote(gate_id, safe='')}")


def usage(
    start: date | str | None,
    end: date | str | None,
    group_by: Sequence[str],
    tenant: str | None,
    *,
    csv: bool = False,
) -> Call:
    if isinstance(group_by, str):
        raise ValueError(f"group_by must be a list, such as ['day', 'tenant'], not {group_by!r}")
    first, last = (None if day is None else str(day) for day in (start, end))
    columns, form = ",".join(group_by), "csv" if csv else None
    return Call(
        "GET",
        query_of("/v1/usage", start=first, end=last, group_by=columns, tenant=tenant, format=form),
    )


def audit_entries(
    tenant: str | None,
    action: str | None,
    target: str | None,
    since: float | None,
    order: str,
    after: str | None,
    limit: int,
) -> Call:
    """Return the call for a page: up to `limit` entries after the id `after`."""
    fields = {"tenant": tenant, "action": action, "target": target, "after": after, "order": order}
    moment = None if since is None else str(since)
    return Call("GET", query_of("/v1/audit", **fields, since=moment, limit=str(limit)))


def logged_requests(
    tenant: str | None,
    since: float | None,
    adapter: str | None,
    user: str | None,
    replayable: bool,
    after: str | None,
    limit: int,
) -> Call:
    """Return the call for a page: up to `limit` requests that began before the one with the id `after`."""
    fields = {"tenant": tenant, "adapter": adapter, "user": user, "after": after}
    fields["replayable"] = "true" if replayable else None
    moment = None if since is None else str(since)
    return Call("GET", query_of("/v1/requests", **fields, since=moment, limit=str(limit)))


def logged_request(request_id: str, tenant: str | None) -> Call:
    return Call("GET", query_of(_logged(request_id), tenant=tenant))


def replay(request_id: str, version: str | None, body: Mapping[str, Any] | None, tenant: str | None) -> Call:
    """Return the call for a replay. It changes nothing, so it may be sent again."""
    sent: Body = {"version": version, "body": None if body is None else dict(body)}
    place = query_of(f"{_logged(request_id)}/replay", tenant=tenant)
    return Call("POST", place, encode(sent), idempotent=True)


def erase_requests(user: str | None, everything: bool, tenant: str | None) -> Call:
    if everything == (user is not None):
        raise ValueError("say either whose requests are erased (user), or everything=True")
    whole = "true" if everything else None
    return Call("DELETE", query_of("/v1/requests", user=user, all=whole, tenant=tenant), idempotent=True)


def _logged(request_id: str) -> str:
    if not request_id:
        raise ValueError("the id of a request is empty")
    return f"/v1/requests/{quote(request_id, safe='')}"
