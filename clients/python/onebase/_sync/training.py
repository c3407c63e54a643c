# Generated from _async/training.py by tools/generate_sync.py; do not edit.
"""`client.files` and `client.training`: what jobs and batches read, and the jobs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

from onebase_protocol.common import ListAnswer, PageAnswer

from .._core import requests, training
from .._core.requests import Body
from ..adapter_types import ProgressCallback
from ..errors import APIStatusError, OneBaseError
from ..training_types import (
    Activate,
    Purpose,
    TrainingFile,
    TrainingJobInfo,
    TrainingMethod,
    TrainingSettings,
)
from ..types import Model
from .http import Http
from .jobs import TrainingJob


class Files:
    """`client.files`: what jobs and batches read, and what they leave."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def upload(
        self, path: str | Path, *, purpose: Purpose = "fine-tune", progress: ProgressCallback | None = None
    ) -> TrainingFile:
        """Send a file, streamed from disk. `client.training.create` and `client.batches.create` do so by
        themselves.

        If the server has a file of this content, name and purpose, that one is given and nothing is sent.

        Args:
            path: For a batch a .jsonl file; for training a .json, .csv or .parquet file too.
            purpose: `fine-tune`, or `batch`.
            progress: Called with the bytes that are sent.

        Raises:
            ValueError: there is no such file; nothing was sent.
            BadRequestError: it is of another kind, or empty.
            PayloadTooLargeError, StorageFullError: there is no room for it.
        """
        return (self._upload(path, purpose, progress))[0]

    def _upload(
        self, path: str | Path, purpose: Purpose, progress: ProgressCallback | None
    ) -> tuple[TrainingFile, bool]:
        """Upload as `upload` does, and return the file and whether it is new."""
        file = training.existing(path, "path")
        digest = training.sha256(file)
        call = training.same_content(digest, purpose)
        found = (self._http.ask(call, PageAnswer[TrainingFile])).data
        known = training.one_of(found, digest, file.name)
        if known is not None:
            return known, False
        sent = training.upload(file, purpose, progress)
        return self._http.ask(sent, TrainingFile), True

    def list(self, *, purpose: str | None = None) -> tuple[TrainingFile, ...]:
        """Return all files, the newest first.

        Args:
            purpose: Only those of this purpose: `fine-tune`, `fine-tune-results`, `batch` or `batch_output`.
        """
        return self._http.collect(
            lambda after, size: training.list_files(purpose, after, size), PageAnswer[TrainingFile]
        )

    def get(self, file_id: str) -> TrainingFile:
        """Return one file's name, size and purpose.

        Raises:
            NotFoundError: there is no file of this id.
        """
        return self._http.ask(training.file(file_id), TrainingFile)

    def content(self, file_id: str) -> bytes:
        """Return the whole content of a file.

        Raises:
            NotFoundError: there is no file of this id.
        """
        reply = self._http.send(training.file(file_id, "content"))
        return reply.body

    def delete(self, file_id: str) -> None:
        """Delete a file. It cannot be undone.

        Raises:
            ConflictError: a job or a batch that has not ended needs it.
            NotFoundError: there is no file of this id.
        """
        self._http.send(training.delete_file(file_id))


class Training:
    """`client.training`: jobs that train adapters on the base that the server has in memory."""

    def __init__(self, http: Http) -> None:
        self._http = http

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
        hold: bool = False,
        grader: Mapping[str, Any] | None = None,
        progress: ProgressCallback | None = None,
        **settings: Unpack[TrainingSettings],
    ) -> TrainingJob:
        """Begin to train an adapter. The job waits for its turn, and goes on without this process.

        Examples:
            >>> job = client.training.create("train.jsonl", name="acme", r=8)  # doctest: +SKIP
            >>> job.wait()  # doctest: +SKIP
            >>> job.report.loss_after  # doctest: +SKIP

        Args:
            training_file: The path of a .jsonl, .json, .csv or .parquet file, which is uploaded; or the id
                of an uploaded file.
            name: The adapter's. The result is one more version of it. By default the server makes up a name.
            validation_file: Rows to measure on, given in the same way. By default some training rows are
                held out.
            activate: Activate the version once it is proven: `always`; `if_better` than the base, than what
                it goes on from, and than the version that is active by then, on held-out rows;
                `if_better_than_base`, whatever is active; or `never`.
            method: `supervised`, from replies; `dpo`, from chosen and rejected ones; `classification`, from
                texts and their labels; or `reinforcement`, from what a grader gives the model's own replies.
            seed: Of everything random.
            metadata: Labels that `list` can search for: up to 16, of 512 characters each at most.
            model: What to begin with: the base (by default; a server has only one), or a version of an
                adapter, as `name` (its active one) or `name@version`. Then training continues from its
                weights, with its rank and layers, and the result is a version of it unless `name` is given.
            hold: Check the files and make the estimate, then wait for `job.resume()` before training; see
                `job.wait`, `job.data_report` and `job.info.estimate`.
            grader: Grader of `reinforcement`, with OpenAI's fields: `{"type": "string_check", ...}`.
            progress: Called with the bytes that are sent, of one file after the other: `file` is its name.
            **settings: See TrainingSettings.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was sent.
            BadRequestError: the server does not accept a setting (`param` names it). It is asked before a
                file is sent.
            ConflictError: the server does not train.
        """
        plain = training.check_settings(settings)
        train = training.source(training_file, "training_file")
        validation = None if validation_file is None else training.source(validation_file, "validation_file")
        body = training.job_body(
            self._base() if model is None else model,
            name=name,
            activate=activate,
            method=method,
            seed=seed,
            metadata=metadata,
            hold=hold,
            settings=plain,
            grader=grader,
        )
        if isinstance(train, Path) or isinstance(validation, Path):
            self._refuse_early(body)
        with _Uploads(Files(self._http), progress) as uploads:
            train_id = uploads.id_of(train)
            validation_id = None if validation is None else uploads.id_of(validation)
            call = training.create(body, train_id, validation_id)
            return self._job(self._http.ask(call, TrainingJobInfo))

    def _refuse_early(self, body: Body) -> None:
        """Raise what the server refuses about a job, before a file is sent for it.

        The server looks for the file last, so a job with a file that no server has asks about the rest.
        """
        try:
            self._http.ask(training.create(body, training.NO_FILE, None), TrainingJobInfo)
        except APIStatusError as error:
            if error.code != training.FILE_NOT_FOUND:
                raise

    def list(
        self, *, limit: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> tuple[TrainingJob, ...]:
        """Return the jobs, the newest first.

        Args:
            limit: The largest number of jobs; None: all.
            metadata: Only jobs with these labels.
        """
        found = self._http.collect(
            lambda after, size: training.list_jobs(metadata, after, size), PageAnswer[TrainingJobInfo], limit
        )
        return tuple(self._job(info) for info in found)

    def get(self, job_id: str) -> TrainingJob:
        """Return one job, whichever process began it.

        Raises:
            NotFoundError: there is no job of this id.
        """
        return self._job(self._http.ask(training.job(job_id), TrainingJobInfo))

    def _job(self, info: TrainingJobInfo) -> TrainingJob:
        return TrainingJob(info, self._http)

    def _base(self) -> str:
        return training.base_of((self._http.ask(requests.MODELS, ListAnswer[Model])).data)


class _Uploads:
    """The files that are sent for one job. The end of the block deletes them if the job was refused."""

    def __init__(self, files: Files, progress: ProgressCallback | None) -> None:
        self._files = files
        self._progress = progress
        self._ids: list[str] = []

    def id_of(self, source: str | Path) -> str:
        """Return the id of a file, which is sent first if it is a path."""
        if isinstance(source, str):
            return source
        sent, is_new = self._files._upload(source, "fine-tune", self._progress)
        if is_new:
            self._ids.append(sent.id)
        return sent.id

    def __enter__(self) -> _Uploads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        for file_id in self._ids if training.was_refused(error) else ():
            with suppress(OneBaseError):  # the caller must learn of the refusal instead
                self._files.delete(file_id)
