"""Registries to test: the same tests run on SQLite and on PostgreSQL."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.postgres import PostgresServer, postgres_server

from onebase_adapters.registry import Registry
from onebase_adapters.store.blobs import AdapterFiles, Blob

Open = Callable[..., Registry]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    return str(request.getfixturevalue("postgres").database())


def migrate(url: str) -> None:
    registry = Registry(url, base_id="base-1", base_name="base")
    registry.migrate()
    registry.close()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "registry.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_database(postgres: PostgresServer) -> str:
    name = postgres.create()
    migrate(postgres.url(name))
    return name


@pytest.fixture
def migrated_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database in which nothing is yet, copied from one that was migrated."""
    if kind == "sqlite":
        path = tmp_path / "migrated.db"
        shutil.copyfile(request.getfixturevalue("migrated_file"), path)
        return f"sqlite:///{path}"
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.url(postgres.create(template=request.getfixturevalue("migrated_database")))


@pytest.fixture
def open_registry(migrated_url: str) -> Iterator[Open]:
    """`open_registry(base_id=)`: another server's registry on the same database."""
    opened: list[Registry] = []

    def _open(base_id: str = "base-1", base_name: str = "base") -> Registry:
        registry = Registry(migrated_url, base_id=base_id, base_name=base_name)
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


def files(text: str) -> AdapterFiles:
    """All versions have the same config, and weights of their own."""
    return AdapterFiles(blob("config"), blob(f"weights {text}"))


def add(registry: Registry, name: str, text: str, *, ready: bool = True, tenant: str = "default") -> str:
    """A version, ready unless said otherwise. Returns its digest."""
    both = files(text)
    registry.add_version(name, both.digest, both, {"kind": "upload"}, tenant=tenant)
    if ready:
        registry.set_state(tenant, name, both.digest, "ready", prepared=blob(f"prepared {text}"))
    return both.digest
