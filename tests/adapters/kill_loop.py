"""Run as a program: kill -9 one life after the other, each EVERY steps later, and check what is left.

    python kill_loop.py FOLDER EVERY

A step is a call of the file system (also in the middle of a write), a statement by which the registry's
database is written, or its commit. Each life is a fork, so that a hundred of them take seconds.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

# What is imported here is there in each fork.
import alembic.command  # noqa: F401
import sqlalchemy.dialects.sqlite  # noqa: F401
from tests.adapters.life import Life, check, states

from onebase_adapters.store.local import FileSystem


class Countdown:
    """Kills this process at step number `left`."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class MortalFiles(FileSystem):
    """Dies before each call, within each write, and after the last."""

    def __init__(self, step: Countdown) -> None:
        self.step = step

    def create(self, path: Path) -> BinaryIO:
        self.step()
        return super().create(path)

    def open_file(self, path: Path) -> BinaryIO:
        self.step()
        return super().open_file(path)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        self.step()
        super().write(file, data[: len(data) // 2])
        self.step()
        super().write(file, data[len(data) // 2 :])

    def sync(self, file: BinaryIO) -> None:
        self.step()
        super().sync(file)

    def rename(self, source: Path, target: Path) -> None:
        self.step()
        super().rename(source, target)
        self.step()

    def sync_folder(self, folder: Path) -> None:
        self.step()
        super().sync_folder(folder)

    def unlink(self, path: Path) -> None:
        self.step()
        super().unlink(path)
        self.step()


def live(folder: Path, at: int, done: int) -> None:
    """All operations, one byte to `done` after each, migrating the registry among them; dies at step `at`."""
    step = Countdown(at)
    life = Life(folder, MortalFiles(step), step)
    for operation in life.operations:
        operation()
        os.write(done, b".")
    life.close()


def forked(work: Callable[[], Any]) -> int:
    """Run in a fork, as no connection may be inherited; the wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def die_at(folder: Path, at: int) -> tuple[int, int]:
    """One life that dies at step `at`: the wait status, and how many operations had ended."""
    reading, writing = os.pipe()
    status = forked(lambda: live(folder, at, writing))
    os.close(writing)
    with open(reading, "rb") as pipe:
        return status, len(pipe.read())


def main(folder: Path, every: int) -> None:
    # In this process, whose forks then find all that is made at the first use; no connection is left open.
    expected = states(folder / "whole")
    check(folder / "whole", expected[-1:])
    migrated = folder / "migrated"
    Life(migrated).close()
    gc.freeze()
    killed: list[int] = []
    for start in (None, migrated):
        # What is killed in the first operations has to migrate before; the others find that done.
        for at in count(1, every):
            place = folder / f"{start is None}-{at}"
            shutil.copytree(start, place) if start else place.mkdir()
            status, done = die_at(place, at)
            if os.WIFEXITED(status):
                if status != 0 or done != len(expected) - 1:
                    sys.exit(f"the last life ended after {done} operations with {status}")
                break
            if forked(lambda place=place, done=done: check(place, expected[done : done + 2])) != 0:
                sys.exit(f"killed at step {at}, in operation {done}: {place} is not whole")
            killed.append(done)
            shutil.rmtree(place)
            if start is None and done:
                break
    print(json.dumps({"killed_in_operation": killed, "operations": len(expected) - 1}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
