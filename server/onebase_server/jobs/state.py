"""The states of a job: which may follow which, by what, and where a job continues.

    from                              by          to
    validating_files                  CHECKED     queued            its files are sound
    validating_files                  HELD        paused            they are, and it is to wait for a word
    validating_files                  RECHECK     validating_files  the process that checked them died
    queued                            STARTED     running
    running                           REQUEUED    queued            interrupted, or its trainer died
    running                           DELIVERED   succeeded
    validating_files, queued, running FAILED      failed
    running                           OUT_OF_QUOTA failed         its tenant has trained long enough
    queued, running                   PAUSED      paused
    those of FAILED, and paused       cancelled   cancelled         also failed, if it is resumable
    paused, and failed if resumable   resumed     queued            without a plan: validating_files
    queued, running                   stopping    as it was         it ends after the step that it computes
    paused, and failed if resumable   stopping    queued            it goes on, and ends at once

Nothing follows `succeeded`, `cancelled`, or `failed` by an error that is not in RESUMABLE. An interrupted job
has no state of its own: it is queued, and goes on after its last checkpoint, also where another server has it
by then. A job whose adapter is being delivered is `running`; users can neither pause nor cancel it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onebase_adapters.registry import OPEN_STATES, RESUMABLE, JobState, OpenJob, TrainingJob
from onebase_edge.background import Backoff

MAX_DEATHS = 3
"""Trainers that may die without a checkpoint in between; with the next one the job fails."""
BACKOFF = Backoff(0.5, 2.0)
"""Pause, in seconds, before the next trainer is started, by the number of deaths."""


@dataclass(frozen=True)
class Move:
    """A change from any state of `among` to the state `to`.

    while_delivered: whether it is allowed while the job's adapter is being delivered.
    """

    among: tuple[JobState, ...]
    to: JobState
    while_delivered: bool = True


CHECKED = Move(("validating_files",), "queued")
HELD = Move(("validating_files",), "paused")
RECHECK = Move(("validating_files",), "validating_files")
STARTED = Move(("queued",), "running")
REQUEUED = Move(("running",), "queued")
DELIVERED = Move(("running",), "succeeded")
FAILED = Move(OPEN_STATES, "failed")
OUT_OF_QUOTA = Move(("running",), "failed", while_delivered=False)
PAUSED = Move(("queued", "running"), "paused", while_delivered=False)


def cancelled(job: TrainingJob) -> Move:
    """Return the move that ends a job for good, also one that failed and could continue."""
    failed: tuple[JobState, ...] = ("failed",) if is_resumable("failed", job.error_code) else ()
    return Move((*OPEN_STATES, "paused", *failed), "cancelled", while_delivered=False)


def resumed(job: TrainingJob) -> Move:
    """Return the move by which a resumable job continues. Without a plan its files have not been checked
    yet."""
    return Move((job.state,), "queued" if job.plan else "validating_files", while_delivered=False)


def stopping(job: TrainingJob) -> Move:
    """Return the move for ending a job early that has steps done; one that waits to be resumed continues for
    that."""
    to: JobState = job.state if job.state in OPEN_STATES else "queued"
    return Move((job.state,), to, while_delivered=False)


def steps_done(job: TrainingJob) -> int:
    """Return the steps done, as far as is known here; of a job that does not run, the saved ones if any
    are."""
    told = int((job.progress or {}).get("step") or 0)
    return max(job.saved_step, told) if job.state == "running" else job.saved_step or told


def is_resumable(state: JobState, error_code: str | None) -> bool:
    """Return True if `resume` continues a job in this state, with this error."""
    return state == "paused" or (state == "failed" and error_code in RESUMABLE)


def resume_point(job: TrainingJob | OpenJob) -> str:
    """Return the point at which a job is resumed, as the end of a sentence."""
    if job.trained:
        return "with the proof of its adapter"
    return f"after step {job.saved_step}" if job.saved_step else "from its beginning"


@dataclass(frozen=True)
class Death:
    """A death of a job's trainer. `how`: `signal SIGKILL`; `count`: deaths since a checkpoint, with this."""

    job: TrainingJob
    how: str
    count: int

    @classmethod
    def of(cls, job: TrainingJob, how: str) -> Death:
        """Return the newest death of a job, whose record does not count it yet."""
        return cls(job, how, job.deaths + 1 if job.saved_step <= job.death_step else 1)

    @property
    def last(self) -> bool:
        """Return True if the job fails by it; else another trainer is started."""
        return self.count > MAX_DEATHS

    @property
    def pause(self) -> float:
        """Seconds before the next trainer is started."""
        return BACKOFF.pause(self.count)

    @property
    def facts(self) -> dict[str, Any]:
        """Return the death's columns in the job's record."""
        return {"deaths": self.count, "death_step": self.job.saved_step}

    @property
    def message(self) -> str:
        """Return the message for the job's owner."""
        killed = " The kernel also ends a process by SIGKILL when memory is short."
        hint = killed if "SIGKILL" in self.how else ""
        if self.last:
            return (
                f"The trainer's process ended {self.count} times without reaching a checkpoint, the last "
                f"time by {self.how}.{hint} The server's log may say more. The job can be resumed."
            )
        return f"The trainer's process ended by {self.how}.{hint} The job continues {resume_point(self.job)}."
