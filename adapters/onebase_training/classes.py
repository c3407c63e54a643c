"""Measure how the adapter, and the base without it, classify held-out rows."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from onebase_engine.base.chat import ControlTokenError
from onebase_engine.base.load import UnsupportedBaseError, longest_row
from onebase_training import events
from onebase_training.batches import pack
from onebase_training.data.dataset import Dataset, Row, are_numbers
from onebase_training.data.tokens import BaseTokens
from onebase_training.events import Gate, Listen
from onebase_training.metrics import label_figures, macro_f1
from onebase_training.recipe import Recipe
from onebase_training.replies import Measuring, Replies, as_chat, score_choices
from onebase_training.trainable import Trainable

DECIDED, MOST_FREQUENT = "decide", "most_frequent"
"""Methods of the base to classify: by the most probable name of a label, or always with the same label."""
MOST_CHOICES = 20_000
"""Largest product of held-out rows and labels for which the base is asked."""
_MOST_FIGURES, _MOST_CONFUSED, _LARGEST_MATRIX = 100, 20, 20
"""Largest number of labels in a report, of pairs that are confused, and of labels in a whole matrix."""
_MARGIN = 16


@dataclass(frozen=True)
class LabelledRow:
    """A held-out row. reference: its label."""

    reference: str
    slice: str
    line: int


class Classifying(Measuring):
    """Labels of all held-out rows: those of the adapter as it is now, and those of the base.

    The base has no head. It is asked which label it would name, as `/v1/decide` does. If the labels are bare
    numbers, or too many, the base's answer is always the label that most training rows have.
    """

    def __init__(
        self,
        trainable: Trainable,
        tokenizer: Any,
        recipe: Recipe,
        train: Dataset,
        held_out: Dataset | None,
        folder: Path,
        listen: Listen,
        gate: Gate,
    ) -> None:
        super().__init__(trainable, tokenizer, recipe, held_out, folder, listen, gate)
        self._rows: Sequence[Row] = held_out.rows if held_out is not None else ()
        self._asked = [LabelledRow(row.label, row.slice, row.line) for row in self._rows]
        self._counts = train.label_counts()

    @property
    def prompts(self) -> Sequence[LabelledRow]:
        """All held-out rows."""
        return self._asked

    def shown(self) -> list[dict[str, Any]]:
        """Return line, slice, text and label of the rows that a report begins with."""
        return self._rows_of(self._asked, (row.samples[0].ids.tolist() for row in self._rows))

    def _measure(self, subject: str) -> Replies:
        if not self._asked:
            return Replies()
        self._listen(events.Phase(at=time.time(), name="measuring", message=subject))
        how = "head"
        if subject == "base":
            how, likelihoods = self._by_base()
        else:
            likelihoods = self._by_head()
        names, own = self._trainable.labels, [row.reference for row in self._asked]
        place = {name: number for number, name in enumerate(names)}
        given = [names[int(row.argmax())] for row in likelihoods]
        losses = [-float(row[place[label]]) for row, label in zip(likelihoods, own, strict=True)]
        right = sum(one == other for one, other in zip(own, given, strict=True))
        found = {"accuracy": right / len(own), "f1": macro_f1(own, given)}
        self._listen(events.Measured(at=time.time(), subject=subject, metrics=found, rows=len(own)))
        return Replies(found, given, losses, how)

    def _by_head(self) -> torch.Tensor:
        """Return log-probabilities [rows, labels] fp64."""
        found = torch.zeros(len(self._rows), len(self._trainable.labels), dtype=torch.float64)
        limit = self._recipe.micro_tokens
        limit = limit if isinstance(limit, int) else 1
        batches = pack(self._rows, range(len(self._rows)), limit, packing=self._recipe.packing)
        with self._trainable.evaluating():
            for batch in batches:
                found[list(batch.rows)] = self._trainable.class_logits(batch).double().cpu()
        return found.log_softmax(1)

    def _by_base(self) -> tuple[str, torch.Tensor]:
        """Return the method, and log-probabilities [rows, labels] fp64."""
        labels = self._trainable.labels
        if not are_numbers(labels) and len(labels) * len(self._rows) <= MOST_CHOICES:
            try:
                if (prompts := self._questions()) is not None:
                    scores = self._scores(prompts)
                    return DECIDED, torch.tensor(scores, dtype=torch.float64).log_softmax(1)
            except (ControlTokenError, UnsupportedBaseError):
                pass  # a base that cannot be asked
        counts = torch.tensor([self._counts[label] for label in labels], dtype=torch.float64)
        return MOST_FREQUENT, (counts / counts.sum()).log().expand(len(self._rows), -1)

    def _questions(self) -> list[list[int]] | None:
        """Return each row as a question; None if that has no room for all labels. Raises
        ControlTokenError."""
        ask = f"Which label fits this text? Answer with one of: {', '.join(self._trainable.labels)}"
        tokenizer, limit = self._tokenizer, longest_row(self._trainable.base.config) or 2**31
        longest = max(map(len, self._choices()))
        room = limit - len(as_chat(tokenizer, ask)) - longest - _MARGIN
        if room < limit // 2:
            return None
        end = "" if tokenizer.chat_template else "\nLabel:"
        texts = [
            tokenizer.decode(row.samples[0].ids[-room:].tolist(), skip_special_tokens=True)
            for row in self._rows
        ]
        found = [as_chat(tokenizer, f"{text}\n\n{ask}{end}") for text in texts]
        return [ids[-(limit - longest) :] for ids in found]

    def _choices(self) -> list[list[int]]:
        """Return the labels as replies: with a chat template up to the end of the turn."""
        base = BaseTokens(self._tokenizer)
        if not self._tokenizer.chat_template:
            return base.encode([f" {label}" for label in self._trainable.labels])
        end = [] if base.end is None else [base.end]
        return [[*ids, *end] for ids in base.encode(self._trainable.labels)]

    def _scores(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        def on_progress(part: float) -> None:
            self._listen(events.StageProgress(at=time.time(), name="measuring base", part=part))

        choices = self._choices()
        return score_choices(
            self._trainable.base, prompts, choices, on_progress=on_progress, wait=self._gate.wait
        )


def class_report(
    labels: Sequence[str], rows: Sequence[LabelledRow], base: Replies, adapter: Replies
) -> dict[str, Any] | None:
    """Return how well base and adapter predict each label, as JSON; None if nothing was held out.

    Args:
        labels: in the order of the head's rows.
    """
    if not rows:
        return None
    own = [row.reference for row in rows]
    return {
        "labels": list(labels),
        "rows": len(rows),
        "base_by": base.how,
        "base": _figures(labels, own, base.texts),
        "adapter": _figures(labels, own, adapter.texts),
    }


def _figures(labels: Sequence[str], own: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """Return figures for each label (if there are many, for those with the lowest F1), and confused pairs."""
    place = {label: number for number, label in enumerate(labels)}
    found = [{"label": label, **asdict(one)} for label, one in label_figures(own, given).items()]
    if len(found) > _MOST_FIGURES:
        found = sorted(found, key=lambda one: one["f1"])[:_MOST_FIGURES]
    found.sort(key=lambda one: place[one["label"]])
    pairs = Counter(zip(own, given, strict=True))
    wrong = [(pair, count) for pair, count in pairs.most_common() if pair[0] != pair[1]]
    matrix = None
    if len(labels) <= _LARGEST_MATRIX:
        matrix = [[pairs[label, answer] for answer in labels] for label in labels]
    return {
        "labels": found,
        "confusion": matrix,
        "confused": [
            {"label": label, "given": answer, "rows": count}
            for (label, answer), count in wrong[:_MOST_CONFUSED]
        ],
    }


BASE_BY = {
    DECIDED: "the base without training: the label whose name it finds likeliest (/v1/decide)",
    MOST_FREQUENT: "the base without training: always the label that most rows to train on have",
}


def figure_rows(classes: Mapping[str, Any]) -> list[list[str]]:
    """Return a table of `RunReport.classes`: its head, then a line for each label."""
    base = {one["label"]: one for one in classes["base"]["labels"]}
    made = [["label", "rows", "F1 of the base", "F1", "precision", "recall"]]
    for one in classes["adapter"]["labels"]:
        before = base.get(one["label"], {}).get("f1", math.nan)
        shares = (before, one["f1"], one["precision"], one["recall"])
        cells = ["" if math.isnan(share) else f"{share:.1%}" for share in shares]
        made.append([one["label"], str(one["rows"]), *cells])
    return made


def confusion_rows(classes: Mapping[str, Any]) -> list[list[str]]:
    """Return the adapter's confusion matrix, or for many labels its most frequent mistakes, as a table with a
    head."""
    found = classes["adapter"]
    if found["confusion"] is None:
        return [
            ["label", "given instead", "rows"],
            *([one["label"], one["given"], str(one["rows"])] for one in found["confused"]),
        ]
    rows = zip(classes["labels"], found["confusion"], strict=True)
    return [["label \\ given", *classes["labels"]], *([label, *map(str, counts)] for label, counts in rows)]
