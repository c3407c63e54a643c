"""The wire models of the routes about adapters."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from msgspec import convert
from pydantic import Field, model_validator

from onebase_engine.engine.messages import MAX_ADAPTER_TERMS
from onebase_protocol.adapters import (
    EvaluationGate,
    GateRule,
    MergeMethod,
    MergeSign,
    ProofGate,
    RolloutRules,
    SliceScore,
)
from onebase_server.adapters.merging import PRUNING, RANDOM, SIGNED
from onebase_server.requests.schemas.generation import MAX_WEIGHT
from onebase_server.requests.schemas.wire import FieldError, Name, Wire

Text = Annotated[str, Field(min_length=1, max_length=250)]
_RULES = RolloutRules()


class HubSource(Wire):
    """A repository on the Hub, or a subfolder of it."""

    repo: Annotated[str, Field(min_length=3, max_length=200)]
    revision: Text | None = Field(
        default=None, description="branch, tag or commit; the default branch if null"
    )
    subfolder: Text | None = None


class PullRequest(Wire):
    """Body of POST /v1/adapters as JSON; files are sent as multipart/form-data."""

    name: Name | None = Field(default=None, description="by default hub:org/repo, as requests may name it")
    hub: HubSource
    activate: bool = False
    allow_noop: bool = False
    any_base: bool = False


class MergeTerm(Wire):
    """One of the adapters that are merged."""

    name: Name
    weight: float = Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)


class MergeRequest(Wire):
    """Body of POST /v1/adapters/merge."""

    name: Name
    adapters: Annotated[list[MergeTerm], Field(min_length=2, max_length=MAX_ADAPTER_TERMS, fail_fast=True)]
    method: MergeMethod = "linear"
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="the part of each matrix that ties, dare_linear and dare_ties keep"
    )
    sign: MergeSign | None = Field(
        default=None, description="how ties and dare_ties find the sign of most; total by default"
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(
        default=None, description="of what dare_linear and dare_ties drop; 0 by default"
    )
    activate: bool = False
    allow_noop: bool = False

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        """Refuse what the method has no use for, and ask for what it needs."""
        for number, term in enumerate(self.adapters):
            if term.weight == 0:
                raise FieldError(
                    f"adapters[{number}].weight", "is 0, which adds nothing. Leave the adapter out"
                )
        if self.method in PRUNING and self.density is None:
            raise FieldError(
                "density", f"is needed by {self.method}: the part of each matrix to keep, such as 0.5"
            )
        for field, methods in (("density", PRUNING), ("sign", SIGNED), ("seed", RANDOM)):
            if getattr(self, field) is not None and self.method not in methods:
                raise FieldError(field, f"is for {', '.join(methods)}, not for {self.method}. Leave it out")
        return self


class ActivateRequest(Wire):
    version: Annotated[str, Field(min_length=1, max_length=80)]
    expected: Annotated[str, Field(max_length=80)] | None = Field(
        default=None, description="the digest that must be active now; null: none is; not given: any"
    )


class ExpectedRequest(Wire):
    """Body of POST .../rollback."""

    expected: Annotated[str, Field(max_length=80)] | None = None


Percent = Annotated[float, Field(ge=0, le=100)]
Margin = Annotated[float, Field(ge=0, le=1)]
RatioMargin = Annotated[float, Field(ge=0, le=100)]


class RolloutRulesBody(Wire):
    """Rules of a rollout. What is not given is as the defaults say; a margin that is null decides nothing."""

    requests: Annotated[int, Field(ge=1, le=10_000_000)] = _RULES.requests
    confidence: Annotated[float, Field(ge=0.5, le=0.9999)] = _RULES.confidence
    errors: Margin | None = _RULES.errors
    first_token: RatioMargin | None = _RULES.first_token
    per_token: RatioMargin | None = _RULES.per_token
    tokens: RatioMargin | None = _RULES.tokens
    refusals: Margin | None = _RULES.refusals
    feedback: Margin | None = _RULES.feedback
    judge: Margin | None = _RULES.judge

    def rules(self) -> RolloutRules:
        return RolloutRules(**self.model_dump())


class RolloutJudgeBody(Wire):
    adapter: Name
    approves: Annotated[str, Field(min_length=1, max_length=200)] = "yes"
    percent: Annotated[float, Field(gt=0, le=100)] = 10.0


Phrase = Annotated[str, Field(min_length=2, max_length=200)]


class RolloutRequest(Wire):
    """Body of POST .../rollout."""

    version: Annotated[str, Field(min_length=1, max_length=80)]
    percent: Percent = 0.0
    shadow: Percent = 0.0
    by: Literal["caller", "request"] = "caller"
    promote: bool = Field(default=False, description="by itself, once the rules allow it")
    rules: RolloutRulesBody = RolloutRulesBody()
    judge: RolloutJudgeBody | None = None
    refusal_phrases: Annotated[list[Phrase], Field(max_length=64, fail_fast=True)] | None = Field(
        default=None, description="in any case, by whose place in its beginning an answer counts as a refusal"
    )

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if not self.percent and not self.shadow:
            raise FieldError("percent", "is 0, and so is shadow: nothing would be compared. Give one of them")
        return self


class RolloutShareRequest(Wire):
    """Body of POST .../rollout/share: what is not given stays."""

    percent: Percent | None = None
    shadow: Percent | None = None

    @model_validator(mode="after")
    def _check_some(self) -> Self:
        if self.percent is None and self.shadow is None:
            raise FieldError("percent", "is missing, and so is shadow: give one of them, or both")
        return self


class FeedbackRequest(Wire):
    """Body of POST /v1/feedback: a score, or a thumb, for one answer."""

    id: Annotated[str, Field(min_length=1, max_length=200, description="the answer's `id`")]
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    thumb: Literal["up", "down"] | None = Field(default=None, description="1 and 0 as a score")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.score is None) == (self.thumb is None):
            raise FieldError("score", "give either score, from 0 to 1, or thumb, up or down")
        return self

    @property
    def value(self) -> float:
        return float(self.thumb == "up") if self.score is None else self.score


KeyPattern = Annotated[str, Field(min_length=1, max_length=200)]
KeyPatterns = Annotated[list[KeyPattern], Field(max_length=64, fail_fast=True)]
_EVALUATION = EvaluationGate()


class EvaluationGateBody(Wire):
    """Evaluation that a gate asks for."""

    margin: Margin = _EVALUATION.margin
    confidence: Annotated[float, Field(ge=0.5, le=0.9999)] = _EVALUATION.confidence
    rows: Annotated[int, Field(ge=1, le=1_000_000)] = _EVALUATION.rows
    evaluators: KeyPatterns = Field(
        default=[], description="ids of the keys whose evaluations count; `jobs` for the server's own jobs"
    )
    metric: Annotated[str, Field(max_length=100)] = Field(
        default="", description="metric by which an evaluation counts; any if empty"
    )
    slices: KeyPatterns = Field(
        default=[], description="slices that must be judged, each with at least `rows` rows"
    )
    total: Annotated[int, Field(ge=0, le=10_000_000)] = Field(
        default=0, description="smallest number of rows of an evaluation"
    )
    data: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = Field(
        default="", description="SHA-256 (hex) of the file with the held-out rows; any if empty"
    )


class GateRequest(Wire):
    """Body of POST /v1/gates. It takes the place of the rule with the same patterns."""

    tenant: KeyPattern = "*"
    name: KeyPattern = "*"
    signature: KeyPatterns = Field(default=[], description="patterns of the signers, of which one must sign")
    proof: ProofGate = "none"
    evaluation: EvaluationGateBody | None = None
    weights: Annotated[float, Field(ge=0, le=1000)] | None = None
    approvals: Annotated[int, Field(ge=0, le=8)] = 0
    approvers: KeyPatterns = Field(default=[], description="ids of the keys that may approve")

    @model_validator(mode="after")
    def _check_some(self) -> Self:
        asked = (
            self.signature,
            self.proof != "none",
            self.evaluation,
            self.weights is not None,
            self.approvals,
        )
        if not any(asked):
            raise FieldError(
                "signature",
                "is missing, and so are all other gates: name one (signature, proof, evaluation, weights, "
                "approvals), or delete the rule",
            )
        if self.approvers and self.approvals > len(set(self.approvers)):
            raise FieldError("approvals", f"are more than the {len(set(self.approvers))} approvers")
        return self

    def rule(self) -> GateRule:
        return convert(self.model_dump(), GateRule)


class SliceScoreBody(Wire):
    """Differences of two versions' scores (0 to 1) on the rows of one slice."""

    slice: Annotated[str, Field(max_length=200)] = ""
    rows: Annotated[int, Field(ge=1, le=10_000_000)]
    sum: float = Field(description="of the differences: the version's score less the other's")
    squares: float = Field(description="sum of the squares of the differences")

    @model_validator(mode="after")
    def _check_possible(self) -> Self:
        if abs(self.sum) > self.rows:
            raise FieldError(
                "sum", f"of {self.rows} differences of scores from 0 to 1 is at most {self.rows}"
            )
        if not self.sum**2 / self.rows * (1 - 1e-9) <= self.squares <= self.rows:
            raise FieldError(
                "squares", "do not belong to this sum: give the sum of the squares of the same differences"
            )
        return self


class EvaluationRequest(Wire):
    """Body of POST .../evaluation: how a version compares with another on the same rows."""

    against: Annotated[str, Field(min_length=1, max_length=80)] | None = Field(
        default=None, description="digest of the other version of the same name; null: the base"
    )
    metric: Annotated[str, Field(min_length=1, max_length=100)]
    slices: Annotated[list[SliceScoreBody], Field(min_length=1, max_length=200, fail_fast=True)]
    data: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        default=None,
        description="SHA-256 (hex) of the file with the held-out rows, if all of them were asked",
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if len({one.slice for one in self.slices}) < len(self.slices):
            raise FieldError("slices", "name a slice twice: add its rows up")
        return self

    def scores(self) -> list[SliceScore]:
        return [SliceScore(**one.model_dump()) for one in self.slices]


class EmptyRequest(Wire):
    """An empty body."""


class PinRequest(Wire):
    pinned: bool


class ShareRequest(Wire):
    shared: bool


class LoadLoraRequest(Wire):
    """Body of vLLM's POST /v1/load_lora_adapter."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadLoraRequest(Wire):
    """Body of vLLM's POST /v1/unload_lora_adapter."""

    lora_name: Name
    lora_int_id: int | None = None
