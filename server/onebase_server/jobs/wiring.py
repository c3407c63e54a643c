"""The parts of training, put together."""

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
from onebase_server.jobs.manager import Manager
from onebase_server.jobs.notifier import Watchers
from onebase_server.jobs.service import Jobs
from onebase_server.jobs.storage import TrainingHome
from onebase_server.jobs.trainer_pool import Runner
from onebase_server.metrics import Metrics
from onebase_server.processes.share import BusyFlag
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.settings import Settings
from onebase_server.storage import Storage

COUNT_SECONDS = 5.0
"""After which figures are given without the registry's."""


@dataclass
class Training:
    """What the routes and the server's life need of training."""

    files: TrainingFiles
    jobs: Jobs
    manager: Manager
    metrics: Metrics
    storage: Storage
    threads: Threads

    async def metrics_text(self) -> bytes:
        """For Prometheus; without the jobs while the registry is away."""
        try:
            counts = await asyncio.wait_for(
                self.threads.run(self.storage.registry.training.counts), COUNT_SECONDS
            )
        except (RegistryError, TimeoutError):
            counts = None
        return await asyncio.to_thread(self.metrics.render, counts)


def assemble_training(
    settings: Settings,
    base: ResolvedBase,
    storage: Storage,
    library: AdapterService,
    supervisor: EngineSupervisor,
    *,
    command: Sequence[str],
    records: Threads,
    disk: Threads,
) -> Training:
    """Training beside one engine. `command` starts a trainer. Raises DataDirError."""
    home = TrainingHome(Path(settings.data_dir).expanduser().absolute())
    registry, watchers, busy = storage.registry.training, Watchers(), BusyFlag.make()
    supervisor.router.on_busy = busy.set
    files = TrainingFiles(registry, home, records, disk, settings.max_train_file)
    runner = Runner(
        records=registry,
        threads=records,
        watchers=watchers,
        home=home,
        delivery=Delivery(library, home, files, PROOFS_WAITED * settings.proof_timeout),
        config=settings.engine_config(str(base.folder)),
        base=base,
        command=command,
        share=settings.train_share,
        memory=settings.train_memory // max(1, settings.train_jobs),
        busy_fd=busy.fd,
    )
    manager = Manager(runner, most=settings.train_jobs, look_seconds=settings.sync_seconds)
    metrics = Metrics(supervisor, manager)
    jobs = Jobs(
        registry,
        records,
        files,
        home,
        manager,
        watchers,
        most=settings.train_jobs,
        look_seconds=settings.sync_seconds,
    )
    return Training(files, jobs, manager, metrics, storage, records)
