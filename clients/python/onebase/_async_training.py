"""`client.training`, asynchronous: Training's methods, awaited. What they mean is documented there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Unpack

from . import _parse, _requests, _training_parse, _training_requests
from ._async_jobs import AsyncTrainingJob
from ._files import AsyncFiles
from ._http import AsyncResponse, Reply
from ._paging import Page, acollect, page_of
from ._parse import parse
from ._requests import Call
from ._training import was_refused
from .adapter_types import ProgressCallback
from .errors import OneBaseError
from .training_types import Activate, TrainingJobInfo, TrainingMethod, TrainingSettings


class AsyncTraining:
    """`client.training`: jobs that train adapters on the base that the server has in memory already."""

    def __init__(
        self,
        send: Callable[[Call], Awaitable[Reply]],
        open: Callable[[Call], Awaitable[AsyncResponse]],
    ) -> None:
        self._send = send
        self._open = open

    async def create(
        self,
        training_file: str | Path,
        *,
        name: str | None = None,
        validation_file: str | Path | None = None,
        activate: Activate = "if_better",
        method: TrainingMethod = "supervised",
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        model: str | None = None,
        progress: ProgressCallback | None = None,
        **settings: Unpack[TrainingSettings],
    ) -> AsyncTrainingJob:
        """As Training.create."""
        plain = _training_requests.check_settings(settings)
        train = _training_requests.source(training_file, "training_file")
        validation = (
            None if validation_file is None else _training_requests.source(validation_file, "validation_file")
        )
        model = await self._base() if model is None else model
        async with _Uploads(AsyncFiles(self._send), progress) as uploads:
            call = _training_requests.create(
                model,
                await uploads.id_of(train),
                None if validation is None else await uploads.id_of(validation),
                name=name,
                activate=activate,
                method=method,
                seed=seed,
                metadata=metadata,
                settings=plain,
            )
            return self._job(parse((await self._send(call)).body, _training_parse.job))

    async def list(
        self, *, limit: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> tuple[AsyncTrainingJob, ...]:
        """As Training.list."""

        async def fetch(after: str | None, size: int) -> Page[TrainingJobInfo]:
            call = _training_requests.list_jobs(metadata, after, size)
            return parse((await self._send(call)).body, page_of(_training_parse.job))

        return tuple(self._job(info) for info in await acollect(fetch, limit))

    async def get(self, job_id: str) -> AsyncTrainingJob:
        """As Training.get."""
        reply = await self._send(_training_requests.job(job_id))
        return self._job(parse(reply.body, _training_parse.job))

    def _job(self, info: TrainingJobInfo) -> AsyncTrainingJob:
        return AsyncTrainingJob(info, self._send, self._open)

    async def _base(self) -> str:
        models = parse((await self._send(_requests.MODELS)).body, _parse.models)
        return _training_requests.base_of(models)


class _Uploads:
    """As in _training.py."""

    def __init__(self, files: AsyncFiles, progress: ProgressCallback | None) -> None:
        self._files = files
        self._progress = progress
        self._ids: list[str] = []

    async def id_of(self, source: str | Path) -> str:
        if isinstance(source, str):
            return source
        self._ids.append((await self._files.upload(source, progress=self._progress)).id)
        return self._ids[-1]

    async def __aenter__(self) -> _Uploads:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        for file_id in self._ids if was_refused(error) else ():
            with suppress(OneBaseError):
                await self._files.delete(file_id)
