"""What the end of a job means: whether it can go on, and what of its folder is still needed."""

from __future__ import annotations

from onebase_adapters.registry import JobState, OpenJob, TrainingJob

RESUMABLE = frozenset(
    {
        "adapter_lost", "base_changed", "delivery_failed", "device_error", "disk_full",
        "internal_error", "no_memory", "out_of_memory", "prepared_damaged", "proof_crashed", "proof_timeout",
        "store_unavailable", "trainer_died", "trainer_failed",
    }
)  # fmt: skip
"""Errors that may not come again: the job stands at its last checkpoint, or is delivered once more."""


def resumable(job: TrainingJob) -> bool:
    """Whether `resume` would do something."""
    return job.state == "paused" or may_go_on(job.state, job.error.code if job.error else None)


def may_go_on(state: JobState, code: str | None) -> bool:
    """Whether a job that has ended like this can be resumed."""
    return state == "failed" and code in RESUMABLE


def place_of(job: TrainingJob | OpenJob) -> str:
    """Where a job goes on, as the end of a sentence."""
    if job.trained:
        return "with the proof of its adapter"
    return f"after step {job.saved_step}" if job.saved_step else "from its beginning"
