"""What the upkeep of live training deletes, and when."""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import msgspec
import pytest
from sqlalchemy import update

from onebase_adapters.registry import (
    DEFAULT_TENANT,
    SIGNATURE,
    LiveSampler,
    LiveSession,
    Registry,
    RegistryFullError,
)
from onebase_adapters.registry.audit import current
from onebase_adapters.registry.tables import LiveSessionRow
from onebase_adapters.signatures import PolicyRule, ServerKey, SignaturePolicy
from onebase_adapters.store.blobs import FULL, AdapterFiles
from onebase_adapters.store.store import Store
from onebase_edge.background import Threads
from onebase_edge.errors import (
    AdapterNotFoundError,
    ApiError,
    DiskFullError,
    ForbiddenError,
    InsufficientScopeError,
    InvalidRequestError,
    LiveNotFoundError,
    QuotaExceededError,
    QuotaSpentError,
    ResultGoneError,
    StateConflictError,
    UnavailableError,
    VersionFailedError,
)
from onebase_server.adapters.activation import RefusalLimit
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.service import VersionOptions
from onebase_server.adapters.sources import take_folder
from onebase_server.http.routes.tinker import OpenFileResponse
from onebase_server.live import service as service_module
from onebase_server.live.service import (
    ENDED_SECONDS,
    FORGOTTEN_SECONDS,
    IDLE_SECONDS,
    LOOK_SECONDS,
    LOST_SECONDS,
    MOST_WAITING,
    TIDY_SECONDS,
    LiveTraining,
    Place,
    adapter_name,
)
from onebase_server.storage.calls import RegistryThreads
from onebase_server.tenancy.access import Caller
from onebase_training import live_store
from onebase_training.live_operations import (
    CheckpointFolder,
    Computed,
    Kind,
    ModelSpec,
    Operation,
    OptimStep,
    Refuse,
    Stepped,
)
from onebase_training.live_store import CHECKPOINT, LiveStore

from .test_adapter_service import House

ACME = Caller("key", "acme", frozenset({"train", "generate"}))
RUN = "1b2c3d4e-0000:train:3"
LATER = 2_000_000_000.0
"""Long after the service began."""


READING = Caller("reader", "acme", frozenset({"train", "adapters"}))
OF_VERSION = "1b2c3d4e-0000:train:4"
"""Run that began with a version of an adapter."""


async def unsigned(*_: Any, **__: Any) -> None:
    """Let anybody train under any name."""


def checkpoint(store: LiveStore, name: str, created: float, number: int = 1, **of: Any) -> CheckpointFolder:
    """Save a checkpoint as operation `number` and after as many steps, in place of one of this name."""
    place = Place(of.get("model", RUN), of.get("kind", "sampler"), name)
    folder = store.checkpoint_folder(place.run, place.kind, name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights %d" % number)
    made = CheckpointFolder(
        name=name, kind=place.kind, folder=str(folder), model=place.run, seq_id=number, step=number,
        digest="", bytes=1, rank=4, alpha=32.0, targets=[], train_mlp=True, train_attn=True,
        train_unembed=True, optimizer=False, created=created, version=of.get("version", ""),
    )  # fmt: skip
    (folder / CHECKPOINT).write_bytes(msgspec.json.encode(made))
    return made


@dataclass
class InUse:
    """Ids of the samplers that have unfinished samples."""

    samplers: Collection[str] = ()


class Upkeep:
    """A run of an open session, with three steps that are sampled and a named checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.store = LiveStore(folder / "live")
        self.registry = Registry(f"sqlite:///{folder / 'registry.db'}", base_id="base-1", base_name="base")
        self.registry.migrate()
        self.records = self.registry.live
        self.records.add_session(LiveSession("s", ACME.tenant, "key", LATER, {}), "server")
        self.store.create(ModelSpec(id=RUN, rank=4, owner="acme", session="s", created=1.0))
        for number in range(3):
            checkpoint(self.store, f"live-{number}", LATER + number)
        checkpoint(self.store, "final", LATER)
        self.unloaded: list[str] = []
        self.charged: list[tuple[float, int]] = []
        self.proved: list[str] = []
        self.refuses: ApiError | None = None
        self.room = 10**9
        threads: Any = Threads("test", 1)
        trainer: Any = SimpleNamespace(
            store=self.store,
            unload=self._unload,
            submit=self._submit,
            create=self._create,
            wait=self._wait,
            created=self._wait,
            expired=self._expired,
        )
        nothing: Any = SimpleNamespace(
            disk=threads,
            drop_live=lambda path: set(),
            forget=lambda digests: None,
            trained=lambda tenant, adapter, *took: self.charged.append(took),
            signs=False,
            check_trained=unsigned,
            catalog=Catalog("base", self.registry, RegistryThreads("records", 1)),
        )
        self.service = LiveTraining(
            trainer, self.records, threads, "server", base_names=["base"], tokenizer="base", max_rank=8,
            files=nothing, residency=nothing, library=nothing, usage=nothing, check_room=self._check_room,
            checkpoints=nothing,
        )  # fmt: skip
        self.service._added = self._add  # type: ignore[method-assign]

    async def _unload(self, run: str) -> None:
        self.unloaded.append(run)
        self.store.unload(run)

    async def _submit(self, run: str, number: int, operation: Operation) -> None:
        self.store.submit(run, number, operation)

    async def _create(self, spec: ModelSpec, files: Mapping[str, Path]) -> None:
        self.store.create(spec, files)

    async def _wait(self, run: str, number: float, seconds: float = 0.0) -> Any:
        return self.store.result(run, int(number)) if number else None

    async def _expired(self, run: str, number: int) -> bool:
        return self.store.expired(run, number)

    async def _check_room(self, caller: Caller, more: int) -> None:
        if more > self.room:
            raise QuotaExceededError(f"{more} bytes are too many", {})

    async def _add(self, tenant: str, checkpoint: CheckpointFolder) -> str:
        if self.refuses is not None:
            raise self.refuses
        self.proved.append(checkpoint.name)
        return "d" * 64

    def finish(self, at: float) -> None:
        """Let the session have finished then."""
        with self.records._database.write_uncounted() as writing:
            writing.execute(update(LiveSessionRow).values(finished_at=at))

    def tidy(self, after: float, in_use: Collection[str] = ()) -> list[str]:
        """Tidy so many seconds later, and return the names that are left."""
        asyncio.run(self.service.tidy(InUse(in_use), LATER + after))
        return sorted(one.name for one in self.store.checkpoints(RUN))


@pytest.fixture
def upkeep(tmp_path: Path) -> Iterator[Upkeep]:
    made = Upkeep(tmp_path)
    yield made
    made.registry.close()


def test_a_steps_weights_go_once_nobody_samples_from_them(upkeep: Upkeep) -> None:
    everything = ["final", "live-0", "live-1", "live-2"]
    assert upkeep.tidy(IDLE_SECONDS - 1) == everything
    assert upkeep.tidy(IDLE_SECONDS + 3, in_use=["s:sample:1"]) == ["final", "live-1", "live-2"]
    assert upkeep.tidy(IDLE_SECONDS + 3) == ["final", "live-2"]  # the newest, and what has a name
    assert upkeep.unloaded == []


def test_a_steps_weights_stay_for_a_sample_that_is_promised_while_others_are_looked_at(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_use, deleted = InUse(), list[str]()

    def delete(model_id: str, kind: Kind, name: str) -> None:
        in_use.samplers = ["s:sample:1"]
        deleted.append(name)

    monkeypatch.setattr(upkeep.store, "delete_checkpoint", delete)
    asyncio.run(upkeep.service.tidy(in_use, LATER + IDLE_SECONDS + 3))
    assert deleted == ["live-0"]


def test_the_times_of_samples_are_forgotten_with_the_weights_and_none_of_lost_ones_stays(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(time=lambda: LATER, monotonic=lambda: 0.0)
    monkeypatch.setattr(service_module, "time", clock)
    nothing: Any = SimpleNamespace(add_live=lambda *_: None, drop_live=lambda path: set())
    upkeep.service._files = nothing
    for name in ("live-0", "lost"):
        path = f"tinker://{RUN}/sampler_weights/{name}"
        sampler = LiveSampler("s:sample:0", "s", ACME.tenant, "base", path, LATER)
        with suppress(LiveNotFoundError):
            asyncio.run(upkeep.service.choose(sampler))
    upkeep.tidy(IDLE_SECONDS)
    assert len(upkeep.service._sampled) == 2
    assert upkeep.tidy(IDLE_SECONDS + 3) == ["final", "live-2"]
    assert not upkeep.service._sampled


def test_a_run_ends_with_its_session_and_leaves_what_has_a_name(upkeep: Upkeep) -> None:
    upkeep.finish(LATER)
    upkeep.tidy(ENDED_SECONDS - 1)
    assert upkeep.unloaded == []
    assert upkeep.tidy(IDLE_SECONDS + 3) == ["final"]
    assert upkeep.unloaded == [RUN]


def test_the_key_that_created_a_run_is_the_maker_of_its_versions(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = upkeep.service
    makers: list[tuple[str, str]] = []

    async def add(*_: Any, actor: str) -> Any:
        makers.append((current().key, actor))
        return SimpleNamespace(digest="d" * 64)

    disk = Threads("test", 1)
    library = SimpleNamespace(disk=disk, store=None, add=add, check_trained=unsigned)
    monkeypatch.setattr(service, "_library", library)
    monkeypatch.setattr("onebase_server.live.service.take_folder", lambda store, folder: None)
    del service.__dict__["_added"]
    made = service.create_run(ACME, "s", 5, base_model="base", rank=4, seed=1, train={}, metadata=None)
    spec = upkeep.store.spec(asyncio.run(made))
    assert spec.key == ACME.key
    saved = upkeep.store.checkpoint(RUN, "sampler", "final")
    asyncio.run(service._added("acme", msgspec.structs.replace(saved, model=spec.id)))
    assert makers == [(ACME.key, ACME.key)]


def test_what_another_base_has_trained_stays_and_is_refused(upkeep: Upkeep) -> None:
    upkeep.finish(LATER)
    upkeep.store.base_id = "another base"
    assert upkeep.tidy(IDLE_SECONDS + 3) == ["final", "live-0", "live-1", "live-2"]
    assert upkeep.unloaded == []
    path = f"tinker://{RUN}/sampler_weights/final"
    with pytest.raises(InvalidRequestError, match="model_path: 'final' was trained on another base"):
        asyncio.run(upkeep.service.checkpoint(ACME, path, "model_path"))
    with pytest.raises(InvalidRequestError, match="was trained on another base"):
        asyncio.run(upkeep.service.submit(ACME, RUN, 1, OptimStep()))


def test_a_lost_session_ends_and_is_forgotten(upkeep: Upkeep) -> None:
    sampler = LiveSampler("s:sample:0", "s", "acme", "base", None, LATER)
    upkeep.records.add_sampler(sampler, "server")
    upkeep.tidy(LOST_SECONDS - 1)
    assert upkeep.unloaded == []
    upkeep.tidy(LOST_SECONDS + 1)
    assert upkeep.unloaded == [RUN]
    assert upkeep.records.samplers("acme", "s") == [sampler]
    upkeep.tidy(FORGOTTEN_SECONDS + 1)
    assert upkeep.records.sessions("acme", offset=0, limit=9) == []
    assert upkeep.records.samplers("acme", "s") == []


def test_a_full_registry_ends_no_run_whose_client_lives(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the disk is full, no sign of the client can be written."""
    now, other = LATER, Caller("k", "globex", frozenset({"train"}))

    def full(*_: Any, **__: Any) -> None:
        raise RegistryFullError("the disk is full")

    monkeypatch.setattr(upkeep.records, "session_seen", full)
    clock = SimpleNamespace(time=lambda: now, monotonic=lambda: 0.0)
    monkeypatch.setattr(service_module, "time", clock)
    for after in (LOST_SECONDS - 60, 2 * LOST_SECONDS - 120):
        now = LATER + after
        with pytest.raises(DiskFullError):
            asyncio.run(upkeep.service.session_seen(ACME, "s"))
        upkeep.tidy(after + 120)
        assert upkeep.unloaded == []
    now = LATER + 3 * LOST_SECONDS - 180
    with pytest.raises(LiveNotFoundError):
        asyncio.run(upkeep.service.session_seen(other, "s"))
    upkeep.tidy(3 * LOST_SECONDS - 60)
    assert upkeep.unloaded == [RUN]


def test_a_run_ends_with_its_finished_session_although_the_clients_last_sign_is_young(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(time=lambda: LATER + LOST_SECONDS, monotonic=lambda: 0.0)
    monkeypatch.setattr(service_module, "time", clock)
    monkeypatch.setattr("onebase_adapters.registry.live.time", clock)
    asyncio.run(upkeep.service.session_seen(ACME, "s"))
    upkeep.finish(LATER + LOST_SECONDS)
    upkeep.tidy(LOST_SECONDS + ENDED_SECONDS - 1)
    assert upkeep.unloaded == []
    upkeep.tidy(LOST_SECONDS + ENDED_SECONDS + 1)
    assert upkeep.unloaded == [RUN]


def test_a_checkpoint_of_an_ended_run_expires_on_time(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    upkeep.finish(LATER)
    assert upkeep.tidy(IDLE_SECONDS + 3) == ["final"]
    assert upkeep.tidy(IDLE_SECONDS + 4) == ["final"]  # the first look at what has ended
    clock = SimpleNamespace(time=lambda: LATER + IDLE_SECONDS + 40, monotonic=lambda: 0.0)
    monkeypatch.setattr(service_module, "time", clock)
    asyncio.run(upkeep.service.set_ttl(ACME, f"tinker://{RUN}/sampler_weights/final", 120.0))
    assert upkeep.tidy(IDLE_SECONDS + 60) == ["final"]
    assert upkeep.tidy(IDLE_SECONDS + 159) == ["final"]
    assert upkeep.tidy(IDLE_SECONDS + 160) == []


@pytest.mark.parametrize("change", ["more time", "saved over"])
def test_a_checkpoint_that_is_given_more_time_or_saved_over_after_the_look_at_it_stays(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    checkpoint(upkeep.store, "late", LATER + 9)
    upkeep.store.set_ttl(RUN, "sampler", "late", LATER + 10)

    async def proving(tenant: str, proved: CheckpointFolder) -> str:
        if change == "more time":
            upkeep.store.set_ttl(RUN, "sampler", "late", None)
        else:
            checkpoint(upkeep.store, "late", LATER + 9, 2)
        return "d" * 64

    monkeypatch.setattr(upkeep.service, "_added", proving)
    assert "late" in upkeep.tidy(10)
    assert upkeep.store.checkpoint(RUN, "sampler", "late").expires is None


@pytest.mark.parametrize("where", ["service.checkpoint", "live_store._write"])
def test_a_checkpoint_that_is_deleted_while_its_expiry_is_set_is_not_found(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    service, folder = upkeep.service, upkeep.store.checkpoint_folder(RUN, "sampler", "final")
    known, write = service.checkpoint, live_store._write

    async def deleting(*given: Any) -> CheckpointFolder:
        found = await known(*given)
        upkeep.store.delete_checkpoint(RUN, "sampler", "final")
        return found

    def write_late(*given: Any) -> None:
        shutil.rmtree(folder)
        write(*given)

    if where == "service.checkpoint":
        monkeypatch.setattr(service, "checkpoint", deleting)
    else:
        monkeypatch.setattr(live_store, "_write", write_late)
    with pytest.raises(LiveNotFoundError):
        asyncio.run(service.set_ttl(ACME, f"tinker://{RUN}/sampler_weights/final", 7200.0))
    assert not folder.exists()


@pytest.mark.parametrize("code", sorted(FULL), ids=errno.errorcode.get)
def test_what_a_request_writes_to_a_full_disk_is_refused(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, "no room")

    service = upkeep.service
    checkpoint(upkeep.store, "out", LATER, kind="external")
    monkeypatch.setattr("onebase_training.live_store._write", full)
    monkeypatch.setattr(service_module, "_write", full)
    calls = [
        service.submit(ACME, RUN, 1, OptimStep()),
        service.set_ttl(ACME, f"tinker://{RUN}/sampler_weights/final", 7200.0),
        service.external_files(ACME, RUN, "out"),
        service.external_file(Place(RUN, "external", "out"), 1, "adapter_config.json", 1, "a" * 64),
    ]
    for call in calls:
        with pytest.raises(DiskFullError):
            asyncio.run(call)


def test_a_run_does_what_it_accepted_before_it_ends(upkeep: Upkeep) -> None:
    accepted = asyncio.run(upkeep.service.submit(ACME, RUN, 1, OptimStep()))
    upkeep.finish(LATER)
    upkeep.tidy(IDLE_SECONDS + 3)
    assert upkeep.unloaded == []
    upkeep.store.write_result(RUN, 1, Stepped(metrics={}, step=1))
    assert asyncio.run(upkeep.service.result(ACME, accepted, 0.0))[1] is not None
    upkeep.tidy(IDLE_SECONDS + 3)
    assert upkeep.unloaded == [RUN]
    with pytest.raises(ResultGoneError, match="has ended"):
        asyncio.run(upkeep.service.result(ACME, accepted, 0.0))


def test_an_ended_run_without_checkpoints_is_deleted(upkeep: Upkeep) -> None:
    upkeep.finish(LATER)
    upkeep.tidy(IDLE_SECONDS + 3)
    asyncio.run(upkeep.service.delete_checkpoint(ACME, f"tinker://{RUN}/sampler_weights/final"))
    upkeep.tidy(IDLE_SECONDS + 4)
    assert not upkeep.store.folder(RUN).exists()
    assert asyncio.run(upkeep.service.runs(ACME)) == []


def test_nothing_begins_in_a_finished_session(upkeep: Upkeep) -> None:
    def begin(number: int) -> str:
        made = upkeep.service.create_run(
            ACME, "s", number, base_model="base", rank=4, seed=1, train={}, metadata=None
        )
        return asyncio.run(made)

    assert begin(0) == "s:train:0"
    asyncio.run(upkeep.service.finish(ACME, "s"))
    with pytest.raises(InvalidRequestError, match="has finished"):
        begin(1)


def test_runs_are_ended_and_read_with_the_scope_train_alone(upkeep: Upkeep) -> None:
    sampling = Caller("k", "acme", frozenset({"generate"}))
    asyncio.run(upkeep.service.submit(ACME, RUN, 1, OptimStep()))
    upkeep.store.write_result(RUN, 1, Stepped(metrics={}, step=1))
    for call in (upkeep.service.finish(sampling, "s"), upkeep.service.result(sampling, f"{RUN}:1", 0.0)):
        with pytest.raises(InsufficientScopeError):
            asyncio.run(call)
    other = upkeep.service
    upkeep.records.add_session(LiveSession("t", "acme", "key", LATER, {}), "server")
    asyncio.run(other.finish(sampling, "t"))  # it has no runs
    assert upkeep.records.session("acme", "t").finished_at is not None


def test_a_run_that_began_with_an_active_version_is_found_again_after_another_was_activated(
    upkeep: Upkeep,
) -> None:
    begun = ModelSpec(
        id="s:train:7", rank=4, owner="acme", base="base", session="s", version=f"brought@{'d' * 64}"
    )
    upkeep.store.create(begun)

    def begin(caller: Caller = ACME, name: str = "brought", metadata: dict[str, str] | None = None) -> str:
        made = upkeep.service.continue_from(
            caller,
            "s",
            7,
            f"tinker://adapters/weights/{name}",
            optimizer=False,
            base_model=None,
            metadata=metadata,
        )
        return asyncio.run(made)

    assert begin() == begin(name=f"brought@{'d' * 8}") == begun.id
    other = Caller("k", "globex", frozenset({"train"}))
    changed = {"metadata": {"run": "2"}}
    for asked in ({"caller": other}, {"name": "another"}, {"name": f"brought@{'e' * 8}"}, changed):
        with pytest.raises(AdapterNotFoundError):  # the version is looked for, and there is none here
            begin(**asked)  # type: ignore[arg-type]


def test_a_run_that_began_with_a_checkpoint_is_found_again_after_that_was_deleted(upkeep: Upkeep) -> None:
    service = upkeep.service
    checkpoint(upkeep.store, "state", LATER, kind="weights")

    def begin(name: str = "state", optimizer: bool = False, metadata: dict[str, str] | None = None) -> str:
        path = f"tinker://{RUN}/weights/{name}"
        made = service.continue_from(
            ACME, "s", 8, path, optimizer=optimizer, base_model="base", metadata=metadata
        )
        return asyncio.run(made)

    run = begin()
    asyncio.run(service.delete_checkpoint(ACME, f"tinker://{RUN}/weights/state"))
    assert begin() == run == "s:train:8"
    for asked in ({"name": "other"}, {"optimizer": True}, {"metadata": {"run": "2"}}):
        with pytest.raises(LiveNotFoundError):
            begin(**asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [False, True])
def test_a_sample_waits_for_a_version_that_is_prepared_again_unless_it_fails(
    upkeep: Upkeep, tmp_path: Path, fails: bool
) -> None:
    async def test() -> None:
        house = House(upkeep.registry, tmp_path)
        house.verifier.rejects = fails
        upkeep.service._library = house.adapters
        path = f"tinker://adapters/sampler_weights/other@{house.digest}"
        sampler = LiveSampler("s:sample:9", "s", DEFAULT_TENANT, "base", path, LATER)
        await house.catalog.refresh()
        with pytest.raises(UnavailableError, match="not proved yet"):
            await upkeep.service.choose(sampler)
        await house.make_ready()
        if fails:
            with pytest.raises(StateConflictError, match="module_differs"):
                await upkeep.service.choose(sampler)
        else:
            assert (await upkeep.service.choose(sampler)).uses[0].digest == house.digest

    asyncio.run(test())


def test_a_sampler_of_a_checkpoint_is_refused_for_now_if_its_proof_takes_long(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(service_module, "PROOF_SECONDS", 0.01)
    checkpoints: Any = SimpleNamespace(use=use)
    upkeep.service._checkpoints = checkpoints
    path = f"tinker://adapters/sampler_weights/orders:ftjob-{'0' * 24}:step-8"
    with pytest.raises(UnavailableError, match="still being proved") as refused:
        asyncio.run(upkeep.service._version("acme", path, "model_path"))
    assert refused.value.code == "adapter_timeout"


@pytest.mark.parametrize("name", ["brought", "hub:acme/first@v1"])
def test_a_sampler_of_a_version_has_no_live_weights(upkeep: Upkeep, name: str) -> None:
    path = f"tinker://adapters/sampler_weights/{name}@{'d' * 64}"
    sampler = LiveSampler("s:sample:9", "s", "acme", "base", path, LATER)
    assert asyncio.run(upkeep.service.live_version(sampler)) is None


def test_another_tenant_reaches_nothing_of_a_run(upkeep: Upkeep) -> None:
    other, path = Caller("k", "globex", frozenset({"train"})), f"tinker://{RUN}/sampler_weights/final"
    service = upkeep.service
    calls = [
        service.run(other, RUN),
        service.submit(other, RUN, 1, OptimStep()),
        service.save(other, RUN, 1, "a", "weights", None, False, None),
        service.result(other, f"{RUN}:0", 0.0),
        service.checkpoint(other, path, "path"),
        service.continue_from(other, "s", 1, path, optimizer=False, base_model=None, metadata=None),
        service.set_ttl(other, path, 7200.0),
        service.delete_checkpoint(other, path),
    ]
    for call in calls:
        with pytest.raises(LiveNotFoundError):
            asyncio.run(call)
    for of_session in (service.finish(other, "s"), service.session_seen(other, "s")):
        with pytest.raises(LiveNotFoundError):
            asyncio.run(of_session)
    assert asyncio.run(service.runs(other)) == []
    assert upkeep.tidy(0) == ["final", "live-0", "live-1", "live-2"]
    assert upkeep.records.session("acme", "s").finished_at is None


def test_an_adapter_that_a_run_began_with_is_downloaded_with_the_scope_that_reads_adapters(
    upkeep: Upkeep,
) -> None:
    service, version = upkeep.service, f"brought@{'d' * 64}"
    upkeep.store.create(ModelSpec(id=OF_VERSION, rank=4, owner="acme", session="s", version=version))
    checkpoint(upkeep.store, "out", LATER, model=OF_VERSION, kind="external", version=version)
    checkpoint(upkeep.store, "out", LATER, kind="external")
    with pytest.raises(InsufficientScopeError, match="adapters"):
        asyncio.run(service.external_files(ACME, OF_VERSION, "out"))
    for caller, run in ((READING, OF_VERSION), (ACME, RUN)):
        found = asyncio.run(service.external_files(caller, run, "out"))
        assert set(found.signatures) == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_address_of_external_weights_is_checked_before_any_file_is_read(upkeep: Upkeep) -> None:
    service, place = upkeep.service, Place(RUN, "external", "out")
    made = checkpoint(upkeep.store, "out", LATER, kind="external")
    found = asyncio.run(service.external_files(ACME, RUN, "out"))

    def fetch(signature: str, until: int = found.until, save: int = found.save) -> bytes:
        with asyncio.run(service.external_file(place, save, name, until, signature)) as file:
            return file.read()

    name, signature = "adapter_config.json", found.signatures["adapter_config.json"]
    assert fetch(signature) == b"{}"
    service._link_secret = b""  # another process, which reads it again
    assert fetch(signature) == b"{}"
    past = service_module._signature(service._read_link_secret(), place, found.save, name, 1)
    record = Path(made.folder) / CHECKPOINT
    written = record.read_bytes()
    record.write_bytes(b"damaged")  # who reads it notices
    with pytest.raises(msgspec.DecodeError):
        fetch(signature)
    for wrong in (("a" * 64,), (signature, found.until + 1), (signature, found.until, 2), ("",), (past, 1)):
        with pytest.raises(ForbiddenError, match="expires" if wrong == (past, 1) else "signature") as refusal:
            fetch(*wrong)
        assert refusal.value.code == "link_invalid"
    record.write_bytes(written)
    upkeep.store.base_id = "another base"
    with pytest.raises(InvalidRequestError, match="another base"):
        fetch(signature)
    upkeep.store.base_id = ""
    checkpoint(upkeep.store, "out", LATER, 2, kind="external")
    with pytest.raises(ForbiddenError, match="any more"):
        fetch(signature)


def test_external_weights_that_are_deleted_while_they_are_asked_for_are_not_found(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, place = upkeep.service, Place(RUN, "external", "out")
    made, known = checkpoint(upkeep.store, "out", LATER, kind="external"), service.checkpoint
    asyncio.run(service.set_ttl(ACME, place.path, LATER))
    found = asyncio.run(service.external_files(ACME, RUN, "out"))
    assert list(found.signatures) == ["adapter_config.json", "adapter_model.safetensors"]
    name, signature = next(iter(found.signatures.items()))
    (Path(made.folder) / name).unlink()
    with pytest.raises(ForbiddenError, match="any more"):
        asyncio.run(service.external_file(place, found.save, name, found.until, signature))

    async def deleting(*given: Any) -> CheckpointFolder:
        found = await known(*given)
        shutil.rmtree(found.folder)
        return found

    monkeypatch.setattr(service, "checkpoint", deleting)
    with pytest.raises(LiveNotFoundError):
        asyncio.run(service.external_files(ACME, RUN, "out"))


def test_external_weights_that_are_deleted_while_they_are_sent_are_sent_whole(upkeep: Upkeep) -> None:
    service, place = upkeep.service, Place(RUN, "external", "out")
    name, whole = "adapter_model.safetensors", b"weights 1"

    async def sent(**headers: str) -> httpx2.Response:
        made = checkpoint(upkeep.store, "out", LATER, kind="external")
        found = await service.external_files(ACME, RUN, "out")
        file = await service.external_file(place, found.save, name, found.until, found.signatures[name])
        shutil.rmtree(made.folder)
        transport = httpx2.ASGITransport(app=OpenFileResponse(file, filename=name))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as http:
            answer = await http.get("/", headers=headers)
        assert file.closed
        return answer

    answer = asyncio.run(sent())
    assert (answer.status_code, answer.content) == (200, whole)
    part = asyncio.run(sent(Range="bytes=3-5"))
    assert (part.status_code, part.content) == (206, whole[3:6])
    assert part.headers["content-range"] == f"bytes 3-5/{len(whole)}"


def test_external_weights_that_are_saved_anew_while_they_are_asked_for_are_not_sent(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, place = upkeep.service, Place(RUN, "external", "out")
    checkpoint(upkeep.store, "out", LATER, kind="external")
    found = asyncio.run(service.external_files(ACME, RUN, "out"))
    name, signature = next(iter(found.signatures.items()))
    read = service._weights

    async def saving(path: str) -> CheckpointFolder | None:
        before = await read(path)
        checkpoint(upkeep.store, "out", LATER, 2, kind="external")
        return before

    monkeypatch.setattr(service, "_weights", saving)
    with pytest.raises(ForbiddenError, match="any more"):
        asyncio.run(service.external_file(place, found.save, name, found.until, signature))


def test_operations_that_wait_are_limited(upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(number: int, operation: Operation) -> None:
        asyncio.run(upkeep.service.submit(ACME, RUN, number, operation))

    submit(MOST_WAITING, OptimStep())
    with pytest.raises(QuotaSpentError, match="too far ahead: operation 1 of"):
        submit(MOST_WAITING + 1, OptimStep())
    monkeypatch.setattr(service_module, "MOST_WAITING_BYTES", 10_000)
    monkeypatch.setattr(service_module, "_COUNTED_SECONDS", 0.0)
    large = Refuse(message="x" * 6000)
    submit(1, large)
    with pytest.raises(QuotaSpentError, match="10000 may wait"):
        submit(2, large)
    upkeep.store.write_result(RUN, 1, Stepped(metrics={}, step=1))
    submit(2, large)


def test_named_checkpoints_are_limited(upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(number: int) -> None:
        asyncio.run(upkeep.service.save(ACME, RUN, number, f"n{number}", "weights", None, False, None))

    save(1)
    upkeep.room = 1  # there is one of 1 byte, and another one would follow
    with pytest.raises(QuotaExceededError):
        save(2)
    save(1)  # the same request again
    upkeep.room = 10**9
    monkeypatch.setattr(service_module, "MOST_CHECKPOINTS", 1)
    with pytest.raises(InvalidRequestError, match="Delete some"):
        save(2)


def test_a_pass_is_charged_once_when_it_was_done(upkeep: Upkeep) -> None:
    done = Computed(outputs=[], metrics={}, tokens=7, seconds=0.5)
    for number in (1, 2):
        upkeep.store.write_result(RUN, number, done)
    upkeep.tidy(0)
    upkeep.tidy(0)
    assert upkeep.charged == [(1.0, 14)]
    upkeep.store.write_result(RUN, 3, done)
    upkeep.finish(LATER)
    upkeep.tidy(IDLE_SECONDS + 3)  # the run ends
    assert upkeep.charged == [(1.0, 14), (0.5, 7)]


def test_a_full_disk_keeps_nothing_from_being_deleted_and_no_pass_from_being_charged_later(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full = True

    def write(path: Path, content: bytes, mode: int = 0o666) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, content, mode)

    def forget_sessions(seen: float, but: object) -> None:
        raise RegistryFullError("the disk is full")

    written = service_module._write
    monkeypatch.setattr(service_module, "_write", write)
    monkeypatch.setattr(upkeep.records, "forget_sessions", forget_sessions)
    upkeep.store.write_result(RUN, 1, Computed(outputs=[], metrics={}, tokens=7, seconds=0.5))
    assert upkeep.tidy(IDLE_SECONDS + 3) == ["final", "live-2"]
    assert upkeep.charged == []
    is_full = False
    upkeep.tidy(IDLE_SECONDS + 4)
    upkeep.tidy(IDLE_SECONDS + 5)
    assert upkeep.charged == [(0.5, 7)]
    is_full = True
    upkeep.store.write_result(RUN, 2, Computed(outputs=[], metrics={}, tokens=3, seconds=0.25))
    upkeep.finish(LATER)
    for after in (IDLE_SECONDS + 6, IDLE_SECONDS + 7):  # the run ends
        assert upkeep.tidy(after) == ["final"]
    assert upkeep.unloaded == [RUN]
    assert upkeep.charged == [(0.5, 7), (0.25, 3)]


def test_what_is_not_proved_yet_is_proved_once_and_a_refusal_is_kept(upkeep: Upkeep) -> None:
    upkeep.tidy(0)
    upkeep.tidy(1)
    assert upkeep.proved == ["final"]
    checkpoint(upkeep.store, "second", LATER)
    upkeep.refuses = UnavailableError("the registry is away", code="registry_unavailable", retry_after=1.0)
    upkeep.tidy(2)
    upkeep.service._prove_after.clear()  # much later
    upkeep.refuses = InvalidRequestError("it is no adapter")
    upkeep.tidy(3)
    upkeep.service._prove_after.clear()
    upkeep.refuses = None
    upkeep.tidy(4)
    assert upkeep.proved == ["final"]
    mark = upkeep.store.checkpoint_folder(RUN, "sampler", "second") / "proved.json"
    assert "it is no adapter" in mark.read_text()


# ---- signatures ------------------------------------------------------------------------------------


class Signing:
    """The upkeep with a real library, whose key signs versions; made in an event loop."""

    def __init__(self, upkeep: Upkeep, folder: Path) -> None:
        pytest.importorskip("cryptography")
        self.house = House(upkeep.registry, folder, key=ServerKey.load(folder / "server.key"))
        self.store, self.service = upkeep.store, upkeep.service
        self.service._library = self.house.adapters
        del self.service.__dict__["_added"]

    async def tidy(self) -> None:
        """Tidy as the server does every 30 seconds. A minute of it is for ever."""
        await asyncio.wait_for(self.service.tidy(InUse(), LATER), 60)

    async def settled(self) -> None:
        """Wait until nothing is proved and nothing waits to be signed."""
        await self.house.settled()
        await asyncio.gather(*self.service._tasks)

    async def signature(self, made: CheckpointFolder) -> Any:
        """Return the signature of the version that a checkpoint is marked with."""
        known = await self.service.proved_as("acme", made)
        assert known is not None
        return (await self.house.adapters.version("acme", *known)).source.get(SIGNATURE)

    async def add(self, made: CheckpointFolder, source: dict[str, Any], options: VersionOptions) -> None:
        """Add a checkpoint's files as a client does, before the checkpoint is proved."""
        files = take_folder(self.house.store, Path(made.folder))
        await self.house.adapters.add("acme", adapter_name(RUN), files, source, options)
        await self.house.settled()


def test_a_proof_that_takes_for_ever_holds_up_nobody_and_its_version_is_signed_once_proved(
    upkeep: Upkeep, tmp_path: Path
) -> None:
    async def test() -> None:
        signing = Signing(upkeep, tmp_path)
        signing.house.verifier.free.clear()
        await signing.tidy()
        upkeep.store.write_result(RUN, 1, Computed(outputs=[], metrics={}, tokens=7, seconds=0.5))
        await signing.tidy()
        assert upkeep.charged == [(0.5, 7)]
        await signing.service.stop()  # what a restart forgets, the upkeep finds

        final = upkeep.store.checkpoint(RUN, "sampler", "final")
        assert await signing.signature(final) is None
        signing.house.verifier.free.set()
        await signing.settled()
        await signing.tidy()
        signature = await signing.signature(final)
        assert (signature["status"], signature["signer"]) == ("verified", "server")
        assert (signature["statement"]["checkpoint"], signature["statement"]["steps"]) == ("final", 1)

    asyncio.run(test())


def test_a_checkpoint_from_before_a_stricter_policy_makes_no_version_until_the_policy_lets_it(
    upkeep: Upkeep, tmp_path: Path
) -> None:
    async def test() -> None:
        signing = Signing(upkeep, tmp_path)
        rules = (PolicyRule("require", signers=("acme",)),)
        signing.house.adapters.signatures = SignaturePolicy(rules)
        await signing.tidy()
        await signing.settled()
        assert signing.house.catalog.of("acme").own(adapter_name(RUN)) is None
        mark = upkeep.store.checkpoint_folder(RUN, "sampler", "final") / "proved.json"
        assert "only acme may sign this name" in mark.read_text()
        signing.house.adapters.signatures = SignaturePolicy(())
        signing.service._prove_after.clear()  # an hour later
        await signing.tidy()
        await signing.settled()
        assert len(await signing.house.adapters.versions("acme", adapter_name(RUN))) == 1

    asyncio.run(test())


@pytest.mark.parametrize("registered", [False, True])
def test_a_checkpoint_of_a_run_that_began_with_an_unsigned_version_is_not_signed_under_a_stricter_policy(
    upkeep: Upkeep, tmp_path: Path, registered: bool
) -> None:
    async def test() -> None:
        signing = Signing(upkeep, tmp_path)
        await signing.add(upkeep.store.checkpoint(RUN, "sampler", "final"), {}, VersionOptions())
        (version,) = await signing.house.adapters.versions("acme", adapter_name(RUN))
        begun = f"{version.name}@{version.digest}"
        upkeep.store.create(ModelSpec(id=OF_VERSION, rank=4, owner="acme", session="s", version=begun))
        made = checkpoint(upkeep.store, "further", LATER, 2, model=OF_VERSION, version=begun)
        if registered:
            signing.house.verifier.free.clear()
            await signing.tidy()
            await signing.service.stop()
            signing.house.verifier.free.set()
            await signing.house.settled()
        rules = (PolicyRule("require", signers=("server",), name=adapter_name(OF_VERSION)),)
        signing.house.adapters.signatures = SignaturePolicy(rules)
        await signing.tidy()
        await signing.settled()
        if registered:
            assert await signing.signature(made) is None
        else:
            assert await signing.service.proved_as("acme", made) is None
            assert "no verified signature" in (Path(made.folder) / "proved.json").read_text()
        signing.house.adapters.signatures = SignaturePolicy(())
        signing.service._prove_after.clear()  # an hour later
        await signing.tidy()
        await signing.settled()
        assert (await signing.signature(made))["status"] == "verified"

    asyncio.run(test())


@pytest.mark.parametrize("is_full", [False, True], ids=["alone", "after a minute of refusals"])
def test_what_the_policy_refuses_again_is_not_copied_and_is_in_the_audit_log_once(
    upkeep: Upkeep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    copied = []

    def take(store: Store, folder: Path) -> AdapterFiles:
        copied.append(folder)
        return take_folder(store, folder)

    async def test() -> None:
        signing = Signing(upkeep, tmp_path)
        rules = (PolicyRule("require", signers=("acme",)),)
        signing.house.adapters.signatures = SignaturePolicy(rules)
        while is_full and signing.house.adapters._refusals.take("acme"):
            pass
        for _ in range(4):
            await signing.tidy()
            await signing.settled()
            signing.service._prove_after.clear()  # an hour later
            signing.house.adapters._refusals = RefusalLimit()

    monkeypatch.setattr(service_module, "take_folder", take)
    asyncio.run(test())
    assert copied == []
    noted = [one.action for one in upkeep.registry.audit.entries(limit=9)]
    assert noted.count("adapter.refused") == 1


def test_a_checkpoint_of_an_ended_run_is_tried_again_each_hour_however_long_a_try_takes(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, took, tried = [0.0], TIDY_SECONDS + 1, list[float]()

    async def refuse(tenant: str, checkpoint: CheckpointFolder) -> str:
        tried.append(now[0])
        now[0] += took
        raise VersionFailedError("no", code="signature_missing")

    async def test() -> None:
        while now[0] < 4 * LOOK_SECONDS:
            await upkeep.service.tidy(InUse(), LATER + now[0])
            now[0] += TIDY_SECONDS

    upkeep.service._added = refuse  # type: ignore[method-assign]
    upkeep.store.unload(RUN)
    for number in range(3):
        upkeep.store.delete_checkpoint(RUN, "sampler", f"live-{number}")
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: LATER + now[0])
    monkeypatch.setattr(service_module, "time", clock)
    asyncio.run(test())
    assert len(tried) == 4
    assert all(later - sooner <= LOOK_SECONDS + took + TIDY_SECONDS for sooner, later in pairwise(tried))


def test_a_run_begins_with_no_version_without_the_signature_that_its_name_needs(
    upkeep: Upkeep, tmp_path: Path
) -> None:
    async def test() -> None:
        signing = Signing(upkeep, tmp_path)
        final = upkeep.store.checkpoint(RUN, "sampler", "final")
        await signing.add(final, {}, VersionOptions())
        brought, hub = adapter_name(RUN), "hub:acme/first@v1"
        (version,) = await signing.house.adapters.versions("acme", brought)
        await signing.house.adapters.add("acme", hub, version.files, {}, VersionOptions())
        rules = (PolicyRule("require", signers=("server",)),)
        signing.house.adapters.signatures = SignaturePolicy(rules)
        for name, why in ((brought, "no verified signature"), (hub, "no verified"), ("x", "was deleted")):
            start = f"{name}@{version.digest}"
            with pytest.raises(VersionFailedError, match=why):
                await signing.service.create_run(
                    ACME, "s", 9, base_model="base", rank=4, seed=1, train={}, metadata=None, version=start
                )

    asyncio.run(test())


def test_a_save_over_another_one_is_signed_with_its_own_steps(
    upkeep: Upkeep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it comes between the first one's files and their registration."""

    async def test() -> None:
        signing, loop = Signing(upkeep, tmp_path), asyncio.get_running_loop()
        first = upkeep.store.checkpoint(RUN, "sampler", "final")
        second: list[CheckpointFolder] = []

        def take(store: Store, folder: Path) -> AdapterFiles:
            files = take_folder(store, folder)
            if not second:
                second.append(checkpoint(upkeep.store, "final", LATER, 2))
                asyncio.run_coroutine_threadsafe(signing.service._prove("acme", second[0]), loop).result(60)
            return files

        monkeypatch.setattr(service_module, "take_folder", take)
        await signing.service._prove("acme", first)
        await signing.settled()
        await signing.service._prove("acme", first)  # whose wait for the trainer ends late
        await signing.settled()
        await signing.tidy()
        (version,) = await signing.house.adapters.versions("acme", adapter_name(RUN))
        assert version.digest == take_folder(signing.house.store, Path(second[0].folder)).digest
        assert (await signing.signature(second[0]))["statement"]["steps"] == 2
        assert await signing.service.proved_as("acme", first) is None

        mark = Path(first.folder) / "proved.json"  # a late one of the first save beside the second's files
        mark.write_bytes(msgspec.json.encode({"digest": "d" * 64, "seq_id": 1}))
        assert await signing.service.proved_as("acme", second[0]) is None
        await signing.tidy()
        assert await signing.service.proved_as("acme", second[0]) == (version.name, version.digest)

    asyncio.run(test())


def test_a_version_that_was_deleted_is_no_error_of_each_look(
    upkeep: Upkeep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        signing = Signing(upkeep, tmp_path)
        signing.house.verifier.free.clear()
        await signing.tidy()
        await signing.service.stop()
        signing.house.verifier.free.set()
        await signing.settled()
        final = upkeep.store.checkpoint(RUN, "sampler", "final")
        known = await signing.service.proved_as("acme", final)
        assert known is not None
        upkeep.registry.delete_version("acme", *known)
        with caplog.at_level(logging.DEBUG, "onebase_server.live"):
            await signing.tidy()  # before the catalog knows
            await signing.house.catalog.refresh()
            await signing.tidy()
        levels = [one.levelno for one in caplog.records if "is not signed" in one.message]
        assert levels == [logging.DEBUG]

    asyncio.run(test())


@pytest.mark.parametrize("waived", [False, True])
def test_a_refused_signature_gives_way_to_the_servers_but_a_waived_proof_is_not_signed(
    upkeep: Upkeep, tmp_path: Path, waived: bool
) -> None:
    async def test() -> None:
        signing = Signing(upkeep, tmp_path)
        final = upkeep.store.checkpoint(RUN, "sampler", "final")
        refused = {"status": "refused", "code": "signer_not_allowed"}
        source = {"kind": "upload", SIGNATURE: refused}
        await signing.add(final, source, VersionOptions(allow_noop=waived))
        await signing.tidy()
        await signing.settled()
        await signing.tidy()
        assert (await signing.signature(final))["status"] == ("refused" if waived else "verified")

    asyncio.run(test())


def test_what_is_changed_is_in_the_audit_log(upkeep: Upkeep) -> None:
    path = f"tinker://{RUN}/sampler_weights/final"
    asyncio.run(upkeep.service.set_ttl(ACME, path, 7200.0))
    asyncio.run(upkeep.service.delete_checkpoint(ACME, path))
    asyncio.run(upkeep.service.finish(ACME, "s"))
    noted = [(one.action, one.target) for one in upkeep.registry.audit.entries(limit=9)]
    assert sorted(noted) == [
        ("checkpoint.changed", path),
        ("checkpoint.deleted", path),
        ("session.finished", "s"),
    ]


def test_a_number_that_is_no_ascii_digit_names_no_result(upkeep: Upkeep) -> None:
    for number in ("\u00b2", "\u0663", "-1", ""):
        with pytest.raises(LiveNotFoundError):
            asyncio.run(upkeep.service.result(ACME, f"{RUN}:{number}", 0.0))


def test_a_path_names_a_checkpoint_and_a_run_its_adapter() -> None:
    place = Place.read(f"tinker://{RUN}/sampler_weights/final", "path")
    assert (place.run, place.kind, place.name, place.is_of_step) == (RUN, "sampler", "final", False)
    assert place.path == f"tinker://{RUN}/sampler_weights/final"
    assert adapter_name(RUN) == "run-1b2c3d4e-3"
    for wrong in ("final", "tinker://x/y", f"tinker://{RUN}/other/final", f"tinker://{RUN}/weights/a/b"):
        with pytest.raises(InvalidRequestError, match="names no checkpoint"):
            Place.read(wrong, "path")
