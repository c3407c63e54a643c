"""Where training keeps its files on this server's disk, whose they are, and when they are deleted."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Collection, Container, Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path

from onebase_adapters.registry import (
    ENDED_STATES,
    JobState,
    RegistryError,
    TrainingFile,
    TrainingRecords,
    UnknownJobError,
)
from onebase_adapters.store.atomic_files import sync, write_atomically
from onebase_server.background import Threads
from onebase_server.jobs.state import is_resumable

UPLOADING = ".part"
"""Ending of a file that is coming in."""
SETTLED_SECONDS = 600.0
"""Anything younger may be about to get its row in the registry."""
ABANDONED_SECONDS = 86_400.0
"""An upload that was not written to for this long is given up; a slow one writes now and then."""
MARK_TENANT = "registry"
"""Owner of the rows that mark registries: no caller sees them."""

_log = logging.getLogger(__name__)


class DataDirError(Exception):
    """Training cannot keep its files; the message says where and why."""


class TrainingStorage:
    """The folder `training` of a data folder: `files/<file-id>.<ending>` and `jobs/<job-id>/`.

    Raises DataDirError.

    `server`: an id that lies there too; jobs and files in the registry that have it are this folder's.
    `registries`: the file that lists which registries the folder was used with.
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
        """Whether this process runs the folder's jobs: of several processes on one folder, one does."""
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
        """Delete what has no row in the registry. Returns how many were deleted. Raises OSError.

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


class KnownRegistries:
    """Which registries a training folder was used with: what one does not know may be another's.

    It tells them apart by a mark in each: the row of an empty file, whose id the folder keeps.

    Args:
        path: the folder's list of marks, one a line.
        server: the folder's id.
    """

    def __init__(self, path: Path, records: TrainingRecords, server: str) -> None:
        self.path = path
        self._records = records
        self._server = server

    def at_hand_alone(self, file_ids: Container[str]) -> bool:
        """Whether the folder was only ever used with this registry. Blocks.

        Args:
            file_ids: the files of this server that the registry knows, marks among them.

        Raises RegistryError, OSError.
        """
        marks = self.path.read_text().split() if self.path.exists() else []
        if not any(mark in file_ids for mark in marks):
            marks.append(self._leave_mark())
            self._keep(marks)
        return len(marks) == 1

    def _keep(self, marks: Iterable[str]) -> None:
        # Empty after a power cut, it would know of no other registry.
        write_atomically(self.path, "".join(f"{mark}\n" for mark in marks))

    def _leave_mark(self) -> str:
        mark = f"registry-{secrets.token_hex(8)}"
        row = TrainingFile(mark, MARK_TENANT, self._server, "fine-tune-results", mark, 0, time.time())
        return self._records.add_file(row).id


class GarbageCollector:
    """Deletes what no job needs any more. No process may be writing into a job's folder."""

    def __init__(self, records: TrainingRecords, threads: Threads, storage: TrainingStorage) -> None:
        self._records = records
        self._threads = threads
        self._storage = storage
        self._registries = KnownRegistries(storage.registries, records, storage.server)
        self._warned = False

    async def job_over(self, tenant: str, job_id: str) -> None:
        """Delete the folder of a job that has ended and does not go on. Raises RegistryError."""
        with suppress(UnknownJobError):
            job = await self._threads.run(self._records.job, tenant, job_id)
            await self._threads.run(self._forget, job_id, job.state, job.error_code)

    async def sweep(self, running: Collection[str]) -> None:
        """Delete what a power cut left, and the folders of jobs that another server ended, or nobody saw end.

        Args:
            running: jobs whose process may still write.
        """
        storage = self._storage
        try:
            left = await self._threads.run(storage.listing)
            files = await self._threads.run(self._records.file_ids, storage.server)
            jobs = await self._threads.run(self._records.job_ends, storage.server)
            left = await self._threads.run(self._orphans_among, left, files)
            removed = await self._threads.run(storage.sweep, left, files, jobs)
            over = {job_id: end for job_id, end in jobs.items() if job_id not in running}
            await self._threads.run(self._forget_all, over)
        except (RegistryError, OSError) as error:
            _log.warning("the training folder was not swept: %s", error)
        else:
            if removed:
                _log.info("swept %d left-over files and folders of training", removed)

    def _orphans_among(self, left: list[Path], file_ids: Collection[str]) -> list[Path]:
        """The part of `left` that may be deleted if it has no row."""
        if self._registries.at_hand_alone(file_ids):
            return left
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s was used with several registries (--registry): files and jobs that this one does not "
                "know are kept, they may be another one's. Delete %s once only this one is in use.",
                self._storage.root,
                self._registries.path,
            )
        return self._storage.uploads(left)

    def _forget_all(self, ends: Mapping[str, tuple[JobState, str | None]]) -> None:
        for job_id, (state, code) in ends.items():
            self._forget(job_id, state, code)

    def _forget(self, job_id: str, state: JobState, code: str | None) -> None:
        if state in ENDED_STATES and not is_resumable(state, code):
            self._storage.forget(job_id)
