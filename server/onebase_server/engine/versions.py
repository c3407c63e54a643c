"""The adapter versions that this engine holds in host memory, ready for a slot."""

from __future__ import annotations

from collections.abc import Mapping, Set

from onebase_adapters.rows import LoraWeights
from onebase_server.engine.row import AdapterMix
from onebase_server.engine.scheduler import NeverFitsError
from onebase_server.engine.slot_table import SlotTable


class Versions:
    """Finished tensors by digest. A version that is told to leave stays until its last row has ended."""

    def __init__(self) -> None:
        self.weights: dict[str, Mapping[str, LoraWeights]] = {}
        self._sizes: dict[str, int] = {}
        self._leaving: set[str] = set()
        self._dropped: list[str] = []

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def any_leaving(self) -> bool:
        return bool(self._leaving)

    def put(self, digest: str, weights: Mapping[str, LoraWeights]) -> None:
        """Take a version in; its scales go into B where that changes no bit."""
        self._sizes[digest] = sum(w.a.nbytes + w.b.nbytes for w in weights.values())
        self.weights[digest] = {name: w.folded() for name, w in weights.items()}
        self._leaving.discard(digest)

    def leave(self, digest: str) -> None:
        """Take no more rows of this version, and drop it with `drop_unused`."""
        if digest in self.weights:
            self._leaving.add(digest)

    def drop_unused(self, in_use: Set[str], slots: SlotTable) -> None:
        """Free the leaving versions that no row uses."""
        for digest in list(self._leaving - in_use):
            if slots.evict(digest):
                self._leaving.discard(digest)
                del self.weights[digest], self._sizes[digest]
                self._dropped.append(digest)

    def take_dropped(self) -> list[str]:
        """Digests whose memory has become free since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def size(self, digest: str) -> int:
        """Bytes of a version's tensors."""
        return self._sizes[digest]

    def check(self, mix: AdapterMix, slot_budget: int = 0) -> None:
        """Raise NeverFitsError when a row's adapters are not here, or can never be in slots together."""
        for digest in mix.digests:
            if digest not in self.weights or digest in self._leaving:
                raise NeverFitsError(
                    "adapter_not_loaded", "adapter", f"adapter version {digest[:12]} is not loaded"
                )
        needed = sum(self._sizes[digest] for digest in mix.digests)
        if slot_budget and needed > slot_budget:
            raise NeverFitsError(
                "slot_memory_exceeded",
                "adapter",
                f"the adapters of this request take {needed} bytes in slots and there are {slot_budget}; "
                "raise --slot-memory",
            )
