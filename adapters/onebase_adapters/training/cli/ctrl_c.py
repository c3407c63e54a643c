"""Ctrl-C in a run on the terminal."""

from __future__ import annotations

import signal
from typing import Any

from onebase_adapters.training.events import Interrupted


class CtrlC:
    """A gate that Ctrl-C closes: the run writes a checkpoint and ends. The second one ends it at once."""

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone
        self._pressed = False
        self._before: Any = None

    def __enter__(self) -> CtrlC:
        # A launcher ends its processes itself.
        if self._alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def wait(self) -> None:
        """Return when the run may compute. Raises Interrupted."""
        if self._pressed:
            raise Interrupted("pause")

    def _press(self, number: int, frame: object) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
