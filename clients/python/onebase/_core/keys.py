"""API keys: what is sent about them, and what the answers mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import quote

from .requests import Body, Call, encode

LIST: Final = Call("GET", "/v1/keys")


def create(
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


def update(key_id: str, quotas: Mapping[str, int | None] | None, priority: int | None) -> Call:
    body: Body = {"quotas": dict(quotas or {}), "priority": priority}
    return Call("POST", _place(key_id), encode(body), idempotent=True)


def revoke(key_id: str) -> Call:
    return Call("DELETE", _place(key_id), idempotent=True)


def _place(key_id: str) -> str:
    if not key_id:
        raise ValueError("the id of a key is empty")
    return f"/v1/keys/{quote(key_id, safe='')}"
