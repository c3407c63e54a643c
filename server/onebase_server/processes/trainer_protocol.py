"""Messages between the api and a trainer, in the frames of `engine.messages`.

`Check` → `RunEvent`… → `FilesChecked`, `Stopped` or `Failed`;
`Train` → `RunEvent`…, `FindActive`, `RunEvent`… → `Trained`, `Stopped` or `Failed`.
One process does one of them and ends; `Stop` may come at any time, `EndAfter` while it trains. `Active`
answers `FindActive`, and `DrawnReplies` or `NotDrawn` a `RolloutOrder` of a run that learns from rewards.
"""

from __future__ import annotations

from typing import Any

import msgspec

from onebase_engine.engine.messages import EngineConfig
from onebase_training.events import AnyEvent, Reason
from onebase_training.rollouts import RewardedReply, RolloutOrder

MAX_PROBLEMS = 10_000
"""Largest number of bad lines that are listed; all of them are counted."""


class ParentFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Files of a version on this machine, as in `training.parent.Parent`."""

    label: str
    digest: str
    config: str
    weights: str


class TrainJob(msgspec.Struct, frozen=True, kw_only=True):
    """One job. Paths are of this machine."""

    id: str
    name: str
    recipe: dict[str, Any]
    """Recipe as `recipe.parse_recipe` accepts it."""
    train: str
    train_name: str
    """Name of the training file at its upload."""
    held_out: str | None
    held_out_name: str | None
    folder: str
    """Folder of the run: checkpoints, the adapter, the report."""
    base_name: str
    base_repo: str | None = None
    """Name of the base on the Hub."""
    base_commit: str | None = None
    memory_limit: int
    """Memory limit, in bytes; 0: half of what is free."""
    parent: ParentFiles | None = None
    last_step: int | None = None
    """Step after which to finish, as in `EndAfter`."""
    base_id: str = ""
    """Identity of the base."""


# ---- api -> trainer --------------------------------------------------------------------------


class Check(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Read both files and decide everything that is "auto". Needs no base in memory."""

    config: EngineConfig
    job: TrainJob


class Train(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Train on the base that an engine has published."""

    config: EngineConfig
    manifest: bytes
    """Manifest from the engine's `Ready`."""
    job: TrainJob
    share: float
    """Part of the time in which it may compute while sequences run, 0 to 1."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End at the next layer, to resume later or for good."""

    reason: Reason


class EndAfter(msgspec.Struct, frozen=True, tag=True):
    """Train no further than this step, or the one that is computed now, and finish as after the last one."""

    step: int


class Active(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The version that requests for the job's adapter get now; `digest` is "" where there is none.

    files: None if they cannot be read, for the reason `problem`.
    """

    label: str = ""
    digest: str = ""
    files: ParentFiles | None = None
    problem: str = ""


class DrawnReplies(msgspec.Struct, frozen=True, tag=True):
    """The replies to each prompt of a rollout, with their rewards."""

    groups: list[list[RewardedReply]]


class NotDrawn(msgspec.Struct, frozen=True, tag=True):
    """The replies cannot be had: the job fails. `code`, `message`, `param`: as in `Failed`."""

    code: str
    message: str
    param: str | None = None


ToTrainer = Check | Train | Stop | EndAfter | Active | DrawnReplies | NotDrawn


# ---- trainer -> api --------------------------------------------------------------------------


class RunEvent(msgspec.Struct, frozen=True, tag=True):
    event: AnyEvent


class FindActive(msgspec.Struct, frozen=True, tag=True):
    """Training has ended: the api is to send the active version, which the adapter is compared with."""


class FilesChecked(msgspec.Struct, frozen=True, tag=True):
    """Both files are sound and the job fits. `plan`: `recipe`, `estimate`, `steps`."""

    plan: dict[str, Any]


class Trained(msgspec.Struct, frozen=True, tag=True):
    """The adapter lies in the job's folder. `report`: run.Report.to_json()."""

    report: dict[str, Any]


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """It did as `Stop` said; for a pause, a checkpoint is written."""

    reason: Reason


class FileProblem(msgspec.Struct, frozen=True):
    """One bad line of a file. `line` counts from 1; `field` may be ""."""

    line: int
    field: str
    reason: str


class Failed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The job cannot be done. `code` is stable, `message` says what to change; `param` names what."""

    code: str
    message: str
    param: str | None = None
    problems: list[FileProblem] = []
    problem_count: int = 0


FromTrainer = RunEvent | FindActive | RolloutOrder | FilesChecked | Trained | Stopped | Failed


def to_trainer_decoder() -> msgspec.msgpack.Decoder[ToTrainer]:
    return msgspec.msgpack.Decoder(ToTrainer)


def from_trainer_decoder() -> msgspec.msgpack.Decoder[FromTrainer]:
    return msgspec.msgpack.Decoder(FromTrainer)
