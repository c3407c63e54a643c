"""The audit log: what is asked, and what the answer means."""

from __future__ import annotations

from urllib.parse import urlencode

from .requests import Call


def entries(
    tenant: str | None,
    action: str | None,
    target: str | None,
    since: float | None,
    order: str,
    after: str | None,
    limit: int,
) -> Call:
    """One page: up to `limit` entries after the id `after`."""
    fields = {"tenant": tenant, "action": action, "target": target, "since": since, "after": after}
    given = {name: value for name, value in fields.items() if value is not None}
    return Call("GET", f"/v1/audit?{urlencode({**given, 'limit': limit, 'order': order})}")
