"""Rules and statistics of rollouts: the version that answers a request, and what the figures prove.

The intervals are asymptotic confidence sequences (Waudby-Smith and others, "Time-uniform central limit theory
and asymptotic confidence sequences", 2021): they hold at every moment together, so that a server may look
after every answer and decide once one of them is beyond the margin. An ordinary interval, looked at again and
again, would sooner or later be wrong by chance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
bound; that of times must be estimated. Where callers are divided, as many clusters of them are needed."""
CLUSTERS: Final = 64
"""Clusters among which the callers of a rollout are spread by their hash."""
_WHOLE = 2**64
REFUSALS = (
    "i can't", "i cannot", "i can not", "i'm unable to", "i am unable to", "i'm not able to",
    "i am not able to", "i won't", "i will not", "i'm sorry, but", "i am sorry, but", "as an ai",
)  # fmt: skip
"""Phrases by which an answer counts as a refusal, unless a rollout names others."""
_BEGINNING = 160
"""First characters of an answer, without leading space, among which a phrase is looked for."""


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


def cluster_of(rollout: RolloutRecord, unit: RequestUnit) -> int:
    """Return the cluster (0 to CLUSTERS - 1) of a caller. It does not depend on its `position`."""
    digest = hashlib.sha256(f"{rollout.id}\0{unit.caller}".encode("utf-8", "surrogatepass")).digest()
    return digest[8] % CLUSTERS


def chooses_candidate(rollout: RolloutRecord, unit: RequestUnit) -> bool:
    """Return True if the candidate answers this unit's requests. A larger share only adds units."""
    by_request = rollout.settings.get("by") == "request"
    return 100.0 * position(rollout.id, unit.request if by_request else unit.caller) < rollout.percent


def plain_phrase(text: str) -> str:
    """Return a text as phrases are compared: in any case, and with straight apostrophes."""
    return text.replace("\u2019", "'").casefold()


def is_refusal(text: str, phrases: tuple[str, ...]) -> bool:
    """Return True if one of the phrases stands near the beginning of an answer."""
    beginning = plain_phrase(text.lstrip()[:_BEGINNING])
    return any(phrase in beginning for phrase in phrases or REFUSALS)


# ---- sums --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutMetric:
    """One metric. kind: `share` of requests (0 or 1 each), `score` from 0 to 1, or a `ratio` of positive
    numbers, whose logarithms are summed. sign: -1 if lower is worse."""

    name: str
    kind: Kind
    sign: int = 1


METRICS = (
    RolloutMetric("errors", "share"),
    RolloutMetric("first_token", "ratio"),
    RolloutMetric("per_token", "ratio"),
    RolloutMetric("tokens", "ratio"),
    RolloutMetric("refusals", "share"),
    RolloutMetric("feedback", "score", -1),
    RolloutMetric("judge", "share", -1),
)
_OF_SHADOWS = ("errors", "tokens", "refusals", "judge")
"""Metrics of copies: they wait for others, so that their times say nothing, and nobody sees them."""


def observe(metric: str, value: float) -> dict[str, float]:
    """Return what one value adds to the sums of a metric."""
    return {f"{metric}.n": 1.0, f"{metric}.sum": value, f"{metric}.squares": value * value}


@dataclass(frozen=True)
class _Sample:
    """Number, mean and standard deviation of the values of one metric on one side.

    effective: number of independent values that would give the mean the same variance (Kish, "Survey
    Sampling", 1965). clusters: number of clusters that have values; None where each value counts by itself.
    """

    n: int
    mean: float
    deviation: float
    effective: float
    clusters: int | None = None

    def is_enough(self, least: int) -> bool:
        return self.n >= least and (self.clusters is None or self.clusters >= least)

    def half_width(self, alpha: float, most_exact_at: int) -> float:
        """Return half the width of a confidence sequence of the mean, which errs with probability `alpha`.

        most_exact_at: the number of values at which it is narrowest.
        """
        if self.n == 0:
            return math.inf
        n = self.effective
        spread = -2 * math.log(alpha)
        rho = (spread + math.log(spread) + 1) / max(1, most_exact_at)
        grown = n * rho + 1
        return self.deviation * math.sqrt(2 * grown / (n**2 * rho) * math.log(math.sqrt(grown) / alpha))


def _sample(metric: RolloutMetric, sums: Mapping[str, float], *, clustered: bool) -> _Sample:
    n = round(sums.get(f"{metric.name}.n", 0.0))
    if n == 0:
        return _Sample(0, 0.0, 0.0, 0.0)
    total = sums.get(f"{metric.name}.sum", 0.0)
    mean = total / n
    if metric.kind == "share":  # none of few is not never: as of two more that did, and two that did not
        likely = (total + 2) / (n + 4)
        variance = likely * (1 - likely)
    else:
        variance = max(0.0, sums.get(f"{metric.name}.squares", 0.0) / n - mean * mean)
        if metric.kind == "score":  # equal ones by chance are no proof that all are
            variance = max(variance, 0.25 / (n + 4))
        variance *= n / max(1, n - 1)
    sample = _Sample(n, mean, math.sqrt(variance), n)
    if not clustered:
        return sample
    clusters, of_mean = _cluster_variance(metric, sums, mean)
    design_effect = max(1.0, of_mean * n / variance) if variance else 1.0
    return replace(sample, effective=n / design_effect, clusters=clusters)


def _cluster_variance(metric: RolloutMetric, sums: Mapping[str, float], mean: float) -> tuple[int, float]:
    """Return the number of clusters with values, and the variance of the mean between them: values of one
    cluster may depend on each other."""
    sizes = {one: sums.get(f"{metric.name}.n.{one}", 0.0) for one in range(CLUSTERS)}
    present = [one for one, size in sizes.items() if size > 0]
    if len(present) < 2:
        return len(present), 0.0
    residuals = (sums.get(f"{metric.name}.sum.{one}", 0.0) - mean * sizes[one] for one in present)
    squares = math.fsum(one * one for one in residuals)
    values = math.fsum(sizes[one] for one in present)
    return len(present), len(present) / (len(present) - 1) * squares / values**2


# ---- what they say -----------------------------------------------------------------------------


def compare(figures: RolloutFigures, settings: RolloutSettings) -> list[RolloutComparison]:
    """Return the comparison of the candidate, and of its copies, by each metric."""
    rules = settings.rules
    ruled = [metric.name for metric in METRICS if getattr(rules, metric.name) is not None]
    alpha = (1 - rules.confidence) / max(1, len(ruled) + sum(name in _OF_SHADOWS for name in ruled))
    active, candidate = figures.get("active", {}), figures.get("candidate", {})
    clustered = settings.by == "caller"
    found = [
        _compare(metric, "candidate", active, candidate, rules, alpha, clustered=clustered)
        for metric in METRICS
    ]
    if figures.get("shadow"):  # requests are chosen for copies one by one, whoever sent them
        found += [
            _compare(metric, "shadow", active, figures["shadow"], rules, alpha, clustered=False)
            for metric in METRICS
            if metric.name in _OF_SHADOWS
        ]
    return found


def _compare(
    metric: RolloutMetric,
    side: Literal["candidate", "shadow"],
    active: Mapping[str, float],
    other: Mapping[str, float],
    rules: RolloutRules,
    alpha: float,
    *,
    clustered: bool,
) -> RolloutComparison:
    ours, theirs = (_sample(metric, one, clustered=clustered) for one in (active, other))
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
        if all(one.is_enough(LEAST[metric.kind]) for one in (ours, theirs)):
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


def _shown(metric: RolloutMetric, sample: _Sample, width: float) -> SideFigure:
    if sample.n == 0:
        return SideFigure(0, None)
    mean, low, high = (
        math.exp(min(one, 700.0)) if metric.kind == "ratio" else max(0.0, min(1.0, one))
        for one in (sample.mean, sample.mean - width, sample.mean + width)
    )
    return SideFigure(sample.n, mean, *((low, high) if sample.is_enough(LEAST[metric.kind]) else ()))


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
class RolloutDecision:
    """Decision that a rollout's figures ask for: its end and the reason, or what a promotion waits for."""

    state: Literal["promoted", "rolled_back"] | None = None
    reason: str = ""
    waits_for: tuple[str, ...] = ()


def decide(rollout: RolloutRecord, settings: RolloutSettings) -> RolloutDecision:
    """Return what the figures of a running rollout ask for.

    Worse by one metric's margin rolls back. A promotion needs the rules' number of answers, and each metric
    that has a margin and any value at all to be not worse. A judge that was asked for must have said
    something, and clients may not have left more of the candidate's answers, by the margin of errors.
    """
    comparisons = compare(rollout.figures, settings)
    ruled = [one for one in comparisons if one.margin is not None]
    for one in ruled:
        if one.verdict == "worse":
            return RolloutDecision("rolled_back", _words(one))
    answered = round(rollout.figures.get("candidate", {}).get("errors.n", 0.0))
    waits = []
    if answered < settings.rules.requests:
        waits.append(f"requests: {answered} of {settings.rules.requests}")
    waits += _lacking(rollout, settings)
    waits += _left_more(rollout, settings.rules)
    waits += _unjudged(comparisons, settings)
    if undecided := [_name(one) for one in ruled if one.verdict == "undecided"]:
        waits.append(f"not decided: {', '.join(undecided)}")
    if waits or not settings.promote:
        return RolloutDecision(waits_for=tuple(waits))
    return RolloutDecision("promoted", f"not worse by any margin after {answered} requests")


def _lacking(rollout: RolloutRecord, settings: RolloutSettings) -> list[str]:
    """Return what keeps the two sides from being compared."""
    active, candidate = (rollout.figures.get(side, {}) for side in ("active", "candidate"))
    if not active.get("errors.n"):
        return ["no requests of the active version"] if candidate.get("errors.n") else []
    if settings.by != "caller" or not candidate.get("errors.n"):
        return []
    rules = settings.rules
    ruled = [LEAST[one.kind] for one in METRICS if getattr(rules, one.name) is not None]
    least = max(ruled, default=0)
    found = min(_sample(METRICS[0], side, clustered=True).clusters or 0 for side in (active, candidate))
    return [f"groups of users: {found} of {least}"] if found < least else []


def _left_more(rollout: RolloutRecord, rules: RolloutRules) -> list[str]:
    """Return what is said of a candidate whose clients leave, as they do where it stalls."""
    if rules.errors is None:
        return []
    shares = []
    for side in ("active", "candidate"):
        sums = rollout.figures.get(side, {})
        left = sums.get("aborted", 0.0)
        shares.append(left / max(1.0, left + sums.get("errors.n", 0.0)))
    if shares[1] - shares[0] <= rules.errors:
        return []
    return [
        f"clients left {_percent(shares[1])}% of the candidate's answers, and {_percent(shares[0])}% of the "
        "active version's"
    ]


def _unjudged(comparisons: Sequence[RolloutComparison], settings: RolloutSettings) -> list[str]:
    """Return what is said of a judge that was asked for and has said nothing: it may be deleted by now."""
    if settings.judge is None or settings.rules.judge is None:
        return []
    silent = (one.verdict == "no_data" for one in comparisons if one.metric == "judge")
    return [f"judge: no answer of {settings.judge.adapter} yet"] if all(silent) else []


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
