"""The folders of jobs on this server's disk: where they are, and when they are deleted."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from onebase_adapters.registry import (
    ENDED_STATES,
    JobState,
    TrainingRecords,
    UnknownJobError,
)
from onebase_adapters.store.atomic_files import sync
from onebase_edge.background import Threads
from onebase_server.jobs.state import is_resumable


class DataDirError(Exception):
    """Training cannot keep its files; the message says where and why."""


class JobFolders:
    """The folder `training` of a data folder, with `<registry>/<job-id>` for each job. Raises DataDirError.

    Args:
        registry: the registry's identity. What is in its folder is its own: a data folder may be used with
            several registries, and each deletes only what it knows.

    `server`: an id that lies there too; jobs in the registry that have it are this folder's.
    `lock_id`: the identity of the folder's lock, which a copy of the folder does not share.
    """

    def __init__(self, data_dir: Path, registry: str) -> None:
        self.root = data_dir / "training"
        self._jobs = self.root / registry
        try:
            for folder in (self.root, self._jobs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.server = _server_id(self.root / "server-id")
        except OSError as error:
            raise DataDirError(f"training cannot keep files in {self.root}: {error} (--data-dir)") from error
        self._lock: int | None = None
        with suppress(OSError):  # `own` raises it
            self._open_lock()
        self.lock_id = secrets.token_hex(16) if self._lock is None else _identity(self._lock)
        self.is_owned = False
        """Whether this process runs the folder's jobs."""

    def own(self) -> bool:
        """Return True if this process runs the folder's jobs: of several processes on one folder, one
        does. Raises OSError."""
        lock = self._open_lock()
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_owned = True
        return self.is_owned

    def _open_lock(self) -> int:
        if self._lock is None:
            self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._lock

    def job(self, job_id: str) -> Path:
        """Return the folder of a job's run."""
        return self._jobs / job_id

    def checkpoint(self, job_id: str, path: str) -> Path:
        """Return the folder of one of a run's checkpoints."""
        return self.job(job_id) / "checkpoints" / Path(path).name

    def job_ids(self) -> list[str]:
        """Return the jobs that have a folder. Raises OSError."""
        return [path.name for path in self._jobs.iterdir()]

    def forget(self, job_id: str) -> None:
        """Delete what a run has written."""
        shutil.rmtree(self.job(job_id), ignore_errors=True)


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


def _identity(file: int) -> str:
    """Return an identity that an open file shares with no other file, on any machine, while it is open."""
    found = os.fstat(file)
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        machine = secrets.token_hex(16)  # never equal: the next process waits for the end of this one's lease
    return hashlib.sha256(f"{machine} {found.st_dev} {found.st_ino}".encode()).hexdigest()[:32]


class _Models(Protocol):
    """Models made of checkpoints: `checkpoints.CheckpointModels`."""

    async def forget(self, job_id: str) -> None: ...

    async def sweep(self) -> None: ...


class _Kept(Protocol):
    """Files of jobs in the store: `kept_files.KeptFiles`."""

    async def forget(self, job_id: str) -> None: ...

    async def sweep(self) -> None: ...


class GarbageCollector:
    """Deletes the folders that no job needs any more. No process may be writing into a job's folder."""

    def __init__(
        self,
        records: TrainingRecords,
        threads: Threads,
        disk: Threads,
        folders: JobFolders,
        models: _Models,
        kept: _Kept,
    ) -> None:
        self._records = records
        self._threads = threads
        self._disk = disk
        self._folders = folders
        self._models = models
        self._kept = kept

    async def forget(self, job_id: str) -> None:
        """Delete what a job's run has written, and the models that were made of its checkpoints."""
        await self._disk.run_blocking(self._folders.forget, job_id)
        await self._kept.forget(job_id)
        await self._models.forget(job_id)

    async def job_over(self, tenant: str, job_id: str) -> None:
        """Delete the folder of a job that has ended and does not continue, or continues elsewhere.

        Raises RegistryError.
        """
        with suppress(UnknownJobError):
            job = await self._threads.run_blocking(self._records.job, tenant, job_id)
            if job.server != self._folders.server:
                await self._disk.run_blocking(self._folders.forget, job_id)
            elif is_over(job.state, job.error_code):
                await self.forget(job_id)

    async def sweep(self, running: Container[str]) -> None:
        """Delete the folders of jobs that another server ended, that nobody saw end, or that have no row.

        Args:
            running: jobs whose process may still write.

        Raises RegistryError, OSError.
        """
        ends = await self._threads.run_blocking(self._records.job_ends, self._folders.server)
        for job_id in await self._disk.run_blocking(self._folders.job_ids):
            if job_id not in running and (job_id not in ends or is_over(*ends[job_id])):
                await self._disk.run_blocking(self._folders.forget, job_id)
        await self._models.sweep()
        await self._kept.sweep()


def is_over(state: JobState, code: str | None) -> bool:
    """Return True if a job has ended and does not continue."""
    return state in ENDED_STATES and not is_resumable(state, code)
