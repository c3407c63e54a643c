"""Processes that share one run's work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


class OtherProcessError(Exception):
    """Another process of the run has failed; it reports why."""


@dataclass(frozen=True)
class ProcessGroup:
    """Rank of this process among `count`; alone it is 0 of 1. The first one writes and reports."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of `items`, which all processes have in the same order."""
        return items[self.rank :: self.count]

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def all_of(self, items: Sequence[Item]) -> list[Item]:
        """Return the items of all processes."""
        if self.count == 1:
            return list(items)
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def decide(self, make: Callable[[], Item]) -> Item:
        """Call `make` in the first process, and return its result in all of them.

        Raises OtherProcessError in the others if it raises in the first.
        """
        made: list[Item | None] = [None]
        try:
            if self.first:
                made = [make()]
        finally:
            if self.count > 1:
                torch.distributed.broadcast_object_list(made, src=0)
        if made[0] is None:
            raise OtherProcessError("the first process could not begin the run")
        return made[0]

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


def join_processes(*, on_cpu: bool = False) -> ProcessGroup:
    """Join the processes that a launcher started, if there are any. on_cpu: use no GPU."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return ProcessGroup()
    from accelerate import PartialState

    # The first process generates replies and writes while the others wait: longer than the usual ten minutes.
    # Without a GPU accelerate has to be told, or each process would take itself for the only one.
    state = PartialState(cpu=on_cpu or not torch.cuda.is_available(), timeout=timedelta(hours=12))
    return ProcessGroup(state.process_index, state.num_processes)
