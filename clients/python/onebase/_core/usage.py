"""Tenants' quotas and use: what is asked, and what the answers mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Final
from urllib.parse import quote, urlencode

from .requests import Call, encode

TENANTS: Final = Call("GET", "/v1/tenants")


def set_quotas(tenant: str, quotas: Mapping[str, int | None]) -> Call:
    if not tenant:
        raise ValueError("the name of a tenant is empty")
    place = f"/v1/tenants/{quote(tenant, safe='')}"
    return Call("POST", place, encode({"quotas": dict(quotas)}), idempotent=True)


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
    asked = {
        "start": None if start is None else str(start),
        "end": None if end is None else str(end),
        "group_by": ",".join(group_by),
        "tenant": tenant,
        "format": "csv" if csv else None,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return Call("GET", f"/v1/usage?{urlencode(given)}")
