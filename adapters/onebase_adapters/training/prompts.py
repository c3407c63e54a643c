"""Prompts of a data set, made when they are asked for: as tuples, all of them would fill the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

from onebase_adapters.training.data_facts import Place
from onebase_adapters.training.samples import Ids, Prompt


@dataclass(frozen=True, eq=False)
class Reference:
    """A prompt and the row's own reply to it, as parts of its sample's ids.

    reply: up to the token that ends its generation, without it.
    """

    prompt: Ids
    reply: Ids
    place: Place


class Prompts(Sequence[Prompt]):
    """A Prompt for each reference.

    Args:
        decode: the text of a reply's ids. The replies that a model generates must be decoded in the same way.
    """

    def __init__(self, references: Sequence[Reference], decode: Callable[[list[int]], str]) -> None:
        self._references = references
        self._decode = decode

    def only(self, keep: Callable[[Place], bool]) -> Prompts:
        """Those of some rows."""
        return Prompts([each for each in self._references if keep(each.place)], self._decode)

    def __len__(self) -> int:
        return len(self._references)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return Prompts(self._references[index], self._decode)
        found = self._references[index]
        return Prompt(tuple(found.prompt.tolist()), self._decode(found.reply.tolist()), found.place.line)
