"""Time shared by serving, training and proofs: a byte that says whether sequences run, and a gate."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from onebase_training.events import Interrupted, Reason

if TYPE_CHECKING:
    import torch

NAP_SECONDS = 0.005
"""Longest time, in seconds, until a waiting run notices that no sequences run, or that it is to stop."""


class BusyFlag:
    """One byte in shared memory: 1 while sequences run. The api writes it, trainers and the verifier read it.

    Costs neither a message nor a system call, so that it can be asked between any two layers.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)

    @classmethod
    def make(cls) -> BusyFlag:
        """Make a new flag. `fd` is for child processes to inherit."""
        fd = os.memfd_create("onebase-rows", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        return cls(fd)

    def set(self, busy: bool) -> None:
        self._memory[0] = busy

    def __bool__(self) -> bool:
        return bool(self._memory[0])


class SharedGate:
    """Lets a run or a proof compute `share` of the time while sequences run, all of it otherwise. For one
    thread.

    Each interval of computing is paid for with a pause before the next one: (1 - share) / share times as
    long. With a share of 0 the run waits until no sequences run.

    Args:
        busy: whether sequences run now.
        stopping: why the run is to stop, or None.
        finish: waits until what was started is computed (an accelerator works behind the program's back).
    """

    def __init__(
        self,
        busy: Callable[[], bool],
        share: float,
        stopping: Callable[[], Reason | None],
        *,
        finish: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._busy = busy
        self._share = share
        self._stopping = stopping
        self._finish = finish
        self._clock = clock
        self._sleep = sleep
        self._resumed = clock()

    def wait(self) -> None:
        """Return when the run may compute. Raises Interrupted."""
        self._raise_if_stopping()
        if self._share < 1.0 and self._busy():
            self._finish()
            self._pause()
        self._resumed = self._clock()

    def _pause(self) -> None:
        now = self._clock()
        computed = now - self._resumed
        end = now + computed * (1.0 - self._share) / self._share if self._share > 0.0 else float("inf")
        while (left := end - self._clock()) > 0 and self._busy():
            self._sleep(min(NAP_SECONDS, left))
            self._raise_if_stopping()

    def _raise_if_stopping(self) -> None:
        reason = self._stopping()
        if reason is not None:
            raise Interrupted(reason)


def device_gate(
    device: torch.device,
    busy: BusyFlag | None,
    share: float,
    stopping: Callable[[], Reason | None] = lambda: None,
) -> SharedGate:
    """Return the gate for a run that gets `share` of a device's time, whose first interval begins now.

    A CPU's time is shared by the system, which gives the process what its niceness says
    (`machine.niceness_for`); its gate holds back only a run that gets no time at all. A GPU knows no
    priorities between processes.
    """
    if device.type != "cuda":
        return SharedGate(lambda: bool(busy), 1.0 if share else 0.0, stopping)
    import torch

    return SharedGate(lambda: bool(busy), share, stopping, finish=torch.cuda.synchronize)
