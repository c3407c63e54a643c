"""Batches as the server reports them, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

ENDED: Final = frozenset({"completed", "failed", "expired", "cancelled"})
"""Final statuses. Each may have results: those that were there by then."""


@dataclass(frozen=True)
class BatchError:
    """An error of a batch, or of a line of its file (counted from 1)."""

    code: str
    """The exact kind, stable enough to compare with."""
    message: str
    line: int | None = None
    param: str | None = None
    """The field that it is about."""


@dataclass(frozen=True)
class Batch:
    """A batch as the server reported it last. Times are Unix times in seconds."""

    id: str
    status: str
    """`validating`, `in_progress`, `finalizing`, `cancelling`, and in the end `completed`, `failed`,
    `expired` or `cancelled`."""
    endpoint: str
    """The route that answers its rows."""
    input_file_id: str
    output_file_id: str | None
    """The file of the answers, once the batch has ended. None if there are none."""
    error_file_id: str | None
    """The file of the rows that failed."""
    completion_window: str
    created_at: float
    expires_at: float
    completed_at: float | None
    total: int
    """Rows, once the file is checked."""
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    errors: tuple[BatchError, ...]
    """Errors because of which it failed, such as wrong lines of its file."""
    metadata: Mapping[str, str] = field(hash=False)
    waiting: str | None = None
    """Reason why nothing of it is computed now, if there is one."""

    @property
    def ended(self) -> bool:
        """Return True if its status is final."""
        return self.status in ENDED

    @property
    def done(self) -> int:
        """Rows that have an answer or an error."""
        return self.completed + self.failed


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
