"""Rows of training data: errors of bad rows, the parsed form of good ones, and their tokens for the trainer.

Fields, reasons and names of files in errors are valid Unicode, whatever the data held: they are sent as JSON.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onebase_adapters.format.config import LABEL_CHARACTERS

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
MOST_LABELS, LONGEST_LABEL = 1000, 100
"""Largest number of labels of a classifier, and of characters of one."""
NO_REGRESSION = "to learn a score (regression) is not trained here. Write the names of classes"
_DIGEST_BYTES = 16
_SHOWN = 20
_LIKE = 0.84


@dataclass(frozen=True)
class Problem:
    """One bad line.

    line: 1-based, as an editor counts; of the record if a file has no lines; 0: the file as a whole.
    field: as in `messages[2].content`; "" if the whole line is bad.
    reason: the fault, and its remedy.
    """

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        return f"{place}{self.field}: {self.reason}" if self.field else f"{place}{self.reason}"


class DataError(ValueError):
    """A file that cannot be trained on. `problems` has every bad line; the text shows the first 20."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        source = self.source = valid_unicode(source)
        self.problems = [
            Problem(each.line, valid_unicode(each.field), valid_unicode(each.reason)) for each in problems
        ]
        shown = [f"  {problem}" for problem in self.problems[:_SHOWN]]
        more = len(self.problems) - len(shown)
        if more:
            shown.append(f"  and {more} more")
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *shown]))

    @classmethod
    def of_file(cls, source: str, reason: str) -> DataError:
        """Return the error for a file that cannot be used as a whole."""
        return cls(source, [Problem(0, "", reason)])


class RowError(ValueError):
    """A row that cannot be used. Its reader adds the line."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def valid_unicode(text: str) -> str:
    """Return `text` with backslash escapes for what UTF-8 cannot encode, such as odd bytes of a file's
    name."""
    return text.encode("utf-8", "backslashreplace").decode()


KNOWN_FIELDS = (
    "messages",
    "tools",
    "functions",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "text",
    "question",
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
)
"""Fields of all shapes of rows."""


def misspelled(key: str, names: Sequence[str]) -> str | None:
    """Return the one of `names` that a key is probably meant as, or None; `prompt_id` does not mean
    prompt."""
    near = difflib.get_close_matches(key, names, n=1, cutoff=_LIKE)
    return near[0] if near and not key.startswith(f"{near[0]}_") else None


Message = dict[str, Any]
"""Message with role, content, and further keys of templates: name, tool_calls, tool_call_id,
reasoning_content."""


@dataclass(frozen=True)
class Chat:
    """A conversation for the base's chat template. supervised: indices of the replies to learn, ascending."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    supervised: Sequence[int]


@dataclass(frozen=True)
class Text:
    """Plain text without a template. prompt None: all of it is to be learned."""

    prompt: str | None
    reply: str


@dataclass(frozen=True)
class PreferencePair:
    """Two replies to the same prompt."""

    chosen: Chat | Text
    rejected: Chat | Text


@dataclass(frozen=True)
class Labelled:
    """A row to classify, and its label."""

    row: Chat | Text
    label: str


@dataclass(frozen=True)
class Task:
    """A prompt whose replies a grader sees, and the row as JSON, which the grader reads."""

    row: Chat | Text
    item: str


Parsed = Chat | Text | PreferencePair | Labelled | Task


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One tokenized row.

    ids: [tokens] int32. supervised: [tokens], True where the token is a target of the loss; never the first.
    In a row with a label, only the last is, where the classifier's head reads.
    line: 1-based number of the row in its file (of the record, if a file has no lines).
    slice: name of the row's slice of the data; "" if it has none. label: "" if none is learned.
    item: the row as JSON, for a grader; "" if none reads it.
    prompt: number of tokens before the last reply, which may invoke an activated LoRA; None: all may.
    """

    ids: Ids
    supervised: Mask
    line: int
    slice: str = ""
    label: str = ""
    prompt: int | None = None
    item: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The row's sequences."""
        return (self,)

    @property
    def targets(self) -> int:
        """Number of supervised tokens."""
        return int(self.supervised.sum())

    @property
    def weight(self) -> int:
        """Weight of the row in the mean loss."""
        return self.targets


@dataclass(frozen=True, eq=False, slots=True)
class Preference:
    """Two replies to one prompt, the preferred one first. Both samples begin with the prompt."""

    chosen: Sample
    rejected: Sample

    @property
    def line(self) -> int:
        return self.chosen.line

    @property
    def slice(self) -> str:
        return self.chosen.slice

    @property
    def label(self) -> str:
        return ""

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The row's sequences."""
        return (self.chosen, self.rejected)

    @property
    def targets(self) -> int:
        """Number of supervised tokens."""
        return self.chosen.targets + self.rejected.targets

    @property
    def weight(self) -> int:
        """Weight of the row in the mean loss: a pair counts once."""
        return 1


Row = Sample | Preference


class RowPlace(NamedTuple):
    """Place of a row in its file. row: its unique number, from 1. line: its first line, for messages; a
    `.json` file may have all of its rows on one line."""

    row: int
    line: int


@dataclass(frozen=True)
class Key:
    """Key that is equal for two rows with the same content, up to white space.

    prompt: None if the row has none. samples: number of the data set's rows made of it, at least one.
    """

    place: RowPlace
    content: bytes
    prompt: bytes | None
    samples: int


@dataclass(frozen=True, eq=False, slots=True)
class PromptRow:
    """A row to generate a reply for.

    sample: the row's last one. own: position of the row's own reply in it, up to the token that ends its
    generation, without it. decode: returns the text of ids; replies that a model generates must be decoded in
    the same way.
    """

    sample: Sample
    own: slice
    place: RowPlace
    decode: Callable[[list[int]], str]

    @property
    def ids(self) -> Ids:
        """Ids before the reply."""
        return self.sample.ids[: self.own.start]

    @property
    def reply(self) -> Ids:
        return self.sample.ids[self.own]

    @property
    def line(self) -> int:
        return self.place.line

    @property
    def slice(self) -> str:
        return self.sample.slice

    @property
    def reference(self) -> str:
        """Text of the row's own reply."""
        return self.decode(self.reply.tolist())


@dataclass(frozen=True)
class Dataset:
    """Rows of one file, in its order. All are Sample, or all are Preference; all have a label, or none has.

    prompts: one for each row that ends in a reply, for metrics on generated replies. `row_store` does not
    store the other fields, which only a report on the file needs. source: the file's name.
    keys: one for each row of the file that is in the data set, in its order. truncated, dropped: places of
    rows of the file. lines_shared: several rows begin on one line, so that a line does not identify a row.
    """

    rows: Sequence[Row]
    prompts: Sequence[PromptRow] = ()
    source: str = ""
    keys: Sequence[Key] = ()
    truncated: Sequence[RowPlace] = ()
    dropped: Sequence[RowPlace] = ()
    lines_shared: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids and supervision of all rows, hexadecimal, which identifies the training data."""
        total = hashlib.sha256()
        for row in self.rows:
            for sample in row.samples:
                total.update(f"{len(row.samples)} {len(sample)} ".encode())
                total.update(sample.ids.astype("<i4").tobytes())
                total.update(sample.supervised.tobytes())
                for text in (sample.label, sample.item):
                    if text:
                        total.update(f"{text}\0".encode())
        return total.hexdigest()

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """All labels of the rows, in order: whole numbers by size (1 and 01 by their letters), else by their
        letters."""
        found = {row.label for row in self.rows} - {""}
        by_size = are_numbers(found)
        return tuple(sorted(found, key=lambda label: (int(label) if by_size else 0, label)))

    def label_counts(self) -> dict[str, int]:
        """Return the number of rows with each label, the most frequent first."""
        return dict(Counter(row.label for row in self.rows if row.label).most_common())

    def places(self) -> list[RowPlace]:
        """Return the place of each row; a row of the file may have made several."""
        return [key.place for key in self.keys for _ in range(key.samples)]


def are_numbers(labels: Iterable[str]) -> bool:
    """Return True if all labels are whole numbers, which say nothing about what they stand for."""
    return all(re.fullmatch(r"-?\d{1,90}", label, re.ASCII) for label in labels)


def check_labels(train: Dataset, held_out: Dataset | None) -> None:
    """Raise DataError unless there are two labels at least, and training rows have all held-out ones."""
    known = train.labels
    if len(known) < 2:
        reason = f"every row has the label {known[0]!r}: give rows of two labels at least"
        raise DataError.of_file(train.source, reason)
    if not are_numbers(known) and all(map(_is_number, known)):
        raise DataError(train.source, [Problem(0, "label", f"the labels are numbers: {NO_REGRESSION}")])
    if len(known) > MOST_LABELS:
        reason = (
            f"there are {len(known):,} labels, and {MOST_LABELS:,} is the most: is `label` what to learn?"
        )
        raise DataError(train.source, [Problem(0, "label", reason)])
    if (characters := sum(map(len, known))) > LABEL_CHARACTERS:
        reason = f"all labels together have {characters:,} characters, and {LABEL_CHARACTERS:,} is the most"
        raise DataError(train.source, [Problem(0, "label", f"{reason}: shorten them")])
    among = set(known)
    problems = [
        Problem(row.line, "label", f"no row to train on has {row.label!r}: add some, or leave this one out")
        for row in (held_out.rows if held_out is not None else ())
        if row.label not in among
    ]
    if held_out is not None and problems:
        raise DataError(held_out.source, problems)


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def row_key(place: RowPlace, row: Parsed, samples: int) -> Key:
    """Return the row's key: equal contents have equal digests."""
    prompt = _prompt(row)
    return Key(place, _digest(_plain(row)), None if prompt is None else _digest(prompt), samples)


def _plain(row: Parsed) -> Any:
    if isinstance(row, PreferencePair):
        return [_plain(row.chosen), _plain(row.rejected)]
    if isinstance(row, Labelled):
        return [_plain(row.row), row.label]
    if isinstance(row, Task):
        return row.item
    if isinstance(row, Text):
        return [row.prompt or "", row.reply]
    return [row.tools, row.messages]


def _prompt(row: Parsed) -> Any:
    """Return the part of a row before its last reply."""
    if isinstance(row, PreferencePair):
        return _prompt(row.chosen)
    if isinstance(row, Labelled | Task):
        return _plain(row.row)
    if isinstance(row, Text):
        return row.prompt
    return [row.tools, row.messages[:-1]] if row.messages[-1]["role"] == "assistant" else None


def _digest(value: Any) -> bytes:
    text = json.dumps(_normal(value), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]


def _normal(value: Any) -> Any:
    """Normalize each white space to one space: rows that differ only in it have the same content."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        return {key: _normal(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(part) for part in value]
    return value


def split(dataset: Dataset, part: float, seed: int, limit: int = 200) -> tuple[Dataset, Dataset]:
    """Return training rows and held-out rows, both in their order.

    Rows with the same content are on one side, so that nothing held out is trained on word by word; rows with
    labels, whatever their label is. Each label keeps a row to train on. The seed and the content decide which
    rows are held out, not their order. Dropped rows stay on record with the training rows.

    Args:
        part: of the rows to hold out, 0 to 0.9; above 0 at least one, if there are two different ones.
        limit: largest number of held-out rows, unless even the smallest group of equal rows is larger.
    """
    groups: dict[bytes, list[int]] = {}
    labels = {
        key.place.row: row.label for key, row in zip(dataset.keys, dataset.rows, strict=False) if row.label
    }
    for key in dataset.keys:
        content = key.prompt if labels and key.prompt else key.content
        groups.setdefault(content, []).append(key.place.row)
    wanted = min(limit, round(part * len(dataset.keys)))
    if part > 0 and len(groups) > 1:
        wanted = max(1, wanted)
    held = _held_out(groups, wanted, seed, labels)
    return (
        _part(dataset, lambda place: place.row not in held, dataset.dropped),
        _part(dataset, lambda place: place.row in held, ()),
    )


def _held_out(
    groups: Mapping[bytes, Sequence[int]], wanted: int, seed: int, labels: Mapping[int, str]
) -> set[int]:
    """Return the numbers of at most `wanted` rows, in whole groups; of the smallest group if none is that
    small.

    labels: of rows; each label is left to at least one other row.
    """
    left = Counter(labels.values())
    order = sorted(groups, key=lambda content: hashlib.sha256(f"{seed} {content.hex()}".encode()).digest())
    held: set[int] = set()
    for content in order[:-1]:
        taken = Counter(labels[row] for row in groups[content] if row in labels)
        if len(held) + len(groups[content]) <= wanted and all(left[one] > taken[one] for one in taken):
            held.update(groups[content])
            left -= taken
    if wanted and not held and len(order) > 1 and not labels:
        held.update(groups[min(order, key=lambda content: len(groups[content]))])
    return held


def _part(dataset: Dataset, keep: Callable[[RowPlace], bool], dropped: Sequence[RowPlace]) -> Dataset:
    return replace(
        dataset,
        rows=[row for row, place in zip(dataset.rows, dataset.places(), strict=True) if keep(place)],
        prompts=[prompt for prompt in dataset.prompts if keep(prompt.place)],
        keys=[key for key in dataset.keys if keep(key.place)],
        truncated=[place for place in dataset.truncated if keep(place)],
        dropped=dropped,
    )
