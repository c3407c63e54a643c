"""Slot table: the adapter version in each slot, and the sequences that use it.

A version stays in its slot until another needs the place; the least recently used idle one is evicted first.
When every slot is in use, the waiting sequence whose turn is first claims slots: sequences whose turn comes
later may no longer join them, so that they become idle, while all other slots are used as before. So no
sequence starves. If the slots' memory is limited in bytes, idle versions are evicted until the new one fits,
and claims cover bytes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from onebase_engine.engine.sequence import SequenceState


@dataclass
class _Slot:
    digest: str | None = None
    users: set[SequenceState] = field(default_factory=set)
    last_used: int = 0
    claimed_by: SequenceState | None = None


class SlotTable:
    """Slots by number. `moves` collects what the model must load before the next step."""

    def __init__(
        self,
        capacity: int,
        budget: int = 0,
        size_of: Callable[[str], int] = lambda digest: 0,
        ready: Callable[[Sequence[str]], bool] = lambda digests: True,
    ) -> None:
        """Create empty slots. `budget`: limit of all versions' `size_of(digest)`, in bytes; 0 is no limit.

        `ready(digests)`: whether versions that are in no slot can be put there without a wait.
        """
        self.order: Callable[[SequenceState], Any] = lambda sequence: sequence.arrival
        """Sort key of a sequence's turn; an earlier turn is smaller."""
        self._slots = [_Slot() for _ in range(capacity)]
        self.budget = budget
        self._size_of = size_of
        self._ready = ready
        self._clock = 0
        self.moves: dict[int, str | None] = {}
        """Slot -> digest to load, or None to empty it; the engine applies and clears it."""

    @property
    def capacity(self) -> int:
        return len(self._slots)

    @property
    def used(self) -> int:
        """Number of slots that running sequences use now."""
        return sum(bool(slot.users) for slot in self._slots)

    @property
    def slot_of(self) -> dict[str, int]:
        return {slot.digest: number for number, slot in enumerate(self._slots) if slot.digest is not None}

    @property
    def unclaimed(self) -> set[str]:
        """Versions in slots that no waiting sequence has claimed."""
        return {slot.digest for slot in self._slots if slot.digest is not None and slot.claimed_by is None}

    def acquire(self, sequence: SequenceState) -> bool:
        """Acquire a slot for each of the sequence's adapters, all or none. Return False if it has to wait."""
        places = self.slot_of
        held = {digest: places[digest] for digest in sequence.mix.digests if digest in places}
        if any(self._closed_to(sequence, self._slots[number]) for number in held.values()):
            return False
        missing = [digest for digest in sequence.mix.digests if digest not in places]
        free = [
            number
            for number, slot in enumerate(self._slots)
            if not slot.users and number not in held.values() and not self._closed_to(sequence, slot)
        ]
        free.sort(key=lambda number: (self._slots[number].digest is not None, self._slots[number].last_used))
        if len(free) < len(missing) or not self._fits(missing, without=free):
            self._claim(sequence, missing, keep=set(held.values()))
            return False
        if missing and not self._ready(missing):
            return False
        for digest, number in zip(missing, free, strict=False):
            self._slots[number].digest = digest
            self.moves[number] = digest
            held[digest] = number
        for number in free[len(missing) :]:
            if self._fits(()):
                break
            self._empty(number)
        self._unclaim(sequence)
        self._clock += 1
        for number in held.values():
            self._slots[number].users.add(sequence)
            self._slots[number].last_used = self._clock
        return True

    def release(self, sequence: SequenceState) -> None:
        """Release the slots of a sequence that runs no longer. Its versions stay in them until evicted."""
        for slot in self._slots:
            slot.users.discard(sequence)

    def forget(self, sequence: SequenceState) -> None:
        """Remove a sequence for good, with its claims."""
        self.release(sequence)
        self._unclaim(sequence)

    def evict(self, digest: str) -> bool:
        """Empty the version's slot if no sequence uses it. Return True if the version is in no slot now."""
        number = self.slot_of.get(digest)
        if number is None:
            return True
        if self._slots[number].users:
            return False
        self._empty(number)
        return True

    def in_the_way(self, sequence: SequenceState) -> set[SequenceState]:
        """Return the sequences that use slots which `sequence` has claimed and lacks."""
        return {
            user
            for slot in self._slots
            if slot.claimed_by is sequence and slot.digest not in sequence.mix.digests
            for user in slot.users
        }

    def users(self, number: int) -> list[SequenceState]:
        """Return the sequences that use a slot, in order of arrival."""
        return sorted(self._slots[number].users, key=lambda sequence: sequence.arrival)

    def vacate(self, number: int) -> None:
        """Mark a slot as empty after a failed load; its sequences have ended."""
        self._slots[number].digest = None

    def _empty(self, number: int) -> None:
        if self._slots[number].digest is not None:
            self._slots[number].digest = None
            self.moves[number] = None

    def _fits(self, added: Iterable[str], without: Sequence[int] = ()) -> bool:
        """Return True if the versions in slots and `added` fit in the budget when `without` are empty."""
        if not self.budget:
            return True
        kept = [slot.digest for number, slot in enumerate(self._slots) if number not in without]
        held = [digest for digest in kept if digest is not None]
        return sum(self._size_of(digest) for digest in (*held, *added)) <= self.budget

    def _closed_to(self, sequence: SequenceState, slot: _Slot) -> bool:
        claimant = slot.claimed_by
        return (
            claimant is not None and claimant is not sequence and self.order(claimant) < self.order(sequence)
        )

    def _claim(self, sequence: SequenceState, missing: Sequence[str], keep: set[int]) -> None:
        """Reserve the slots with the fewest users, unless this or an earlier sequence has claims.

        The claims of a sequence whose turn is later are dropped. Otherwise a preempted sequence could find
        some when it returns, and would have to wait for all of them in turn.
        """
        for slot in self._slots:
            if slot.claimed_by is not None and self.order(slot.claimed_by) <= self.order(sequence):
                return
        for slot in self._slots:
            slot.claimed_by = None
        candidates = [number for number in range(self.capacity) if number not in keep]
        candidates.sort(key=lambda number: (len(self._slots[number].users), self._slots[number].last_used))
        claimed: list[int] = []
        for number in candidates:
            enough = len(claimed) >= len(missing)
            if enough and self._fits(missing, without=claimed):
                break
            if enough and self._slots[number].digest is None:
                continue  # an empty slot frees no bytes
            claimed.append(number)
            self._slots[number].claimed_by = sequence
        for number in keep:
            self._slots[number].claimed_by = sequence

    def _unclaim(self, sequence: SequenceState) -> None:
        for slot in self._slots:
            if slot.claimed_by is sequence:
                slot.claimed_by = None
