"""Registries to test: the same tests run on SQLite and on PostgreSQL."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.postgres import PostgresServer, postgres_server

from onebase_adapters.registry import Registry
from onebase_adapters.store.blobs import Blob, VersionFiles

Open = Callable[..., Registry]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    return str(request.getfixturevalue("postgres").database())


@pytest.fixture
def open_registry(url: str) -> Iterator[Open]:
    """`open_registry(base_id=)`: another server's registry on the same database."""
    opened: list[Registry] = []

    def _open(base_id: str = "base-1", base_name: str = "base") -> Registry:
        registry = Registry(url, base_id=base_id, base_name=base_name)
        opened.append(registry)
        registry.migrate()
        return registry

    yield _open
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    return open_registry()


def blob(text: str) -> Blob:
    return Blob(hashlib.sha256(text.encode()).hexdigest(), len(text))


def files(text: str) -> VersionFiles:
    """All versions have the same config, and weights of their own."""
    return VersionFiles(blob("config"), blob(f"weights {text}"))


def add(registry: Registry, name: str, text: str, *, ready: bool = True, tenant: str = "default") -> str:
    """A version, ready unless said otherwise. Returns its digest."""
    both = files(text)
    registry.add_version(name, both.digest, both, {"kind": "upload"}, tenant=tenant)
    if ready:
        registry.set_state(tenant, name, both.digest, "ready", prepared=blob(f"prepared {text}"))
    return both.digest
