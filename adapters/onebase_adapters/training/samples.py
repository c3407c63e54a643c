"""Rows of training data as the trainer takes them: token ids, and which of them are in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    def targets(self) -> int:
        """Supervised tokens."""
        return int(self.supervised.sum())


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
