"""How a version gets another packed adapter when its own is damaged, with a real registry and store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onebase_adapters.registry import Registry
from onebase_adapters.store.blobs import VersionFiles
from onebase_adapters.store.store import Store
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.residency import PackedAdapterFiles
from onebase_server.adapters.service import AdapterService, VersionOptions
from onebase_server.background import RegistryThreads, Threads
from onebase_server.processes.verifier_client import VerifierClient
from onebase_server.processes.verifier_protocol import Prove, Proved
from onebase_server.traces import Tracing

from .scripted_verifier import REPORT

PACKED = b"packed"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}", base_id="b" * 64, base_name="base")
    registry.migrate()
    yield registry
    registry.close()


class Verifier(VerifierClient):
    """Packs every version as the same bytes, as the real one does, and has no process."""

    def __init__(self, store: Store, disk: Threads) -> None:
        super().__init__(store, disk, base_id="b" * 64, probes=[])
        self.proofs = 0
        self._base_here.set()

    async def ask(self, job: Prove, on_progress: Any) -> Proved:
        self.proofs += 1
        Path(job.packed_path).write_bytes(PACKED)
        sha256 = hashlib.sha256(PACKED).hexdigest()
        return Proved(digest=job.digest, report=REPORT, sha256=sha256, bytes=len(PACKED))


class House:
    """The service around them, without engine or verifier; made in an event loop."""

    def __init__(self, registry: Registry, folder: Path) -> None:
        store = Store(str(folder / "store"), folder / "cache")
        disk = Threads("disk", 2)
        nobody: Any = None
        self.verifier = Verifier(store, disk)
        records = RegistryThreads("records", 2)
        self.catalog = Catalog("base", registry, records)
        self.files = PackedAdapterFiles(self.catalog, store, disk)
        self.adapters = AdapterService(
            registry,
            store,
            self.catalog,
            nobody,
            self.verifier,
            base_names=("base",),
            records=records,
            disk=disk,
            tracing=Tracing(),
        )
        with store.writer() as config, store.writer() as weights:
            config.write(b"{}")
            weights.write(b"weights")
            files = VersionFiles(config.commit(), weights.commit())
        self.digest, self.both = files.digest, files
        for name in ("acme", "other"):
            registry.add_version(name, files.digest, files, {"kind": "upload"})
        self.store = store

    async def make_ready(self) -> None:
        await self.catalog.refresh()
        await self.adapters.resume()
        await self.settled()

    async def settled(self) -> None:
        """Wait until nothing is on its way."""
        while self.adapters._tasks or self.adapters._jobs:
            await asyncio.sleep(0.01)

    def states(self) -> list[str]:
        return [version.state for version in self.catalog.of_digest(self.digest)]


def test_a_version_that_was_healed_is_not_opened_again_by_a_late_report_of_the_old_file(
    registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        house = House(registry, tmp_path)
        await house.make_ready()
        old = house.files.find(house.digest)
        (await house.files.fetch(old)).unlink()

        house.adapters.prove_again(old)
        await house.settled()
        proofs = house.verifier.proofs
        healed = house.files.find(house.digest)
        house.adapters.prove_again(old)
        await house.settled()

        assert proofs == house.verifier.proofs == 2
        assert house.states() == ["ready", "ready"]
        assert (healed.blob, len(healed.versions)) == (old.blob, 2)
        assert (await house.files.fetch(healed)).read_bytes() == PACKED

    asyncio.run(asyncio.wait_for(test(), 60))


def test_content_that_another_tenant_has_proved_is_proved_again_unless_it_is_shared(
    registry: Registry, tmp_path: Path
) -> None:
    """Else the time until it is ready would tell that somebody has it."""

    async def test() -> None:
        house = House(registry, tmp_path)
        await house.make_ready()

        async def proofs_for(tenant: str) -> int:
            before = house.verifier.proofs
            await house.adapters.add(tenant, "mine", house.both, {"kind": "upload"}, VersionOptions())
            await house.settled()
            assert (await house.adapters.version(tenant, "mine", house.digest)).state == "ready"
            return house.verifier.proofs - before

        assert await proofs_for("default") == 0
        assert await proofs_for("stranger") == 1
        registry.share("default", "acme", True)
        await house.catalog.refresh()
        assert await proofs_for("guest") == 0

    asyncio.run(test())
