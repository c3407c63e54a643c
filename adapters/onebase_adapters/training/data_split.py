"""Data sets made of rows, and rows held out of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from onebase_adapters.training.data_facts import Facts, Place
from onebase_adapters.training.prompts import Prompts
from onebase_adapters.training.samples import Dataset, Prompt, Row, Sample


def dataset_of(rows: Sequence[Row], prompts: Sequence[Prompt], facts: Facts) -> Dataset:
    """A data set with its digest."""
    return Dataset(rows=rows, prompts=prompts, digest=_digest(rows), report=facts)


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


def _digest(rows: Sequence[Row]) -> str:
    """SHA-256 over the ids and the supervision of all rows."""
    total = hashlib.sha256()
    for row in rows:
        samples = (row,) if isinstance(row, Sample) else (row.chosen, row.rejected)
        for sample in samples:
            total.update(f"{len(samples)} {len(sample)} ".encode())
            total.update(sample.ids.astype("<i4").tobytes())
            total.update(sample.supervised.tobytes())
    return total.hexdigest()
