"""Prompts of a data set, made when they are asked for: as tuples, all of them would fill the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from onebase_adapters.training.samples import Ids, Prompt


@dataclass(frozen=True, eq=False)
class Reference:
    """A prompt as a part of its sample's ids, and the row's own reply to it."""

    ids: Ids
    reply: str
    line: int


class Prompts(Sequence[Prompt]):
    """A Prompt for each reference."""

    def __init__(self, references: Sequence[Reference]) -> None:
        self.references = references

    def __len__(self) -> int:
        return len(self.references)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return Prompts(self.references[index])
        reference = self.references[index]
        return Prompt(tuple(reference.ids.tolist()), reference.reply, reference.line)
