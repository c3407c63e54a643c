"""`client.training`, synchronous: jobs that make adapters on the server's own base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Unpack

from . import _parse, _requests, _training_parse, _training_requests
from ._files import Files
from ._http import Reply, Response
from ._jobs import TrainingJob
from ._paging import Page, collect, page_of
from ._parse import parse
from ._requests import Call
from .adapter_types import ProgressCallback
from .errors import APIStatusError, OneBaseError
from .training_types import Activate, TrainingJobInfo, TrainingMethod, TrainingSettings


class Training:
    """`client.training`: jobs that train adapters on the base that the server has in memory already."""

    def __init__(self, send: Callable[[Call], Reply], open: Callable[[Call], Response]) -> None:
        self._send = send
        self._open = open

    def create(
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
    ) -> TrainingJob:
        """Begin to train an adapter. The job waits for its turn and goes on without this process.

        Example:
            >>> job = client.training.create("train.jsonl", name="acme", r=8)  # doctest: +SKIP
            >>> job.wait().report.loss_after  # doctest: +SKIP

        Args:
            training_file: The path of a .jsonl, .json, .csv or .parquet file, which is uploaded, or the id
                of one that was.
            name: The adapter's. What comes out is one more version of it. By default one is made up.
            validation_file: Rows to measure on, given in the same way; else a part of the training rows is
                held out.
            activate: Let it answer to the name as soon as it is proven: `always`, `if_better` than the base
                on held-out rows, or `never`.
            method: `supervised`, from replies, or `dpo`, from chosen and rejected ones.
            seed: Of everything random.
            metadata: Labels that `list` can search for: up to 16, at most 512 characters each.
            model: The base to train on, as a check: a server has one.
            progress: Told of the bytes that are sent.
            **settings: See TrainingSettings.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was sent.
            BadRequestError: the server does not take a setting (`param` names it). What was uploaded is
                deleted again.
            ConflictError: the server trains nothing.
        """
        plain = _training_requests.check_settings(settings)
        train = _training_requests.source(training_file, "training_file")
        validation = (
            None if validation_file is None else _training_requests.source(validation_file, "validation_file")
        )
        model = self._base() if model is None else model
        with _Uploads(Files(self._send), progress) as uploads:
            call = _training_requests.create(
                model,
                uploads.id_of(train),
                None if validation is None else uploads.id_of(validation),
                name=name,
                activate=activate,
                method=method,
                seed=seed,
                metadata=metadata,
                settings=plain,
            )
            return self._job(parse(self._send(call).body, _training_parse.job))

    def list(
        self, *, limit: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> tuple[TrainingJob, ...]:
        """The jobs, the newest first.

        Args:
            limit: Not more than so many; None: all.
            metadata: Only those with these labels.
        """

        def fetch(after: str | None, size: int) -> Page[TrainingJobInfo]:
            call = _training_requests.list_jobs(metadata, after, size)
            return parse(self._send(call).body, page_of(_training_parse.job))

        return tuple(self._job(info) for info in collect(fetch, limit))

    def get(self, job_id: str) -> TrainingJob:
        """One job, also one that another process began.

        Raises:
            NotFoundError: there is none of this id.
        """
        return self._job(parse(self._send(_training_requests.job(job_id)).body, _training_parse.job))

    def _job(self, info: TrainingJobInfo) -> TrainingJob:
        return TrainingJob(info, self._send, self._open)

    def _base(self) -> str:
        """The base's name: the server lists it first."""
        models = parse(self._send(_requests.MODELS).body, _parse.models)
        return _training_requests.base_of(models)


class _Uploads:
    """Files that are sent for one job, in a `with` block; deleted again when the job is refused."""

    def __init__(self, files: Files, progress: ProgressCallback | None) -> None:
        self._files = files
        self._progress = progress
        self._ids: list[str] = []

    def id_of(self, source: str | Path) -> str:
        if isinstance(source, str):
            return source
        self._ids.append(self._files.upload(source, progress=self._progress).id)
        return self._ids[-1]

    def __enter__(self) -> _Uploads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        for file_id in self._ids if was_refused(error) else ():
            with suppress(OneBaseError):  # the refusal is what the caller must hear of
                self._files.delete(file_id)


def was_refused(error: BaseException | None) -> bool:
    """Whether there is certainly no job: after a lost connection there may be one that needs its files."""
    return isinstance(error, APIStatusError | TypeError | ValueError)
