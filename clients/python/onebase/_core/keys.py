"""API keys: what is sent about them, and what the answers mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

from ..types import ApiKey, NewApiKey
from .parse import Json, flat
from .requests import Body, Call, encode

LIST: Final = Call("GET", "/v1/keys")


def create(scopes: Sequence[str], tenant: str, name: str, expires_in: float | None) -> Call:
    """Not idempotent: sent twice, it makes two keys."""
    if isinstance(scopes, str):
        raise ValueError(f"scopes must be a list, such as ['generate'], not {scopes!r}")
    body: Body = {"scopes": list(scopes), "tenant": tenant, "name": name, "expires_in_s": expires_in}
    return Call("POST", "/v1/keys", encode(body))


def revoke(key_id: str) -> Call:
    if not key_id:
        raise ValueError("the id of a key is empty")
    return Call("DELETE", f"/v1/keys/{quote(key_id, safe='')}", idempotent=True)


def parse_key(value: Json) -> ApiKey:
    return flat(ApiKey, value, scopes=tuple(value["scopes"]))


def parse_new_key(value: Json) -> NewApiKey:
    return flat(NewApiKey, value, scopes=tuple(value["scopes"]))


def parse_keys(value: Json) -> tuple[ApiKey, ...]:
    return tuple(parse_key(item) for item in value["data"])
