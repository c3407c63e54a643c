"""One job on its way: a trainer process, what it says, how it ends, and what follows from that."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, cast

from onebase_adapters.registry import (
    OPEN_STATES,
    JobError,
    JobEvent,
    JobState,
    JobStateError,
    RegistryError,
    TrainingJob,
    UnknownJobError,
)
from onebase_adapters.training.events import DataChecked
from onebase_adapters.training.gate import Reason
from onebase_server.jobs.deaths import Death
from onebase_server.jobs.delivery import LOST, DeliveryError
from onebase_server.jobs.event_view import problems_told
from onebase_server.jobs.outcomes import place_of
from onebase_server.jobs.recorder import Recorder
from onebase_server.jobs.store import JobRecord
from onebase_server.jobs.trainer_pool import AttachedBase, FileGoneError, Runner
from onebase_server.processes.trainer_link import Died, Outcome, Trainer
from onebase_server.processes.trainer_protocol import Check, Checked, Failed, Stopped, Train, Trained

RunKind = Literal["check", "train"]

BROKEN_SECONDS = 2.0
"""Before a job is taken up whose run ended since the registry was away."""
PASSING = ("device_error", "base_unavailable", "base_changed")
"""Failures that an engine which is about to die causes: the next one may be well."""

_log = logging.getLogger(__name__)


class Run:
    """One process for one job: the check of its files, or its training and the delivery of what came out."""

    def __init__(self, runner: Runner, job: TrainingJob, kind: RunKind, base: AttachedBase | None) -> None:
        self.job = job
        self.kind = kind
        self.recorder: Recorder | None = None
        self._runner = runner
        self._base = base
        self._trainer: Trainer | None = None
        self._stop: tuple[Reason, float] | None = None
        self._interrupted = ""
        self._delivering = False
        self._in_process = False
        self._released = asyncio.Event()
        self._record = JobRecord(job, runner.records, runner.threads, runner.watchers)

    def begin(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run())

    # ---- from outside ------------------------------------------------------------------------

    @property
    def holds_base(self) -> bool:
        """Whether its process has attached the engine's base, or is about to."""
        return self.kind == "train" and not self._delivering

    @property
    def delivering(self) -> bool:
        """It has trained: others may train while its adapter is proved."""
        return self._delivering

    @property
    def stopping(self) -> bool:
        """Somebody wants it to end: what its process says of that is no failure."""
        return self._stop is not None

    @property
    def computes(self) -> bool:
        """Whether its process trains, and is not about to end."""
        return self.kind == "train" and self._trainer is not None and self._stop is None

    @property
    def pid(self) -> int | None:
        return None if self._trainer is None else self._trainer.pid

    @property
    def progress(self) -> Mapping[str, Any]:
        """The newest figures."""
        return self.recorder.progress if self.recorder is not None else {}

    async def ended(self) -> None:
        """Wait until it is over, however it ends."""
        await asyncio.gather(self.task, return_exceptions=True)

    async def released(self) -> None:
        """Wait until it has no process any more; what it delivers then is another matter."""
        await self._released.wait()

    def stop(self, reason: Reason, seconds: float) -> None:
        """End the process: asked first, killed after `seconds`. The job's new state is written already."""
        self._stop = (reason, seconds)
        if self._delivering:
            self.task.cancel()
        elif self._trainer is not None:
            self._trainer.stop(reason)
            asyncio.get_running_loop().call_later(seconds, self._trainer.kill)
        if not self._in_process:
            self._released.set()  # and none will be started

    def interrupt(self, why: str, seconds: float) -> None:
        """As `stop`, although the job is to go on: it waits for its turn again."""
        self._interrupted = why
        self._record.patient = False
        self.stop("pause", seconds)

    # ---- the way -----------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._do()
        finally:
            self._released.set()

    async def _do(self) -> None:
        try:
            await (self._check() if self.kind == "check" else self._train_and_deliver())
        except (JobStateError, UnknownJobError):
            _log.info("job %s was stopped on its way", self.job.id)
        except RegistryError as error:
            _log.error("job %s: %s", self.job.id, error)
            if not self.stopping:
                await asyncio.sleep(BROKEN_SECONDS)  # it is taken up again at once
        except FileGoneError as error:
            with suppress(RegistryError):
                await self._fail(JobError("file_not_found", error.message, error.param))
        except Exception:
            _log.exception("job %s failed", self.job.id)
            internal = JobError("internal_error", "The server failed on this job; its log says why.")
            with suppress(RegistryError):
                await self._fail(internal)

    async def _check(self) -> None:
        runner = self._runner
        outcome = await self._process(
            Check(config=runner.config, job=await runner.train_job(self.job, self._record)), {}
        )
        if isinstance(outcome, Checked):
            event = JobEvent(time.time(), "The job waits for its turn.")
            told: dict[str, Any] = {"plan": outcome.plan, "deaths": 0, "death_step": 0}
            await self._record.move("queued", ("validating_files",), event, **told)
        else:
            await self._ended_early(outcome)

    async def _train_and_deliver(self) -> None:
        self.job = job = await self._record.move("running", ("queued",))
        if not job.trained:
            if self._base is None:
                await self._record.move("queued", ("running",))
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
        runner = self._runner
        job = await runner.train_job(self.job, self._record)
        message = Train(config=base.config, manifest=base.manifest, job=job, share=runner.share)
        return await self._process(message, {"--base-fd": base.fd, "--busy-fd": runner.busy_fd})

    async def _keep_report(self, report: Mapping[str, Any]) -> TrainingJob:
        """The job with what training found. If it runs still, nobody stops its delivery."""
        state: JobState = "running"
        while True:
            try:
                return await self._record.move(state, (state,), report=report)
            except JobStateError as error:
                if error.state not in ("running", "queued", "paused"):
                    raise
                state = cast(JobState, error.state)

    async def _deliver(self, job: TrainingJob) -> None:
        await self._record.tell(JobEvent(time.time(), "The adapter is being proved."))
        try:
            done = await self._runner.delivery.deliver(job, self._record)
        except DeliveryError as error:
            lost = {"report": None} if error.code == LOST else {}
            await self._fail(JobError(error.code, error.message), **lost)
            return
        await self._record.move(
            "succeeded",
            ("running",),
            JobEvent(time.time(), done.message, level="info" if done.as_wished else "warn"),
            version=done.version,
            activated=done.activated,
            result_file=done.result_file,
        )

    async def _process(self, message: Check | Train, fds: dict[str, int]) -> Outcome:
        """Run a trainer to its end, and write down what it says."""
        runner = self._runner
        self.recorder = recorder = Recorder(
            self.job.id, runner.records, runner.threads, runner.watchers, self.job.progress or {}
        )
        # A run reads the files once more, but what there is to say of them was said by their check.
        recorder.silent = (DataChecked,) if self.kind == "train" else ()
        try:
            if self._stop is not None:
                return Stopped(self._stop[0])
            self._in_process = True
            self._trainer = await Trainer.start(runner.command, message, fds, recorder.listen)
            if self._stop is not None:
                self.stop(*self._stop)
            return await self._trainer.outcome()
        except OSError as error:
            return Failed(code="trainer_failed", message=f"The trainer cannot be started: {error}")
        finally:
            self._trainer, self._in_process = None, False
            self._released.set()  # what is left to write must not keep an engine waiting
            await recorder.close(lambda: self._record.patient)

    # ---- other ends --------------------------------------------------------------------------

    async def _ended_early(self, outcome: Outcome) -> None:
        """The process has ended without having done what it was for."""
        if self._interrupted:
            await self._interrupted_for_now()
        elif isinstance(outcome, Failed) and self.stopping:
            await self._record.tell(JobEvent(time.time(), outcome.message, level="warn"))
        elif isinstance(outcome, Failed) and outcome.code not in PASSING:
            await self._failed(outcome)
        elif self.stopping:
            await self._stopped()
        elif isinstance(outcome, Failed):
            await self._died(f"{outcome.code} ({outcome.message})")
        else:
            await self._died(outcome.how if isinstance(outcome, Died) else type(outcome).__name__)

    async def _failed(self, failed: Failed) -> None:
        for event in problems_told(failed):
            await self._record.tell(event)
        await self._fail(JobError(failed.code, failed.message, failed.param))

    async def _fail(self, error: JobError, **facts: Any) -> None:
        event = JobEvent(time.time(), error.message, level="error", data={"code": error.code})
        await self._record.move("failed", OPEN_STATES, event, error=error, **facts)

    async def _interrupted_for_now(self) -> None:
        job = await self._record.current()
        event = JobEvent(time.time(), f"Interrupted: {self._interrupted}. The job goes on {place_of(job)}.")
        if job.state == "running":
            await self._record.move("queued", ("running",), event)

    async def _stopped(self) -> None:
        job = await self._record.current()
        if job.state == "paused":
            await self._record.tell(JobEvent(time.time(), f"Paused. A resumed job goes on {place_of(job)}."))

    async def _died(self, how: str) -> None:
        self._runner.deaths += 1
        death = Death.of(await self._record.current(), how)
        _log.error(
            "the trainer of job %s died (%s), %d times since its last checkpoint",
            self.job.id,
            how,
            death.count,
        )
        if death.last:
            await self._fail(JobError("trainer_died", death.message), **death.facts)
            return
        event = JobEvent(time.time(), death.message, level="warn")
        if self.kind == "check":
            await self._record.move("validating_files", ("validating_files",), event, **death.facts)
        else:
            await self._record.move("queued", ("running",), event, **death.facts)
        await asyncio.sleep(death.pause)
