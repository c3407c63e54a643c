"""A run's messages as OpenAI's events, for those who follow the job."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from onebase_adapters.registry import JobEvent
from onebase_server.processes.trainer_protocol import Failed
from onebase_training import events

PROBLEMS_IN_ONE = 500
"""Bad lines in one event."""
_LONG = ("losses", "held_out", "recipe", "slices", "classes", "replies")
"""Parts of a report that the result file and the job have."""

_SUBJECTS = {"active": "active version"}
"""Subjects of figures in words, where their name alone is none."""


def job_event(event: events.Event) -> JobEvent | None:
    """Return the event of the job that it makes; None when it only changes the progress."""
    if isinstance(event, events.StepDone):
        return _metrics(event, f"Step {event.step}/{event.steps}: {_measure(event, 'training loss')}", {
            "step": event.step, "total_steps": event.steps, "epoch": event.epoch, "train_loss": event.loss,
            "learning_rate": event.learning_rate, "grad_norm": event.grad_norm,
            "tokens_per_second": event.tokens_per_second, "seconds_left": event.seconds_left,
            "memory_bytes": event.memory_bytes, "train_accuracy": event.accuracy, **_rewards(event.rewards),
        })  # fmt: skip
    if isinstance(event, events.Evaluated):
        if event.parent:
            return _metrics(event, f"Step 0: {_measure(event)} (what it goes on from)", {
                "step": 0, "parent_loss": event.loss, **_rewards(event.rewards),
            })  # fmt: skip
        if event.active:
            return _metrics(event, f"{event.active}, which is active: {_measure(event)}", {
                "step": event.step, "active": event.active, "active_loss": event.loss,
                "active_accuracy": event.accuracy, **_rewards(event.rewards),
            })  # fmt: skip
        whose = "" if event.step else " (the base)"
        return _metrics(event, f"Step {event.step}: {_measure(event)}{whose}", {
            "step": event.step, "valid_loss": event.loss, "full_valid_loss": event.loss, "best": event.best,
            "valid_accuracy": event.accuracy, **_rewards(event.rewards),
        })  # fmt: skip
    if isinstance(event, events.Measured):
        figures = ", ".join(f"{name} {value:.3f}" for name, value in event.metrics.items())
        given = "Labels" if "accuracy" in event.metrics else "Replies"
        return _metrics(
            event,
            f"{given} of the {_SUBJECTS.get(event.subject, event.subject)}: {figures}",
            msgspec.to_builtins(event) | {"type": None},
        )
    if isinstance(event, events.StageProgress):
        return None
    return JobEvent(event.at, _message(event), level=_level(event), data=_data(event))


def problem_events(failed: Failed) -> list[JobEvent]:
    """Return the bad lines that the trainer named (protocol.MAX_PROBLEMS), PROBLEMS_IN_ONE to an event."""
    now = time.time()
    made = []
    for start in range(0, len(failed.problems), PROBLEMS_IN_ONE):
        part = failed.problems[start : start + PROBLEMS_IN_ONE]
        count = failed.problem_count
        of = f"problems {start + 1} to {start + len(part)} of {count}" if count > len(part) else "problems"
        message = f"{failed.param}: {of}"
        data = {"param": failed.param, "problems": [msgspec.to_builtins(problem) for problem in part]}
        made.append(JobEvent(now, message, level="error", data=data))
    return made


def _metrics(event: events.Event, message: str, data: dict[str, Any]) -> JobEvent:
    return JobEvent(event.at, message, kind="metrics", data={k: v for k, v in data.items() if v is not None})


def _measure(event: events.StepDone | events.Evaluated, name: str = "held-out loss") -> str:
    """Return a step's loss in words; the reward, if replies were graded."""
    if (reward := event.rewards.get("mean")) is not None:
        return f"{'mean' if isinstance(event, events.StepDone) else 'held-out'} reward {reward:.3f}"
    return f"{name} {event.loss:.4f}"


def _rewards(rewards: dict[str, float]) -> dict[str, float]:
    return {f"rewards_{name}": value for name, value in rewards.items()}


def _level(event: events.Event) -> Any:
    return event.level if isinstance(event, events.Notice) and event.level in ("info", "warn") else "info"


def _message(event: events.Event) -> str:
    if isinstance(event, events.Phase):
        return event.message or f"{event.name.replace('_', ' ').capitalize()}."
    if isinstance(event, events.DataChecked):
        return f"The files are sound: {_sizes(event)}."
    if isinstance(event, events.Planned):
        if event.first_step:
            return f"Continuing after step {event.first_step} of {event.steps}."
        return f"{event.steps} steps are planned."
    if isinstance(event, events.Sampled):
        return f"Step {event.step}: a sample."
    if isinstance(event, events.Saved):
        return f"Step {event.step}: checkpoint saved."
    if isinstance(event, events.Notice):
        return event.message
    return "The adapter is written."


def _sizes(event: events.DataChecked) -> str:
    train, held_out = event.report, event.report.get("evaluation") or {}
    text = f"{train.get('rows', '?')} rows to train on"
    return f"{text}, {held_out['rows']} held out" if held_out.get("rows") else text


def _data(event: events.Event) -> dict[str, Any] | None:
    if isinstance(event, events.Notice):
        return None
    facts: dict[str, Any] = msgspec.to_builtins(event)
    kept = {key: value for key, value in facts.items() if key not in ("at", "type", "message")}
    if isinstance(event, events.Finished):
        kept["report"] = {key: value for key, value in event.report.items() if key not in _LONG}
    return {"kind": facts["type"], **kept}
