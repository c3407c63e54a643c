"""`client.batches`: files of requests that the server answers when it has room."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anyio

from onebase_protocol.common import PageAnswer

from .._core import batches, training
from .._core.parse import decode
from .._core.requests import Call
from .._core.retry import ReconnectBackoff
from .._http import Reply
from .._terminal.batches import observer
from ..adapter_types import ProgressCallback
from ..batch_types import Batch, BatchCallback, BatchResult
from ..errors import APIConnectionError, APIStatusError, APITimeoutError
from .http import AsyncHttp
from .training import AsyncFiles


class AsyncBatches:
    """`client.batches`: files of requests that the server answers when it has room.

    Examples:
        >>> batch = await client.batches.create("requests.jsonl")  # doctest: +SKIP
        >>> batch = await client.batches.wait(batch.id)  # doctest: +SKIP
        >>> for row in await client.batches.results(batch):  # doctest: +SKIP
        ...     print(row.custom_id, row.body)
    """

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def create(
        self,
        file: str | Path,
        *,
        endpoint: str = "/v1/chat/completions",
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> Batch:
        """Have each request of a file answered. The batch continues without this process.

        Args:
            file: The path of a .jsonl file, which is uploaded; or the id of an uploaded one. Each line is
                `{"custom_id": ..., "method": "POST", "url": endpoint, "body": {...}}`. `body` is what the
                endpoint takes; its `model` may be another adapter in each line.
            endpoint: Also `/v1/completions`, `/v1/responses`, `/v1/embeddings`, `/classify`, `/v1/rerank`,
                `/score` or `/v1/decide`.
            completion_window: From `1h` to `30d`. Rows without an answer by then are given up.
            metadata: Labels: up to 16, of 512 characters each at most.
            progress: Called with the bytes that are sent.

        Raises:
            ValueError: there is no such file; nothing was sent.
            BadRequestError: the server does not accept it; `param` names the field.
        """
        source = training.source(file, "file", ".jsonl")
        if isinstance(source, Path):
            source = (await AsyncFiles(self._http).upload(source, purpose="batch", progress=progress)).id
        call = batches.create(source, endpoint, completion_window, metadata)
        return await self._http.ask(call, Batch)

    async def retrieve(self, batch_id: str) -> Batch:
        """Return one batch as it is now.

        Raises:
            NotFoundError: there is no batch of this id.
        """
        return await self._http.ask(batches.batch(batch_id), Batch)

    async def list(self, *, limit: int | None = None) -> tuple[Batch, ...]:
        """Return the batches, the newest first.

        Args:
            limit: The largest number of batches; None: all.
        """
        return await self._http.collect(batches.list_batches, PageAnswer[Batch], limit)

    async def cancel(self, batch_id: str) -> Batch:
        """End a batch. What is answered by then stays.

        Raises:
            ConflictError: it has ended.
        """
        return await self._http.ask(batches.cancel(batch_id), Batch)

    async def wait(self, batch_id: str, *, progress: bool | BatchCallback = True) -> Batch:
        """Wait until a batch has ended, and give it, however it ended. It goes on if you stop waiting.

        Args:
            progress: Draw a bar on stderr, or print lines if that is no terminal. Or a function that is
                called with each change instead.

        Raises:
            APIConnectionError, APITimeoutError: the server was away for more than about a minute.
        """
        pause, known = batches.FIRST_PAUSE_S, None
        with observer(progress) as watch:
            while True:
                reply = await self._send_patiently(batches.batch(batch_id))
                batch = decode(reply.body, Batch)
                if batch != known:
                    watch.show(batch)
                    known = batch
                if batch.ended:
                    return batch
                await anyio.sleep(pause)
                pause = min(batches.LONGEST_PAUSE_S, pause * 1.5)

    async def results(self, batch: Batch | str) -> tuple[BatchResult, ...]:
        """Return the answers of a batch that has ended, then its rows that failed, each in the order they
        ended.

        Args:
            batch: The batch, or its id.

        Raises:
            NotFoundError: there is no such batch, or its files were deleted.
        """
        found = await self.retrieve(batch) if isinstance(batch, str) else batch
        files = AsyncFiles(self._http)
        rows: list[BatchResult] = []
        for file_id in (found.output_file_id, found.error_file_id):
            if file_id is not None:
                rows += batches.results_of(await files.content(file_id))
        return tuple(rows)

    async def _send_patiently(self, call: Call) -> Reply:
        backoff = ReconnectBackoff()
        while True:
            try:
                return await self._http.send(call)
            except (APIConnectionError, APITimeoutError, APIStatusError) as error:
                delay = backoff.delay(error, call)
            await anyio.sleep(delay)
