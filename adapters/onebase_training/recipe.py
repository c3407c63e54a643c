"""Define every setting of a training run once, with its default, its help text and its limits.

The command line, the jobs of a server and a sweep all read this one table. A field that may be "auto" is
decided by `resolve`, once the data is known; a trainer only takes resolved recipes.
"""

# ruff: noqa: RUF009 - `_setting` is dataclasses.field with a help text
from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import date
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from onebase_adapters.format.config import MOST_INVOCATION_TOKENS
from onebase_training.graders import GraderError, parse_grader
from onebase_training.metrics import MetricError, check_metric

AUTO_EVAL_SPLIT, MOST_HELD_OUT = 0.1, 200
Auto = Literal["auto"]
Value = TypeVar("Value", int, float)
Method = Literal["supervised", "dpo", "classification", "reinforcement"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Schedule = Literal["cosine", "linear", "constant"]
TooLong = Literal["refuse", "truncate", "drop"]
TrainOn = Literal["assistant", "all"]
Init = Literal["true", "gaussian", "false", "eva"]
PolicyLoss = Literal["importance_sampling", "ppo", "cispo", "gspo"]

HIGHEST_RANK = 1024
MODEL = "model"
"""Field, of a job and in errors, that names the adapter to continue."""
MOST_TEXTS = 32
"""Largest number of metrics, and of prompts that are answered during a run."""
NO_PARENT = "a classifier is trained from the base, with a head of its own: name no adapter to go on from"
MOST_REPLY_TOKENS = 400_000
"""Largest number of tokens of the replies that one message holds, which may have 64 MiB."""
REWARD = "reward"
"""Measure of reinforcement: the mean of what the grader gives replies to held-out prompts."""
CLASS_METRICS = ("accuracy", "f1")
"""Metrics of a classifier, on every held-out row: F1 is the mean of all labels' (macro)."""

_REFUSED_INITS = {
    **dict.fromkeys(
        ("pissa", "olora", "corda", "loftq", "lora_ga"),
        "changes the base's weights, which all adapters share",
    ),
    **dict.fromkeys(("orthogonal", "mica"), "does not work on 4-bit weights"),
}


class RecipeError(ValueError):
    """A setting that cannot be used. `field`: its name in the recipe, "" if several conflict."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _setting(
    default: Any,
    group: str,
    text: str,
    *,
    low: float | None = None,
    high: float | None = 1e9,
    above: float | None = None,
) -> Any:
    """Return a field with its help text and limits: `low` and `high` are allowed, `above` is not."""
    metadata = {"group": group, "help": text, "low": low, "high": high, "above": above}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_value(item: Field[Any], value: Any, kind: Any) -> None:
    """Raise RecipeError unless `value` is of the type `kind` and within the limits of a recipe's field."""
    name, limits = item.name, item.metadata
    if name == "init" and isinstance(value, str) and value in _REFUSED_INITS:
        raise RecipeError(name, f"init {value!r} {_REFUSED_INITS[value]}; use true, gaussian, false or eva")
    if not _fits(value, kind):
        raise RecipeError(name, f"{name} is {shown(value)}: {_expected(kind)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(name, f"{name} is {value}: write a finite number")
    if limits["above"] is not None and not value > limits["above"]:
        raise RecipeError(name, f"{name} is {shown(value)}: it must be above {limits['above']:g}")
    if limits["low"] is not None and value < limits["low"]:
        raise RecipeError(name, f"{name} is {shown(value)}: the lowest value is {limits['low']:g}")
    if limits["high"] is not None and value > limits["high"]:
        raise RecipeError(name, f"{name} is {shown(value)}: the highest value is {limits['high']:g}")


def check_texts(field: str, texts: Sequence[str], longest: int) -> None:
    """Raise RecipeError for too many texts, or one of more than `longest` characters."""
    if len(texts) > MOST_TEXTS:
        raise RecipeError(field, f"{field} has {len(texts)} texts: write {MOST_TEXTS} at most")
    for number, text in enumerate(texts):
        if len(text) > longest:
            raise RecipeError(field, f"{field}[{number}] has {len(text)} characters: write {longest} at most")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        if get_args(kind)[0] is int:
            return isinstance(value, tuple) and all(type(part) is int and part >= 0 for part in value)
        return isinstance(value, tuple) and all(isinstance(part, str) and part for part in value)
    if get_origin(kind) is Mapping:
        number: Any = int if get_args(kind)[1] is int else int | float
        most = HIGHEST_RANK if number is int else 1e6
        return isinstance(value, Mapping) and all(
            isinstance(key, str)
            and isinstance(part, number)
            and not isinstance(part, bool)
            and 0 < part <= most
            for key, part in value.items()
        )
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return any(_fits(value, part) for part in get_args(kind))


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"choose one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"write a list of {'token ids' if get_args(kind)[0] is int else 'texts'}"
    if get_origin(kind) is Mapping:
        most = f", {HIGHEST_RANK} at most" if get_args(kind)[1] is int else ""
        return f"write layer names with positive numbers{most}"
    plain = {
        bool: "write true or false",
        int: "write a whole number",
        float: "write a number",
        str: "write a text",
    }
    if kind in plain:
        return plain[kind]
    first = next(part for part in get_args(kind) if get_origin(part) is not Literal)
    return f"{plain[first]} or auto"


def shown(value: Any) -> str:
    """Format a value for an error message, cut to one line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_date(text: str) -> bool:
    """Return True if it is a day as in 2026-01-31."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one training run, checked. Lengths are tokens, batch sizes rows."""

    method: Method = _setting(
        "supervised",
        "method",
        "supervised: learn the replies; dpo: prefer `chosen` to `rejected`; classification: learn `label`; "
        "reinforcement: learn from what a grader gives the model's own replies",
    )
    beta: float | Auto = _setting(
        "auto", "method", "DPO's beta: how close to stay to the base (auto: 0.1)", above=0, high=100
    )

    grader: str = _setting("", "reinforcement", "reinforcement: the grader of replies, as JSON")
    group_size: int | Auto = _setting(
        "auto", "reinforcement", "reinforcement: replies to each prompt (auto: 8)", low=2, high=128
    )
    compute_multiplier: float | Auto = _setting(
        "auto", "reinforcement", "reinforcement: factor on group_size (auto: 1)", above=0, high=64
    )
    sample_tokens: int = _setting(
        256, "reinforcement", "reinforcement: longest reply, in tokens", low=1, high=32768
    )
    temperature: float = _setting(
        1.0, "reinforcement", "reinforcement: temperature of the replies", above=0, high=2
    )
    policy_loss: PolicyLoss = _setting(
        "importance_sampling",
        "reinforcement",
        "reinforcement: the loss; ppo, cispo and gspo clip what further updates of a step change",
    )
    updates: int = _setting(
        1, "reinforcement", "reinforcement: updates of the weights with the replies of a step", low=1, high=16
    )
    kl: float = _setting(
        0.0, "reinforcement", "reinforcement: weight of the KL divergence from the start", low=0, high=100
    )
    eval_samples: int | Auto = _setting(
        "auto",
        "reinforcement",
        "reinforcement: replies to each held-out prompt (auto: 1, the most probable one)",
        low=1,
        high=64,
    )

    r: int = _setting(16, "lora", "rank of the update matrices", low=1, high=HIGHEST_RANK)
    alpha: float | Auto = _setting(
        "auto", "lora", "scaling is alpha / r (auto: twice the rank)", above=0, high=1e6
    )
    targets: tuple[str, ...] = _setting(
        ("all-linear",),
        "lora",
        "layers to adapt: attention, mlp, all-linear, experts, or names of linear layers as in "
        "q_proj,v_proj,lm_head; all-linear leaves lm_head and a mixture's experts out, "
        "all-linear,lm_head,experts takes them in",
    )
    rank_pattern: Mapping[str, int] = _setting({}, "lora", "ranks of some layers, such as down_proj")
    alpha_pattern: Mapping[str, float] = _setting({}, "lora", "alphas of some layers, such as down_proj")
    dropout: float = _setting(0.0, "lora", "dropout of the adapter's inputs", low=0, high=0.95)
    use_rslora: bool = _setting(False, "lora", "scaling is alpha / sqrt(r)")
    use_dora: bool = _setting(False, "lora", "DoRA: train magnitudes as well")
    alora_invocation: str = _setting(
        "",
        "lora",
        "activated LoRA: the text at the end of each prompt from which on the adapter acts; what comes "
        "before shares the base's cache",
    )
    alora_invocation_tokens: tuple[int, ...] = _setting((), "lora", "the same as token ids")
    init: Init = _setting(
        "true", "lora", "initial A and B: true and gaussian with B = 0, false with B random, eva by data"
    )

    epochs: float | Auto = _setting("auto", "training", "passes over the data (auto: 3)", above=0, high=1000)
    max_steps: int = _setting(0, "training", "stop after this many steps; 0: after the epochs", low=0)
    batch_size: int | Auto = _setting(
        "auto", "training", "rows in one step (auto: 16 or fewer)", low=1, high=4096
    )
    learning_rate: float | Auto = _setting(
        "auto", "training", "peak learning rate (auto: 5e-4, for DPO 5e-5, for rewards 2e-4)", above=0, high=1
    )
    learning_rate_multiplier: float | Auto = _setting(
        "auto", "training", "factor on the learning rate (auto: 1)", above=0, high=1000
    )
    lora_plus_ratio: float = _setting(
        0.0, "training", "LoRA+: how many times faster B learns than A; 0: equally fast", low=0, high=1000
    )
    schedule: Schedule = _setting("cosine", "training", "fall of the learning rate after the warm-up")
    warmup_ratio: float = _setting(
        0.05, "training", "part of the steps in which the learning rate rises", low=0, high=1
    )
    optimizer: Optimizer = _setting("adamw", "training", "AdamW, its 8-bit form, either paged on a GPU")
    weight_decay: float = _setting(0.0, "training", "AdamW's weight decay", low=0, high=10)
    max_grad_norm: float = _setting(1.0, "training", "gradients are clipped to this norm; 0: never", low=0)
    seed: int = _setting(0, "training", "seed of everything random", low=0, high=2**31 - 1)

    train_on: TrainOn = _setting("assistant", "data", "tokens in the loss: the replies', or all")
    max_length: int | Auto = _setting(
        "auto", "data", "longest row, in tokens (auto: 2048, or the base's limit)", low=8, high=2**20
    )
    too_long: TooLong = _setting("refuse", "data", "treatment of longer rows; truncating cuts the end off")
    template_date: str = _setting(
        "auto", "data", "the day that the chat template prints, as in 2026-01-31 (auto: when the run begins)"
    )
    packing: bool = _setting(True, "data", "compute several rows in one sequence, without padding")
    eval_split: float | Auto = _setting(
        "auto",
        "data",
        "part of the rows to hold out when there is no validation data (auto: 0.1, at most 200 rows)",
        low=0,
        high=0.9,
    )

    micro_tokens: int | Auto = _setting(
        "auto", "memory", "tokens computed at once (auto: by memory)", low=1, high=2**20
    )
    gradient_checkpointing: bool | Auto = _setting(
        "auto", "memory", "compute activations twice instead of keeping them (auto: if memory requires it)"
    )

    eval_every: int | Auto = _setting(
        "auto", "evaluation", "steps between evaluations (auto: a tenth of all)", low=1
    )
    save_every: int | Auto = _setting(
        "auto", "evaluation", "steps between checkpoints (auto: as eval_every)", low=1
    )
    keep: int = _setting(2, "evaluation", "checkpoints kept in addition to the best one", low=1, high=100)
    patience: int = _setting(
        0, "evaluation", "stop after this many evaluations without a better one; 0: never", low=0
    )
    metrics: tuple[str, ...] = _setting(
        (),
        "evaluation",
        "measured on generated replies, base and adapter: exact_match, json_valid, json_equal, "
        "json_keys:A|B|C, word_f1, contains:TEXT, lacks:TEXT, starts_with:TEXT, ends_with:TEXT, "
        "one_of:A|B|C, min_characters:N, max_characters:N (default: json_valid and exact_match where every "
        "measured held-out reply is JSON, exact_match where all are short)",
    )
    best_by: str = _setting(
        "loss",
        "evaluation",
        "measure by which the adapter is judged: loss or one of the metrics; for classification loss, "
        "accuracy or f1",
    )
    metric_rows: int = _setting(
        32, "evaluation", "held-out rows that replies are generated for; 0: none", low=0, high=10_000
    )
    metric_tokens: int = _setting(
        128, "evaluation", "longest generated reply, where metrics are named", low=1, high=8192
    )
    slice_by: str = _setting(
        "slice",
        "evaluation",
        "the field of the rows that says of which slice a row is: held-out rows are compared by slice",
    )
    slice_rows: int = _setting(
        10, "evaluation", "least held-out rows of a slice for max_regression to look at it", low=1
    )
    max_regression: float | Auto = _setting(
        "auto",
        "evaluation",
        "largest regression of a slice, by best_by, with which the adapter may be activated (auto: no limit)",
        low=0,
        high=100,
    )
    sample_prompts: tuple[str, ...] = _setting(
        (), "evaluation", "prompts that are answered at each evaluation"
    )

    def __post_init__(self) -> None:
        for item, kind in recipe_fields():
            check_value(item, getattr(self, item.name), kind)
        _check_together(self)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as `parse_recipe` takes them."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @property
    def measured(self) -> tuple[str, ...]:
        """Metrics that held-out rows are measured by, before and after."""
        if self.method == "reinforcement":
            return (REWARD,)
        return CLASS_METRICS if self.method == "classification" else self.metrics


def recipe_fields() -> Iterator[tuple[Field[Any], Any]]:
    """Yield each field of Recipe with its type, in the order of the help text."""
    hints = get_type_hints(Recipe)
    for item in fields(Recipe):
        yield item, hints[item.name]


def parse_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Return a recipe from JSON-like values; missing settings have their defaults. Raises RecipeError by
    field."""
    known = dict(recipe_fields_by_name())
    for name in settings:
        if name not in known:
            raise RecipeError(name, f"{name} is not a setting of a recipe; there are {', '.join(known)}")
    values = {name: _plain(name, value, known[name]) for name, value in settings.items() if value is not None}
    return Recipe(**values)


def recipe_fields_by_name() -> Iterator[tuple[str, Any]]:
    for item, kind in recipe_fields():
        yield item.name, kind


def resolve(recipe: Recipe, *, rows: int, held_out: int, base_limit: int) -> Recipe:
    """Decide all "auto" settings except those that depend on memory (`micro_tokens`,
    `gradient_checkpointing`).

    Args:
        rows: of training data, after holding out.
        held_out: rows of a file of evaluation data; 0 if there is none.
        base_limit: the base's longest sequence, in tokens.
    """
    rate = {"dpo": 5e-5, "reinforcement": 2e-4}.get(recipe.method, 5e-4)
    batch = _chosen(recipe.batch_size, max(1, min(16, rows // 4)))
    epochs = _chosen(recipe.epochs, 3.0)
    multiplier = _chosen(recipe.learning_rate_multiplier, 1.0)
    made = replace(
        recipe,
        beta=_chosen(recipe.beta, 0.1),
        alpha=_chosen(recipe.alpha, 2.0 * recipe.r),
        epochs=float(epochs),
        batch_size=batch,
        learning_rate=_chosen(recipe.learning_rate, rate) * multiplier,
        learning_rate_multiplier=1.0,
        group_size=_group_size(recipe),
        compute_multiplier=1.0,
        eval_samples=_chosen(recipe.eval_samples, 1),
        best_by=REWARD if recipe.method == "reinforcement" else recipe.best_by,
        max_length=min(_chosen(recipe.max_length, 2048), base_limit),
        eval_split=_chosen(recipe.eval_split, 0.0 if held_out else AUTO_EVAL_SPLIT),
    )
    tenth = max(1, math.ceil(step_count(made, rows) / 10))
    every = _chosen(made.eval_every, tenth)
    return replace(made, eval_every=every, save_every=_chosen(made.save_every, every))


def step_count(recipe: Recipe, rows: int) -> int:
    """Return the optimizer steps of a recipe whose epochs and batch size are decided."""
    if recipe.epochs == "auto" or recipe.batch_size == "auto":
        raise RecipeError("epochs", "epochs and batch_size must be decided first")
    steps = max(1, round(recipe.epochs * math.ceil(rows / recipe.batch_size)))
    return min(steps, recipe.max_steps) if recipe.max_steps else steps


def token_count(recipe: Recipe, rows: int, tokens: int) -> int:
    """Return the tokens of all steps together, if all rows had the mean length. `tokens`: of all `rows`."""
    if recipe.epochs == "auto" or recipe.batch_size == "auto":
        raise RecipeError("epochs", "epochs and batch_size must be decided first")
    computed = min(recipe.epochs * rows, float(step_count(recipe, rows) * recipe.batch_size))
    return round(computed * tokens / rows)


def held_out_count(recipe: Recipe, rows: int) -> int:
    """Return the number of `rows` to hold out if no evaluation data are given."""
    if recipe.eval_split == "auto":
        return min(MOST_HELD_OUT, round(AUTO_EVAL_SPLIT * rows))
    return round(recipe.eval_split * rows)


def _listed(name: str, text: str) -> tuple[str, ...]:
    """Split names of layers or metrics at commas. A prompt contains commas, as a metric's text may."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if name == "targets":
        return parts
    if name == "metrics":
        with contextlib.suppress(MetricError):
            for part in parts:
                check_metric(part)
            return parts
    return (text.strip(),) if text.strip() else ()


def decided(value: Value | Auto) -> Value:
    """Return a setting of a resolved recipe. Raises ValueError if it is "auto"."""
    if value == "auto":
        raise ValueError("the recipe is not resolved")
    return value


def _chosen(value: Any, auto: Any) -> Any:
    return auto if value == "auto" else value


def _plain(name: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        if isinstance(value, str) and get_args(kind)[0] is int:
            with contextlib.suppress(ValueError):
                return tuple(int(part) for part in value.split(",") if part.strip())
            return value
        if isinstance(value, str):
            return _listed(name, value)
        if isinstance(value, list | tuple):
            return tuple(value)
    takes_float = kind is float or float in get_args(kind)
    if takes_float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # the limits are checked next
            return float(value)
    if name == "init" and isinstance(value, bool):
        return str(value).lower()
    return value


def _check_together(recipe: Recipe) -> None:
    check_texts("metrics", recipe.metrics, 500)
    check_texts("sample_prompts", recipe.sample_prompts, 8000)
    if not recipe.targets:
        raise RecipeError("targets", "targets is empty: name at least one group or linear layer")
    for field_name in ("targets", "rank_pattern", "alpha_pattern"):
        for name in getattr(recipe, field_name):
            if not name.replace("-", "_").replace(".", "_").isidentifier():
                raise RecipeError(
                    field_name, f"{shown(name)} is not a layer's name: patterns are not allowed"
                )
    if not recipe.slice_by.strip() or len(recipe.slice_by) > 100:
        raise RecipeError("slice_by", "slice_by is empty or over 100 characters: write the name of a field")
    if recipe.use_dora and recipe.init == "eva":
        raise RecipeError("init", "EVA and DoRA do not go together: choose one of them")
    if recipe.rank_pattern and recipe.init == "eva":
        raise RecipeError("rank_pattern", "EVA chooses each layer's rank itself: leave the pattern out")
    _check_activated(recipe)
    if recipe.method == "dpo" and recipe.train_on == "all":
        raise RecipeError("train_on", "DPO compares the replies: leave train_on at assistant")
    if recipe.method == "classification":
        _check_classification(recipe)
    if recipe.method == "reinforcement":
        _check_reinforcement(recipe)
    elif recipe.grader:
        raise RecipeError("grader", f"grader: {recipe.method} has none. Set method to reinforcement")
    if recipe.template_date != "auto" and not is_date(recipe.template_date):
        reason = "write a day as in 2026-01-31, or auto"
        raise RecipeError("template_date", f"template_date is {shown(recipe.template_date)}: {reason}")
    for metric in recipe.metrics:
        try:
            check_metric(metric)
        except MetricError as error:
            raise RecipeError("metrics", str(error)) from error
    if recipe.best_by != "loss" and recipe.best_by not in recipe.measured:
        own = {"classification": "accuracy or f1", "reinforcement": REWARD}
        known = own.get(recipe.method, "one of the recipe's metrics")
        raise RecipeError("best_by", f"best_by is {shown(recipe.best_by)}: write loss, or {known}")
    if recipe.metrics and not recipe.metric_rows:
        raise RecipeError(
            "metric_rows",
            f"metric_rows is 0, so that no replies are generated for {', '.join(recipe.metrics)}: write 1 or "
            "more, or leave metrics out",
        )


def _check_activated(recipe: Recipe) -> None:
    """Raise RecipeError for settings that an activated LoRA does not have."""
    name = "alora_invocation" if recipe.alora_invocation else "alora_invocation_tokens"
    if not getattr(recipe, name):
        return
    if recipe.alora_invocation and recipe.alora_invocation_tokens:
        reason = "alora_invocation and alora_invocation_tokens say the same: leave one of them out"
        raise RecipeError("alora_invocation_tokens", reason)
    if len(recipe.alora_invocation) > 1000:
        raise RecipeError(name, f"{name} has over 1000 characters: shorten it")
    if len(recipe.alora_invocation_tokens) > MOST_INVOCATION_TOKENS:
        raise RecipeError(name, f"{name} has over {MOST_INVOCATION_TOKENS} tokens: shorten it")
    if recipe.use_dora:
        raise RecipeError(
            "use_dora", "DoRA changes all tokens and an activated LoRA some: choose one of them"
        )
    if recipe.init == "eva":
        raise RecipeError("init", "EVA looks at all tokens of the data: choose another for an activated LoRA")
    if recipe.method == "classification":
        raise RecipeError(name, f"{name}: a classifier is no activated LoRA. Leave it out")


def _check_classification(recipe: Recipe) -> None:
    """Raise RecipeError for settings of replies: a classifier writes none."""
    for name, used in (("metrics", recipe.metrics), ("sample_prompts", recipe.sample_prompts)):
        if used:
            raise RecipeError(
                name,
                f"{name}: a classifier writes no replies to measure or show; accuracy and F1 are measured "
                f"anyway. Leave {name} out",
            )
    if recipe.train_on == "all":
        raise RecipeError("train_on", "classification learns the label: leave train_on at assistant")


def _group_size(recipe: Recipe) -> int:
    """Return the number of replies to each prompt."""
    group = _chosen(recipe.group_size, 8) * _chosen(recipe.compute_multiplier, 1.0)
    size: int = min(128, max(2, round(group)))
    return size


def _check_reinforcement(recipe: Recipe) -> None:
    """Raise RecipeError for a grader that cannot be used, and for settings that rewards leave no place."""
    if not recipe.grader:
        raise RecipeError("grader", "reinforcement needs a grader, which gives replies their rewards")
    try:
        parse_grader(recipe.grader)
    except GraderError as error:
        raise RecipeError(f"grader.{error.field}".rstrip("."), error.reason) from error
    for name, used in (("metrics", recipe.metrics), ("sample_prompts", recipe.sample_prompts)):
        if used:
            reason = "replies are measured by the grader, and the report shows some"
            raise RecipeError(name, f"{name}: {reason}. Leave {name} out")
    for name in ("alora_invocation", "alora_invocation_tokens"):
        if getattr(recipe, name):
            raise RecipeError(name, f"{name}: rewards train no activated LoRA. Leave it out")
    if recipe.init == "eva":
        raise RecipeError("init", "EVA looks at replies, and the rows of reinforcement have none: use true")
    counts = {"group_size": _group_size(recipe), "eval_samples": _chosen(recipe.eval_samples, 1)}
    for name, count in counts.items():
        if count * recipe.sample_tokens > MOST_REPLY_TOKENS:
            reason = f"{count} replies of {recipe.sample_tokens} tokens to one prompt are too many to send"
            remedy = f"Lower sample_tokens or {name}: their product may be {MOST_REPLY_TOKENS}"
            raise RecipeError(name, f"{name}: {reason}. {remedy}")
    if recipe.too_long == "truncate":
        raise RecipeError("too_long", "a prompt without its end asks for nothing: refuse or drop longer ones")
    if recipe.train_on == "all":
        raise RecipeError("train_on", "rewards are for replies: leave train_on at assistant")


# ---- training that goes on from an adapter -----------------------------------------------------------


class Module(Protocol):
    """One adapted module, as a proof's report or the files describe it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Any: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...


def own_settings(
    modules: Iterable[Module], *, task: str, rslora: bool, label: str, invocation: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the settings of a recipe that an adapter's weights decide; `targets` are whole names of layers.

    Raises RecipeError: it is of a kind that is not trained here.
    """
    if task != "CAUSAL_LM":
        raise RecipeError(
            MODEL,
            f"{label} cannot be trained further: it generates no text (its task_type is {task}). Begin with "
            "the base or another one",
        )
    found = sorted(modules, key=lambda module: module.name)
    for module in found:
        trained = module.kind in ("lora", "dora", "alora")
        if not trained or getattr(module, "bias", False):
            what = "lora_bias" if trained else module.kind
            raise RecipeError(
                MODEL,
                f"{label} cannot be trained further: its module {module.name} is of the kind {what}, and "
                "only LoRA, DoRA and activated LoRA on linear layers are trained here. Begin with the base "
                "or another one",
            )
    first = found[0]
    return {
        "r": first.rank,
        "alpha": float(first.alpha),
        "targets": [module.name for module in found],
        "rank_pattern": {module.name: module.rank for module in found if module.rank != first.rank},
        "alpha_pattern": {
            module.name: float(module.alpha) for module in found if module.alpha != first.alpha
        },
        "use_rslora": rslora,
        "use_dora": first.kind == "dora",
        "alora_invocation_tokens": tuple(invocation),
        "init": "true",
    }


def continued(given: Mapping[str, Any], own: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the given settings, with those that the parent decides.

    An invocation given as text stays in place of the parent's tokens: they are compared once it is tokens.

    Raises RecipeError for one that contradicts the parent.
    """
    by_text = bool(given.get("alora_invocation")) and not given.get("alora_invocation_tokens")
    if by_text and not own.get("alora_invocation_tokens"):
        raise RecipeError(
            "alora_invocation",
            f"alora_invocation is {shown(given['alora_invocation'])}, but {label} has no invocation, and "
            "training continues from its weights. Leave alora_invocation out",
        )
    for name, value in own.items():
        if name not in given or given[name] in (None, "auto"):
            continue
        asked = _plain(name, given[name], dict(recipe_fields_by_name())[name])
        if name == "targets":
            agrees = _fits(asked, tuple[str, ...]) and _are_layers(asked, value)
            has = "layers of its own"
        elif name == "alora_invocation_tokens":
            agrees = asked == tuple(value) or (by_text and not asked)
            has = f"the invocation {shown(list(value))}" if value else "no invocation"
        elif name == "init":
            agrees, has = asked in (None, "true"), "weights of its own"
        else:
            agrees, has = asked == value, f"{name} {shown(value)}"
        if not agrees:
            raise RecipeError(
                name,
                f"{name} is {shown(given[name])}, but {label} has {has}, and training continues from its "
                f"weights. Leave {'the invocation' if name == 'alora_invocation_tokens' else name} out",
            )
    made = {**given, **own}
    if by_text:
        del made["alora_invocation_tokens"]
    return made


def _are_layers(targets: Sequence[str], layers: Sequence[str]) -> bool:
    """Return True if the targets, whole names, last names or the group of experts, mean all of the layers and
    no others."""
    names = [_names_of(layer) for layer in layers]
    return set[str]().union(*names).issuperset(targets) and not any(map(set(targets).isdisjoint, names))


def _names_of(layer: str) -> set[str]:
    *_, module, last = ["", *layer.split(".")]
    return {layer, last, *(("experts", f"experts.{last}") if module == "experts" else ())}
