"""The events of a training run, and the gate at which it waits or is stopped.

The same events go to a terminal, a file and over a socket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all events. `at`: Unix seconds."""

    at: float


class Phase(Event, frozen=True, kw_only=True, tag="phase"):
    """Start of a stage: validating_files, training, measuring or saving."""

    name: str
    message: str = ""


class DataChecked(Event, frozen=True, kw_only=True, tag="data_checked"):
    """The files are sound. `report`: DataReport.to_json()."""

    report: dict[str, Any]


class Planned(Event, frozen=True, kw_only=True, tag="planned"):
    """The resolved recipe and its estimate. `estimate`: Estimate.to_json()."""

    recipe: dict[str, Any]
    estimate: dict[str, Any]
    steps: int
    first_step: int
    """Steps that an earlier run has done; above 0 when it continues from a checkpoint."""


class StepDone(Event, frozen=True, kw_only=True, tag="step"):
    """Result of an optimizer step. loss: mean over the step's supervised tokens (classification: its rows),
    in nats."""

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens of this step, supervised or not."""
    total_tokens: int
    tokens_per_second: float
    seconds_left: float
    memory_bytes: int
    """Peak memory of the process so far (resident set on the CPU, allocated on CUDA)."""
    rewards: dict[str, float] = {}
    """Means of DPO: accuracy, margin."""
    accuracy: float | None = None
    """Classification: part of the step's rows whose label was the likeliest."""


class Evaluated(Event, frozen=True, kw_only=True, tag="evaluated"):
    """Held-out loss, in nats a supervised token (DPO: its own loss; classification: a row). step 0 is the
    base, or the parent; `active` has the loss of the version that was active when training ended."""

    step: int
    loss: float
    best: bool
    parent: bool = False
    """Whether it is the loss of the adapter that training continues, at step 0."""
    active: str = ""
    """Label of the active version, if it is the loss of that one; `step` is the run's last."""
    rewards: dict[str, float] = {}
    accuracy: float | None = None
    """Classification: part of the held-out rows whose label was the likeliest."""


class Sampled(Event, frozen=True, kw_only=True, tag="sampled"):
    """Reply of the adapter to a fixed prompt after `step` steps; step 0 is the base."""

    step: int
    prompt: str
    text: str


class Measured(Event, frozen=True, kw_only=True, tag="measured"):
    """Metrics on held-out rows, by the replies generated for them or by the labels given to them, each from
    0 to 1. subject: "base", "parent", "active" or "adapter"."""

    subject: str
    metrics: dict[str, float]
    rows: int


class Saved(Event, frozen=True, kw_only=True, tag="saved"):
    """A checkpoint that a run can continue from. path: its folder's name, in the run's `checkpoints`."""

    step: int
    path: str
    loss: float | None
    """Held-out loss, if it was evaluated at this step."""


class StageProgress(Event, frozen=True, kw_only=True, tag="progress"):
    """Progress of a long stage that is not training. `part`: from 0 to 1."""

    name: str
    part: float


class Notice(Event, frozen=True, kw_only=True, tag="notice"):
    """A message that a person should see. level: "info" or "warn"."""

    level: str
    message: str


class Finished(Event, frozen=True, kw_only=True, tag="finished"):
    """The adapter is written. report: Report.to_json()."""

    report: dict[str, Any]


AnyEvent = (
    Phase
    | DataChecked
    | Planned
    | StepDone
    | Evaluated
    | Sampled
    | Measured
    | Saved
    | StageProgress
    | Notice
    | Finished
)

Listen = Callable[[Event], None]


Reason = Literal["pause", "cancel"]


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run must stop: until it is resumed, or for good."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(f"the run was interrupted: {reason}")
        self.reason = reason


LastStep = Callable[[], int | None]
"""Function that returns the step after which the run must end early, or None; called after each step. The run
ends there, or after the step that was being computed, as after its last one."""


class Gate(Protocol):
    """A run passes through it between two layers of the model, many times in a step."""

    def wait(self) -> None:
        """Return when the run may compute. Raises Interrupted."""


class OpenGate:
    """Gate that never waits, for a run that has the machine to itself."""

    def wait(self) -> None:
        return None
