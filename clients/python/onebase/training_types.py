"""Files, jobs, events and checkpoints as the server reports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

from onebase_protocol.training import (
    SUCCEEDED,
    Activate,
    ChangedRow,
    ClassFigures,
    ClassReport,
    ConfusedLabels,
    HeldOutReplies,
    LabelFigures,
    SliceReport,
    SliceResult,
    TrainingCheckpoint,
    TrainingEvent,
    TrainingFailure,
    TrainingFile,
    TrainingJobInfo,
    TrainingProgress,
    TrainingReport,
    TrainingStop,
)

__all__ = [
    "SUCCEEDED",
    "Activate",
    "ChangedRow",
    "ClassFigures",
    "ClassReport",
    "ConfusedLabels",
    "CurvePoint",
    "HeldOutReplies",
    "LabelFigures",
    "Purpose",
    "SliceReport",
    "SliceResult",
    "TrainingCallback",
    "TrainingCheckpoint",
    "TrainingEvent",
    "TrainingFailure",
    "TrainingFile",
    "TrainingJobInfo",
    "TrainingMethod",
    "TrainingProgress",
    "TrainingReport",
    "TrainingSettings",
    "TrainingStop",
]

Purpose: TypeAlias = Literal["fine-tune", "batch"]
TrainingMethod: TypeAlias = Literal["supervised", "dpo", "classification", "reinforcement"]


@dataclass(frozen=True)
class CurvePoint:
    """One step of a job. A loss that was not measured is None."""

    step: int
    train_loss: float | None
    valid_loss: float | None


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
    """Layers to adapt: attention, mlp, all-linear, experts, or names of linear layers as in
    q_proj,v_proj,lm_head; all-linear leaves lm_head and a mixture's experts out, all-linear,lm_head,experts
    takes them in (default: all-linear)."""
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
    alora_invocation: str
    """Activated LoRA: the text at the end of each prompt from which on the adapter acts; what comes before
    shares the base's cache."""
    alora_invocation_tokens: str | Sequence[int]
    """The same as token ids."""
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
    """Peak learning rate (auto: 5e-4, for DPO 5e-5, for rewards 2e-4)."""
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
    """Part of the rows to hold out when there is no validation data (auto: 0.1, at most 200 rows)."""
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
    max_characters:N (default: json_valid and exact_match where every measured held-out reply is JSON,
    exact_match where all are short)."""
    best_by: str
    """Measure by which the adapter is judged: loss or one of the metrics; for classification loss, accuracy
    or f1 (default: loss)."""
    metric_rows: int
    """Held-out rows that replies are generated for; 0: none (default: 32)."""
    metric_tokens: int
    """Longest generated reply, where metrics are named (default: 128)."""
    slice_by: str
    """The field of the rows that says of which slice a row is: held-out rows are compared by slice (default:
    slice)."""
    slice_rows: int
    """Least held-out rows of a slice for max_regression to look at it (default: 10)."""
    max_regression: float | str
    """Largest regression of a slice, by best_by, with which the adapter may be activated (auto: no limit)."""
    sample_prompts: Sequence[str]
    """Prompts that are answered at each evaluation."""
    group_size: int | str
    """Reinforcement: replies to each prompt (auto: 8)."""
    compute_multiplier: float | str
    """Reinforcement: factor on group_size (auto: 1)."""
    sample_tokens: int
    """Reinforcement: longest reply, in tokens (default: 256)."""
    temperature: float
    """Reinforcement: temperature of the replies (default: 1)."""
    policy_loss: str
    """Reinforcement: the loss; ppo, cispo and gspo clip what further updates of a step change
    (`importance_sampling`, `ppo`, `cispo` or `gspo`; default: importance_sampling)."""
    updates: int
    """Reinforcement: updates of the weights with the replies of a step (default: 1)."""
    kl: float
    """Reinforcement: weight of the KL divergence from the start (default: 0)."""
    eval_samples: int | str
    """Reinforcement: replies to each held-out prompt (auto: 1, the most probable one)."""
