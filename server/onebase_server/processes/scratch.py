"""The verifier's folder of temporary files, which goes with the process however that ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "onebase-verifier-"


def scratch_folder(pid: int) -> Path:
    """Where the verifier of this process id keeps temporary files; the api removes it after a kill."""
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{pid}"


def make_scratch() -> Path:
    """This process's own folder, empty; those of processes that were killed together with their api go.

    Locked until the process ends: others may not see its process id, from another container.
    """
    sweep()
    folder = scratch_folder(os.getpid())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    fcntl.flock(_opened(folder), fcntl.LOCK_EX)
    return folder


def sweep() -> None:
    """Remove the folders of processes that are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if Path("/proc", folder.name.removeprefix(_PREFIX)).exists():
            continue
        try:
            fd = _opened(folder)
        except OSError:  # somebody else's, or gone by now
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its process lives
            continue
        finally:
            os.close(fd)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
