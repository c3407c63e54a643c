"""What a trainer process does: one job, or the check of one, and then it ends."""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch

from onebase_adapters.training.estimate import measured_rate
from onebase_adapters.training.events import AnyEvent, Event, Interrupted
from onebase_adapters.training.recipe import parse_recipe
from onebase_adapters.training.run import Job, train
from onebase_engine.base.attach import attach
from onebase_engine.engine.messages import EngineConfig
from onebase_server.processes.engine_process import base_settings
from onebase_server.processes.share import BusyFlag, SharedGate
from onebase_server.processes.trainer_channel import Channel
from onebase_server.processes.trainer_checking import check
from onebase_server.processes.trainer_failures import UNEXPECTED, failure_of
from onebase_server.processes.trainer_limits import bound_memory, memory_limit
from onebase_server.processes.trainer_protocol import Check, Checked, Said, Stopped, Train, Trained, TrainJob

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
LOCK_FILE = ".lock"
CHECK_BYTES = 2 << 30
"""What the check of a job may take at least: libraries and rows, also where training may take less."""


def run(sock: socket.socket, base_fd: int | None, busy_fd: int | None) -> int:
    """Do what the api asks for first; returns the process's exit status."""
    work = Work(Channel(sock), base_fd, busy_fd)
    return work.do()


class Work:
    """What one process is for, and what it may take."""

    def __init__(self, channel: Channel, base_fd: int | None, busy_fd: int | None) -> None:
        self._channel = channel
        self._base_fd = base_fd
        self._busy_fd = busy_fd
        self._limit = 0

    def do(self) -> int:
        message = self._channel.receive()
        try:
            answer = self._check(message) if isinstance(message, Check) else self._train(message)
            self._channel.send(answer)
        except Interrupted as interrupt:
            self._channel.send(Stopped(interrupt.reason))
        except Exception as error:
            failure = failure_of(error, message.job, limit=self._limit)
            if failure.code in UNEXPECTED:
                logger.exception("job %s failed", message.job.id)
            self._channel.send(failure)
        return 0

    def _check(self, message: Check) -> Checked:
        job, config = message.job, message.config
        with alone(Path(job.folder)):
            on_gpu = config.device != "cpu" and torch.cuda.is_available()
            device = torch.device("cuda" if on_gpu else "cpu")
            torch.set_num_threads(_threads(config))
            rate = None if on_gpu else measured_rate(device, base_settings(config, device).dtype)
            torch.set_num_threads(1)
            # It computes on the CPU whatever the base lives on, and must not begin to use a GPU.
            self._limit = memory_limit(job.memory_limit, CPU)
            bound_memory(max(self._limit, CHECK_BYTES), CPU)
            budget = (job.memory_limit or None) if on_gpu else self._limit
            run_job, gate = _run_job(job, config, device, budget), self._gate(1.0, CPU)
            plan = check(run_job, self._listen, gate, rate)
            return Checked(plan)

    def _train(self, message: Train) -> Trained:
        job, config = message.job, message.config
        with alone(Path(job.folder)):
            torch.set_num_threads(_threads(config))
            base = attach(base_settings(config, CPU), message.manifest, self._base_fd)
            device = next(base.parameters()).device
            importlib.import_module("peft")  # before the limit, which is for what the job takes
            self._limit = memory_limit(job.memory_limit, device)
            bound_memory(self._limit, device)
            run_job = _run_job(job, config, device, self._limit)
            report = train(base, run_job, self._listen, self._gate(message.share, device))
            return Trained(report.to_json())

    def _gate(self, share: float, device: torch.device) -> SharedGate:
        flag = None if self._busy_fd is None else BusyFlag(self._busy_fd)
        finish: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else _done
        return SharedGate(lambda: bool(flag), share, self._channel.stopping, finish=finish)

    def _listen(self, event: Event) -> None:
        self._channel.send(Said(cast(AnyEvent, event)))


def _run_job(job: TrainJob, config: EngineConfig, device: torch.device, limit: int | None) -> Job:
    return Job(
        name=job.name,
        recipe=parse_recipe(job.recipe),
        train=Path(job.train),
        held_out=None if job.held_out is None else Path(job.held_out),
        names=(job.train_name, job.held_out_name),
        folder=Path(job.folder),
        base=base_settings(config, device),
        base_name=job.base_name,
        base_repo=job.base_repo,
        base_commit=job.base_commit,
        memory_limit=limit,
        base_resident=True,
    )


def _threads(config: EngineConfig) -> int:
    return config.threads or len(os.sched_getaffinity(0))


def _done() -> None:
    """On the CPU nothing is left to wait for."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process writes into the run's folder: one of a server that was killed may be about to end."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
