"""Parameters of tests that hold for every combination of some values."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import pytest


def matrix(*axes: Collection[Any], usual: Collection[Any] = ()) -> list[Any]:
    """All combinations, for `parametrize`; those are marked `full` that show no value for the first time.

    usual: values that others are combined with, where two others do together what each of them does; of other
    combinations those are left that show a value.
    """
    values = [list(axis) for axis in axes]
    shown = [[axis[row % len(axis)] for axis in values] for row in range(max(map(len, values)))]
    return [
        pytest.param(*row, id="-".join(map(str, row)), marks=() if [*row] in shown else pytest.mark.full)
        for row in itertools.product(*values)
        if not usual or [*row] in shown or any(value in usual for value in row)
    ]
