"""A queue of bounded length that no tenant can close to the others."""

from __future__ import annotations

from collections import Counter


class QueueShares:
    """Number of places in a queue that each tenant has.

    One tenant may take them all. When none are left, a tenant that has fewer than an equal part of them (by
    the number of tenants in the queue, itself counted) may still take more, up to that part, and one in any
    case. So with n tenants, fewer than `limit`, it holds at most `limit` times (1 + 1/2 + ... + 1/n).
    """

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        """Places by tenant."""
        self.total = 0

    def has_room(self, tenant: str, places: int, limit: int) -> bool:
        """Return True if a tenant may take so many places more."""
        if self.total + places <= limit:
            return True
        tenants = len(self.taken) + (tenant not in self.taken)
        return self.taken[tenant] + places <= max(1, limit // tenants)

    def enter(self, tenant: str, places: int = 1) -> None:
        self.taken[tenant] += places
        self.total += places

    def leave(self, tenant: str, places: int = 1) -> None:
        self.taken[tenant] -= places
        self.total -= places
        if not self.taken[tenant]:
            del self.taken[tenant]

    def clear(self) -> None:
        self.taken.clear()
        self.total = 0
