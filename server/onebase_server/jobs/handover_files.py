"""Files in the store from which another server can resume a job.

They are its newest checkpoint, its best adapter, the decisions made when it began, and the trained adapter
until it is delivered.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from onebase_adapters.registry import (
    RESUMABLE,
    RegistryError,
    Takeovers,
    TrainingJob,
    UnkeptJob,
    UnknownJobError,
)
from onebase_adapters.registry.jobs import PARENT_FILES
from onebase_adapters.store.atomic_files import atomic_directory, sync
from onebase_adapters.store.blobs import store_errors
from onebase_adapters.store.store import BlobDamagedError, BlobMissingError, Store, StoreError
from onebase_edge.background import Threads
from onebase_server.jobs.folders import JobFolders

CHECKPOINTS, ADAPTER = "checkpoints", "adapter"
ACTIVE_FILES = ("active_config", "active_weights")
"""Names in a job's folder of the files of the version that the job's adapter is compared with."""
_BEST = "best-*"
_TWIN_SECONDS = 30.0
"""Time, in seconds, for which a checkpoint's file stays: a job of the same rows and seed may be storing the
same."""
_LEFT_OUT = ("training_file", "validation_file", "events.jsonl", *ACTIVE_FILES)
"""Files in a job's folder that the store has anyway, or that no resumption needs."""

_log = logging.getLogger(__name__)


class KeptFiles:
    """Files of this server's jobs in the store, restored on whichever server resumes a job.

    For one event loop.

    Args:
        wanted: whether another server could resume a job. If none could, nothing is stored.
    """

    def __init__(
        self,
        takeovers: Takeovers,
        store: Store,
        folders: JobFolders,
        threads: Threads,
        disk: Threads,
        wanted: Callable[[], bool],
    ) -> None:
        self.takeovers = takeovers
        self._store = store
        self._folders = folders
        self._threads = threads
        self._disk = disk
        self._wanted = wanted
        self._keeping: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Store new files in the background, and those that could not be stored before."""
        if self._wanted() and (self._keeping is None or self._keeping.done()):
            self._keeping = asyncio.get_running_loop().create_task(self._keep_all())

    async def finish(self, seconds: float) -> None:
        """Store the last files as the server stops, if that does not take longer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if self._keeping is not None:
                    await self._keeping
                if self._wanted():
                    await self._keep_all()

    async def _keep_all(self) -> None:
        try:
            left = await self._threads.run_blocking(self.takeovers.unkept, self._folders.server, RESUMABLE)
        except RegistryError as error:
            _log.warning("checkpoints are not in the store yet: %s", error)
            return
        for job in left:
            try:
                await self._keep(job)
            except UnknownJobError:
                _log.debug("job %s has ended meanwhile, or is another server's", job.id)
            except FileNotFoundError as error:
                _log.debug("a newer checkpoint has taken the place of one: %s", error)
            except (RegistryError, StoreError, OSError) as error:
                _log.warning("what job %s continues from is not in the store yet: %s", job.id, error)
            except Exception:
                _log.exception("what job %s continues from is not in the store yet", job.id)

    async def _keep(self, job: UnkeptJob) -> None:
        found = await self._disk.run_blocking(_files_of, self._folders.job(job.id), job)
        has_adapter = any(_part_of(path) == ADAPTER for path in found)
        if job.trained != has_adapter or not any(_part_of(path) == CHECKPOINTS for path in found):
            return  # its files are gone: it will train again
        blobs = {
            path: await self._disk.run_blocking(self._put, path, source) for path, source in found.items()
        }
        left = await self._threads.run_blocking(
            self.takeovers.keep, job.id, self._folders.server, job.step, blobs, adapter=has_adapter
        )
        await self._delete(left)

    def _put(self, path: str, source: Path) -> str:
        """Store a file, and return its hash. A checkpoint on the same disk, which nobody writes to again, is
        not copied."""
        part = self._store.scratch() / f"{uuid.uuid4().hex}.part"
        try:
            if not _part_of(path):
                raise OSError(errno.EMLINK, "it may be written to", path)
            os.link(source, part)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, part)
        return self._store.add_file(part, move=True).sha256

    async def restore(self, job: TrainingJob) -> None:
        """Bring a job's folder here, if it has none and the store has something to continue from.

        Raises StoreError, RegistryError.
        """
        folder = self._folders.job(job.id)
        if await self._disk.run_blocking(folder.exists):
            return
        kept = await self._threads.run_blocking(self.takeovers.kept, job.id)
        if not kept:
            return
        try:
            await self._disk.run_blocking(self._fetch, kept, folder)
        except (BlobMissingError, BlobDamagedError) as error:
            _log.warning("job %s begins again: %s", job.id, error)
            await self._drop(job.id, self._folders.server)

    def _fetch(self, kept: Mapping[str, str], folder: Path) -> None:
        with store_errors(f"bringing files to {folder}"), atomic_directory(folder) as work:
            for path, sha256 in kept.items():
                if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                    raise StoreError(
                        f"The registry names a file outside of its job's folder: {path[:200]!r}."
                    )
                target = work / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if _part_of(path) or path in PARENT_FILES:
                    self._store.hold(sha256, target, own=True)
                else:
                    shutil.copyfile(self._store.local(sha256), target)
                sync(target)
                sync(target.parent)

    async def forget(self, job_id: str) -> None:
        """Drop the files of a job that will not be resumed."""
        await self._drop(job_id, None)

    async def _drop(self, job_id: str, server: str | None) -> None:
        """server: see Takeovers.drop. One that lost the job meanwhile drops nothing of the next one's."""
        try:
            await self._delete(await self._threads.run_blocking(self.takeovers.drop, job_id, server))
        except UnknownJobError:
            pass
        except RegistryError as error:
            _log.info("the store keeps the files of job %s until the next sweep: %s", job_id, error)

    async def sweep(self) -> None:
        """Drop the files of jobs that have ended, on whichever server. Raises RegistryError."""
        await self._threads.run_blocking(self.takeovers.drop_ended, RESUMABLE)

    async def _delete(self, left: Mapping[str, str]) -> None:
        """Delete files soon if only training writes them. Those that an adapter may have too are deleted as
        the store does."""
        for path, sha256 in left.items():
            ours = _part_of(path) == CHECKPOINTS and ADAPTER not in PurePosixPath(path).parts
            with suppress(StoreError):
                age = _TWIN_SECONDS if ours else None
                await self._disk.run_blocking(self._store.delete, sha256, older_than=age)


def _part_of(path: str) -> str:
    """Return the folder in the job's that a path leads into; "" is none."""
    return path.partition("/")[0] if "/" in path else ""


def _files_of(folder: Path, job: UnkeptJob) -> dict[str, Path]:
    """Return the files from which a job is resumed, by path in the folder. Raises FileNotFoundError,
    OSError."""
    checkpoints = folder / CHECKPOINTS
    parts = [checkpoints / PurePosixPath(job.path).name, *checkpoints.glob(_BEST)]
    if job.trained:
        parts.append(folder / ADAPTER)
    found = [path for part in parts for path in part.rglob("*")]
    if found:
        found += checkpoints.glob("*.json")  # what was computed before the first step
    if folder.is_dir():
        found += [path for path in folder.iterdir() if path.name not in _LEFT_OUT]
    return {
        str(PurePosixPath(path.relative_to(folder))): path
        for path in found
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(".part")
    }
