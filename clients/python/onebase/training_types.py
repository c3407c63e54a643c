"""Files, jobs, events and checkpoints as the server reports them, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, TypedDict

SUCCEEDED: Final = "succeeded"
ENDED: Final = frozenset({SUCCEEDED, "failed", "cancelled"})
"""Final statuses. Only a failed job that is `resumable` can leave its own."""

Activate: TypeAlias = Literal["always", "if_better", "if_better_than_base", "never"]
Purpose: TypeAlias = Literal["fine-tune", "batch"]
TrainingMethod: TypeAlias = Literal["supervised", "dpo", "classification"]


@dataclass(frozen=True)
class TrainingFile:
    """A file that a job or a batch reads, or what one left."""

    id: str
    filename: str
    bytes: int
    purpose: str
    """`fine-tune` or `batch`; `fine-tune-results` for the curve of a job, `batch_output` for the answers of a
    batch."""
    created_at: float
    """Unix time in seconds."""
    sha256: str
    """SHA-256 of its content."""


@dataclass(frozen=True)
class TrainingProgress:
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

    @property
    def fraction(self) -> float | None:
        """The share of the steps that are done, 0 to 1."""
        return self.step / self.steps if self.steps else None


@dataclass(frozen=True)
class SliceResult:
    """One slice of the held-out rows: before is what training went on from, after the adapter, active the
    version that was active when training ended."""

    slice: str
    rows: int
    measured: int
    """Rows that `before` and `after` are means over."""
    before: float | None
    """Result before training by the job's `best_by`: a loss, or a metric."""
    after: float | None
    worse_by: float
    """Amount by which it is worse than before, or than the active version if that is more; 0 if not worse."""
    regressed: bool
    """Whether it is worse by more than `max_regression`, on at least `slice_rows` rows."""
    loss_before: float | None
    loss_after: float | None
    metrics_before: Mapping[str, float] = field(hash=False)
    metrics_after: Mapping[str, float] = field(hash=False)
    active: float | None = None
    """Result of the active version. None if there was none, or it could not be measured."""
    loss_active: float | None = None
    metrics_active: Mapping[str, float] = field(default_factory=dict, hash=False)
    regressed_against: tuple[str, ...] = ()
    """`base` or `parent`, and `active`: those that it is worse than by more than `max_regression`."""


@dataclass(frozen=True)
class ChangedRow:
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


@dataclass(frozen=True)
class SliceReport:
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


@dataclass(frozen=True)
class LabelFigures:
    """Precision and recall of one label among the others, on held-out rows."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ConfusedLabels:
    """Held-out rows of one label that were given another."""

    label: str
    given: str
    rows: int


@dataclass(frozen=True)
class ClassFigures:
    """Classification of the held-out rows by one subject."""

    labels: tuple[LabelFigures, ...]
    """Figures by label; of more than 100 labels, the worst."""
    confusion: tuple[tuple[int, ...], ...] | None
    """Rows by their label, and in it by the one given, both in the order of ClassReport.labels; None where
    there are more than 20."""
    confused: tuple[ConfusedLabels, ...]
    """The most frequent mistakes."""


@dataclass(frozen=True)
class ClassReport:
    """A classifier that a job has trained, next to the base without training."""

    labels: tuple[str, ...]
    rows: int
    """Number of held-out rows."""
    base_by: str
    """Method by which the base, which has no head, classifies: `decide`, by the label's name that it finds
    likeliest, or `most_frequent`, always as most rows to train on are labelled."""
    base: ClassFigures
    adapter: ClassFigures


@dataclass(frozen=True)
class TrainingReport:
    """The result of a job: the base before, the adapter after, and the version that was active when training
    ended, on the same held-out rows."""

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
    metrics_before: Mapping[str, float] = field(hash=False)
    """Metrics of the base's replies, each from 0 to 1."""
    metrics_after: Mapping[str, float] = field(hash=False)
    better: bool | None
    """Whether the adapter is better than all that it was compared with, by the job's `best_by`. None if that
    was not measured."""
    peak_memory_bytes: int
    loss_parent: float | None = None
    """Loss of the version from which training continued, if there is one."""
    metrics_parent: Mapping[str, float] = field(default_factory=dict, hash=False)
    better_than: Mapping[str, bool | None] = field(default_factory=dict, hash=False)
    """Whether it is better than `base`, and than `parent` and `active` where there is one."""
    active: str | None = None
    """The digest of the version that requests by name got when training ended. None if there was none."""
    loss_active: float | None = None
    metrics_active: Mapping[str, float] = field(default_factory=dict, hash=False)
    not_compared: str | None = None
    """Reason why the active version was not measured. None if it was, or if there was none."""
    slices: SliceReport | None = None
    """Result by slice. None if the held-out rows name no slices; lists of jobs leave it out."""
    classes: ClassReport | None = None
    """Result of the method `classification`; lists of jobs leave it out."""


@dataclass(frozen=True)
class TrainingFailure:
    """Reason why a job failed."""

    code: str
    """The exact kind, stable enough to compare with."""
    message: str
    param: str | None = None
    """The field or file that it is about."""


@dataclass(frozen=True)
class TrainingEvent:
    """One event of a job."""

    id: str
    created_at: float
    """Unix time in seconds."""
    level: str
    """`info`, `warn` or `error`."""
    message: str
    type: str
    """`metrics` if `data` has figures such as `step` and `train_loss` or `valid_loss`; else `message`."""
    data: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A checkpoint from which a job can continue."""

    id: str
    created_at: float
    """Unix time in seconds."""
    step: int
    model: str
    """Name for `adapter=` of a request while the job keeps the checkpoint."""
    metrics: Mapping[str, float] = field(hash=False)
    """`train_loss` and `valid_loss`, if they were measured at this step."""


@dataclass(frozen=True)
class CurvePoint:
    """One step of a job. A loss that was not measured is None."""

    step: int
    train_loss: float | None
    valid_loss: float | None


@dataclass(frozen=True)
class TrainingStop:
    """Early end of a job, with the best adapter that it had."""

    step: int | None
    """Step after which training ended. None until it has."""
    steps: int
    """Number of steps that were planned."""
    by: str
    """The id of the API key that asked; "" if the server needs none."""
    at: float
    """Unix time in seconds."""


@dataclass(frozen=True)
class TrainingJobInfo:
    """A job as the server reported it last."""

    id: str
    name: str
    """The adapter's. The result is a version of it."""
    status: str
    """`validating_files`, `queued`, `running`, `paused`, and in the end `succeeded`, `failed` or
    `cancelled`."""
    model: str
    """The base that it trains on, or the version from which it continues."""
    method: str
    """`supervised`, `dpo` or `classification`."""
    settings: Mapping[str, Any] = field(hash=False)
    """All hyperparameters. Those that were "auto" are decided once the files are checked."""
    seed: int
    training_file: str
    validation_file: str | None
    activate: str
    """`always`, `if_better`, `if_better_than_base` or `never`."""
    metadata: Mapping[str, str] = field(hash=False)
    created_at: float
    """Unix time in seconds."""
    finished_at: float | None
    fine_tuned_model: str | None
    """`name@version`, for `adapter=` in a request. None until the job has succeeded."""
    version: str | None
    """The digest of the resulting version."""
    activated: bool | None
    """Whether requests for the name alone get this version. None until the job has succeeded."""
    resumable: bool
    """Whether `resume` would continue from the last checkpoint."""
    progress: TrainingProgress | None
    report: TrainingReport | None
    error: TrainingFailure | None
    result_files: tuple[str, ...]
    """Ids of files: the curve of the losses as CSV."""
    estimate: Mapping[str, Any] | None = field(default=None, hash=False)
    """Estimate of the job, once its files are checked: `seconds` of training, `total` bytes of memory,
    `total_tokens`, `parameters` and parts of them."""
    parent: str | None = None
    """`name@version` with the whole digest, if training continues from a version of an adapter."""
    hold: bool = False
    """Whether it waits for `resume` once its files are checked. False from then on."""
    stopped: TrainingStop | None = None
    """Record of who ended it early, by `stop`. None if nobody did."""
    replaced: str | None = None
    """The digest of the version that was active until this one was activated. None if there was none."""

    @property
    def held(self) -> bool:
        """Return True if the job is checked and waits for `resume` to train."""
        return self.hold and self.status == "paused"

    @property
    def ended(self) -> bool:
        """Return True if the job has succeeded, failed or been cancelled. A paused job has not ended."""
        return self.status in ENDED


TrainingCallback: TypeAlias = Callable[[TrainingJobInfo], object]
"""Called with each change of a job that is waited for, in the thread (or event loop) that waits."""


class TrainingSettings(TypedDict, total=False):
    """Settings of training. One that is missing, or "auto", has the server's default, given here."""

    beta: float | str
    """DPO's beta: how close to stay to the base (auto: 0.1)."""
    r: int
    """Rank of the update matrices (default: 16)."""
    alpha: float | str
    """Scaling is alpha / r (auto: twice the rank)."""
    targets: str | Sequence[str]
    """Layers to adapt: attention, mlp, all-linear, or names of linear layers as in q_proj,v_proj,lm_head;
    all-linear leaves lm_head out, all-linear,lm_head takes it in (default: all-linear)."""
    rank_pattern: Mapping[str, int]
    """Ranks of some layers, such as down_proj."""
    alpha_pattern: Mapping[str, float]
    """Alphas of some layers, such as down_proj."""
    dropout: float
    """Dropout of the adapter's inputs (default: 0)."""
    use_rslora: bool
    """Scaling is alpha / sqrt(r) (default: false)."""
    use_dora: bool
    """DoRA: train magnitudes as well (default: false)."""
    init: str | bool
    """Initial A and B: true and gaussian with B = 0, false with B random, eva by data (`true`, `gaussian`,
    `false` or `eva`; default: true)."""
    epochs: float | str
    """Passes over the data (auto: 3)."""
    max_steps: int
    """Stop after this many steps; 0: after the epochs (default: 0)."""
    batch_size: int | str
    """Rows in one step (auto: 16 or fewer)."""
    learning_rate: float | str
    """Peak learning rate (auto: 5e-4, for DPO 5e-5)."""
    learning_rate_multiplier: float | str
    """Factor on the learning rate (auto: 1)."""
    lora_plus_ratio: float
    """LoRA+: how many times faster B learns than A; 0: equally fast (default: 0)."""
    schedule: str
    """Fall of the learning rate after the warm-up (`cosine`, `linear` or `constant`; default: cosine)."""
    warmup_ratio: float
    """Part of the steps in which the learning rate rises (default: 0.05)."""
    optimizer: str
    """AdamW, its 8-bit form, either paged on a GPU (`adamw`, `adamw_8bit`, `paged_adamw` or
    `paged_adamw_8bit`; default: adamw)."""
    weight_decay: float
    """AdamW's weight decay (default: 0)."""
    max_grad_norm: float
    """Gradients are clipped to this norm; 0: never (default: 1)."""
    train_on: str
    """Tokens in the loss: the replies', or all (`assistant` or `all`; default: assistant)."""
    max_length: int | str
    """Longest row, in tokens (auto: 2048, or the base's limit)."""
    too_long: str
    """Treatment of longer rows; truncating cuts the end off (`refuse`, `truncate` or `drop`; default:
    refuse)."""
    packing: bool
    """Compute several rows in one sequence, without padding (default: true)."""
    template_date: str
    """The day that the chat template prints, as in 2026-01-31 (auto: when the run begins)."""
    eval_split: float | str
    """Part of the rows to hold out when there is no eval data (auto: 0.1, at most 200 rows)."""
    micro_tokens: int | str
    """Tokens computed at once (auto: by memory)."""
    gradient_checkpointing: bool | str
    """Compute activations twice instead of keeping them (auto: if memory requires it)."""
    eval_every: int | str
    """Steps between evaluations (auto: a tenth of all)."""
    save_every: int | str
    """Steps between checkpoints (auto: as eval_every)."""
    keep: int
    """Checkpoints kept in addition to the best one (default: 2)."""
    patience: int
    """Stop after this many evaluations without a better one; 0: never (default: 0)."""
    metrics: str | Sequence[str]
    """Measured on generated replies, base and adapter: exact_match, json_valid, json_equal, json_keys:A|B|C,
    word_f1, contains:TEXT, lacks:TEXT, starts_with:TEXT, ends_with:TEXT, one_of:A|B|C, min_characters:N,
    max_characters:N."""
    best_by: str
    """Measure by which the adapter is judged: loss or one of the metrics; for classification loss, accuracy
    or f1 (default: loss)."""
    metric_rows: int
    """Held-out rows that replies are generated for (default: 32)."""
    metric_tokens: int
    """Longest generated reply (default: 128)."""
    slice_by: str
    """The field of the rows that says of which slice a row is: held-out rows are compared by slice (default:
    slice)."""
    slice_rows: int
    """Least held-out rows of a slice for max_regression to look at it (default: 10)."""
    max_regression: float | str
    """Largest regression of a slice, by best_by, with which the adapter may be activated (auto: no limit)."""
    sample_prompts: Sequence[str]
    """Prompts that are answered at each evaluation."""
