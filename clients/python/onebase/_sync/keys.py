# Generated from _async/keys.py by tools/generate_sync.py; do not edit.
"""`client.keys`."""

from __future__ import annotations

from collections.abc import Sequence

from .._core import keys
from ..types import ApiKey, NewApiKey
from .http import Http


class Keys:
    """`client.keys`: who may use the servers of this registry. Only a key with the scope `admin` may ask.

    The first key is made on the server's machine: `onebase keys create --scope admin`.
    """

    def __init__(self, http: Http) -> None:
        self._http = http

    def create(
        self,
        scopes: Sequence[str],
        *,
        tenant: str = "default",
        name: str = "",
        expires_in: float | None = None,
    ) -> NewApiKey:
        """A new key. Its text is in the result's `key`, and nowhere else: keep it.

        Args:
            scopes: What it allows: `generate`, `adapters`, `train`, `admin`.
            tenant: Whose adapters, files and jobs it sees.
            name: For people, in lists.
            expires_in: Seconds until it ends; None is never.

        Raises:
            BadRequestError: no key can have such a tenant, scope, name or end.
            PermissionDeniedError: there is no key yet, or yours lacks the scope `admin`.
        """
        return self._http.ask(keys.create(scopes, tenant, name, expires_in), keys.parse_new_key)

    def list(self) -> tuple[ApiKey, ...]:
        """All keys that there ever were, of all tenants, the newest first."""
        return self._http.ask(keys.LIST, keys.parse_keys)

    def revoke(self, key_id: str) -> ApiKey:
        """End a key for good: at once on this server, within a second on the others.

        Raises:
            NotFoundError: there is no key of this id.
        """
        return self._http.ask(keys.revoke(key_id), keys.parse_key)
