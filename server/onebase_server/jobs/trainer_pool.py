"""What all runs of a server share, and what a trainer is told of a job."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from onebase_adapters import registry
from onebase_adapters.registry import TrainingFile, TrainingJob, TrainingRecords
from onebase_engine.base.default_base import ResolvedBase
from onebase_engine.engine.messages import EngineConfig
from onebase_server.background import Threads
from onebase_server.errors import UnknownFileError
from onebase_server.jobs.delivery import Delivery
from onebase_server.jobs.notifier import Watchers
from onebase_server.jobs.storage import TrainingHome
from onebase_server.jobs.store import JobRecord
from onebase_server.processes.trainer_protocol import TrainJob


class FileGoneError(Exception):
    """A file that the job needs is not here any more. `param`: the job's field that names it."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(reason)
        self.param = param
        self.message = f"{param}: {reason} Upload it again and make a new job."


@dataclass(frozen=True)
class AttachedBase:
    """What a trainer attaches. `fd`: of the memory that holds the base."""

    config: EngineConfig
    manifest: bytes
    fd: int


@dataclass
class Runner:
    """What all runs of a server share.

    command: starts a trainer. share: part of the time for jobs while rows run. busy_fd: of the byte that
    says so. memory: bytes for one job, 0 for a part of what is free.
    """

    records: TrainingRecords
    threads: Threads
    watchers: Watchers
    home: TrainingHome
    delivery: Delivery
    config: EngineConfig
    base: ResolvedBase
    command: Sequence[str]
    share: float
    memory: int
    busy_fd: int
    deaths: int = 0
    """Trainers that died by themselves."""

    async def train_job(self, job: TrainingJob, record: JobRecord) -> TrainJob:
        """What the trainer is told. Raises FileGoneError, and RegistryError."""
        train, train_path = await self._file(record, job.training_file, "training_file")
        held_out_name = held_out_path = None
        if job.validation_file:
            held_out, held_out_path = await self._file(record, job.validation_file, "validation_file")
            # Errors name the file: two of one name would be one.
            same = held_out.filename == train.filename
            held_out_name = f"validation-{held_out.filename}" if same else held_out.filename
        return TrainJob(
            id=job.id,
            name=job.name,
            recipe=dict(job.settings),
            train=train_path,
            train_name=train.filename,
            held_out=held_out_path,
            held_out_name=held_out_name,
            folder=str(self.home.job(job.id)),
            base_name=self.base.name,
            base_repo=self.base.repo,
            base_commit=self.base.revision,
            memory_limit=self.memory,
        )

    async def _file(self, record: JobRecord, file_id: str, param: str) -> tuple[TrainingFile, str]:
        try:
            file = await record.file(file_id)
            path = self.delivery.files.content_path(file)
        except (registry.UnknownFileError, UnknownFileError) as error:
            raise FileGoneError(param, str(error)) from error
        if not await asyncio.to_thread(path.is_file):
            raise FileGoneError(param, f"File {file_id} is gone from --data-dir.")
        return file, str(path)
