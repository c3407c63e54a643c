"""A trainer process: does one job, or the check of one, and then it ends.

The api runs it as `python -m onebase_server.processes trainer --fd N [--base-fd M] [--busy-fd K]`.
"""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch

from onebase_adapters.store.blobs import FULL
from onebase_engine.base.attach import AttachError, attach
from onebase_engine.base.load import BaseChangedError, load_config
from onebase_engine.engine.messages import EngineConfig
from onebase_engine.imports import load_compiler
from onebase_engine.machine import free_memory, is_out_of_memory, keep_freed_memory
from onebase_server.processes.child import Channel, begin
from onebase_server.processes.engine import base_settings
from onebase_server.processes.job_memory import job_bytes
from onebase_server.processes.time_share import BusyFlag, device_gate
from onebase_server.processes.trainer_protocol import (
    MAX_PROBLEMS,
    Active,
    Check,
    DrawnReplies,
    EndAfter,
    Failed,
    FileProblem,
    FilesChecked,
    FindActive,
    NotDrawn,
    ParentFiles,
    RunEvent,
    Stop,
    Stopped,
    ToTrainer,
    Train,
    Trained,
    TrainJob,
    to_trainer_decoder,
)
from onebase_training import events
from onebase_training.checkpoint import CheckpointError
from onebase_training.data.dataset import DataError
from onebase_training.estimate import measured_rates
from onebase_training.events import Interrupted, Reason
from onebase_training.loop import TrainingDivergedError
from onebase_training.parent import ActiveVersion, Parent
from onebase_training.recipe import RecipeError, parse_recipe
from onebase_training.rollouts import RewardedReply, RolloutError, RolloutOrder
from onebase_training.run import DoesNotFitError, TrainingRequest, prepare, train

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
LOCK_FILE = ".lock"
CHECK_BYTES = 2 << 30
"""Least memory that the check of a job may take, for libraries and rows; training may have less."""
UNEXPECTED = ("trainer_failed", "device_error", "base_unavailable", "base_changed")
"""Codes of failures whose traceback goes into the server's log."""
_NO_SPACE = ("No space left on device", "Disk quota exceeded")
_EXPLAINED: dict[type[Exception], str] = {
    DoesNotFitError: "does_not_fit",
    TrainingDivergedError: "training_diverged",
    CheckpointError: "checkpoint_damaged",
    AttachError: "base_unavailable",
    BaseChangedError: "base_changed",
    torch.AcceleratorError: "device_error",
}
"""Errors whose messages are made for people."""
_PARALLEL = 1 << 20
"""Number of elements of an operation that uses all threads."""


def main() -> int:
    inherited = begin("trainer")
    keep_freed_memory()
    return run_trainer(inherited.sock, inherited.base_fd, inherited.busy_fd)


def run_trainer(sock: socket.socket, base_fd: int | None, busy_fd: int | None) -> int:
    """Do what the api asks for first; returns the process's exit status.

    When the api goes, the process ends at once: nobody waits for it, and what it has saved is whole.
    """
    channel = Channel[ToTrainer](sock, to_trainer_decoder().decode, leave_within=0.0)
    try:
        return Work(channel, base_fd, busy_fd).do()
    finally:
        channel.close()


class Work:
    """One trainer process's work: a job, or the check of one, within its memory limit."""

    def __init__(self, channel: Channel[ToTrainer], base_fd: int | None, busy_fd: int | None) -> None:
        self._channel = channel
        self._base_fd = base_fd
        self._busy = None if busy_fd is None else BusyFlag(busy_fd)
        self._limit = 0
        self._reason: Reason | None = None
        self._last_step: int | None = None
        self._active: Active | None = None
        self._drawn: DrawnReplies | NotDrawn | None = None

    def do(self) -> int:
        message = self._channel.receive()
        while not isinstance(message, Check | Train):
            if isinstance(message, Stop):
                self._channel.send(Stopped(message.reason))
                return 0
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

    def _check(self, message: Check) -> FilesChecked:
        """Decide everything that is "auto", and keep it in the job's folder: the run reads it there.

        Needs the base's folder, but nothing of it in memory, and no accelerator.
        """
        job, config = message.job, message.config
        with alone(Path(job.folder)):
            on_gpu = config.device != "cpu" and torch.cuda.is_available()
            device = torch.device("cuda" if on_gpu else "cpu")
            torch.set_num_threads(threads_of(config))
            rate = slow = None
            if not on_gpu:
                rate, slow = measured_rates(device, base_settings(config, device).dtype)
            torch.set_num_threads(1)
            # It computes on the CPU whatever the base lives on, and must not begin to use a GPU.
            self._limit = memory_limit(job.memory_limit, CPU, config)
            bound_memory(max(self._limit, CHECK_BYTES), CPU)
            budget = memory_limit(job.memory_limit, device, config) if on_gpu else self._limit
            run_job = _run_job(job, config, device, budget)
            gate = device_gate(CPU, self._busy, 1.0, self._stopping)
            self._listen(events.Phase(at=time.time(), name="validating_files", message="Reading the files."))
            plan = prepare(
                load_config(run_job.base.folder), run_job, self._listen, gate, rate=rate, reread=True
            )
            recipe, estimate = plan.recipe.to_json(), plan.estimate.to_json()
            if rate and slow and estimate["seconds"]:
                estimate |= {"seconds_low": estimate["seconds"], "seconds_from": "measured"}
                estimate["seconds_high"] = estimate["seconds"] * rate / slow
            return FilesChecked({"recipe": recipe, "estimate": estimate, "steps": plan.steps})

    def _train(self, message: Train) -> Trained:
        job, config = message.job, message.config
        with alone(Path(job.folder)):
            torch.set_num_threads(threads_of(config))
            base = attach(base_settings(config, CPU), message.manifest, self._base_fd)
            device = next(base.parameters()).device
            # Before the limit, which is for what the job takes.
            importlib.import_module("peft")
            load_compiler()
            self._limit = memory_limit(job.memory_limit, device, config)
            bound_memory(self._limit, device)
            run_job = _run_job(job, config, device, self._limit)
            self._last_step = job.last_step
            gate = device_gate(device, self._busy, message.share, self._stopping)
            report = train(
                lambda: base,
                run_job,
                self._listen,
                gate,
                last_step=self._newest_last_step,
                find_active=self._find_active,
                rollouts=self,
            )
            return Trained(report.to_json())

    def _stopping(self) -> Reason | None:
        """Return the reason why the run is to stop, or None."""
        for message in self._channel.arrived():
            self._take(message)
        return self._reason

    def _take(self, message: ToTrainer) -> None:
        if isinstance(message, Stop):
            self._reason = message.reason
        elif isinstance(message, EndAfter):
            self._last_step = message.step
        elif isinstance(message, Active):
            self._active = message
        elif isinstance(message, DrawnReplies | NotDrawn):
            self._drawn = message

    def _newest_last_step(self) -> int | None:
        self._stopping()
        return self._last_step

    def _find_active(self) -> ActiveVersion | None:
        """Ask the api, which may have to read the version's files first. Raises Interrupted."""
        self._channel.send(FindActive())
        while (active := self._active) is None:
            self._take(self._channel.receive())
            if self._reason is not None:
                raise Interrupted(self._reason)
        if not active.digest:
            return None
        return ActiveVersion(active.label, active.digest, _parent(active.files), active.problem)

    def draw(self, rollout: RolloutOrder) -> list[list[RewardedReply]]:
        """Have the server sample replies and grade them. Raises RolloutError, Interrupted."""
        self._drawn = None
        self._channel.send(rollout)
        while (drawn := self._drawn) is None:
            self._take(self._channel.receive())
            if self._reason is not None:
                raise Interrupted(self._reason)
        if isinstance(drawn, NotDrawn):
            raise RolloutError(drawn.code, drawn.message, drawn.param)
        return drawn.groups

    def _listen(self, event: events.Event) -> None:
        self._channel.send(RunEvent(cast(events.AnyEvent, event)))


def _run_job(job: TrainJob, config: EngineConfig, device: torch.device, limit: int | None) -> TrainingRequest:
    return TrainingRequest(
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
        parent=_parent(job.parent),
        base_id=job.base_id,
    )


def _parent(files: ParentFiles | None) -> Parent | None:
    if files is None:
        return None
    return Parent(files.label, files.digest, Path(files.config), Path(files.weights))


def threads_of(config: EngineConfig) -> int:
    return config.threads or len(os.sched_getaffinity(0))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into the run's folder: a killed server's trainer may still end."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


# ---- failures ------------------------------------------------------------------------------------


def failure_of(error: BaseException, job: TrainJob, *, limit: int) -> Failed:
    """Return the failure for any error of a run, for the user who made the job. `limit`: bytes that it may
    take."""
    if isinstance(error, RecipeError):
        return Failed(code="invalid_value", message=str(error), param=error.field or None)
    if isinstance(error, RolloutError):
        return Failed(code=error.code, message=str(error), param=error.param)
    if isinstance(error, DataError) and isinstance(error.__cause__, OSError):
        # It was there when the job began: the disk that it lies on is away.
        return Failed(code="store_unavailable", message=f"{error} Resume the job later.")
    if isinstance(error, DataError):
        return _bad_data(error, job)
    if is_out_of_memory(error):
        return Failed(
            code="out_of_memory",
            message=f"The job needed more than the {limit / 1e6:.0f} MB of memory that it may take. Set "
            "gradient_checkpointing to true, lower micro_tokens, max_length or r, or send fewer rows, in a "
            "new job; or let the server give jobs more (--train-memory) and resume this one.",
        )
    if _is_about_space(error):
        return Failed(
            code="disk_full",
            message="The server's disk is full: the job stands at its last checkpoint. Free some space in "
            "--data-dir and resume it.",
        )
    for kind, code in _EXPLAINED.items():
        if isinstance(error, kind):
            return Failed(code=code, message=str(error))
    return Failed(code="trainer_failed", message=f"The trainer failed: {type(error).__name__}: {error}")


def _bad_data(error: DataError, job: TrainJob) -> Failed:
    return Failed(
        code="invalid_file",
        message=str(error),
        param="validation_file" if error.source == job.held_out_name else "training_file",
        problems=[FileProblem(one.line, one.field, one.reason) for one in error.problems[:MAX_PROBLEMS]],
        problem_count=len(error.problems),
    )


def _is_about_space(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(part in str(error) for part in _NO_SPACE)


# ---- memory --------------------------------------------------------------------------------------


def memory_limit(asked: int, device: torch.device, config: EngineConfig) -> int:
    """Return the bytes that a job may take next to the base.

    Unless `asked` says how many, that is on a GPU what the engine has left free for a job, since what else is
    free there is set aside for steps, slots and proofs. On the CPU, and where --kv-memory has the engine set
    nothing aside, it is half of the free memory.
    """
    if not asked and device.type == "cuda" and not config.kv_memory:
        return job_bytes(load_config(Path(config.base_folder)), config)
    return asked or free_memory(device) // 2


def bound_memory(limit: int, device: torch.device, uncounted: int | None = None) -> int:
    """Limit this process to `limit` more bytes; beyond that allocations fail, in this process alone.

    On the CPU by RLIMIT_DATA, which counts private writable memory, mapped or not from a file: the base is
    counted already when this is called.

    uncounted: bytes beside which the limit counts; None: all that the process has now.

    Returns these bytes, with which the limit can be replaced later by another one.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        return 0
    if uncounted is None:
        torch.ones(_PARALLEL).add_(1.0)  # the threads' stacks are not what a job takes
        uncounted = private_bytes()
    highest = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = uncounted + limit if highest == resource.RLIM_INFINITY else min(uncounted + limit, highest)
    resource.setrlimit(resource.RLIMIT_DATA, (most, highest))
    return uncounted


def private_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Return the private writable memory of this process, in bytes, as RLIMIT_DATA counts it."""
    for line in status.read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0
