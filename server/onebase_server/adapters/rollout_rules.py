"""Rules and statistics of rollouts: the version that answers a request, and what the figures prove.

The intervals are asymptotic confidence sequences (Waudby-Smith and others, "Time-uniform central limit theory
and asymptotic confidence sequences", 2021): they hold at every moment together, so that a server may look
after every answer and decide once one of them is beyond the margin. An ordinary interval, looked at again and
again, would sooner or later be wrong by chance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from msgspec import convert

from onebase_adapters.registry import RolloutFigures, RolloutRecord
from onebase_protocol.adapters import (
    RolloutComparison,
    RolloutJudge,
    RolloutRules,
    RolloutSideCounts,
    SideFigure,
    Verdict,
)

Kind = Literal["share", "score", "ratio"]
By = Literal["caller", "request"]

LEAST: Final[Mapping[Kind, int]] = {"share": 10, "score": 10, "ratio": 30}
"""Smallest number of values on each side before a metric says anything. The spread of shares and scores has a
bound; that of times must be estimated."""
_WHOLE = 2**64
REFUSALS = (
    "i can't", "i cannot", "i can not", "i'm unable to", "i am unable to", "i'm not able to",
    "i am not able to", "i won't", "i will not", "i'm sorry, but", "i am sorry, but", "as an ai",
)  # fmt: skip
"""Phrases at the beginning of an answer by which it counts as a refusal, unless a rollout names others."""
_BEGINNING = 160
"""Characters of an answer among which a phrase is looked for."""


@dataclass(frozen=True)
class RequestUnit:
    """Keys by which rollouts divide requests. `caller`: who asks; `request`: an id of the request's own."""

    caller: str
    request: str


@dataclass(frozen=True)
class RolloutSettings:
    """Fields of a rollout that the registry keeps as JSON."""

    rules: RolloutRules
    by: By = "caller"
    promote: bool = False
    judge: RolloutJudge | None = None
    phrases: tuple[str, ...] = ()
    """Phrases of refusals; empty: REFUSALS."""

    @classmethod
    def of(cls, rollout: RolloutRecord) -> RolloutSettings:
        return convert(dict(rollout.settings), cls)


def position(rollout: str, unit: str) -> float:
    """Return a number from 0 to 1 that a unit keeps throughout a rollout, whatever its share is."""
    digest = hashlib.sha256(f"{rollout}\0{unit}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / _WHOLE


def chooses_candidate(rollout: RolloutRecord, unit: RequestUnit) -> bool:
    """Return True if the candidate answers this unit's requests. A larger share only adds units."""
    by_request = rollout.settings.get("by") == "request"
    return 100.0 * position(rollout.id, unit.request if by_request else unit.caller) < rollout.percent


def is_refusal(text: str, phrases: tuple[str, ...]) -> bool:
    """Return True if an answer begins like a refusal."""
    beginning = text.lstrip()[:_BEGINNING].replace("\u2019", "'").casefold()
    return any(phrase in beginning for phrase in phrases or REFUSALS)


# ---- sums --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One metric. kind: `share` of requests (0 or 1 each), `score` from 0 to 1, or a `ratio` of positive
    numbers, whose logarithms are summed. sign: -1 if lower is worse."""

    name: str
    kind: Kind
    sign: int = 1


METRICS = (
    Metric("errors", "share"),
    Metric("first_token", "ratio"),
    Metric("per_token", "ratio"),
    Metric("tokens", "ratio"),
    Metric("refusals", "share"),
    Metric("feedback", "score", -1),
    Metric("judge", "share", -1),
)
_OF_SHADOWS = ("errors", "tokens", "refusals", "judge")
"""Metrics of copies: they wait for others, so that their times say nothing, and nobody sees them."""


def observe(metric: str, value: float) -> dict[str, float]:
    """Return what one value adds to the sums of a metric."""
    return {f"{metric}.n": 1.0, f"{metric}.sum": value, f"{metric}.squares": value * value}


@dataclass(frozen=True)
class _Sample:
    """Number, mean and standard deviation of the values of one metric on one side."""

    n: int
    mean: float
    deviation: float

    def half_width(self, alpha: float, most_exact_at: int) -> float:
        """Return half the width of a confidence sequence of the mean, which errs with probability `alpha`.

        most_exact_at: the number of values at which it is narrowest.
        """
        if self.n == 0:
            return math.inf
        spread = -2 * math.log(alpha)
        rho = (spread + math.log(spread) + 1) / max(1, most_exact_at)
        grown = self.n * rho + 1
        return self.deviation * math.sqrt(2 * grown / (self.n**2 * rho) * math.log(math.sqrt(grown) / alpha))


def _sample(metric: Metric, sums: Mapping[str, float]) -> _Sample:
    n = round(sums.get(f"{metric.name}.n", 0.0))
    if n == 0:
        return _Sample(0, 0.0, 0.0)
    total = sums.get(f"{metric.name}.sum", 0.0)
    mean = total / n
    if metric.kind == "share":  # none of few is not never: as of two more that did, and two that did not
        likely = (total + 2) / (n + 4)
        return _Sample(n, mean, math.sqrt(likely * (1 - likely)))
    variance = max(0.0, sums.get(f"{metric.name}.squares", 0.0) / n - mean * mean)
    if metric.kind == "score":  # equal ones by chance are no proof that all are
        variance = max(variance, 0.25 / (n + 4))
    return _Sample(n, mean, math.sqrt(variance * n / max(1, n - 1)))


# ---- what they say -----------------------------------------------------------------------------


def compare(figures: RolloutFigures, rules: RolloutRules) -> list[RolloutComparison]:
    """Return the comparison of the candidate, and of its copies, by each metric."""
    ruled = sum(getattr(rules, metric.name) is not None for metric in METRICS)
    alpha = (1 - rules.confidence) / max(1, ruled)
    active, found = figures.get("active", {}), []
    for metric in METRICS:
        found.append(_compare(metric, "candidate", active, figures.get("candidate", {}), rules, alpha))
    if figures.get("shadow"):
        found += [
            _compare(metric, "shadow", active, figures["shadow"], rules, alpha)
            for metric in METRICS
            if metric.name in _OF_SHADOWS
        ]
    return found


def _compare(
    metric: Metric,
    side: Literal["candidate", "shadow"],
    active: Mapping[str, float],
    other: Mapping[str, float],
    rules: RolloutRules,
    alpha: float,
) -> RolloutComparison:
    ours, theirs = _sample(metric, active), _sample(metric, other)
    margin: float | None = getattr(rules, metric.name)
    widths = [one.half_width(alpha / 2, rules.requests) for one in (ours, theirs)]
    worse_by = low = high = None
    verdict: Verdict = "no_data" if not (ours.n or theirs.n) else "undecided"
    if ours.n and theirs.n:
        difference, width = metric.sign * (theirs.mean - ours.mean), sum(widths)
        worse_by, *ends = (
            math.expm1(min(one, 700.0)) if metric.kind == "ratio" else max(-1.0, min(1.0, one))
            for one in (difference, difference - width, difference + width)
        )
        if min(ours.n, theirs.n) >= LEAST[metric.kind]:
            low, high = ends
            verdict = _verdict(low, high, margin or 0.0)
    return RolloutComparison(
        metric=metric.name,
        side=side,
        active=_shown(metric, ours, widths[0]),
        candidate=_shown(metric, theirs, widths[1]),
        worse_by=worse_by,
        low=low,
        high=high,
        margin=margin,
        verdict=verdict,
    )


def _verdict(low: float, high: float, margin: float) -> Verdict:
    if low > margin:
        return "worse"
    if high < 0:
        return "better"
    return "not_worse" if high <= margin else "undecided"


def _shown(metric: Metric, sample: _Sample, width: float) -> SideFigure:
    if sample.n == 0:
        return SideFigure(0, None)
    mean, low, high = (
        math.exp(min(one, 700.0)) if metric.kind == "ratio" else max(0.0, min(1.0, one))
        for one in (sample.mean, sample.mean - width, sample.mean + width)
    )
    return SideFigure(sample.n, mean, *((low, high) if sample.n >= LEAST[metric.kind] else ()))


def side_counts(rollout: RolloutRecord) -> tuple[RolloutSideCounts, ...]:
    """Return the counts of each side that has any; the active version and the candidate always."""
    found = []
    for side, version in (
        ("active", rollout.baseline), ("candidate", rollout.candidate), ("shadow", rollout.candidate)
    ):  # fmt: skip
        sums = rollout.figures.get(side, {})
        if side == "shadow" and not (sums or rollout.shadow):
            continue
        found.append(
            RolloutSideCounts(
                side=side,  # type: ignore[arg-type]
                version=version,
                requests=round(sums.get("errors.n", 0.0)),
                errors=round(sums.get("errors.sum", 0.0)),
                refusals=round(sums.get("refusals.sum", 0.0)),
                aborted=round(sums.get("aborted", 0.0)),
                skipped=round(sums.get("skipped", 0.0)),
                prompt_tokens=round(sums.get("prompt_tokens", 0.0)),
                completion_tokens=round(sums.get("completion_tokens", 0.0)),
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Decision:
    """Decision that a rollout's figures ask for: its end and the reason, or what a promotion waits for."""

    state: Literal["promoted", "rolled_back"] | None = None
    reason: str = ""
    waits_for: tuple[str, ...] = ()


def decide(rollout: RolloutRecord, settings: RolloutSettings) -> Decision:
    """Return what the figures of a running rollout ask for.

    Worse by one metric's margin rolls back. A promotion needs the rules' number of answers, and each metric
    that has a margin and any value at all to be not worse.
    """
    comparisons = compare(rollout.figures, settings.rules)
    ruled = [one for one in comparisons if one.margin is not None]
    for one in ruled:
        if one.verdict == "worse":
            return Decision("rolled_back", _words(one))
    answered = round(rollout.figures.get("candidate", {}).get("errors.n", 0.0))
    waits = []
    if answered < settings.rules.requests:
        waits.append(f"requests: {answered} of {settings.rules.requests}")
    if undecided := [_name(one) for one in ruled if one.verdict == "undecided"]:
        waits.append(f"not decided: {', '.join(undecided)}")
    if waits or not settings.promote:
        return Decision(waits_for=tuple(waits))
    return Decision("promoted", f"not worse by any margin after {answered} requests")


def _name(one: RolloutComparison) -> str:
    return one.metric if one.side == "candidate" else f"{one.metric} of copies"


def _words(one: RolloutComparison) -> str:
    ratio = next(metric.kind for metric in METRICS if metric.name == one.metric) == "ratio"
    unit = "%" if ratio else " points"
    return (
        f"{_name(one)}: worse by {_percent(one.low)} to {_percent(one.high)}{unit}, and the margin is "
        f"{_percent(one.margin)}{unit}"
    )


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.3g}"
