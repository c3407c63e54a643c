"""Files: what jobs and batches read, uploaded, read and deleted; and what they leave."""

from __future__ import annotations

import csv
import io
import secrets
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onebase_adapters import registry
from onebase_adapters.registry import (
    RESUMABLE,
    FileInUseError,
    FileRecord,
    Purpose,
    Scope,
    TrainingRecords,
    UnknownJobError,
)
from onebase_adapters.store.store import Blob, BlobMissingError, BlobWriter, Store
from onebase_edge.background import Threads
from onebase_edge.errors import InvalidRequestError, StateConflictError, TrainingFileNotFoundError
from onebase_server.jobs.folders import JobFolders
from onebase_server.storage.calls import delete_blobs, storage_errors

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
"""Kinds of files that jobs can read."""
BATCH_ENDING = ".jsonl"
MAX_FILENAME = 200
SCOPES: Mapping[Purpose, Scope] = {
    "fine-tune": "train",
    "fine-tune-results": "train",
    "batch": "generate",
    "batch_output": "generate",
}
"""Scope that a key needs for a file, by the file's purpose."""


class TrainingFiles:
    """Files of jobs and batches: blobs of the store, each with a record in the registry. `limit`: bytes of
    one."""

    def __init__(
        self,
        records: TrainingRecords,
        store: Store,
        folders: JobFolders,
        threads: Threads,
        disk: Threads,
        limit: int,
    ) -> None:
        self.store = store
        self.disk = disk
        self.limit = limit
        self._records = records
        self._folders = folders
        self._threads = threads

    async def store_file(
        self, tenant: str, writer: BlobWriter, filename: str, purpose: Purpose, file_id: str | None = None
    ) -> FileRecord:
        """Commit written content as a file that jobs can name. Raises DiskFullError, UnavailableError."""
        with storage_errors():
            # The row comes last: a blob without one is swept, a row without a blob would be a lie.
            blob = await self.disk.run_blocking(writer.commit)
        return await self.add(tenant, blob, filename, purpose, file_id)

    async def add(
        self, tenant: str, blob: Blob, filename: str, purpose: Purpose, file_id: str | None = None
    ) -> FileRecord:
        """Register content of the store as a file. Raises DiskFullError, UnavailableError,
        QuotaExceededError."""
        name, server = file_id or f"file-{secrets.token_hex(12)}", self._folders.server
        made = float(int(time.time()))
        file = FileRecord(name, tenant, server, purpose, filename, blob.size, made, blob.sha256)
        with storage_errors():
            return await self._threads.run_blocking(self._records.add_file, file)

    async def store_curve(self, tenant: str, job_id: str, report: Mapping[str, Any]) -> str:
        """Keep the losses of a run as a CSV file, under one id each time. Returns it. Raises as `keep`."""
        file_id = f"file-{job_id.removeprefix('ftjob-')}"
        with storage_errors():
            writer = await self.disk.run_blocking(self.store.writer)
            await self.disk.run_blocking(writer.write, curve_csv(report))
        await self.store_file(tenant, writer, f"{job_id}-metrics.csv", "fine-tune-results", file_id)
        return file_id

    async def find(
        self,
        tenant: str,
        *,
        purposes: Collection[str],
        sha256: str | None,
        after: str | None,
        limit: int,
        oldest_first: bool,
    ) -> list[FileRecord]:
        """Return the files of these purposes and of this content.

        Raises TrainingFileNotFoundError (`after`), UnavailableError.
        """
        with storage_errors():
            return await self._threads.run_blocking(
                self._records.files,
                tenant,
                purposes=purposes,
                sha256=sha256,
                after=after,
                limit=limit,
                oldest_first=oldest_first,
            )

    async def get(self, tenant: str, file_id: str) -> FileRecord:
        """Raises TrainingFileNotFoundError, UnavailableError."""
        with storage_errors():
            return await self._threads.run_blocking(self._records.file, tenant, file_id)

    async def usable(
        self, tenant: str, file_id: str, param: str, purpose: Purpose = "fine-tune"
    ) -> FileRecord:
        """Return a file that a job or a batch of this server may use.

        Raises InvalidRequestError, UnavailableError.
        """
        try:
            file = await self.get(tenant, file_id)
            with storage_errors():
                if not await self.disk.run_blocking(self.store.exists, file.sha256):
                    await self.disk.run_blocking(self.content, file)  # it says what is wrong
        except TrainingFileNotFoundError as error:
            raise InvalidRequestError(
                f"{param}: {error.message} POST /v1/files uploads one.", param=param, code="file_not_found"
            ) from error
        if file.purpose != purpose:
            raise InvalidRequestError(
                f"{param}: {file.id} has the purpose {file.purpose}: upload one with purpose {purpose}.",
                param=param,
            )
        return file

    async def is_stored(self, tenant: str, file_id: str) -> bool:
        """Return True if a job that needs the file could run here. Raises RegistryError, StoreError."""
        try:
            file = await self._threads.run_blocking(self._records.file, tenant, file_id)
        except registry.UnknownFileError:
            return False
        return await self.disk.run_blocking(self.store.exists, file.sha256)

    async def delete(self, tenant: str, file_id: str) -> None:
        """Raises TrainingFileNotFoundError, StateConflictError while a job or a batch needs it,
        UnavailableError."""
        with storage_errors():
            try:
                blobs = await self._threads.run_blocking(
                    self._records.delete_file, tenant, file_id, RESUMABLE
                )
            except FileInUseError as error:
                if not error.job.startswith("ftjob-"):
                    raise
                await self._raise_if_elsewhere(tenant, error)
                raise
        await delete_blobs(self.store, self.disk, blobs)

    async def _raise_if_elsewhere(self, tenant: str, used: FileInUseError) -> None:
        """Raises StateConflictError when the job that needs a file is not to be found on this server."""
        try:
            await self._threads.run_blocking(self._records.job, tenant, used.job)
        except UnknownJobError as error:
            raise StateConflictError(
                f"{used} It is a job on another base: wait for its end, or cancel it through a server of "
                "that base on the same registry.",
                code="file_in_use",
                param="file_id",
            ) from error

    # ---- content -----------------------------------------------------------------------------

    async def local(self, file: FileRecord) -> Path:
        """Return a local file with the content, to be read at once. Raises TrainingFileNotFoundError,
        UnavailableError."""
        with storage_errors():
            return await self.disk.run_blocking(self.content, file)

    def content(self, file: FileRecord, held: Path | None = None) -> Path:
        """Return a local file with the content. Blocks. Raises TrainingFileNotFoundError, StoreError.

        Args:
            held: a place for it, as `Store.hold` takes one; without it the file must be read at once.
        """
        try:
            return self.store.local(file.sha256) if held is None else self.store.hold(file.sha256, held)
        except BlobMissingError as error:
            raise TrainingFileNotFoundError(
                f"The content of file {file.id} is not in this server's store; another server may have it. "
                "Servers that share a registry (--registry) should share a store (--store)."
            ) from error


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


def ending(filename: str) -> str:
    """Return the ending of a file's name, in lower case, with its dot; "" if it has none."""
    return Path(filename).suffix.lower()


def check_filename(filename: str) -> str:
    """Return the last part of an uploaded file's name. One without an ending becomes .jsonl, since OpenAI's
    client sends bytes as `upload`. Raises InvalidRequestError for an ending that nothing can read."""
    name = filename.replace("\\", "/").rpartition("/")[2][-MAX_FILENAME:]
    if name and not ending(name):
        name = f"{name[-MAX_FILENAME + len(ENDINGS[0]) :]}{ENDINGS[0]}"
    if ending(name) not in ENDINGS:
        raise InvalidRequestError(
            f"file: {filename[:80]!r} does not end in one of {', '.join(ENDINGS)}, by which jobs know how to "
            f"read it; a batch's file ends in {BATCH_ENDING}. Rename it.",
            param="file",
        )
    return name
