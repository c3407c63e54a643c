"""Metrics of generated replies, each from 0 to 1. No metric runs code or patterns from outside.

A metric is a name, or a name with an argument: `contains:TEXT`. Spaces around a reply and around its
reference never count; the case of letters does. For labels, which a classifier gives in place of replies,
there are accuracy and F1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from onebase_adapters.format.strict_json import parse_json, shown

SHORT_TOKENS, SHORT_CHARACTERS = 5, 20
"""Longest reply, in tokens or in characters, that is compared as a whole without being asked."""

Score = Callable[[str, str, str], float]
"""Function of reply, reference and the metric's argument."""


class MetricError(ValueError):
    """The text is not a metric; the message says how to write one."""


@dataclass(frozen=True)
class Metric:
    """Definition of a metric. `argument`: TEXT, A|B|C or N; "" if it takes none."""

    argument: str
    about: str
    score: Score
    decides: bool = True
    """Whether it counts a reply as right or wrong, with nothing between."""


@dataclass(frozen=True)
class LabelMetrics:
    """Figures of one label against all others. precision is 0 if it was never predicted."""

    rows: int
    precision: float
    recall: float
    f1: float


def check_metric(name: str) -> None:
    """Raise MetricError unless `name` is a metric."""
    _parse(name)


def is_decided(name: str) -> bool:
    """Return True if a metric decides between right and wrong. Raises MetricError."""
    return _parse(name)[0].decides


def score(name: str, reply: str, reference: str) -> float:
    """Return a reply's score, from 0 to 1.

    Args:
        reply: the model's text.
        reference: the reply of the held-out row.

    Raises:
        MetricError: there is no such metric.
    """
    metric, argument = _parse(name)
    return float(metric.score(reply.strip(), reference.strip(), argument))


def automatic_metrics(references: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Return the metrics that suit all references: for JSON its validity and the exact match, for short
    replies the exact match, else none.

    Args:
        references: text and number of tokens of the own reply of each held-out row that is measured.
    """
    json, short, some = True, True, False
    for text, tokens in references:
        some, text = True, text.strip()
        json = json and text[:1] in ("{", "[") and _parsed(text)[1]
        short = short and (tokens <= SHORT_TOKENS or len(text) <= SHORT_CHARACTERS)
        if not (json or short):
            break
    if not some:
        return ()
    return ("json_valid", "exact_match") if json else ("exact_match",) if short else ()


def mean(name: str, replies: list[str], references: list[str]) -> float:
    """Return the mean score of replies to as many rows; 0.0 for none."""
    scores = [score(name, *pair) for pair in zip(replies, references, strict=True)]
    return sum(scores) / len(scores) if scores else 0.0


def label_figures(references: Sequence[str], given: Sequence[str]) -> dict[str, LabelMetrics]:
    """Return figures of each label that a row has or was given, in alphabetical order."""
    rows, answers = Counter(references), Counter(given)
    right = Counter(label for label, answer in zip(references, given, strict=True) if label == answer)
    return {
        label: LabelMetrics(
            rows=rows[label],
            precision=right[label] / answers[label] if answers[label] else 0.0,
            recall=right[label] / rows[label] if rows[label] else 0.0,
            f1=2 * right[label] / (rows[label] + answers[label]),
        )
        for label in sorted(rows | answers)
    }


def macro_f1(references: Sequence[str], given: Sequence[str]) -> float:
    """Return the mean F1 of all labels that a row has or was given, equally weighted; 0.0 for no rows."""
    found = label_figures(references, given).values()
    return sum(one.f1 for one in found) / len(found) if found else 0.0


def describe() -> str:
    """Return one line on each metric, for help texts."""
    return "\n".join(f"  {_written(name):20} {metric.about}" for name, metric in METRICS.items())


def _parse(written: str) -> tuple[Metric, str]:
    name, colon, argument = written.partition(":")
    metric = METRICS.get(name)
    if metric is None:
        known = ", ".join(_written(name) for name in METRICS)
        raise MetricError(f"{shown(written)} is not a metric; there are {known}")
    if colon and not metric.argument:
        raise MetricError(f"{shown(written)}: {name} takes nothing after it; write just {name}")
    if metric.argument and not argument.strip():
        raise MetricError(f"{shown(written)}: write it as {_written(name)}")
    if metric.argument == "N" and not (argument.isascii() and argument.isdigit() and len(argument) < 8):
        raise MetricError(f"{shown(written)}: N is a whole number of at most 7 digits")
    if metric.argument == "A|B|C" and not all(_choices(argument)):
        raise MetricError(f"{shown(written)}: no choice may be empty")
    return metric, argument


def _written(name: str) -> str:
    argument = METRICS[name].argument
    return f"{name}:{argument}" if argument else name


def _choices(argument: str) -> list[str]:
    return [choice.strip() for choice in argument.split("|")]


def _one_of(reply: str, reference: str, argument: str) -> bool:
    choices = _choices(argument)
    return reply in choices and (reply == reference or reference not in choices)


def _parsed(text: str) -> tuple[Any, bool]:
    """Return the value of a strict JSON text, and whether it is one."""
    try:
        return parse_json(text.encode()), True
    except (ValueError, RecursionError):
        return None, False


def _json_equal(reply: str, reference: str, _argument: str) -> bool:
    ours, valid = _parsed(reply)
    theirs, comparable = _parsed(reference)
    try:
        return valid and comparable and _same(ours, theirs)
    except RecursionError:
        return False


def _same(one: Any, other: Any) -> bool:
    """Return True if values are equal in JSON: true is not 1, 1.0 is 1, and the order of keys is free."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _json_keys(reply: str, _reference: str, argument: str) -> bool:
    value, _ = _parsed(reply)
    return isinstance(value, dict) and set(value) == set(_choices(argument))


def _word_f1(reply: str, reference: str, _argument: str) -> float:
    """Return the F1 of the words, as SQuAD counts it (Rajpurkar et al. 2016, section 6.1), without its
    clean-up."""
    ours, theirs = Counter(reply.lower().split()), Counter(reference.lower().split())
    both = (ours & theirs).total()
    if not both:
        return float(ours == theirs)
    return 2 * both / (ours.total() + theirs.total())


METRICS: dict[str, Metric] = {
    "exact_match": Metric("", "the reply is the reference", lambda reply, ref, _: reply == ref),
    "word_f1": Metric(
        "", "words in common with the reference, in any order and case", _word_f1, decides=False
    ),
    "json_valid": Metric("", "the reply is JSON and nothing else", lambda reply, _, __: _parsed(reply)[1]),
    "json_equal": Metric("", "the reply is the reference's JSON, keys in any order", _json_equal),
    "json_keys": Metric("A|B|C", "the reply is a JSON object with exactly these keys", _json_keys),
    "contains": Metric("TEXT", "TEXT occurs in the reply", lambda reply, _, text: text in reply),
    "lacks": Metric("TEXT", "TEXT does not occur in the reply", lambda reply, _, text: text not in reply),
    "starts_with": Metric(
        "TEXT", "the reply starts with TEXT", lambda reply, _, text: reply.startswith(text)
    ),
    "ends_with": Metric("TEXT", "the reply ends with TEXT", lambda reply, _, text: reply.endswith(text)),
    "one_of": Metric("A|B|C", "the reply is one of these, the reference if that is one", _one_of),
    "max_characters": Metric(
        "N", "the reply has at most N characters", lambda reply, _, n: len(reply) <= int(n)
    ),
    "min_characters": Metric(
        "N", "the reply has at least N characters", lambda reply, _, n: len(reply) >= int(n)
    ),
}
