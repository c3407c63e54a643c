"""What is known of a data set beside its tokens: what reading it did, and which rows say the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from onebase_adapters.training.conversation import Choice, Parsed, Text

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
