"""Which server proves what, and when a version is proved once more, with a real registry and store."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from onebase_adapters.registry import QuotaError, Registry
from onebase_adapters.signatures import ServerKey
from onebase_adapters.store.blobs import AdapterFiles
from onebase_adapters.store.store import Store
from onebase_edge.background import Threads
from onebase_edge.errors import ApiError, InvalidRequestError, UnavailableError, UnconfirmedChangeError
from onebase_server.adapters import service
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.residency import PackedAdapterFiles
from onebase_server.adapters.service import AdapterService, VersionOptions
from onebase_server.adapters.shared_proofs import SharedProofs
from onebase_server.app.wiring import Preparation
from onebase_server.http.views.adapters import AdapterViews
from onebase_server.processes.supervisor import AdapterStartError
from onebase_server.processes.verifier_client import RejectedError, VerifierClient
from onebase_server.processes.verifier_protocol import Prove, Proved
from onebase_server.storage.calls import RegistryThreads
from onebase_server.telemetry.traces import Tracing

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
        self.tenants: list[str] = []
        self.free = asyncio.Event()
        self.free.set()
        self.rejects = False
        self.kernels = "torch"
        self._base_here.set()

    async def ask(self, job: Prove, on_progress: Any, tenant: str = "") -> Proved:
        self.proofs += 1
        self.tenants.append(tenant)
        await self.free.wait()
        if self.rejects:
            raise RejectedError("module_differs", "q_proj is off")
        Path(job.packed_path).write_bytes(PACKED)
        sha256 = hashlib.sha256(PACKED).hexdigest()
        proof = msgspec.structs.replace(REPORT.proof, kernels=self.kernels)
        report = msgspec.structs.replace(REPORT, proof=proof)
        return Proved(digest=job.digest, report=report, sha256=sha256, bytes=len(PACKED))


class Activation:
    """Activates in the registry alone, once `free` is set."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.free = asyncio.Event()
        self.free.set()
        self.asked = asyncio.Event()
        self.refusal: ApiError | None = None

    async def activate(self, tenant: str, name: str, digest: str, **how: Any) -> None:
        self.asked.set()
        await self.free.wait()
        if self.refusal is not None:
            raise self.refusal
        self._registry.activate(tenant, name, digest, **how)


class House:
    """The service around them, without engine or verifier; made in an event loop."""

    def __init__(
        self, registry: Registry, folder: Path, kernels: str = "torch", key: ServerKey | None = None
    ) -> None:
        store = Store(str(folder / "store"), folder / "cache")
        disk = Threads("disk", 2)
        self.activation = Activation(registry)
        self.verifier = Verifier(store, disk)
        self.verifier.kernels = kernels
        records = RegistryThreads("records", 2)
        self.catalog = Catalog("base", registry, records)
        self.files = PackedAdapterFiles(self.catalog, store, disk, lambda: kernels)
        self.proofs = SharedProofs(
            registry,
            store,
            self.catalog,
            self.verifier,
            lambda: kernels,
            records=records,
            disk=disk,
            tracing=Tracing(),
        )
        self.adapters = AdapterService(
            registry,
            store,
            self.catalog,
            cast(Any, self.activation),
            self.proofs,
            base_names=("base",),
            records=records,
            disk=disk,
            key=key,
        )
        with store.writer() as config, store.writer() as weights:
            config.write(b"{}")
            weights.write(b"weights")
            files = AdapterFiles(config.commit(), weights.commit())
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
        assert house.verifier.tenants == ["default", "stranger"], "a proof has its turn as another tenant's"

    asyncio.run(test())


# Several servers


@pytest.fixture
def other_registry(registry: Registry, tmp_path: Path) -> Iterator[Registry]:
    """Another server's registry on the same database."""
    registry.sign("server-1")
    other = Registry(f"sqlite:///{tmp_path / 'registry.db'}", base_id="b" * 64, base_name="base")
    other.sign("server-2")
    yield other
    other.close()


def claims(folder: Path) -> int:
    """Versions that a server is to prove."""
    with sqlite3.connect(folder / "registry.db") as database:
        return int(database.execute("SELECT count(*) FROM proofs WHERE until IS NOT NULL").fetchone()[0])


def test_a_start_at_which_the_registry_goes_away_ends_with_a_sentence_that_names_the_option(
    registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        house = House(registry, tmp_path)
        preparation = Preparation(house.adapters, cast(Any, None), cast(Any, None))  # it gets no farther
        with sqlite3.connect(tmp_path / "registry.db") as database:
            database.execute("ALTER TABLE versions RENAME TO gone")
        said = r"failed while reading: .*versions.* \(--registry, --data-dir\)$"
        with pytest.raises(AdapterStartError, match=said):
            await preparation.prepare_adapters()

    asyncio.run(test())


def test_a_start_that_a_quota_ends_does_not_name_the_option(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise QuotaError("The tenant keeps 2 adapters, and its quota is 2.", "adapters", 2)

    async def test() -> None:
        house = House(registry, tmp_path)
        monkeypatch.setattr(house.adapters, "resume", refuse)
        with pytest.raises(AdapterStartError, match=r"its quota is 2\.$"):
            await Preparation(house.adapters, cast(Any, None), cast(Any, None)).prepare_adapters()

    asyncio.run(test())


def test_of_two_servers_one_proves_and_the_other_takes_its_proof(
    registry: Registry, other_registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        one, other = House(registry, tmp_path), House(other_registry, tmp_path)
        one.verifier.free.clear()
        await one.adapters.resume()
        while not one.verifier.proofs or claims(tmp_path) < 2:  # of both names of the content
            await asyncio.sleep(0.01)
        await other.adapters.resume()
        await asyncio.sleep(0.05)
        one.verifier.free.set()
        await one.settled()
        await other.catalog.refresh()
        await other.settled()

        assert (one.verifier.proofs, other.verifier.proofs) == (1, 0)
        assert one.states() == other.states() == ["ready", "ready"]
        packed = other.files.find(other.digest)
        assert (await other.files.fetch(await other.proofs.for_kernels(packed))).read_bytes() == PACKED
        assert other.verifier.proofs == 0

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_version_whose_server_died_is_proved_by_another(
    registry: Registry, other_registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        one, other = House(registry, tmp_path), House(other_registry, tmp_path)
        for version in registry.unfinished():
            assert registry.proofs.claim(version, "torch", 60)  # and is never heard of again
        await other.catalog.refresh()
        await other.adapters.resume()
        await asyncio.sleep(0.05)
        assert other.verifier.proofs == 0
        with sqlite3.connect(tmp_path / "registry.db") as database:
            database.execute("UPDATE proofs SET until = 1")
        await other.catalog.refresh()
        other.catalog.changed.set()  # as the next change would
        await other.settled()
        assert (one.verifier.proofs, other.verifier.proofs) == (0, 1)
        assert other.states() == ["ready", "ready"]

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_server_with_other_kernels_proves_for_itself_before_the_first_load_and_others_like_it_do_not(
    registry: Registry, other_registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        one = House(registry, tmp_path)
        await one.make_ready()
        houses = [House(each, tmp_path, "avx2") for each in (other_registry, registry)]
        for house in houses:
            await house.catalog.refresh()
            packed = house.files.find(house.digest)
            proved = await house.proofs.for_kernels(packed)
            assert (await house.files.fetch(proved)).read_bytes() == PACKED
            await house.catalog.refresh()
            assert house.files.find(house.digest).is_proved
            again = await house.proofs.for_kernels(house.files.find(house.digest))
            assert again.blob == proved.blob
        assert [house.verifier.proofs for house in houses] == [1, 0]
        assert one.files.find(one.digest).is_proved

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_version_that_other_kernels_compute_otherwise_is_served_by_the_first_only(
    registry: Registry, other_registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        one = House(registry, tmp_path)
        await one.make_ready()
        other = House(other_registry, tmp_path, "avx2")
        await other.catalog.refresh()
        other.verifier.rejects = True
        for _ in range(3):
            with pytest.raises(UnavailableError, match="avx2 kernels: q_proj is off"):
                await other.proofs.for_kernels(other.files.find(other.digest))
        assert other.verifier.proofs == 1
        assert other.states() == ["ready", "ready"]
        assert one.files.find(one.digest).is_proved

    asyncio.run(asyncio.wait_for(test(), 60))


# Activation after the proof


def files_of(store: Store, content: bytes) -> AdapterFiles:
    with store.writer() as config, store.writer() as weights:
        config.write(b"{}")
        weights.write(content)
        return AdapterFiles(config.commit(), weights.commit())


async def sent(house: House, content: bytes, *, activate: bool = True) -> str:
    files = files_of(house.store, content)
    options = VersionOptions(activate=activate)
    return (await house.adapters.add("default", "red", files, {"kind": "upload"}, options)).digest


def test_a_server_that_waited_for_the_proof_undoes_no_activation_that_came_after_it(
    registry: Registry, other_registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        one, other = House(registry, tmp_path), House(other_registry, tmp_path)
        await one.make_ready()
        first = await sent(one, b"first")
        await one.settled()
        one.verifier.free.clear()
        second = await sent(one, b"second")
        while not claims(tmp_path):
            await asyncio.sleep(0.01)
        other.activation.free.clear()  # its memory is slow to load
        await other.catalog.refresh()
        await other.adapters.resume()
        one.verifier.free.set()
        await one.settled()
        assert registry.adapter("default", "red").active == second

        await other.activation.asked.wait()
        registry.activate("default", "red", first)
        other.activation.free.set()
        await other.settled()

        assert registry.adapter("default", "red").active == first

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_restart_undoes_no_activation_whatever_the_clock_was(registry: Registry, tmp_path: Path) -> None:
    async def test() -> None:
        house = House(registry, tmp_path)
        first = await sent(house, b"first")
        await house.settled()
        second = await sent(house, b"second")
        await house.settled()
        registry.activate("default", "red", first)
        with sqlite3.connect(tmp_path / "registry.db") as database:
            database.execute("UPDATE versions SET finished_at = finished_at + 86400")

        await House(registry, tmp_path).make_ready()

        assert second != first == registry.adapter("default", "red").active

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_restart_while_an_old_version_is_proved_again_does_not_activate_it(
    registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        house = House(registry, tmp_path)
        first = await sent(house, b"first")
        await house.settled()
        second = await sent(house, b"second")
        await house.settled()
        registry.reopen("default", "red", first)

        await House(registry, tmp_path).make_ready()

        assert registry.version("default", "red", first).state == "ready"
        assert registry.adapter("default", "red").active == second

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_version_that_was_ready_just_before_a_restart_is_activated_after_it_unless_another_was_chosen(
    registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        house = House(registry, tmp_path)
        first = await sent(house, b"first")
        await house.settled()
        for is_chosen in (False, True):
            files = files_of(house.store, f"second {is_chosen}".encode())
            options = {"options": {"activate": True}}
            registry.add_version("red", files.digest, files, options, activates=True)
            registry.set_state("default", "red", files.digest, "ready")
            if is_chosen:  # also what is active already
                registry.activate("default", "red", first)

            again = House(registry, tmp_path)
            await again.make_ready()

            expected = first if is_chosen else files.digest
            assert registry.adapter("default", "red").active == expected
            registry.activate("default", "red", first)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_version_that_became_active_since_the_catalog_was_read_is_shown_as_active(
    registry: Registry, tmp_path: Path
) -> None:
    async def test() -> None:
        house = House(registry, tmp_path)
        digest = await sent(house, b"first", activate=False)
        await house.settled()
        await house.catalog.refresh()
        nothing: Any = None
        views = AdapterViews(house.adapters, nothing, nothing, nothing)
        assert not views.version(await house.adapters.version("default", "red", digest)).active
        registry.activate("default", "red", digest)
        read = await house.adapters.version("default", "red", digest)
        assert views.version(read).active
        registry.deactivate("default", "red")
        assert not views.version(await house.adapters.version("default", "red", digest)).active

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("if_due", [True, False])
def test_an_activation_that_may_have_been_made_is_tried_again_only_where_it_can_undo_nothing(
    registry: Registry, tmp_path: Path, if_due: bool
) -> None:
    async def test() -> None:
        house = House(registry, tmp_path)
        digest = await sent(house, b"first", activate=False)
        await house.settled()
        version = registry.version("default", "red", digest)
        tries = 0

        async def activate(*_: object, **__: object) -> None:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise UnconfirmedChangeError("the change may have been made")

        house.activation.activate = activate  # type: ignore[method-assign]
        job = service._Job(service.VersionOptions(activate=True), activate=True, if_due=if_due)
        await house.adapters._activate_if_asked(version, job)
        assert (tries, job.failure is None) == ((2, True) if if_due else (1, False))

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize(
    ("refusal", "is_due"),
    [
        (InvalidRequestError("no room for it in memory", param="version"), False),
        (UnavailableError("the registry is away", code="registry_busy", retry_after=1.0), True),
        (UnconfirmedChangeError("the change may have been made"), True),
    ],
)
def test_an_activation_that_failed_for_good_is_not_tried_again_after_a_restart(
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: ApiError,
    is_due: bool,
) -> None:
    monkeypatch.setattr(service, "ACTIVATION_TRIES", 1)

    async def test() -> None:
        house = House(registry, tmp_path)
        house.activation.refusal = refusal
        digest = await sent(house, b"first")
        await house.settled()
        assert registry.version("default", "red", digest).activates == is_due

        await House(registry, tmp_path).make_ready()

        assert registry.adapter("default", "red").active == (digest if is_due else None)

    asyncio.run(asyncio.wait_for(test(), 60))
