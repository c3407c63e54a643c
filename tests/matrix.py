"""Parameters of tests that hold for every combination of some values."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import pytest


def matrix(*axes: Collection[Any]) -> list[Any]:
    """All combinations, for `parametrize`; those are marked `full` that show no value for the first time."""
    values = [list(axis) for axis in axes]
    shown = [[axis[row % len(axis)] for axis in values] for row in range(max(map(len, values)))]
    return [
        pytest.param(*row, id="-".join(map(str, row)), marks=() if [*row] in shown else pytest.mark.full)
        for row in itertools.product(*values)
    ]


def pairs(one: Collection[Any], other: Collection[Any]) -> list[Any]:
    """The same for a fixture's `params`: each a pair."""
    return [pytest.param(row.values, id=row.id, marks=row.marks) for row in matrix(one, other)]
