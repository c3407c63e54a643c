"""Several processes that train one adapter, as `accelerate launch` starts them; each takes micro-batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process's place among `count`; alone it is 0 of 1. The first one writes and reports."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What this process does of `items`, which all processes have in the same order."""
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

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


def join_ranks() -> Ranks:
    """Meet the other processes that a launcher started; alone if there are none."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return Ranks()
    from accelerate import PartialState

    state = PartialState()
    return Ranks(state.process_index, state.num_processes)
