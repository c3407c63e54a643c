"""Keys for tests: made in a server's registry before it starts, and while it runs."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2

from onebase_adapters.registry import ApiKeyRecord, ApiKeys, Tenants
from onebase_adapters.registry.database import Database

from .support import Server


class Keys:
    """The keys of a registry, as `onebase keys` makes them: of the one in a data folder, or of a URL."""

    def __init__(self, data_dir: Path, url: str | None = None) -> None:
        data_dir.mkdir(exist_ok=True)
        self.file = data_dir / "registry.db"
        self.database = Database(url or f"sqlite:///{self.file}")
        self.database.migrate()
        self.registry = ApiKeys(self.database)
        self.tenants = Tenants(self.database)

    def make(self, *scopes: str, tenant: str = "default", **limits: Any) -> str:
        return self.registry.create(tenant, scopes, **limits)[1]

    def record(self, key: str) -> ApiKeyRecord:
        (found,) = (one for one in self.registry.all() if key.startswith(one.id))
        return found

    def expire(self, key: str) -> str:
        with closing(sqlite3.connect(self.file)) as database, database:
            database.execute("UPDATE change_counter SET value = value + 1")
            database.execute(
                "UPDATE api_keys SET expires_at = 1.0, changed = (SELECT value FROM change_counter) "
                "WHERE id = ?",
                (self.record(key).id,),
            )
        return key

    def revoke(self, key: str) -> str:
        self.registry.revoke(self.record(key).id)
        return key

    def close(self) -> None:
        self.database.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def client_with(server: Server, key: str) -> httpx2.Client:
    """A client that sends the key."""
    http = server.client(60)
    http.headers.update(bearer(key))
    return http
