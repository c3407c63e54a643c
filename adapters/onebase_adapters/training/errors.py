"""What can end a run."""

from __future__ import annotations

from collections.abc import Sequence


class TrainingDivergedError(Exception):
    """A loss or gradient is not finite. `lines`: of the rows in the batch it came from."""

    def __init__(self, step: int, what: str, lines: Sequence[int]) -> None:
        shown = ", ".join(map(str, lines[:20])) + (" and more" if len(lines) > 20 else "")
        super().__init__(
            f"step {step}: {what} is not finite, on the rows of lines {shown}. Look at these rows, or lower "
            "learning_rate"
        )
        self.step = step
        self.lines = list(lines)
