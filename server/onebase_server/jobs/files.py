"""Training files on this server's disk: uploaded, read and deleted; and the loss curves that jobs leave."""

from __future__ import annotations

import csv
import errno
import io
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from onebase_adapters import registry
from onebase_adapters.registry import (
    DEFAULT_TENANT,
    FileInUseError,
    Purpose,
    RegistryError,
    TrainingFile,
    TrainingRecords,
    UnknownJobError,
)
from onebase_adapters.store.atomic_files import replace_synced
from onebase_server.background import Threads
from onebase_server.errors import ConflictError, InvalidRequestError, StoreFullError, UnknownFileError
from onebase_server.jobs.state import RESUMABLE
from onebase_server.jobs.storage import UPLOADING, TrainingStorage, ending
from onebase_server.storage import storage_errors

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
"""Kinds of files that jobs can read."""
MAX_FILENAME = 200
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileWriter:
    """A file that is coming in. Blocks. Raises StoreFullError; `abort` in any case, unless committed."""

    def __init__(self, folder: Path) -> None:
        self.size = 0
        self._path = folder / f".{secrets.token_hex(8)}{UPLOADING}"
        self._file = self._path.open("xb", buffering=0)

    def write(self, data: memoryview | bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _disk_error(error) from error
        self.size += len(data)

    def commit(self, target: Path) -> None:
        """The content is at `target`, whole and synced, when this has returned."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            replace_synced(self._path, target)
        except OSError as error:
            raise _disk_error(error) from error

    def abort(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class TrainingFiles:
    """The files of this server. `limit`: bytes of one."""

    def __init__(
        self, records: TrainingRecords, storage: TrainingStorage, threads: Threads, disk: Threads, limit: int
    ) -> None:
        self.disk = disk
        self.limit = limit
        self._records = records
        self._storage = storage
        self._threads = threads

    def writer(self) -> FileWriter:
        """Blocks. Raises StoreFullError."""
        try:
            return FileWriter(self._storage.files)
        except OSError as error:
            raise _disk_error(error) from error

    async def keep(self, writer: FileWriter, filename: str, purpose: Purpose) -> TrainingFile:
        """Make what was uploaded a file that jobs can name. Raises StoreFullError, UnavailableError."""
        file = self._made(f"file-{secrets.token_hex(12)}", filename, purpose, writer.size)
        path = self._storage.file(file.id, filename)
        with storage_errors():
            try:
                # The row comes last: a file without one is swept, a row without a file would be a lie.
                await self.disk.run(writer.commit, path)
                return await self._threads.run(self._records.add_file, file)
            except Exception:
                if not await self._may_be_known(file):
                    with suppress(OSError):
                        await self.disk.run(path.unlink, True)
                raise

    async def _may_be_known(self, file: TrainingFile) -> bool:
        """Whether the file may have its row, though adding it failed: only the answer may be lost."""
        try:
            await self._threads.run(self._records.file, file.tenant, file.id)
        except registry.UnknownFileError:
            return False
        except RegistryError:
            pass
        return True

    async def find(
        self, *, purpose: str | None, after: str | None, limit: int, oldest_first: bool
    ) -> list[TrainingFile]:
        """Raises UnknownFileError (`after`), UnavailableError."""
        with storage_errors():
            return await self._threads.run(
                self._records.files,
                DEFAULT_TENANT,
                purpose=purpose,
                after=after,
                limit=limit,
                oldest_first=oldest_first,
            )

    async def get(self, file_id: str) -> TrainingFile:
        """Raises UnknownFileError, UnavailableError."""
        with storage_errors():
            return await self._threads.run(self._records.file, DEFAULT_TENANT, file_id)

    async def usable(self, file_id: str, param: str) -> TrainingFile:
        """A file that a job of this server may be given. Raises InvalidRequestError."""
        try:
            file = await self.get(file_id)
            self.content_path(file)
        except UnknownFileError as error:
            raise InvalidRequestError(
                f"{param}: {error.message} POST /v1/files uploads one.", param=param, code="file_not_found"
            ) from error
        if file.purpose != "fine-tune":
            raise InvalidRequestError(
                f"{param}: {file.id} has the purpose {file.purpose}: upload one with purpose fine-tune.",
                param=param,
            )
        return file

    def content_path(self, file: TrainingFile) -> Path:
        """Where the content lies. Raises UnknownFileError when that is another server's disk."""
        if file.server != self._storage.server:
            raise UnknownFileError(
                f"File {file.id} lies on the disk of another server, which shares the registry. Ask that "
                "one, or upload it here."
            )
        return self._storage.file(file.id, file.filename)

    async def delete(self, file_id: str) -> None:
        """Raises UnknownFileError, ConflictError while a job needs it, UnavailableError."""
        self.content_path(await self.get(file_id))
        with storage_errors():
            try:
                file = await self._threads.run(self._records.delete_file, DEFAULT_TENANT, file_id, RESUMABLE)
            except FileInUseError as error:
                await self._raise_if_elsewhere(error)
                raise
        await self.disk.run(self._storage.file(file.id, file.filename).unlink, True)

    async def _raise_if_elsewhere(self, used: FileInUseError) -> None:
        """Raises ConflictError when the job that needs a file is not to be found on this server."""
        try:
            await self._threads.run(self._records.job, DEFAULT_TENANT, used.job)
        except UnknownJobError as error:
            raise ConflictError(
                f"{used} It is a job on another base: wait for its end, or cancel it through a server of "
                "that base on the same registry.",
                code="file_in_use",
                param="file_id",
            ) from error

    async def keep_curve(self, job_id: str, report: Mapping[str, Any]) -> str:
        """Keep the losses of a run as a CSV file, under the same id each time. Returns the id."""
        file_id = f"file-{job_id.removeprefix('ftjob-')}"
        filename = f"{job_id}-metrics.csv"
        content = curve_csv(report)
        writer = await self.disk.run(self.writer)
        try:
            await self.disk.run(writer.write, content)
            await self.disk.run(writer.commit, self._storage.file(file_id, filename))
        except BaseException:
            writer.abort()
            raise
        file = self._made(file_id, filename, "fine-tune-results", len(content))
        await self._threads.run(self._records.add_file, file)
        return file_id

    def _made(self, file_id: str, filename: str, purpose: Purpose, size: int) -> TrainingFile:
        return TrainingFile(
            file_id, DEFAULT_TENANT, self._storage.server, purpose, filename, size, float(int(time.time()))
        )


def curve_csv(report: Mapping[str, Any]) -> bytes:
    """step, train_loss and valid_loss of a run's report; empty where a step has no such figure."""
    train = {int(step): loss for step, loss in report.get("losses") or ()}
    held_out = {int(step): loss for step, loss in report.get("held_out") or ()}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("step", "train_loss", "valid_loss"))
    for step in sorted({*train, *held_out}):
        rows.writerow((step, train.get(step, ""), held_out.get(step, "")))
    return text.getvalue().encode()


def check_filename(filename: str) -> str:
    """The last part of an uploaded file's name. Raises InvalidRequestError when no job could read it."""
    name = filename.replace("\\", "/").rpartition("/")[2][-MAX_FILENAME:]
    if ending(name) not in ENDINGS:
        raise InvalidRequestError(
            f"file: {filename[:80]!r} does not end in one of {', '.join(ENDINGS)}, by which jobs know how to "
            "read it. Rename it.",
            param="file",
        )
    return name


def _disk_error(error: OSError) -> Exception:
    return StoreFullError() if error.errno in _FULL else error
