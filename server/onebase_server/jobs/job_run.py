"""Run of one job: a trainer process, its messages, its end, and what follows from that."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, cast

import msgspec

from onebase_adapters import registry
from onebase_adapters.names import label
from onebase_adapters.registry import (
    FileRecord,
    JobEvent,
    JobState,
    JobStateError,
    ParentVersion,
    QuotaError,
    RegistryError,
    Tenants,
    TrainingJob,
    TrainingRecords,
    UnknownJobError,
)
from onebase_adapters.registry.jobs import PARENT_FILES
from onebase_adapters.store.store import BlobMissingError, StoreError, StoreFullError
from onebase_edge.background import Threads
from onebase_edge.errors import TrainingFileNotFoundError
from onebase_engine.base.default_base import ResolvedBase
from onebase_engine.engine.messages import EngineConfig
from onebase_protocol.training import TrainingFailure
from onebase_server.jobs.checkpoints import CheckpointModels
from onebase_server.jobs.delivery import BACKOFF, LOST, TRIES, Delivery, DeliveryError
from onebase_server.jobs.event_view import problem_events
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders
from onebase_server.jobs.handover_files import ACTIVE_FILES, KeptFiles
from onebase_server.jobs.job_record import JobNotifier, JobRecord
from onebase_server.jobs.sampling import JobSampler
from onebase_server.jobs.state import (
    CHECKED,
    DELIVERED,
    FAILED,
    HELD,
    OUT_OF_QUOTA,
    RECHECK,
    REQUEUED,
    STARTED,
    Death,
    Move,
    resume_point,
)
from onebase_server.processes.trainer_client import Died, Outcome, TrainerClient
from onebase_server.processes.trainer_protocol import (
    Active,
    Check,
    DrawnReplies,
    Failed,
    FilesChecked,
    NotDrawn,
    ParentFiles,
    Stopped,
    Train,
    Trained,
    TrainJob,
)
from onebase_server.telemetry.traces import Tracing, failed
from onebase_server.tenancy.usage import TenantUsageRecorder
from onebase_training.events import Event, Notice, Reason, StepDone
from onebase_training.rollouts import RolloutOrder

RunKind = Literal["check", "train"]

EXPERIENCE = 5
"""Finished jobs by whose speed the time of the next one is estimated."""
BROKEN_SECONDS = 2.0
"""Pause before a job continues whose run ended because the registry could not be reached."""
STOP_SECONDS = 60.0
"""A trainer that has not written its checkpoint by then is killed; the checkpoint before it is whole."""
METER_SECONDS = 5.0
"""Time, in seconds, between two checks of the training quota, and so the longest excess over it."""
PASSING = ("device_error", "base_unavailable", "base_changed")
"""Failures that an engine causes when it is about to die: the next one may work."""

_log = logging.getLogger(__name__)


class FileGoneError(Exception):
    """A file that the job needs is gone. `param`: the job's field that names it."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(reason)
        self.param = param
        self.message = f"{param}: {reason} Upload it again and make a new job."


@dataclass(frozen=True)
class AttachedBase:
    """A base that a trainer attaches. `fd`: file descriptor of the base's memory."""

    config: EngineConfig
    manifest: bytes
    fd: int


@dataclass
class TrainerPool:
    """Dependencies that all runs of a server share.

    command: starts a trainer. share: part of the time for jobs while rows run. busy_fd: of the byte that
    says whether rows run. memory: bytes for one job, 0 for a part of what is free.
    """

    records: TrainingRecords
    threads: Threads
    notifier: JobNotifier
    files: TrainingFiles
    folders: JobFolders
    delivery: Delivery
    config: EngineConfig
    base: ResolvedBase
    command: Sequence[str]
    share: float
    memory: int
    busy_fd: int
    tenants: Tenants
    usage: TenantUsageRecorder
    checkpoints: CheckpointModels
    kept: KeptFiles
    tracing: Tracing
    base_id: str
    sampler: JobSampler | None = None
    """Samples for jobs that learn from rewards."""
    deaths: int = 0
    """Trainers that died without being stopped."""

    async def train_job(self, job: TrainingJob, record: JobRecord) -> TrainJob:
        """Return the job as the trainer's input. Raises FileGoneError, StoreError, RegistryError."""
        await self.kept.restore(job)
        train, train_path = await self._file(job, record, job.training_file, "training_file")
        held_out_name = held_out_path = None
        if job.validation_file:
            held_out, held_out_path = await self._file(job, record, job.validation_file, "validation_file")
            # Errors name the file, so two files need two names.
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
            folder=str(self.folders.job(job.id)),
            base_name=self.base.name,
            base_repo=self.base.repo,
            base_commit=self.base.revision,
            memory_limit=self.memory,
            parent=await self._parent(job),
            last_step=None if job.stop is None else job.stop.step,
            base_id=self.base_id,
        )

    async def _parent(self, job: TrainingJob) -> ParentFiles | None:
        """Return the files of the version that the job continues from. They are the job's own from its check
        on: the version may be deleted while the job waits for its turn, as a checkpoint is at the end of its
        job. Raises FileGoneError, StoreError."""
        if job.parent is None:
            return None
        try:
            return await self._version_files(job, job.parent, PARENT_FILES)
        except BlobMissingError as error:
            name = label(job.parent.name, job.parent.digest)
            raise FileGoneError(
                "model", f"{name} was deleted, from which training was to continue."
            ) from error

    async def active_version(self, job: TrainingJob) -> Active:
        """Return the version that requests for the job's adapter get now, as a trainer takes it."""
        version = await self.delivery.active_version(job)
        if version is None:
            return Active()
        active = Active(label=label(version.name, version.digest), digest=version.digest)
        for pause in BACKOFF.tries(TRIES):
            try:
                files = await self._version_files(job, ParentVersion.of(version), ACTIVE_FILES)
                return msgspec.structs.replace(active, files=files)
            except BlobMissingError:
                return msgspec.structs.replace(active, problem="its files are gone")
            except StoreError as error:
                _log.warning("job %s waits for the files of %s: %s", job.id, active.label, error)
                problem = f"its files cannot be read: {str(error).rstrip('.')}"
            if pause is None:
                break
            await asyncio.sleep(pause)
        return msgspec.structs.replace(active, problem=problem)

    async def _version_files(
        self, job: TrainingJob, version: ParentVersion, names: tuple[str, str]
    ) -> ParentFiles:
        """Bring a version's config and weights by these names to the job's folder. Raises StoreError."""
        run, hold, folder = self.files.disk.run_blocking, self.files.store.hold, self.folders.job(job.id)
        config = await run(hold, version.config, folder / names[0], own=True)
        weights = await run(hold, version.weights, folder / names[1], own=True)
        name = label(version.name, version.digest)
        return ParentFiles(label=name, digest=version.digest, config=str(config), weights=str(weights))

    async def _file(
        self, job: TrainingJob, record: JobRecord, file_id: str, param: str
    ) -> tuple[FileRecord, str]:
        try:
            file = await record.file(file_id)
            path = await self.files.disk.run_blocking(
                self.files.content, file, self.folders.job(job.id) / param
            )
        except (registry.UnknownFileError, TrainingFileNotFoundError) as error:
            raise FileGoneError(param, str(error)) from error
        return file, str(path)


class JobRun:
    """One process for one job: the check of its files, or its training and the delivery of what came out."""

    def __init__(self, pool: TrainerPool, job: TrainingJob, kind: RunKind, base: AttachedBase | None) -> None:
        self.job = job
        self.kind = kind
        self._pool = pool
        self._base = base
        self._trainer: TrainerClient | None = None
        self._stop: tuple[Reason, float] | None = None
        self._interrupted = ""
        self._ends_early = False
        self._delivering = False
        self._in_process = False
        self._tokens, self._counted = 0, 0.0
        self._released = asyncio.Event()
        self._record = JobRecord(job, pool.records, pool.threads, pool.notifier)

    def begin(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run())

    # ---- from outside ------------------------------------------------------------------------

    @property
    def holds_base(self) -> bool:
        """Return True if its process has attached the engine's base, or is about to."""
        return self.kind == "train" and not self._delivering

    @property
    def delivering(self) -> bool:
        """Return True if it has trained: others may train while its adapter is proved."""
        return self._delivering

    @property
    def stopping(self) -> bool:
        """Return True if somebody asked it to end: what its process then reports is no failure."""
        return self._stop is not None

    @property
    def computes(self) -> bool:
        """Return True if its process trains, and is not about to end."""
        return self.kind == "train" and self._trainer is not None and self._stop is None

    @property
    def pid(self) -> int | None:
        return None if self._trainer is None else self._trainer.pid

    @property
    def progress(self) -> Mapping[str, Any]:
        """The newest figures."""
        return self._record.progress

    async def ended(self) -> None:
        """Wait until it is over, however it ends."""
        await asyncio.gather(self.task, return_exceptions=True)

    async def released(self) -> None:
        """Wait until its process is gone; it may still deliver what it trained."""
        await self._released.wait()

    def stop(self, reason: Reason, seconds: float) -> None:
        """End the process: ask it to, and kill it after `seconds`. The job's new state is already written."""
        self._stop = (reason, seconds)
        if self._delivering:
            self.task.cancel()
        elif self._trainer is not None:
            self._trainer.stop(reason)
            asyncio.get_running_loop().call_later(seconds, self._trainer.kill)
        if not self._in_process:
            self._released.set()  # and none will be started

    def end_after(self, step: int) -> None:
        """End training after this step, or the one that is computed, and deliver the best. May be repeated.

        A trainer that is yet to start knows it from its job, or is told at the scheduler's next look.
        """
        if self._trainer is not None and not self._ends_early:
            self._ends_early = True
            self._trainer.end_after(step)

    def interrupt(self, why: str, seconds: float) -> None:
        """Stop the run as `stop` does, but leave the job queued, so that it is resumed later."""
        self._interrupted = why
        self._record.retries = False
        self.stop("pause", seconds)

    # ---- from start to end -------------------------------------------------------------------

    async def _run(self) -> None:
        told = {
            "onebase.job": self.job.id,
            "onebase.adapter": self.job.name,
            "onebase.tenant": self.job.tenant,
        }
        try:
            with self._pool.tracing.span("check job" if self.kind == "check" else "train job", told) as span:
                await self._do()
                span.set_attribute("onebase.job.state", self._record.state)
                for field in ("step", "tokens"):
                    if field in self.progress:
                        span.set_attribute(f"onebase.job.{field}", self.progress[field])
                if self._record.state == "failed":
                    failed(span, "failed")
        finally:
            self._released.set()

    async def _do(self) -> None:
        try:
            await (self._check() if self.kind == "check" else self._train_and_deliver())
        except (JobStateError, UnknownJobError):
            _log.info("job %s was stopped while it ran", self.job.id)
        except RegistryError as error:
            _log.error("job %s: %s", self.job.id, error)
            if not self.stopping:
                await asyncio.sleep(BROKEN_SECONDS)  # the scheduler starts it again at once
        except Exception:
            _log.exception("job %s failed", self.job.id)
            internal = TrainingFailure("internal_error", "The server failed on this job; its log says why.")
            with suppress(RegistryError):
                await self._fail(internal)

    async def _check(self) -> None:
        pool = self._pool
        outcome = await self._process(lambda job: Check(config=pool.config, job=job), {})
        if isinstance(outcome, FilesChecked):
            plan = with_experience(outcome.plan, await self._record.training_rates(EXPERIENCE))
            move, event = (HELD, _held(plan)) if self.job.hold else (CHECKED, _waits_for_its_turn())
            await self._record.move(move, event, plan=plan, deaths=0, death_step=0)
        else:
            await self._ended_early(outcome)

    async def _train_and_deliver(self) -> None:
        self.job = job = await self._record.move(STARTED)
        if not job.trained:
            if self._base is None:
                await self._record.move(REQUEUED)
                return
            outcome = await self._train(self._base)
            if not isinstance(outcome, Trained):
                await self._ended_early(outcome)
                return
            job = await self._keep_report(outcome.report)
        if job.state != "running":
            await self._stopped()
        elif self._stop is not None:
            await self._ended_early(Stopped(self._stop[0]))
        else:
            self._delivering = True
            self._released.set()
            await self._deliver(job)

    async def _train(self, base: AttachedBase) -> Outcome:
        pool = self._pool
        await self._check_quota()
        return await self._process(
            lambda job: Train(config=base.config, manifest=base.manifest, job=job, share=pool.share),
            {"--base-fd": base.fd, "--busy-fd": pool.busy_fd},
        )

    async def _keep_report(self, report: Mapping[str, Any]) -> TrainingJob:
        """Return the job with its report. If it still runs, its delivery can no longer be stopped."""
        state: JobState = "running"
        event = await self._ended_at(int(report["steps"]), int(report["best_step"]))
        while True:
            try:
                return await self._record.move(Move((state,), state), event, report=report)
            except JobStateError as error:
                if error.state not in ("running", "queued", "paused"):
                    raise
                state = cast(JobState, error.state)

    async def _ended_at(self, step: int, best: int) -> JobEvent | None:
        """Return the event of a job that somebody stopped, if the stop ended it early."""
        job = await self._record.current()
        steps = int((job.plan or {}).get("steps") or 0)
        if job.stop is None or step >= steps:
            return None
        asked = f"as key {job.stop.key} asked" if job.stop.key else "as it was asked to"
        kept = f" What is kept is step {best}, the best on held-out rows." if best != step else ""
        data = {"kind": "stopped", "step": step, "steps": steps, "best_step": best, "by": job.stop.key}
        return JobEvent(time.time(), f"It stopped at step {step} of {steps}, {asked}.{kept}", data=data)

    async def _deliver(self, job: TrainingJob) -> None:
        await self._record.add(JobEvent(time.time(), "The adapter is being proved."))
        try:
            done = await self._pool.delivery.deliver(job, self._record)
        except DeliveryError as error:
            lost = {"report": None} if error.code == LOST else {}
            await self._fail(TrainingFailure(error.code, error.message), **lost)
            return
        await self._record.move(
            DELIVERED,
            JobEvent(time.time(), done.message, level="info" if done.as_asked else "warn"),
            version=done.version,
            activated=done.activated,
            result_file=done.result_file,
            report={**(job.report or {}), "replaced": done.replaced},
        )

    async def _process(self, message: Callable[[TrainJob], Check | Train], fds: dict[str, int]) -> Outcome:
        """Run a trainer to its end, and record its messages."""
        try:
            job = await self._train_job()
            if self._stop is not None:
                return Stopped(self._stop[0])
            self._in_process = True
            self._trainer = await TrainerClient.start(
                self._pool.command,
                message(job),
                fds,
                self._take,
                lambda: self._pool.active_version(self.job),
                self._draw,
            )
            if self._stop is not None:
                self.stop(*self._stop)
            async with self._metered():
                return await self._trainer.outcome()
        except FileGoneError as error:
            return Failed(code="file_not_found", message=error.message, param=error.param)
        except StoreError as error:
            if self._stop is not None:
                return Stopped(self._stop[0])
            code = "disk_full" if isinstance(error, StoreFullError) else "store_unavailable"
            return Failed(code=code, message=f"The job's files cannot be read: {error} Resume the job later.")
        except OSError as error:
            return Failed(code="trainer_failed", message=f"The trainer cannot be started: {error}")
        finally:
            self._trainer, self._in_process = None, False
            if self._pool.sampler is not None:
                self._pool.sampler.forget(self.job)
            self._released.set()  # what is left to write must not keep an engine waiting
            await self._record.close()

    async def _draw(self, rollout: RolloutOrder) -> DrawnReplies | NotDrawn:
        """Return a rollout's replies with their rewards, on behalf of the job's key."""
        if self._pool.sampler is None:
            return NotDrawn("no_samples", "This server samples nothing for jobs.")
        return await self._pool.sampler.draw(self.job, rollout, self._warn)

    def _warn(self, message: str) -> None:
        self._take(Notice(at=time.time(), level="warn", message=message))

    async def _train_job(self) -> TrainJob:
        """Return the trainer's input. Tries again while the store cannot be reached, unless the job stops.

        Raises FileGoneError, StoreError, RegistryError.
        """
        for pause in BACKOFF.tries(TRIES):
            try:
                return await self._pool.train_job(self.job, self._record)
            except StoreError as error:
                if pause is None or self._stop is not None or isinstance(error, StoreFullError):
                    raise
                _log.warning("job %s waits: %s", self.job.id, error)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._released.wait()
        raise AssertionError("the last try returns or raises")

    def _take(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._tokens += event.tokens
        self._record.record_event(event)

    # ---- what it takes -----------------------------------------------------------------------

    @asynccontextmanager
    async def _metered(self) -> AsyncIterator[None]:
        """Count the seconds and tokens of training meanwhile."""
        if self.kind == "check":
            yield
            return
        meter = asyncio.get_running_loop().create_task(self._meter())
        try:
            yield
        finally:
            meter.cancel()
            await asyncio.gather(meter, return_exceptions=True)

    async def _meter(self) -> None:
        self._counted = time.monotonic()
        try:
            while True:
                await asyncio.sleep(METER_SECONDS)
                self._count()
                await self._check_quota()
        finally:
            self._count()

    def _count(self) -> None:
        now = time.monotonic()
        self._pool.usage.trained(self.job.tenant, self.job.name, now - self._counted, self._tokens)
        self._counted, self._tokens = now, 0

    async def _check_quota(self) -> None:
        """End the run when its tenant has trained long enough; the job fails, and can be resumed."""
        try:
            await self._pool.usage.flush()
            await self._pool.threads.run_blocking(self._pool.tenants.check_training, self.job.tenant)
        except QuotaError as error:
            with suppress(JobStateError, RegistryError):
                failed = TrainingFailure("insufficient_quota", str(error))
                event = JobEvent(time.time(), str(error), level="error", data={"code": failed.code})
                await self._record.move(OUT_OF_QUOTA, event, error=failed)
                self.stop("pause", STOP_SECONDS)
        except RegistryError as error:
            _log.warning("the quota of job %s cannot be checked now: %s", self.job.id, error)
        except Exception:  # what trains goes on to be counted
            _log.exception("the quota of job %s cannot be checked now", self.job.id)

    # ---- other ends --------------------------------------------------------------------------

    async def _ended_early(self, outcome: Outcome) -> None:
        """Handle a process that has ended before its work was done."""
        if self._interrupted:
            await self._interrupted_for_now()
        elif isinstance(outcome, Failed) and self.stopping:
            await self._record.add(JobEvent(time.time(), outcome.message, level="warn"))
        elif isinstance(outcome, Failed) and outcome.code not in PASSING:
            await self._failed(outcome)
        elif self.stopping:
            await self._stopped()
        elif isinstance(outcome, Failed):
            await self._died(f"{outcome.code} ({outcome.message})")
        else:
            await self._died(outcome.how if isinstance(outcome, Died) else type(outcome).__name__)

    async def _failed(self, failed: Failed) -> None:
        for event in problem_events(failed):
            await self._record.add(event)
        await self._fail(TrainingFailure(failed.code, failed.message, failed.param))

    async def _fail(self, error: TrainingFailure, **facts: Any) -> None:
        event = JobEvent(time.time(), error.message, level="error", data={"code": error.code})
        await self._record.move(FAILED, event, error=error, **facts)

    async def _interrupted_for_now(self) -> None:
        job = await self._record.current()
        message = f"Interrupted: {self._interrupted}. The job continues {resume_point(job)}."
        if job.state == "running":
            await self._record.move(REQUEUED, JobEvent(time.time(), message))

    async def _stopped(self) -> None:
        job = await self._record.current()
        if job.state == "paused":
            await self._record.add(
                JobEvent(time.time(), f"Paused. A resumed job continues {resume_point(job)}.")
            )

    async def _died(self, how: str) -> None:
        self._pool.deaths += 1
        death = Death.of(await self._record.current(), how)
        _log.error(
            "the trainer of job %s died (%s), %d times since its last checkpoint",
            self.job.id,
            how,
            death.count,
        )
        if death.last:
            await self._fail(TrainingFailure("trainer_died", death.message), **death.facts)
            return
        event = JobEvent(time.time(), death.message, level="warn")
        if self.kind == "check":
            await self._record.move(RECHECK, event, **death.facts)
        else:
            await self._record.move(REQUEUED, event, **death.facts)
        await asyncio.sleep(death.pause)


def with_experience(plan: Mapping[str, Any], rates: Sequence[float]) -> dict[str, Any]:
    """Return a job's plan, with the time it will take by finished jobs of its base, if there are some.

    Args:
        rates: FLOP/s of those jobs.
    """
    estimate = dict(plan["estimate"])
    if rates and estimate.get("total_tokens"):
        work = estimate["total_tokens"] * estimate["flops_per_token"]
        estimate |= {
            "seconds": work / median(rates),
            "seconds_low": work / max(rates),
            "seconds_high": work / min(rates),
            "seconds_from": "finished_jobs",
            "finished_jobs": len(rates),
        }
    return {**plan, "estimate": estimate}


def _waits_for_its_turn() -> JobEvent:
    return JobEvent(time.time(), "The job waits for its turn.")


def _held(plan: Mapping[str, Any]) -> JobEvent:
    """Return the event of a job that waits to be resumed, with the training that it estimates."""
    steps = plan["steps"]
    data = {"kind": "held", "steps": steps, "estimate": plan["estimate"]}
    return JobEvent(
        time.time(),
        f"The job is checked, and {steps} steps are planned. It waits: resume it to train.",
        data=data,
    )
