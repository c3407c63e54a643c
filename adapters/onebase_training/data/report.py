"""Report on a data set for people: counts, lengths, repeated rows, and three rows as they are learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from onebase_training.data.dataset import Dataset, Row, RowPlace, Sample

_EXAMPLES = 3
_BARS = 10
_MOST_SEGMENTS = 40
_LONGEST_SEGMENT = 800
_MOST_NAMED = 1000
_UNEVEN = 10


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. row: its number in the file. side: of a preference, "chosen" or
    "rejected", else "".

    segments: text with its control tokens, and whether it is learned; for a row with a label, whether the
    label is read there.
    """

    row: int
    line: int
    side: str
    segments: Sequence[tuple[str, bool]]
    label: str = ""


@dataclass(frozen=True)
class DataReport:
    """Figures of one data set, and its overlap with the one for evaluation.

    rows: of the file. samples: sequences made of them: more for preferences, or if a chat template rewrites
    earlier replies. tokens, supervised: in all samples. shortest, median, longest: tokens of one.
    histogram: (from, to, samples) with `to` included.
    named_by: "line": a row is named by the line on which it begins; "row": by its number, if several begin on
    one line.
    truncated, dropped: rows. duplicates: (row, earlier row with the same content).
    leakage: rows whose content is in `evaluation`. same_prompt: rows that only have the same prompt as one
    there.
    labels: rows of each, the most frequent first. not_held_out: labels that no row in `evaluation` has.
    """

    source: str
    rows: int
    samples: int
    tokens: int
    supervised: int
    shortest: int
    median: int
    longest: int
    histogram: Sequence[tuple[int, int, int]]
    truncated: Sequence[int]
    dropped: Sequence[int]
    duplicates: Sequence[tuple[int, int]]
    leakage: Sequence[int]
    same_prompt: Sequence[int]
    examples: Sequence[Example]
    evaluation: DataReport | None = None
    named_by: Literal["line", "row"] = "line"
    labels: Mapping[str, int] = field(default_factory=dict)
    not_held_out: Sequence[str] = ()

    @property
    def uneven(self) -> bool:
        """Whether a label has many times the rows of another."""
        counts = self.labels.values()
        return bool(counts) and max(counts) > _UNEVEN * min(counts)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; lists of rows are cut after 1000, and counted in `counts`."""
        lists = {
            name: list(getattr(self, name))
            for name in ("truncated", "dropped", "duplicates", "leakage", "same_prompt")
        }
        return {
            "source": self.source,
            "rows": self.rows,
            "samples": self.samples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "shortest": self.shortest,
            "median": self.median,
            "longest": self.longest,
            "counts": {name: len(found) for name, found in lists.items()},
            "named_by": self.named_by,
            **{name: [_plain(each) for each in found[:_MOST_NAMED]] for name, found in lists.items()},
            "histogram": [{"from": low, "to": high, "samples": count} for low, high, count in self.histogram],
            "examples": [
                {
                    "row": example.row,
                    "line": example.line,
                    "side": example.side,
                    "segments": [{"text": text, "supervised": learned} for text, learned in example.segments],
                    **({"label": example.label} if example.label else {}),
                }
                for example in self.examples
            ],
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
        } | self._labels_json()

    def _labels_json(self) -> dict[str, Any]:
        if not self.labels:
            return {}
        counts = [{"label": label, "rows": rows} for label, rows in self.labels.items()]
        return {"labels": counts, "uneven_labels": self.uneven, "labels_not_held_out": [*self.not_held_out]}


def report(train: Dataset, evaluation: Dataset | None, tokenizer: Any) -> DataReport:
    """Describe training data, as `load_dataset` or `split` made it, and compare it with evaluation data.

    Args:
        evaluation: None or empty: nothing to compare with.
        tokenizer: the base's own, for the examples.
    """
    if evaluation is not None and not len(evaluation):
        evaluation = None
    samples = [sample for row in train.rows for sample in row.samples]
    lengths = np.array([len(sample) for sample in samples] or [0])
    leakage, same_prompt = _shared(train, evaluation) if evaluation else ([], [])

    def named(places: Iterable[RowPlace]) -> list[int]:
        return [place.row if train.lines_shared else place.line for place in places]

    return DataReport(
        source=train.source,
        rows=len(train.keys),
        samples=len(samples),
        tokens=int(lengths.sum()),
        supervised=sum(sample.targets for sample in samples),
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
        histogram=_histogram(lengths) if samples else [],
        truncated=named(train.truncated),
        dropped=named(train.dropped),
        duplicates=[(again, first) for again, first in map(named, _duplicates(train))],
        leakage=named(leakage),
        same_prompt=named(same_prompt),
        examples=list(_examples(train.rows, train.places(), tokenizer)),
        evaluation=report(evaluation, None, tokenizer) if evaluation else None,
        named_by="row" if train.lines_shared else "line",
        labels=train.label_counts(),
        not_held_out=[one for one in train.labels if one not in evaluation.labels] if evaluation else (),
    )


def _duplicates(data: Dataset) -> list[tuple[RowPlace, RowPlace]]:
    first: dict[bytes, RowPlace] = {}
    return [
        (key.place, first[key.content])
        for key in data.keys
        if first.setdefault(key.content, key.place) != key.place
    ]


def _shared(train: Dataset, evaluation: Dataset) -> tuple[list[RowPlace], list[RowPlace]]:
    """Return the rows of `train` that are in `evaluation` too, and rows that only share a prompt with one
    there."""
    contents = {key.content for key in evaluation.keys}
    prompts = {key.prompt for key in evaluation.keys} - {None}
    leakage = [key.place for key in train.keys if key.content in contents]
    asked = [key.place for key in train.keys if key.content not in contents and key.prompt in prompts]
    return leakage, asked


def _histogram(lengths: np.ndarray[Any, Any]) -> list[tuple[int, int, int]]:
    """Return about ten bars at most, each 1, 2 or 5 times a power of ten wide."""
    width = 1
    while lengths.max() - lengths.min() > width * _BARS:
        width = width * 5 // 2 if str(width).startswith("2") else width * 2
    first, last = int(lengths.min()) // width, int(lengths.max()) // width
    counts = np.bincount(lengths // width - first, minlength=last - first + 1)
    return [(i * width, (i + 1) * width - 1, int(counts[i - first])) for i in range(first, last + 1)]


def _examples(rows: Sequence[Row], places: Sequence[RowPlace], tokenizer: Any) -> Iterable[Example]:
    """Yield the first row, the last and one between."""
    count = len(rows)
    for index in sorted({0, count // 2, count - 1})[:_EXAMPLES] if count else ():
        sides = ("",) if isinstance(rows[index], Sample) else ("chosen", "rejected")
        for side, sample in zip(sides, rows[index].samples, strict=True):
            yield Example(*places[index], side, _segments(sample, tokenizer), sample.label)


def _segments(sample: Sample, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the sample's text, cut where learning begins or ends; long parts lose their middle."""
    borders = [0, *(np.flatnonzero(np.diff(sample.supervised)) + 1).tolist(), len(sample)]
    made = []
    for start, stop in itertools.pairwise(borders):
        text = tokenizer.decode(sample.ids[start:stop].tolist(), clean_up_tokenization_spaces=False)
        made.append((_shortened(text), bool(sample.supervised[start])))
    if len(made) > _MOST_SEGMENTS:
        half = _MOST_SEGMENTS // 2
        made = [*made[:half], (f"[... {len(made) - 2 * half} parts ...]", False), *made[-half:]]
    return made


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_SEGMENT:
        return text
    left, right = _LONGEST_SEGMENT * 2 // 3, _LONGEST_SEGMENT // 3
    return f"{text[:left]}[... {len(text) - left - right:,} characters ...]{text[-right:]}"


def _plain(row: int | tuple[int, int]) -> int | list[int]:
    return list(row) if isinstance(row, tuple) else row
