"""Puts the parts of training together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onebase_adapters.registry import RegistryError
from onebase_engine.base.default_base import ResolvedBase
from onebase_server.adapters.service import AdapterService
from onebase_server.background import Threads
from onebase_server.jobs.delivery import PROOFS_WAITED, Delivery
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.job_run import TrainerPool
from onebase_server.jobs.manager import Manager
from onebase_server.jobs.service import JobService
from onebase_server.jobs.storage import TrainingStorage
from onebase_server.jobs.store import JobNotifier
from onebase_server.metrics import Metrics
from onebase_server.processes.share import BusyFlag
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.settings import Settings
from onebase_server.storage import Storage

COUNT_SECONDS = 5.0
"""Limit for the registry's figures; after it the others are given alone."""


@dataclass
class Training:
    """What the routes and the server's life need of training."""

    files: TrainingFiles
    jobs: JobService
    manager: Manager
    storage: Storage
    threads: Threads

    async def metrics_text(self, supervisor: EngineSupervisor) -> bytes:
        """For Prometheus; without the jobs while the registry is away."""
        try:
            counts = await asyncio.wait_for(
                self.threads.run(self.storage.registry.training.counts), COUNT_SECONDS
            )
        except (RegistryError, TimeoutError):
            counts = None
        return await asyncio.to_thread(Metrics(supervisor, self.manager).render, counts)


def assemble_training(
    settings: Settings,
    base: ResolvedBase,
    storage: Storage,
    library: AdapterService,
    busy: BusyFlag,
    *,
    command: Sequence[str],
    records: Threads,
    disk: Threads,
) -> Training:
    """The training of one engine's base. Raises DataDirError.

    `command` starts a trainer; `busy` says whether rows run.
    """
    folder = TrainingStorage(Path(settings.data_dir).expanduser().absolute(), storage.registry_id)
    registry, notifier = storage.registry.training, JobNotifier()
    files = TrainingFiles(registry, storage.store, folder, records, disk, settings.max_train_file)
    pool = TrainerPool(
        records=registry,
        threads=records,
        notifier=notifier,
        files=files,
        storage=folder,
        delivery=Delivery(library, folder, files, PROOFS_WAITED * settings.proof_timeout),
        config=settings.engine_config(str(base.folder)),
        base=base,
        command=command,
        share=settings.train_share,
        memory=settings.train_memory // max(1, settings.train_jobs),
        busy_fd=busy.fd,
    )
    manager = Manager(pool, most=settings.train_jobs, look_seconds=settings.sync_seconds)
    jobs = JobService(
        registry,
        records,
        files,
        folder,
        manager,
        notifier,
        most=settings.train_jobs,
        look_seconds=settings.sync_seconds,
    )
    return Training(files, jobs, manager, storage, records)
