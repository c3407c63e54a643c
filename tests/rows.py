"""What acts on which rows, as the engine's packer says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onebase_engine.kernels.interface import RowGroup, RowMap


def row_map(mixes: Sequence[Mapping[int, float]], start: int = 0) -> RowMap:
    """Row `start + i` has the slots and weights `mixes[i]`."""
    groups: dict[tuple[tuple[int, float], ...], list[int]] = {}
    for row, mix in enumerate(mixes, start):
        if mix:
            groups.setdefault(tuple(sorted(mix.items())), []).append(row)
    return RowMap(tuple(RowGroup(tuple(rows), terms) for terms, rows in groups.items()))


def owned(owners: Sequence[int | None]) -> RowMap:
    """Row i has the slot `owners[i]`, or none."""
    return row_map([{} if slot is None else {slot: 1.0} for slot in owners])
