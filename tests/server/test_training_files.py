"""Training files, in the store and in the registry: what one of them does not take is swept."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_adapters.registry import (
    FileRecord,
    JobEvent,
    NewJob,
    Registry,
    RegistryBusyError,
    RegistryError,
    RegistryFullError,
)
from onebase_adapters.store.store import Store
from onebase_edge.background import Threads
from onebase_edge.errors import ApiError, InvalidRequestError, StateConflictError
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders

ROWS = b'{"text": "rows"}'
HERE = "default"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = open_registry(tmp_path, "base")
    yield made
    made.close()


def open_registry(folder: Path, base: str) -> Registry:
    made = Registry(f"sqlite:///{folder / 'registry.db'}", base_id=base, base_name=base)
    made.migrate()
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """It deletes at once what it is told to delete."""
    return Store(str(tmp_path / "store"), tmp_path / "cache", grace=0.0)


@pytest.fixture
def storage(tmp_path: Path) -> JobFolders:
    return JobFolders(tmp_path, "registry-1")


def test_a_folder_s_lock_is_the_same_at_each_start_and_another_one_in_a_copy(
    storage: JobFolders, tmp_path: Path
) -> None:
    again = JobFolders(tmp_path, "registry-1")
    shutil.copytree(storage.root, tmp_path / "copy" / "training")
    copy = JobFolders(tmp_path / "copy", "registry-1")
    assert storage.server == again.server == copy.server
    assert storage.lock_id == again.lock_id != copy.lock_id
    assert storage.own()
    assert not again.own()
    assert copy.own()


def using(
    records: Any, store: Any, storage: JobFolders, use: Callable[[TrainingFiles], Awaitable[Any]]
) -> Any:
    """What a use of a server's training files returns."""

    async def run() -> Any:
        threads = Threads("test", 2)
        return await use(TrainingFiles(records, store, storage, threads, threads, 1 << 20))

    return asyncio.run(run())


async def upload(files: TrainingFiles) -> FileRecord:
    writer = files.store.writer()
    writer.write(ROWS)
    return await files.store_file(HERE, writer, "a.jsonl", "fine-tune")


@pytest.mark.parametrize("refusal", [RegistryFullError, RegistryBusyError])
def test_an_upload_that_the_registry_does_not_take_leaves_what_the_next_sweep_deletes(
    registry: Registry, store: Store, storage: JobFolders, refusal: type[RegistryError]
) -> None:
    def add_file(file: object) -> None:
        raise refusal("no")

    with pytest.raises(ApiError):
        using(SimpleNamespace(add_file=add_file), store, storage, upload)
    assert store.sweep(registry.referenced_blobs(), 0.0) == 1


def test_an_upload_whose_row_is_there_although_that_was_not_told_keeps_its_content(
    registry: Registry, store: Store, storage: JobFolders
) -> None:
    def add_file(file: FileRecord) -> None:
        registry.training.add_file(file)
        raise RegistryBusyError("the answer is lost")

    with pytest.raises(ApiError):
        using(SimpleNamespace(add_file=add_file), store, storage, upload)
    assert store.sweep(registry.referenced_blobs(), 0.0) == 0
    (kept,) = registry.training.files("default", limit=9)
    assert using(registry.training, store, storage, lambda files: files.local(kept)).read_bytes() == ROWS


def test_content_goes_with_the_last_file_that_has_it(
    registry: Registry, store: Store, storage: JobFolders
) -> None:
    first, second = (using(registry.training, store, storage, upload) for _ in range(2))
    assert first.sha256 == second.sha256
    for file, left in ((first, True), (second, False)):
        using(registry.training, store, storage, lambda files, file=file: files.delete(HERE, file.id))
        assert store.exists(first.sha256) == left


def test_a_file_is_used_and_deleted_by_every_server_that_shares_registry_and_store(
    registry: Registry, store: Store, storage: JobFolders, tmp_path: Path
) -> None:
    other = JobFolders(tmp_path / "other", "registry-1")
    file = using(registry.training, store, storage, upload)
    assert (
        using(registry.training, store, other, lambda files: files.usable(HERE, file.id, "training_file"))
        == file
    )
    own = Store(str(tmp_path / "other/store"), tmp_path / "cache")
    with pytest.raises(InvalidRequestError, match="share a store") as refused:
        using(registry.training, own, other, lambda files: files.usable(HERE, file.id, "training_file"))
    assert (refused.value.code, refused.value.param) == ("file_not_found", "training_file")
    using(registry.training, store, other, lambda files: files.delete(HERE, file.id))
    assert not store.exists(file.sha256)


def test_a_job_reads_its_file_also_when_the_cache_of_a_remote_store_has_given_it_up(
    registry: Registry, storage: JobFolders, tmp_path: Path
) -> None:
    store = Store("memory://training", tmp_path / "cache")
    file = using(registry.training, store, storage, upload)

    async def held(files: TrainingFiles) -> Path:
        return files.content(file, storage.job("ftjob-1") / "training_file")

    for _ in range(2):  # each run of the job anew
        path = using(registry.training, store, storage, held)
        store.local(file.sha256).unlink()
        assert path.read_bytes() == ROWS
        assert path.parent == storage.job("ftjob-1")


def test_a_file_that_a_job_of_another_base_needs_is_not_deleted_and_says_where_that_job_is(
    registry: Registry, store: Store, storage: JobFolders, tmp_path: Path
) -> None:
    there = open_registry(tmp_path, "another")
    file = using(there.training, store, storage, upload)
    there.training.add_job(
        NewJob(
            id="ftjob-1", tenant="default", server=storage.server, name="orders", training_file=file.id,
            validation_file=None, activate="never", settings={}, labels={},
        ),
        JobEvent(1.0, "made"),
    )  # fmt: skip
    there.close()
    with pytest.raises(StateConflictError, match=r"ftjob-1 needs it. It is a job on another base") as refused:
        using(registry.training, store, storage, lambda files: files.delete(HERE, file.id))
    assert refused.value.code == "file_in_use"
    assert store.exists(file.sha256)
