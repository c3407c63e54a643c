"""Where training keeps its files on this server's disk, and whose they are."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Container, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path

from onebase_adapters.store.atomic_files import sync

UPLOADING = ".part"
"""Ending of a file that is coming in."""
SETTLED_SECONDS = 600.0
"""What is younger may be about to get its row in the registry."""
ABANDONED_SECONDS = 86_400.0
"""An upload of which nothing came for so long is not waited for: a slow one writes now and then."""

_log = logging.getLogger(__name__)


class DataDirError(Exception):
    """Training cannot keep its files; the message says where and why."""


class TrainingHome:
    """The folder `training` of a data folder: `files/<file-id>.<ending>` and `jobs/<job-id>/`.

    Raises DataDirError.

    `server`: an id that lies there too; jobs and files in the registry that bear it are this folder's.
    `registries`: where the folder keeps which registries it was used with.
    """

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir / "training"
        self.files = self.root / "files"
        self.jobs = self.root / "jobs"
        self.registries = self.root / "registries"
        try:
            for folder in (self.root, self.files, self.jobs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.server = _server_id(self.root / "server-id")
        except OSError as error:
            raise DataDirError(f"training cannot keep files in {self.root}: {error} (--data-dir)") from error
        self._lock: int | None = None

    def own(self) -> bool:
        """Whether this process is the one that runs the folder's jobs; of several with one folder, one is."""
        if self._lock is not None:
            return True
        lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    def job(self, job_id: str) -> Path:
        """The folder of a job's run."""
        return self.jobs / job_id

    def checkpoint(self, job_id: str, path: str) -> Path:
        """The folder of one of a run's checkpoints."""
        return self.job(job_id) / "checkpoints" / Path(path).name

    def file(self, file_id: str, filename: str) -> Path:
        """Where a file's content lies."""
        return self.files / f"{file_id}{ending(filename)}"

    def forget(self, job_id: str) -> None:
        """Delete what a run has written."""
        shutil.rmtree(self.job(job_id), ignore_errors=True)

    def uploads(self, left: Iterable[Path]) -> list[Path]:
        """Those of a `listing` that are half of an upload: they have no row in any registry."""
        return [path for path in left if path.parent == self.files and path.name.endswith(UPLOADING)]

    def listing(self) -> list[Path]:
        """Files and folders of jobs that are no longer being made. Raises OSError."""
        now, found = time.time(), []
        for path in chain(self.files.iterdir(), self.jobs.iterdir()):
            settled = ABANDONED_SECONDS if path.name.endswith(UPLOADING) else SETTLED_SECONDS
            with suppress(FileNotFoundError):  # an upload has just ended
                if path.lstat().st_mtime < now - settled:
                    found.append(path)
        return found

    def sweep(self, left: Iterable[Path], file_ids: Container[str], job_ids: Container[str]) -> int:
        """Delete what no row of the registry speaks of. Returns how many. Raises OSError.

        Args:
            left: a `listing` that is older than the ids.
        """
        removed = 0
        for path in left:
            if path.parent == self.files and path.name.partition(".")[0] not in file_ids:
                path.unlink(missing_ok=True)
                removed += 1
            elif path.parent == self.jobs and path.name not in job_ids:
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
        return removed


def ending(filename: str) -> str:
    """The ending of a file's name, in lower case, with its dot; "" if it has none."""
    return Path(filename).suffix.lower()


def _server_id(path: Path) -> str:
    try:
        known = path.read_text().strip()
        if known:
            return known
    except FileNotFoundError:
        pass
    made = f"server-{secrets.token_hex(8)}"
    work = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    work.write_text(made)
    sync(work)  # empty after a power cut, it would be another server's
    try:
        os.link(work, path)  # of two that start at once, the first one's stays
    except FileExistsError:
        return path.read_text().strip()
    finally:
        work.unlink()
    return made
