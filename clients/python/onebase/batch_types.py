"""Batches as the server reports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from onebase_protocol.batches import Batch, BatchError

__all__ = ["Batch", "BatchCallback", "BatchError", "BatchResult"]


@dataclass(frozen=True)
class BatchResult:
    """One row's answer or error."""

    custom_id: str
    status: int | None
    """The HTTP status that a live request would have had. None if the row was not asked for."""
    body: Mapping[str, Any] | None = field(hash=False)
    """Answer that a live request would have got, or `{"error": {...}}`."""
    error: Mapping[str, Any] | None = field(default=None, hash=False)
    """Reason why there is no body, as `code` and `message`."""

    @property
    def ok(self) -> bool:
        """Return True if it is an answer."""
        return self.status is not None and self.status < 400


BatchCallback: TypeAlias = Callable[[Batch], None]
