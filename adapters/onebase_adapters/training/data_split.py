"""Data sets made of rows, and rows held out of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from onebase_adapters.training.data_facts import Facts
from onebase_adapters.training.prompts import Prompts, Reference
from onebase_adapters.training.samples import Dataset, Row, Sample


def dataset_of(rows: Sequence[Row], references: Sequence[Reference], facts: Facts) -> Dataset:
    """A data set with its digest."""
    return Dataset(rows=rows, prompts=Prompts(references), digest=_digest(rows), report=facts)


def split(dataset: Dataset, part: float, seed: int, limit: int = 200) -> tuple[Dataset, Dataset]:
    """Training rows and held-out rows, both in their order.

    A row's side depends on the seed and on what it says, not on its neighbours: rows that say the same are
    on one side, so that nothing held out is trained on word by word.

    Args:
        part: of the rows to hold out, 0 to 0.9; above 0 at least one, if there are two different ones.
        limit: most rows held out.
    """
    facts: Facts = dataset.report
    groups: dict[bytes, list[int]] = {}
    for key in facts.keys:
        groups.setdefault(key.content, []).append(key.line)
    wanted = min(limit, round(part * len(facts.keys)))
    if part > 0 and len(groups) > 1:
        wanted = max(1, wanted)
    held: set[int] = set()
    order = sorted(groups, key=lambda content: hashlib.sha256(f"{seed} {content.hex()}".encode()).digest())
    for content in order[:-1]:
        if len(held) + len(groups[content]) <= wanted or (wanted and not held):
            held.update(groups[content])
    return _part(dataset, lambda line: line not in held), _part(dataset, lambda line: line in held)


def _part(dataset: Dataset, keep: Callable[[int], bool]) -> Dataset:
    facts: Facts = dataset.report
    prompts = dataset.prompts
    references = prompts.references if isinstance(prompts, Prompts) else ()
    return dataset_of(
        [row for row in dataset.rows if keep(row.line)],
        [reference for reference in references if keep(reference.line)],
        replace(
            facts,
            keys=[key for key in facts.keys if keep(key.line)],
            truncated=[line for line in facts.truncated if keep(line)],
            dropped=[],
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
