"""Temporary folders of verifiers that were killed together with their api."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from onebase_server.processes.verifier_protocol import make_scratch, scratch_folder

NOBODY, NOBODY_ELSE, LINK = (1 << 22) + 1, (1 << 22) + 2, (1 << 22) + 3
"""Process ids beyond what Linux gives."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def folder_of(pid: int) -> Path:
    folder = scratch_folder(pid)
    folder.mkdir()
    (folder / "tensors").write_bytes(b"much")
    return folder


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_kept(temporary: Path) -> None:
    dead, living, unseen = folder_of(NOBODY), folder_of(os.getppid()), folder_of(NOBODY_ELSE)
    foreign = temporary / "precious"
    foreign.mkdir()
    scratch_folder(LINK).symlink_to(foreign)
    lock = os.open(unseen, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    own = make_scratch()
    os.close(lock)
    assert not dead.exists()
    assert [(folder / "tensors").exists() for folder in (living, unseen)] == [True, True]
    assert foreign.is_dir()
    assert own == scratch_folder(os.getpid())
    assert own.stat().st_mode & 0o777 == 0o700


def test_what_an_earlier_process_of_the_same_id_left_is_removed() -> None:
    folder_of(os.getpid())
    assert list(make_scratch().iterdir()) == []


def test_a_folder_stays_locked_for_as_long_as_its_process_lives() -> None:
    other = os.open(make_scratch(), os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
