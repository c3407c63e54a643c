"""Training files on the disk and in the registry: what one of them does not take is in neither."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_adapters.registry import (
    JobEvent,
    NewJob,
    Registry,
    RegistryBusyError,
    RegistryError,
    RegistryFullError,
    TrainingFile,
    UnknownFileError,
)
from onebase_server.background import Threads
from onebase_server.errors import ConflictError, OneBaseError
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.storage import TrainingStorage


@pytest.mark.parametrize("refusal", [RegistryFullError, RegistryBusyError])
def test_an_upload_that_the_registry_does_not_take_leaves_nothing_on_the_disk(
    tmp_path: Path, refusal: type[RegistryError]
) -> None:
    def unknown(tenant: str, file_id: str) -> None:
        raise UnknownFileError(file_id)

    assert refused_upload(tmp_path, refusal, file=unknown) == []


def test_an_upload_whose_row_is_there_although_that_was_not_told_keeps_its_content(tmp_path: Path) -> None:
    (left,) = refused_upload(tmp_path, RegistryBusyError, file=lambda tenant, file_id: file_id)
    assert left.read_bytes() == b"rows"


def refused_upload(folder: Path, refusal: type[RegistryError], **known: Any) -> list[Path]:
    """What an upload leaves on the disk whose row cannot be written."""

    def add_file(file: object) -> None:
        raise refusal("no")

    async def upload() -> list[Path]:
        home, threads = TrainingStorage(folder), Threads("test", 2)
        records: Any = SimpleNamespace(add_file=add_file, **known)
        files = TrainingFiles(records, home, threads, threads, 1 << 20)
        writer = files.writer()
        writer.write(b"rows")
        with pytest.raises(OneBaseError):
            await files.keep(writer, "a.jsonl", "fine-tune")
        return list(home.files.iterdir())

    return asyncio.run(upload())


def test_a_file_that_a_job_of_another_base_needs_is_not_deleted_and_says_where_that_job_is(
    tmp_path: Path,
) -> None:
    def registry(base: str) -> Registry:
        made = Registry(f"sqlite:///{tmp_path / 'registry.db'}", base_id=base, base_name=base)
        made.migrate()
        return made

    async def delete(home: TrainingStorage) -> None:
        threads = Threads("test", 2)
        await TrainingFiles(here.training, home, threads, threads, 1 << 20).delete("file-1")

    home, here, there = TrainingStorage(tmp_path), registry("base"), registry("another")
    there.training.add_file(TrainingFile("file-1", "default", home.server, "fine-tune", "a.jsonl", 1, 1.0))
    there.training.add_job(
        NewJob(
            id="ftjob-1", tenant="default", server=home.server, name="orders", training_file="file-1",
            validation_file=None, activate="never", settings={}, labels={},
        ),
        JobEvent(1.0, "made"),
    )  # fmt: skip
    with pytest.raises(ConflictError, match=r"ftjob-1 needs it. It is a job on another base") as refused:
        asyncio.run(delete(home))
    assert refused.value.code == "file_in_use"
    here.close()
    there.close()
