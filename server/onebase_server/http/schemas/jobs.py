"""The wire models of the routes about training, as OpenAI's, and what they mean for a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from msgspec import convert
from pydantic import Field, model_validator

from onebase_edge.errors import InvalidRequestError
from onebase_protocol.adapters import ModuleReport
from onebase_protocol.training import Activate
from onebase_server.http.views.jobs import wire_name
from onebase_server.requests.schemas.wire import FieldError, Name, Wire
from onebase_training.graders import GraderError, parse_grader, to_json
from onebase_training.recipe import (
    MODEL,
    NO_PARENT,
    Recipe,
    RecipeError,
    continued,
    own_settings,
    parse_recipe,
)
from onebase_training.recipe import Method as RecipeMethod

MAX_LABELS = 16
MAX_SUFFIX = 64
_NO_KEY = frozenset('"\\')
"""Characters in a key of metadata with which databases do not find it."""
_OWN_FIELDS = ("method", "seed", "grader")
"""Fields of a recipe that a request sets elsewhere."""
_OPENAI = {"n_epochs": "epochs", "eval_interval": "eval_every"}
"""Fields of a recipe by the names that OpenAI's clients have for them."""
_INTEGRATIONS = (
    "this server sends nothing to others: leave it out. The job's events and its result file have all "
    "figures, by which a client can draw them"
)

EVA_GROWTH = 2
"""Largest factor by which EVA, which moves rank between layers, raises the `r` of one."""

FileId = Annotated[str, Field(min_length=1, max_length=100)]
Settings = dict[str, Any]
Label = Annotated[str, Field(max_length=64)]
Labels = Annotated[dict[Label, Annotated[str, Field(max_length=512)]], Field(max_length=MAX_LABELS)]


class MethodSettings(Wire):
    """Settings of one method: OpenAI's hyperparameters and all fields of the recipe; "auto" is a default."""

    hyperparameters: Settings | None = None


class ReinforcementSettings(MethodSettings):
    """Settings of learning from rewards."""

    grader: Settings = Field(description="string_check, text_similarity, score_model, python or multi")


class Method(Wire):
    """Training method: `supervised` on replies, `dpo` on pairs of replies, `classification` on labels, or
    `reinforcement` on rewards that a grader gives the model's own replies."""

    type: Literal["supervised", "dpo", "classification", "reinforcement"]
    supervised: MethodSettings | None = None
    dpo: MethodSettings | None = None
    classification: MethodSettings | None = None
    reinforcement: ReinforcementSettings | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        for other in get_args(RecipeMethod):
            if other != self.type and getattr(self, other) is not None:
                raise FieldError(other, f"method.type is {self.type}: leave {other} out")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise FieldError("reinforcement", "it needs a grader, which gives replies their rewards")
        return self

    @property
    def settings(self) -> Settings:
        chosen: MethodSettings | None = getattr(self, self.type)
        return (chosen.hyperparameters if chosen else None) or {}

    @property
    def grader(self) -> Settings | None:
        return self.reinforcement.grader if self.reinforcement else None


class CreateJobRequest(Wire):
    """Body of POST /v1/fine_tuning/jobs."""

    model: Name
    training_file: FileId
    validation_file: FileId | None = None
    method: Method | None = None
    hyperparameters: Settings | None = Field(default=None, description="of older clients; use method")
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    suffix: Annotated[str, Field(min_length=1, max_length=MAX_SUFFIX)] | None = None
    name: Name | None = Field(default=None, description="the adapter's; by default ft- and the suffix")
    activate: Activate | None = Field(default=None, description="if_better by default")
    hold: bool = Field(
        default=False, description="pause once the files are checked and the estimate is there, until resumed"
    )
    metadata: Labels | None = None
    integrations: Annotated[list[Any], Field(max_length=16)] | None = Field(
        default=None, description="none is served: leave it out, or empty"
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.method is not None and self.hyperparameters is not None:
            raise FieldError("hyperparameters", "they belong into method; give one of the two")
        if self.name is not None and self.suffix is not None:
            raise FieldError("suffix", "name says it all already; give one of the two")
        if self.integrations:
            raise FieldError("integrations", _INTEGRATIONS)
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        for key in self.metadata or ():
            if problem := label_problem(key):
                raise FieldError("metadata", problem)
        return self

    def recipe(self, max_rank: int, parent: ParentSettings | None = None) -> Recipe:
        """Return the recipe that the request asks for, with ranks up to `max_rank`.

        parent: decides the settings that are its own. Raises InvalidRequestError naming the field.
        """
        kind = self.method.type if self.method else "supervised"
        place = f"method.{kind}.hyperparameters" if self.method else "hyperparameters"
        settings = dict(self.method.settings if self.method else self.hyperparameters or {})
        for name, own in _OPENAI.items():
            if name in settings:
                if own in settings:
                    raise InvalidRequestError(
                        f"{place}.{name}: {own} is another name for it; give one of the two.",
                        param=f"{place}.{name}",
                    )
                settings[own] = settings.pop(name)
        if kind == "reinforcement" and settings.pop("reasoning_effort", None) not in (None, "default"):
            raise InvalidRequestError(
                f"{place}.reasoning_effort: replies are sampled as the base thinks by itself. Leave it out.",
                param=f"{place}.reasoning_effort",
            )
        for name in _OWN_FIELDS:
            if name in settings:
                raise InvalidRequestError(
                    f"{place}.{name}: send it next to the hyperparameters, not inside them.",
                    param=f"{place}.{name}",
                )
        given = {name: value for name, value in settings.items() if value != "auto"}
        if self.seed is not None:
            given["seed"] = self.seed
        try:
            if parent is not None:
                if kind == "classification":
                    raise RecipeError(MODEL, NO_PARENT)
                given = continued(given, parent.settings(), parent.label)
            if self.method is not None and self.method.grader is not None:
                given["grader"] = grader_text(self.method.grader)
            recipe = parse_recipe({**given, "method": kind})
            _check_rank(recipe, max_rank)
        except RecipeError as error:
            param = f"{place}.{wire_name(error.field)}" if error.field else place
            if error.field.partition(".")[0] == "grader":
                param = f"method.{kind}.{error.field}"
            param = MODEL if error.field == MODEL else param
            raise InvalidRequestError(f"{param}: {error}.", param=param) from error
        return recipe


@dataclass(frozen=True)
class ParentSettings:
    """Settings that are decided by the version to continue training from. report: that of its proof,
    whole."""

    label: str
    report: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """Return the settings. Raises RecipeError if the version is of a kind that is not trained here."""
        modules = convert(self.report["modules"], list[ModuleReport])
        task = self.report.get("task", "CAUSAL_LM")
        return own_settings(
            modules,
            task=task,
            rslora=self.report["rslora"],
            label=self.label,
            invocation=self.report.get("invocation_tokens", ()),
        )


def grader_text(grader: Settings) -> str:
    """Return a grader as it is stored. Raises RecipeError: it cannot be used."""
    try:
        return json.dumps(to_json(parse_grader(grader)), sort_keys=True)
    except GraderError as error:
        raise RecipeError(f"grader.{error.field}".rstrip("."), error.reason) from error


class RunGraderRequest(Wire):
    """Body of POST /v1/fine_tuning/alpha/graders/run."""

    grader: Settings
    model_sample: Annotated[str, Field(max_length=1 << 20)]
    item: Settings | None = Field(default=None, description="the row, which templates read as `item`")


class ValidateGraderRequest(Wire):
    """Body of POST /v1/fine_tuning/alpha/graders/validate."""

    grader: Settings


def label_problem(key: str) -> str:
    """Return why jobs could not be found by this key of their metadata; "" if they can."""
    if key.isprintable() and _NO_KEY.isdisjoint(key):
        return ""
    return f'a key is {key[:80]!r}: write it without ", \\ and characters that cannot be printed'


def _check_rank(recipe: Recipe, max_rank: int) -> None:
    """Refuse an adapter that would not be served, before it is trained. Raises RecipeError."""
    eva = recipe.init == "eva"
    growth = EVA_GROWTH if eva else 1
    why = f", and init eva gives some layers up to {EVA_GROWTH} times that" if eva else ""
    layers = [("rank_pattern", f" of {layer[:80]}", rank) for layer, rank in recipe.rank_pattern.items()]
    for field, of, rank in [("r", "", recipe.r), *layers]:
        if rank * growth > max_rank:
            raise RecipeError(
                field,
                f"{field}{of} is {rank}{why}: this server serves adapters up to rank {max_rank}. Write "
                f"{max_rank // growth} or less, or raise its --max-rank",
            )
