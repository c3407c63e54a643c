"""A GPU that is not there, for what Triton asks before it launches: compiling needs none."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Absent:
    """Triton's driver of a device of this capability."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stand_in(capability: int) -> None:
    driver.set_active(Absent(capability))
