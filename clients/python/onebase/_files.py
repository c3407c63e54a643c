"""`client.files`, synchronous and asynchronous: what jobs learn from, and the curves that they leave."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from . import _training_parse, _training_requests
from ._http import Reply
from ._paging import Page, acollect, collect, page_of
from ._parse import parse
from ._requests import Call
from .adapter_types import ProgressCallback
from .training_types import TrainingFile


class Files:
    """`client.files`: what jobs learn from, and the curves that they leave."""

    def __init__(self, send: Callable[[Call], Reply]) -> None:
        self._send = send

    def upload(self, path: str | Path, *, progress: ProgressCallback | None = None) -> TrainingFile:
        """Send a file of examples; it is streamed from disk. `client.training.create` does it by itself.

        Args:
            path: A .jsonl, .json, .csv or .parquet file.
            progress: Told of the bytes that are sent.

        Raises:
            ValueError: there is no such file; nothing was sent.
            BadRequestError: it is of another kind, or empty.
            PayloadTooLargeError, StorageFullError: there is no room for it.
        """
        return parse(self._send(upload_call(path, progress)).body, _training_parse.file)

    def list(self, *, purpose: str | None = None) -> tuple[TrainingFile, ...]:
        """All files, the newest first.

        Args:
            purpose: Only those of this one: `fine-tune`, or `fine-tune-results`.
        """
        return collect(lambda after, size: self._page(purpose, after, size), None)

    def get(self, file_id: str) -> TrainingFile:
        """One file's name, size and purpose.

        Raises:
            NotFoundError: there is none of this id.
        """
        return parse(self._send(_training_requests.file(file_id)).body, _training_parse.file)

    def content(self, file_id: str) -> bytes:
        """What is in it, whole.

        Raises:
            NotFoundError: there is none of this id.
        """
        return self._send(_training_requests.file(file_id, "content")).body

    def delete(self, file_id: str) -> None:
        """Delete it. It cannot be undone.

        Raises:
            ConflictError: a job that has not ended needs it.
            NotFoundError: there is none of this id.
        """
        self._send(_training_requests.delete_file(file_id))

    def _page(self, purpose: str | None, after: str | None, size: int) -> Page[TrainingFile]:
        reply = self._send(_training_requests.list_files(purpose, after, size))
        return parse(reply.body, page_of(_training_parse.file))


class AsyncFiles:
    """`client.files`: what jobs learn from, and the curves that they leave."""

    def __init__(self, send: Callable[[Call], Awaitable[Reply]]) -> None:
        self._send = send

    async def upload(self, path: str | Path, *, progress: ProgressCallback | None = None) -> TrainingFile:
        """As Files.upload."""
        return parse((await self._send(upload_call(path, progress))).body, _training_parse.file)

    async def list(self, *, purpose: str | None = None) -> tuple[TrainingFile, ...]:
        """As Files.list."""
        return await acollect(lambda after, size: self._page(purpose, after, size), None)

    async def get(self, file_id: str) -> TrainingFile:
        """As Files.get."""
        return parse((await self._send(_training_requests.file(file_id))).body, _training_parse.file)

    async def content(self, file_id: str) -> bytes:
        """As Files.content."""
        return (await self._send(_training_requests.file(file_id, "content"))).body

    async def delete(self, file_id: str) -> None:
        """As Files.delete."""
        await self._send(_training_requests.delete_file(file_id))

    async def _page(self, purpose: str | None, after: str | None, size: int) -> Page[TrainingFile]:
        reply = await self._send(_training_requests.list_files(purpose, after, size))
        return parse(reply.body, page_of(_training_parse.file))


def upload_call(path: str | Path, progress: ProgressCallback | None) -> Call:
    """The call that sends a file. Raises ValueError when it is not there."""
    return _training_requests.upload(_training_requests.existing(path, "path"), progress)
