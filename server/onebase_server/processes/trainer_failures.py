"""What can end a job, as the api is told it: a stable code, and a sentence that says what to change."""

from __future__ import annotations

import errno

import torch

from onebase_adapters.training.checkpoint import CheckpointError
from onebase_adapters.training.data.dataset import DataError
from onebase_adapters.training.loop import TrainingDivergedError
from onebase_adapters.training.recipe import RecipeError
from onebase_adapters.training.run import DoesNotFitError
from onebase_engine.base.attach import AttachError
from onebase_engine.base.load import BaseChangedError
from onebase_engine.machine import is_out_of_memory
from onebase_server.processes.trainer_protocol import MAX_PROBLEMS, Failed, Problem, TrainJob

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


UNEXPECTED = ("trainer_failed", "device_error", "base_unavailable", "base_changed")
"""Codes of failures whose traceback belongs into the server's log."""


def failure_of(error: BaseException, job: TrainJob, *, limit: int) -> Failed:
    """Any error of a run, for the one who made the job. `limit`: bytes that it may take."""
    if isinstance(error, RecipeError):
        return Failed(code="invalid_value", message=str(error), param=error.field or None)
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
        problems=[Problem(one.line, one.field, one.reason) for one in error.problems[:MAX_PROBLEMS]],
        problem_count=len(error.problems),
    )


def _is_about_space(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(part in str(error) for part in _NO_SPACE)
