"""Run as a program: what kill -9 leaves at each step of a life, and whether it is whole.

    python kill_loop.py FOLDER EVERY

A step is a call of the file system (also in the middle of a write), a statement by which the registry's
database is written, or its commit. A kill leaves the files as they are at that moment, and no lock: one life
goes through all steps, and a copy of its folder is checked at every EVERY-th of them. At each REALLY-th step
a life of its own is killed as well.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

# What is imported here is there in each fork.
import alembic.command  # noqa: F401
import sqlalchemy.dialects.sqlite  # noqa: F401
from tests.adapters.life import Life, Observed, check, states

from onebase_adapters.store.local import FileSystem

REALLY = 25
"""Steps from one real kill to the next."""


class Countdown:
    """Kills this process at step number `left`."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Copies:
    """Checks a copy of the folder at every so manyth step, of which `expected` names the allowed states."""

    def __init__(self, folder: Path, every: int, expected: list[Observed]) -> None:
        self.folder, self.every, self.expected = folder, every, expected
        self.steps = 0
        self.done = 0
        self.copied: list[int] = []
        """Operations that had ended, for each copy."""

    def operation_ended(self) -> None:
        self.done += 1

    def __call__(self, *_: object) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            # In a fork: whoever closes a database here would release this life's locks on it.
            if forked(self.check_copy) != 0:
                os._exit(1)
            self.copied.append(self.done)

    def check_copy(self) -> None:
        copy = self.folder.with_name("copy")
        shutil.copytree(self.folder, copy)
        check(copy, self.expected[self.done : self.done + 2])
        shutil.rmtree(copy)


class MortalFiles(FileSystem):
    """Dies before each call, within each write, and after the last."""

    def __init__(self, step: Callable[..., None]) -> None:
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


def live(folder: Path, step: Callable[..., None], after: Callable[[], object]) -> None:
    """All operations, `after` called after each; migrating the registry is among the first one's steps."""
    life = Life(folder, MortalFiles(step), step)
    for operation in life.operations:
        operation()
        after()
    life.close()


def look_at_copies(folder: Path, every: int, expected: list[Observed], tell: int) -> None:
    """One whole life whose folder is copied; what was copied is written to `tell`."""
    copies = Copies(folder, every, expected)
    live(folder, copies, copies.operation_ended)
    os.write(tell, json.dumps({"steps": copies.steps, "operations": copies.copied}).encode())


def die_at(folder: Path, at: int) -> int:
    """Kill one life at step `at`; how many operations had ended."""
    reading, writing = os.pipe()
    status = forked(lambda: live(folder, Countdown(at), lambda: os.write(writing, b".")))
    os.close(writing)
    if not os.WIFSIGNALED(status):
        sys.exit(f"the life that was to be killed at step {at} ended with {status}")
    with open(reading, "rb") as pipe:
        return len(pipe.read())


def main(folder: Path, every: int) -> None:
    # In this process, whose forks then find all that is made at the first use; no connection is left open.
    expected = states(folder / "whole")
    check(folder / "whole", expected[-1:])
    gc.freeze()
    whole = folder / "copied"
    whole.mkdir()
    reading, writing = os.pipe()
    if forked(lambda: look_at_copies(whole, every, expected, writing)) != 0:
        sys.exit("a copy of a life's folder is not whole")
    os.close(writing)
    with open(reading, "rb") as pipe:
        found = json.loads(pipe.read())
    if found["operations"][-1] < len(expected) - 2:
        sys.exit(f"the whole life ended after {found['operations'][-1]} operations")
    killed = 0
    for at in range(REALLY, found["steps"], REALLY):
        place = folder / str(at)
        place.mkdir()
        done = die_at(place, at)
        if forked(functools.partial(check, place, expected[done : done + 2])) != 0:
            sys.exit(f"killed at step {at}, in operation {done}: {place} is not whole")
        shutil.rmtree(place)
        killed += 1
    print(json.dumps({**found, "killed": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
