"""Files, training jobs, their events and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import field

from onebase_protocol.adapters import ParentAnswer
from onebase_protocol.common import Json, Stored, UnixTime, shown_as

SUCCEEDED: Final = "succeeded"
ENDED: Final = frozenset({SUCCEEDED, "failed", "cancelled"})
"""Final statuses. Only a failed job that is `resumable` can leave its own."""

MEANT: Final[Mapping[str, tuple[str, ...]]] = {
    "completion": ("answer", "response", "reply", "output", "target"),
    "output": ("answer", "response", "reply", "completion", "target"),
    "messages": ("conversations", "conversation", "message"),
    "label": ("class", "category", "labels", "target"),
    "chosen": ("preferred", "accepted"),
    "rejected": ("non_preferred", "refused"),
}
"""Names that other tools give to a field of a row."""

Activate = Literal["always", "if_better", "if_better_than_base", "never"]


class TrainingFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a job or a batch reads, or what one left."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: UnixTime
    """Unix time in seconds."""
    filename: str
    purpose: str
    """`fine-tune` or `batch`; `fine-tune-results` for the curve of a job, `batch_output` for the answers of a
    batch."""
    status: Annotated[str, shown_as(type="string", const="processed")] = "processed"
    status_details: None = None
    expires_at: None = None
    sha256: str
    """SHA-256 of its content."""


class TrainingProgress(Stored, frozen=True):
    """Progress of a job. Losses are in nats per supervised token. None is not known yet."""

    phase: str | None = None
    """Present work of the job, such as `training` or `measuring`."""
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    """Loss of the newest step."""
    eval_loss: float | None = None
    """Loss on held-out rows, as measured last. Before the first step it is the base's."""
    tokens: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    memory_bytes: int | None = None
    """Largest memory that the trainer has used, in bytes."""
    part: float | None = None
    """Part of the present work that is done, from 0 to 1, where that is known."""

    @property
    def fraction(self) -> float | None:
        """The share of the steps that are done, 0 to 1."""
        return self.step / self.steps if self.steps else None


class SliceResult(Stored, frozen=True, kw_only=True):
    """One slice of the held-out rows: before is what training went on from, after the adapter, active the
    version that was active when training ended."""

    slice: str
    rows: int
    measured: int
    """Rows that `before` and `after` are means over."""
    before: float | None
    """Result before training by the job's `best_by`: a loss, or a metric."""
    after: float | None
    active: float | None = None
    """Result of the active version. None if there was none, or it was not measured."""
    worse_by: float
    """Amount by which it is worse than before, or than the active version if that is more; 0 if not worse."""
    regressed: bool
    """Whether it is worse by more than `max_regression`, on at least `slice_rows` rows."""
    regressed_against: tuple[str, ...] = ()
    """`base` or `parent`, and `active`: those that it is worse than by more than `max_regression`."""
    loss_before: float | None
    loss_after: float | None
    loss_active: float | None = None
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]
    metrics_active: dict[str, float] = field(default_factory=dict)


class ChangedRow(Stored, frozen=True, kw_only=True):
    """A held-out row whose reply was right, by a metric, and is wrong."""

    line: int
    slice: str
    """"" if the row names none."""
    metric: str
    reference: str
    """The row's own reply. This and the replies are cut at 500 characters."""
    before: str
    after: str
    against: str = ""
    """Subject whose reply was right: `active`, `base` or `parent`."""


class HeldOutReplies(Stored, frozen=True, kw_only=True):
    """A held-out row, and the replies to its prompt. Each text is cut at 500 characters."""

    line: int
    slice: str = ""
    """"" if the row names none."""
    prompt: str
    """The last turn of the prompt."""
    reference: str
    """The row's own reply."""
    base: str | None = None
    parent: str | None = None
    active: str | None = None
    """Reply of the active version; None if there was none, or it was not measured."""
    adapter: str
    rewards: dict[str, float] | None = None
    """Reward of each subject's replies, where a grader gave them some."""


class SliceReport(Stored, frozen=True, kw_only=True):
    """Changes by a job in each slice of its held-out rows, those first that got worse most."""

    by: str
    """The job's `best_by`."""
    against: str
    """`base`, or `parent` for a job that continues from a version."""
    slices: tuple[SliceResult, ...]
    slice_count: int
    """Number of all slices, which may be more than are listed."""
    regressed: tuple[str, ...]
    """Slices for which the version is not activated."""
    changed: tuple[ChangedRow, ...]
    changed_count: int


class LabelFigures(Stored, frozen=True, kw_only=True):
    """Precision and recall of one label among the others, on held-out rows."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


class ConfusedLabels(Stored, frozen=True, kw_only=True):
    """Held-out rows of one label that were given another."""

    label: str
    given: str
    rows: int


class ClassFigures(Stored, frozen=True, kw_only=True):
    """Classification of the held-out rows by one subject."""

    labels: tuple[LabelFigures, ...]
    """Figures by label; of more than 100 labels, the worst."""
    confusion: tuple[tuple[int, ...], ...] | None
    """Rows by their label, and in it by the one given, both in the order of ClassReport.labels; None where
    there are more than 20."""
    confused: tuple[ConfusedLabels, ...]
    """The most frequent mistakes."""


class ClassReport(Stored, frozen=True, kw_only=True):
    """A classifier that a job has trained, next to the base without training."""

    labels: tuple[str, ...]
    rows: int
    """Number of held-out rows."""
    base_by: str
    """Method by which the base, which has no head, classifies: `decide`, by the label's name that it finds
    likeliest, or `most_frequent`, always as most rows to train on are labelled."""
    base: ClassFigures
    adapter: ClassFigures


class TrainingReport(Stored, frozen=True, kw_only=True):
    """The result of a job: the base before, the adapter after, and the version that was active when training
    ended, on the same held-out rows."""

    name: str | None = None
    """The adapter's."""
    steps: int
    best_step: int
    """The step whose weights the adapter has."""
    tokens: int
    seconds: float
    parameters: int
    adapter_bytes: int
    loss_before: float | None
    """Loss of the base, in nats per supervised token. None if no rows were held out."""
    loss_after: float | None
    metrics_before: dict[str, float]
    """Metrics of the base's replies, each from 0 to 1."""
    metrics_after: dict[str, float]
    better: bool | None
    """Whether the adapter is better than all that it was compared with, by the job's `best_by`. None if that
    was not measured."""
    better_than: dict[str, bool | None] = field(default_factory=dict)
    """Whether it is better than `base`, and than `parent` and `active` where there is one."""
    peak_memory_bytes: int
    loss_parent: float | None = None
    """Loss of the version from which training continued, if there is one."""
    metrics_parent: dict[str, float] = field(default_factory=dict)
    active: str | None = None
    """The digest of the version that requests by name got when training ended. None if there was none."""
    loss_active: float | None = None
    metrics_active: dict[str, float] = field(default_factory=dict)
    not_compared: str | None = None
    """Reason why the active version was not measured. None if it was, or if there was none."""
    warnings: tuple[str, ...] = ()
    """Metrics by which an adapter that is called better is not, a sentence each."""
    replies: tuple[HeldOutReplies, ...] = ()
    """The first held-out prompts with the replies of all; lists of jobs leave them out."""
    slices: SliceReport | None = None
    """Result by slice. None if the held-out rows name no slices; lists of jobs leave it out."""
    classes: ClassReport | None = None
    """Result of the method `classification`; lists of jobs leave it out."""

    def __post_init__(self) -> None:
        for name in ("active", "not_compared"):  # "" where there is none
            msgspec.structs.force_setattr(self, name, getattr(self, name) or None)


class TrainingFailure(msgspec.Struct, frozen=True):
    """Reason why a job failed."""

    code: str
    """The exact kind, stable enough to compare with."""
    message: str
    param: str | None = None
    """The field or file that it is about."""


class TrainingStop(msgspec.Struct, frozen=True):
    """Early end of a job, with the best adapter that it had."""

    step: int | None
    """Step after which training ended. None until it has."""
    steps: int
    """Number of steps that were planned."""
    by: str
    """The id of the API key that asked; "" if the server needs none."""
    at: UnixTime
    """Unix time in seconds."""


class ValidatedGrader(msgspec.Struct, frozen=True):
    """A grader that can be run, as it was read."""

    grader: Json


class GraderRunMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """Account of one reward. errors: OpenAI's flags, and details of some."""

    name: str
    type: str
    errors: Json
    execution_time: float
    """Seconds."""
    scores: dict[str, float]
    token_usage: int | None = None
    """Tokens of judges."""
    sampled_model_name: str | None = None


class GraderRun(msgspec.Struct, frozen=True, kw_only=True):
    """The reward that a grader gives one text."""

    reward: float
    sub_rewards: dict[str, float] = {}
    """Rewards of a multi grader's graders."""
    metadata: GraderRunMetadata
    model_grader_token_usage_per_model: dict[str, int] = {}


class TrainingJobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the server reported it last."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str
    """The base that it trains on, or the version from which it continues."""
    created_at: UnixTime
    """Unix time in seconds."""
    finished_at: UnixTime | None
    estimated_finish: UnixTime | None = None
    fine_tuned_model: str | None
    """`name@version`, for `adapter=` in a request. None until the job has succeeded."""
    organization_id: str = ""
    result_files: tuple[str, ...]
    """Ids of files: the curve of the losses as CSV."""
    status: str
    """`validating_files`, `queued`, `running`, `paused`, and in the end `succeeded`, `failed` or
    `cancelled`."""
    training_file: str
    validation_file: str | None
    hyperparameters: Json = {}
    method_settings: Json = field(name="method")
    trained_tokens: int | None = None
    seed: int
    integrations: tuple[Json, ...] = ()
    metadata: dict[str, str]
    error: TrainingFailure | None
    name: str
    """The adapter's. The result is a version of it."""
    parent_version: ParentAnswer | None = field(default=None, name="parent")
    activate: Annotated[str, shown_as(type="string", enum=list(get_args(Activate)))]
    """`always`, `if_better`, `if_better_than_base` or `never`."""
    activated: bool | None
    """Whether requests for the name alone get this version. None until the job has succeeded."""
    version: str | None
    """The digest of the resulting version."""
    replaced: str | None = None
    """The digest of the version that was active until this one was activated. None if there was none."""
    progress: TrainingProgress | None
    estimate: Json | None = None
    """Estimate of the job, once its files are checked: `seconds` of training, `total` bytes of memory,
    `total_tokens`, `parameters` and parts of them."""
    report: TrainingReport | None
    resumable: bool
    """Whether `resume` would continue from the last checkpoint."""
    hold: bool = False
    """Whether it waits for `resume` once its files are checked. False from then on."""
    stopped: TrainingStop | None = None
    """Record of who ended it early, by `stop`. None if nobody did."""
    created_by: str = ""
    """The id of the API key that made it; "" if the server needs none."""

    @property
    def method(self) -> str:
        """`supervised`, `dpo`, `classification` or `reinforcement`."""
        return str(self.method_settings["type"])

    @property
    def settings(self) -> Json:
        """All hyperparameters. Those that were "auto" are decided once the files are checked."""
        found: Json = self.method_settings[self.method]["hyperparameters"]
        return found

    @property
    def parent(self) -> str | None:
        """`name@version` with the whole digest, if training continues from a version of an adapter."""
        return None if self.parent_version is None else str(self.parent_version)

    @property
    def held(self) -> bool:
        """Return True if the job is checked and waits for `resume` to train."""
        return self.hold and self.status == "paused"

    @property
    def ended(self) -> bool:
        """Return True if the job has succeeded, failed or been cancelled. A paused job has not ended."""
        return self.status in ENDED


class TrainingEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a job."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: str
    created_at: UnixTime
    """Unix time in seconds."""
    level: str
    """`info`, `warn` or `error`."""
    message: str
    type: str
    """`metrics` if `data` has figures such as `step` and `train_loss` or `valid_loss`; else `message`."""
    facts: Json | None = field(name="data")

    @property
    def data(self) -> Json:
        """Figures and facts of the event, by name."""
        return self.facts or {}


class TrainingCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint from which a job can continue."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    created_at: UnixTime
    """Unix time in seconds."""
    model: str = field(name="fine_tuned_model_checkpoint")
    """Name for `adapter=` of a request while the job keeps the checkpoint."""
    job: str = field(default="", name="fine_tuning_job_id")
    metrics: dict[str, float]
    """`train_loss` and `valid_loss`, if they were measured at this step."""
    step: int = field(name="step_number")


JobStreamEvent = TrainingEvent | TrainingJobInfo
"""Events of a job's stream; the last one, `event: done`, is the job."""
