"""A full disk at any step of any write: an error that says so, nothing lost, and later writes work."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save_file
from tests.adapters.life import CONTENTS, Life, check, observe, states
from tests.disks import fill, small_disk

from onebase_adapters.registry import RegistryFullError
from onebase_adapters.store.atomic_files import atomic_directory
from onebase_adapters.store.blobs import Blob
from onebase_adapters.store.local import FileSystem
from onebase_adapters.store.store import Store, StoreError, StoreFullError

ROOT = Path(__file__).parents[2]


class FailingFiles(FileSystem):
    """Fails at call number `left`, in the middle of a write too, with the given error; then works again."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.left = 0
        self.calls = 0

    def step(self) -> None:
        self.calls += 1
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path: Path) -> BinaryIO:
        self.step()
        return super().create(path)

    def open_file(self, path: Path) -> BinaryIO:
        self.step()
        return super().open_file(path)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        half = len(data) // 2
        super().write(file, data[:half])
        self.step()
        super().write(file, data[half:])

    def sync(self, file: BinaryIO) -> None:
        self.step()
        super().sync(file)

    def rename(self, source: Path, target: Path) -> None:
        self.step()
        super().rename(source, target)

    def sync_folder(self, folder: Path) -> None:
        self.step()
        super().sync_folder(folder)

    def unlink(self, path: Path) -> None:
        super().unlink(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_at_any_step_loses_nothing_and_the_same_call_works_later(tmp_path: Path, code: int) -> None:
    expected = states(tmp_path / "whole")
    files = FailingFiles(code)
    life = Life(tmp_path, files)
    failed = []
    for number, operation in enumerate(life.operations):
        at = 0
        while True:
            at += 1
            files.left = at
            try:
                operation()
            except StoreFullError:
                assert observe(life.registry) == expected[number]
                assert not list(life.store.scratch().iterdir())
                failed.append(number)
            else:
                break
        files.left = 0
        assert observe(life.registry) == expected[number + 1]
    life.close()
    check(tmp_path, expected[-1:])
    assert {0, 2, 4, 6, 13} <= set(failed)
    assert (
        failed.count(0) == 2 * 6
    )  # create, two writes, sync, rename, folder: of the weights and of the config


def test_another_error_of_the_disk_is_not_called_full(tmp_path: Path) -> None:
    files = FailingFiles(errno.EIO)
    store = Store(str(tmp_path / "store"), tmp_path / "cache", files=files)
    files.left = 2
    with store.writer() as writer, pytest.raises(StoreError) as refused:
        writer.write(b"x")
    assert not isinstance(refused.value, StoreFullError)


def test_a_disk_that_is_really_full_answers_so_and_works_again_when_there_is_space(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        store = Store(str(disk / "store"), tmp_path / "cache")
        kept = put(store, CONTENTS["weights1"])
        filler = fill(disk)
        for space in range(0, len(CONTENTS["weights2"]), 16_384):
            os.truncate(filler, filler.stat().st_size - (16_384 if space else 0))
            with pytest.raises(StoreFullError):
                put(store, CONTENTS["weights2"] + CONTENTS["weights1"])
            store.check_blob(kept.sha256)
            assert not list(store.scratch().iterdir())
        filler.unlink()
        store.check_blob(put(store, CONTENTS["weights2"]).sha256)


def test_a_registry_on_a_full_disk_answers_so_keeps_what_it_has_and_works_again(tmp_path: Path) -> None:
    """With a little more space at each turn, so that it runs out at other steps of a transaction."""
    expected = states(tmp_path / "whole")
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        life = Life(disk)
        failures = 0
        for number, operation in enumerate(life.operations):
            filler = fill(disk)
            while True:
                try:
                    operation()
                except (StoreFullError, RegistryFullError):
                    failures += 1
                    assert observe(life.registry) == expected[number]
                    os.truncate(filler, max(0, filler.stat().st_size - 4_096))
                else:
                    break
            filler.unlink()
            assert observe(life.registry) == expected[number + 1]
        life.close()
        check(disk, expected[-1:])
    assert failures > 50


def test_a_limit_on_the_size_of_files_is_a_full_store_too(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from onebase_adapters.store.store import Store, StoreFullError\n"
        "store = Store(sys.argv[1], Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    with store.writer() as writer: writer.write(bytes(60_000))\n"
        "except StoreFullError: print('full', len(list(store.scratch().iterdir())))\n"
        "with store.writer() as writer: writer.write(bytes(40_000)); print(writer.commit().size)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "adapters")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["full", "0", "40000"]


def test_a_folder_that_safetensors_cannot_write_keeps_the_number_of_its_error(tmp_path: Path) -> None:
    weights, before = {"a": torch.zeros(50_000)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with (
            pytest.raises(OSError, match="cannot be written") as refused,
            atomic_directory(tmp_path / "large") as work,
        ):
            save_file(weights, work / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.errno == errno.EFBIG
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "gone") as work:
        save_file(weights, work / "no folder" / "weights")
    assert list(tmp_path.iterdir()) == []


def put(store: Store, content: bytes) -> Blob:
    with store.writer() as writer:
        writer.write(content)
        return writer.commit()
