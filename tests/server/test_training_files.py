"""Training files on the disk and in the registry: what one of them does not take is in neither."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_adapters.registry import RegistryBusyError, RegistryError, RegistryFullError
from onebase_server.background import Threads
from onebase_server.errors import OneBaseError
from onebase_server.training.files import TrainingFiles
from onebase_server.training.home import TrainingHome


@pytest.mark.parametrize("refusal", [RegistryFullError, RegistryBusyError])
def test_an_upload_that_the_registry_does_not_take_leaves_nothing_on_the_disk(
    tmp_path: Path, refusal: type[RegistryError]
) -> None:
    def add_file(file: object) -> None:
        raise refusal("no")

    async def upload() -> list[Path]:
        home, threads = TrainingHome(tmp_path), Threads("test", 2)
        records: Any = SimpleNamespace(add_file=add_file)
        files = TrainingFiles(records, home, threads, threads, 1 << 20)
        writer = files.writer()
        writer.write(b"rows")
        with pytest.raises(OneBaseError):
            await files.keep(writer, "a.jsonl", "fine-tune")
        return list(home.files.iterdir())

    assert asyncio.run(upload()) == []
