"""The lock of a server's data folder: another server's jobs, caches and sweeps in it would be in the way."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TextIO

LOCK_FILE = "server.lock"


class FolderInUseError(Exception):
    """Another server has the folder; the message says which, and what to do."""


def lock_folder(folder: Path) -> TextIO:
    """Return an open file that keeps other servers out of the folder until it is closed.

    The operating system holds the lock for this process, without its children, and takes it back however
    the process ends: what a killed one has left in the file is no lock. Raises FolderInUseError. A folder
    that cannot be written is left to whoever opens what is in it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.fdopen(os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
    except OSError:
        return open(os.devnull, encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:
            holder = file.read(20).strip()
        process = f" (process {holder})" if holder else ""
        raise FolderInUseError(
            f"the data folder {folder} is in use by another server{process}: stop that one, or give this "
            "one a folder of its own with --data-dir. Servers of one registry have a data folder each"
        ) from error
    except OSError:  # a file system without locks
        return file
    with contextlib.suppress(OSError):  # the disk is full: the lock holds without the process's id too
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), f"{os.getpid()}\n".encode(), 0)
    return file
