"""Creating, reading and cancelling batches for users."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping

from onebase_adapters.registry import (
    BatchRecord,
    BatchRecords,
    BatchState,
    BatchStateError,
    NewBatch,
)
from onebase_edge.background import Threads
from onebase_edge.errors import StateConflictError
from onebase_server.batches.runner import BatchRunner
from onebase_server.jobs.files import TrainingFiles
from onebase_server.storage.calls import storage_errors


class BatchService:
    """The batches of this server's registry. For one event loop. Every method may raise UnavailableError.

    runner: runs those that are made here. server: the id under which it finds them.
    """

    def __init__(
        self, records: BatchRecords, threads: Threads, files: TrainingFiles, runner: BatchRunner, server: str
    ) -> None:
        self.records = records
        self.runner = runner
        self._threads = threads
        self._files = files
        self._server = server

    async def create(
        self, tenant: str, *, input_file: str, endpoint: str, window: str, seconds: float,
        labels: Mapping[str, str] | None,
    ) -> BatchRecord:  # fmt: skip
        """Create a batch, whose file is checked next.

        Args:
            window: how long it may take, as it was asked for; `seconds`: what that means.

        Raises InvalidRequestError: a file that cannot be used.
        """
        await self._files.usable(tenant, input_file, "input_file_id", "batch")
        now = time.time()
        batch = NewBatch(
            id=f"batch_{secrets.token_hex(12)}",
            tenant=tenant,
            server=self._server,
            endpoint=endpoint,
            input_file=input_file,
            window=window,
            created_at=now,
            expires_at=now + seconds,
            labels=labels,
        )
        with storage_errors():
            made = await self._threads.run_blocking(self.records.add, batch)
        self.runner.look()
        return made

    async def get(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises BatchNotFoundError."""
        with storage_errors():
            return await self._threads.run_blocking(self.records.batch, tenant, batch_id)

    async def find(self, tenant: str, *, after: str | None, limit: int) -> list[BatchRecord]:
        """Newest first. Raises BatchNotFoundError (`after`)."""
        with storage_errors():
            return await self._threads.run_blocking(self.records.batches, tenant, after=after, limit=limit)

    async def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """Cancel a batch; its answers stay. Repeating it changes nothing.

        Raises BatchNotFoundError, StateConflictError when it has ended or is about to.
        """
        among: tuple[BatchState, ...] = ("validating", "in_progress")
        with storage_errors():
            try:
                batch = await self._threads.run_blocking(
                    self.records.move, batch_id, "cancelling", among, tenant=tenant
                )
            except BatchStateError as error:
                if error.state in ("cancelling", "cancelled"):
                    return await self.get(tenant, batch_id)
                raise StateConflictError(
                    f"{error} There is nothing left to cancel.", code="batch_state", param="batch_id"
                ) from error
        self.runner.look()
        return batch
