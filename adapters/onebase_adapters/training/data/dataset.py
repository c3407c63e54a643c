"""Tokenized rows as the trainer takes them: where each stands, which say the same, which are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from onebase_adapters.training.data.conversation import Choice, Parsed, Text

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenized row.

    ids: [tokens] int32. supervised: [tokens], True where the token is a target of the loss; never the first.
    line: 1-based number of the row in its file (of the record, where a file has no lines).
    """

    ids: Ids
    supervised: Mask
    line: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The row's sequences."""
        return (self,)

    @property
    def targets(self) -> int:
        """Supervised tokens."""
        return int(self.supervised.sum())

    @property
    def weight(self) -> int:
        """What the row counts in the mean loss."""
        return self.targets


@dataclass(frozen=True, eq=False)
class Preference:
    """Two replies to one prompt; the first is to be preferred. Both samples begin with the prompt."""

    chosen: Sample
    rejected: Sample

    @property
    def line(self) -> int:
        return self.chosen.line

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The row's sequences."""
        return (self.chosen, self.rejected)

    @property
    def targets(self) -> int:
        """Supervised tokens."""
        return self.chosen.targets + self.rejected.targets

    @property
    def weight(self) -> int:
        """What the row counts in the mean loss: a pair counts once."""
        return 1


Row = Sample | Preference


@dataclass(frozen=True)
class Prompt:
    """A held-out row to generate a reply for. `reference`: the reply that the row has."""

    ids: tuple[int, ...]
    reference: str
    line: int


@dataclass(frozen=True)
class Dataset:
    """Rows of one file, in its order. All are Sample, or all are Preference.

    prompts: one for each row that ends in a reply, for metrics on generated replies.
    digest: SHA-256 over ids and supervision of all rows, hexadecimal: names what was trained on.
    """

    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    digest: str
    report: Any = None

    def __len__(self) -> int:
        return len(self.rows)


_DIGEST_BYTES = 16


class Place(NamedTuple):
    """Where a row stands in its file. row: its number, from 1, which no other row has. line: where it begins,
    for messages: a `.json` file may have all of its rows on one line."""

    row: int
    line: int


@dataclass(frozen=True)
class Key:
    """Tells whether two rows say the same, up to white space.

    prompt: None if the row has none. samples: how many of the data set's rows were made of it, at least one.
    """

    place: Place
    content: bytes
    prompt: bytes | None
    samples: int


@dataclass(frozen=True)
class Facts:
    """Of one file, or of a part of it.

    keys: one for each row that is in the data set, in its order. truncated, dropped: places of rows.
    lines_shared: several rows begin on one line, so that a line does not tell which row is meant.
    """

    source: str
    keys: Sequence[Key]
    truncated: Sequence[Place] = ()
    dropped: Sequence[Place] = ()
    lines_shared: bool = False

    def places(self) -> list[Place]:
        """Where each of the data set's rows comes from: a row of the file may have made several."""
        return [key.place for key in self.keys for _ in range(key.samples)]


def row_key(place: Place, row: Parsed, samples: int) -> Key:
    """The row's key: equal contents have equal digests."""
    prompt = _prompt(row)
    return Key(place, _digest(_plain(row)), None if prompt is None else _digest(prompt), samples)


def _plain(row: Parsed) -> Any:
    if isinstance(row, Choice):
        return [_plain(row.chosen), _plain(row.rejected)]
    if isinstance(row, Text):
        return [row.prompt or "", row.reply]
    return [row.tools, row.messages]


def _prompt(row: Parsed) -> Any:
    """What comes before the last reply."""
    if isinstance(row, Choice):
        return _prompt(row.chosen)
    if isinstance(row, Text):
        return row.prompt
    return [row.tools, row.messages[:-1]] if row.messages[-1]["role"] == "assistant" else None


def _digest(value: Any) -> bytes:
    text = json.dumps(_normal(value), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]


def _normal(value: Any) -> Any:
    """With white space made one space: it tells no two rows apart."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        return {key: _normal(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(part) for part in value]
    return value


@dataclass(frozen=True, eq=False)
class Reference:
    """A prompt and the row's own reply to it, as parts of its sample's ids.

    reply: up to the token that ends its generation, without it.
    """

    prompt: Ids
    reply: Ids
    place: Place


class Prompts(Sequence[Prompt]):
    """A Prompt for each reference.

    Args:
        decode: the text of a reply's ids. The replies that a model generates must be decoded in the same way.
    """

    def __init__(self, references: Sequence[Reference], decode: Callable[[list[int]], str]) -> None:
        self._references = references
        self._decode = decode

    def only(self, keep: Callable[[Place], bool]) -> Prompts:
        """Those of some rows."""
        return Prompts([each for each in self._references if keep(each.place)], self._decode)

    def __len__(self) -> int:
        return len(self._references)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return Prompts(self._references[index], self._decode)
        found = self._references[index]
        return Prompt(tuple(found.prompt.tolist()), self._decode(found.reply.tolist()), found.place.line)


def dataset_of(rows: Sequence[Row], prompts: Sequence[Prompt], facts: Facts) -> Dataset:
    """A data set with its digest."""
    return Dataset(rows=rows, prompts=prompts, digest=_digest_of(rows), report=facts)


def split(dataset: Dataset, part: float, seed: int, limit: int = 200) -> tuple[Dataset, Dataset]:
    """Training rows and held-out rows, both in their order.

    Rows that say the same are on one side, so that nothing held out is trained on word by word. The seed and
    what the rows say decide which of them are held out, not their order. What was dropped stays on record
    with the training rows.

    Args:
        part: of the rows to hold out, 0 to 0.9; above 0 at least one, if there are two different ones.
        limit: most rows held out, unless even the smallest group of rows that say the same is larger.
    """
    facts: Facts = dataset.report
    groups: dict[bytes, list[int]] = {}
    for key in facts.keys:
        groups.setdefault(key.content, []).append(key.place.row)
    wanted = min(limit, round(part * len(facts.keys)))
    if part > 0 and len(groups) > 1:
        wanted = max(1, wanted)
    held = _held_out(groups, wanted, seed)
    return (
        _part(dataset, lambda place: place.row not in held, facts.dropped),
        _part(dataset, lambda place: place.row in held, ()),
    )


def _held_out(groups: Mapping[bytes, Sequence[int]], wanted: int, seed: int) -> set[int]:
    """Numbers of at most `wanted` rows, in whole groups; of the smallest group if none is that small."""
    order = sorted(groups, key=lambda content: hashlib.sha256(f"{seed} {content.hex()}".encode()).digest())
    held: set[int] = set()
    for content in order[:-1]:
        if len(held) + len(groups[content]) <= wanted:
            held.update(groups[content])
    if wanted and not held and len(order) > 1:
        held.update(groups[min(order, key=lambda content: len(groups[content]))])
    return held


def _part(dataset: Dataset, keep: Callable[[Place], bool], dropped: Sequence[Place]) -> Dataset:
    facts: Facts = dataset.report
    prompts = dataset.prompts
    return dataset_of(
        [row for row, place in zip(dataset.rows, facts.places(), strict=True) if keep(place)],
        prompts.only(keep) if isinstance(prompts, Prompts) else prompts,
        replace(
            facts,
            keys=[key for key in facts.keys if keep(key.place)],
            truncated=[place for place in facts.truncated if keep(place)],
            dropped=dropped,
        ),
    )


def _digest_of(rows: Sequence[Row]) -> str:
    """SHA-256 over the ids and the supervision of all rows."""
    total = hashlib.sha256()
    for row in rows:
        for sample in row.samples:
            total.update(f"{len(row.samples)} {len(sample)} ".encode())
            total.update(sample.ids.astype("<i4").tobytes())
            total.update(sample.supervised.tobytes())
    return total.hexdigest()
