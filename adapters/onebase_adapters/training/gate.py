"""Where a run waits for others, and where it is told to stop."""

from __future__ import annotations

from typing import Literal, Protocol

Reason = Literal["pause", "cancel"]


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was told to stop: to go on later, or for good."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(f"the run was interrupted: {reason}")
        self.reason = reason


class Gate(Protocol):
    """A run passes through it between two layers of the model, and so many times in a step."""

    def wait(self) -> None:
        """Return when the run may compute. Raises Interrupted."""


class OpenGate:
    """For a run that has the machine for itself."""

    def wait(self) -> None:
        return None
