"""Training files, jobs, events and checkpoints as the JSON that callers get: OpenAI's, and a little more."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, cast

from msgspec.structs import replace

from onebase_adapters.names import label
from onebase_adapters.registry import Checkpoint, FileRecord, JobEvent, TrainingJob
from onebase_protocol import training as wire
from onebase_protocol.adapters import ParentAnswer
from onebase_protocol.common import Json
from onebase_server.adapters.catalog import VisibleAdapters
from onebase_server.jobs.checkpoints import checkpoint_model
from onebase_server.jobs.state import is_resumable
from onebase_training.graders import Grade, Grader, judges, to_json

EVENT, CHECKPOINT = "ftevent-", "ftckpt-"
_DIGITS = 16
_FLAGS = (
    "formula_parse_error",
    "sample_parse_error",
    "truncated_observation_error",
    "unresponsive_reward_error",
    "invalid_variable_error",
    "other_error",
    "python_grader_server_error",
    "python_grader_runtime_error",
    "model_grader_server_error",
    "model_grader_refusal_error",
    "model_grader_parse_error",
)
"""Errors of a grader's run, as OpenAI names them."""
_DETAILS = {
    "python_grader_server_error_type": "python_grader_server_error",
    "python_grader_runtime_error_details": "python_grader_runtime_error",
    "model_grader_server_error_details": "model_grader_server_error",
}
_MULTIPLIER = "learning_rate_multiplier"
_OPENAI = ("batch_size", _MULTIPLIER)


def file_view(file: FileRecord) -> wire.TrainingFile:
    return wire.TrainingFile(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        sha256=file.sha256,
    )


def job_view(
    job: TrainingJob, base_name: str, names: VisibleAdapters, *, in_list: bool = False
) -> wire.TrainingJobInfo:
    """Return one job; `report` lacks the curve, which is in the result file, and in a list also slices and
    classes. Its report and its progress are JSON of the registry, and are sent as they are.

    names: those of its tenant.
    """
    recipe = (job.plan or {}).get("recipe") or job.settings
    settings = {key: value for key, value in recipe.items() if key not in ("method", "seed", "grader")}
    shown = {"n_epochs": _whole(recipe["epochs"]), **{k: recipe[k] for k in _OPENAI}}
    if job.settings[_MULTIPLIER] != "auto":  # of a plan it is 1: the rate there has it in it
        shown[_MULTIPLIER] = job.settings[_MULTIPLIER]
    kind = recipe["method"]
    report, parent = job.report, job.parent
    grader = {"grader": json.loads(recipe["grader"])} if recipe.get("grader") else {}
    return wire.TrainingJobInfo(
        id=job.id,
        model=base_name if parent is None else label(parent.name, parent.digest),
        created_at=int(job.created_at),
        finished_at=None if job.finished_at is None else int(job.finished_at),
        estimated_finish=_estimated_finish(job),
        fine_tuned_model=label(job.name, job.version) if job.version else None,
        organization_id=job.tenant,
        result_files=(job.result_file,) if job.result_file else (),
        status=job.state,
        training_file=job.training_file,
        validation_file=job.validation_file,
        hyperparameters=shown,
        method_settings={"type": kind, kind: {**grader, "hyperparameters": {**settings, **shown}}},
        trained_tokens=report.get("tokens") if report and job.ended else None,
        seed=recipe["seed"],
        metadata=dict(job.labels),
        error=None if job.error is None else replace(job.error, param=wire_name(job.error.param)),
        name=job.name,
        parent_version=None if parent is None else ParentAnswer(parent.name, parent.digest),
        activate=job.activate,
        activated=None if job.activated is None else is_active(job, names),
        version=job.version,
        replaced=(report or {}).get("replaced"),
        progress=cast(wire.TrainingProgress | None, job.progress),
        estimate=(job.plan or {}).get("estimate"),
        report=cast(wire.TrainingReport, _report(report, slices=not in_list)) if report else None,
        resumable=is_resumable(job.state, job.error_code),
        hold=job.hold,
        stopped=_stopped(job),
        created_by=job.key,
    )


def _stopped(job: TrainingJob) -> wire.TrainingStop | None:
    if job.stop is None:
        return None
    steps = int((job.plan or {}).get("steps") or 0)
    step = None if job.report is None else int(job.report["steps"])
    if step == steps:  # it had come to its own end
        return None
    return wire.TrainingStop(step, steps, job.stop.key, int(job.stop.at))


def is_active(job: TrainingJob, names: VisibleAdapters) -> bool:
    """Return True if requests for the job's adapter get its version now."""
    record = names.own(job.name)
    return record is not None and job.version is not None and record.active == job.version


def _report(report: Mapping[str, Any], *, slices: bool) -> Json:
    shown = {name: report[name] for name in wire.TrainingReport.__struct_fields__ if name in report}
    return shown if slices else shown | {"slices": None, "classes": None, "replies": ()}


def event_view(event: JobEvent) -> wire.TrainingEvent:
    return wire.TrainingEvent(
        id=event_id(event.number),
        created_at=int(event.at),
        level=event.level,
        message=event.message,
        type=event.kind,
        facts=None if event.data is None else dict(event.data),
    )


def grader_run_view(grader: Grader, found: Grade, seconds: float) -> wire.GraderRun:
    """Return what a grader gave one text."""
    flags = {name: name in found.errors for name in _FLAGS}
    details = {name: found.errors.get(flag) for name, flag in _DETAILS.items()}
    kind = str(to_json(grader)["type"])
    models = [one.model for one in judges(grader)]
    return wire.GraderRun(
        reward=found.reward,
        sub_rewards=found.parts,
        model_grader_token_usage_per_model=dict(found.tokens),
        metadata=wire.GraderRunMetadata(
            name=grader.name,
            type=kind,
            errors={**flags, **details},
            execution_time=seconds,
            scores=found.parts or {grader.name: found.reward},
            token_usage=found.tokens.total() or None,
            sampled_model_name=models[0] if models else None,
        ),
    )


def checkpoint_view(checkpoint: Checkpoint, job: TrainingJob) -> wire.TrainingCheckpoint:
    metrics: Mapping[str, float | None] = {
        "step": float(checkpoint.step),
        "train_loss": checkpoint.train_loss,
        "valid_loss": checkpoint.valid_loss,
        "full_valid_loss": checkpoint.valid_loss,
    }
    return wire.TrainingCheckpoint(
        id=checkpoint_id(checkpoint.number),
        created_at=int(checkpoint.at),
        model=checkpoint_model(job, checkpoint.step),
        job=job.id,
        metrics={key: value for key, value in metrics.items() if value is not None},
        step=checkpoint.step,
    )


def event_id(number: int) -> str:
    return f"{EVENT}{number:0{_DIGITS}d}"


def checkpoint_id(number: int) -> str:
    return f"{CHECKPOINT}{number:0{_DIGITS}d}"


def number_of(given: str, prefix: str) -> int | None:
    """Return the number in an id, or None if it is none."""
    digits = given.removeprefix(prefix)
    if not given.startswith(prefix) or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        return None
    return int(digits)


def wire_name(field: str | None) -> str | None:
    """Return the name by which OpenAI's clients call a recipe's field."""
    return "n_epochs" if field == "epochs" else field


def _whole(value: Any) -> Any:
    """Return whole epochs as an integer, which OpenAI's client takes them as."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _estimated_finish(job: TrainingJob) -> int | None:
    left = (job.progress or {}).get("seconds_left")
    goes_on = job.state == "running" and job.stop is None
    return int(time.time() + left) if left is not None and goes_on else None
