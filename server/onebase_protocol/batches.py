"""Batches of requests."""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import field

from onebase_protocol.common import CachedTokens, OutputTokensDetails, UnixTime

ENDED: Final = frozenset({"completed", "failed", "expired", "cancelled"})
"""Final statuses. Each may have results: those that were there by then."""


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """An error of a batch, or of a line of its file (counted from 1)."""

    code: str
    """The exact kind, stable enough to compare with."""
    line: int | None = None
    message: str
    param: str | None = None
    """The field that it is about."""


class BatchProblems(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: tuple[BatchError, ...] = ()


class BatchCounts(msgspec.Struct, frozen=True):
    total: int
    """Rows, once the file is checked."""
    completed: int
    failed: int


class BatchUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as the server reported it last. Times are Unix times in seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    """The route that answers its rows."""
    model: None = None
    problems: BatchProblems | None = field(name="errors")
    input_file_id: str
    completion_window: str
    status: str
    """`validating`, `in_progress`, `finalizing`, `cancelling`, and in the end `completed`, `failed`,
    `expired` or `cancelled`."""
    output_file_id: str | None
    """The file of the answers, once the batch has ended. None if there are none."""
    error_file_id: str | None
    """The file of the rows that failed."""
    created_at: UnixTime
    expires_at: UnixTime
    in_progress_at: UnixTime | None = None
    finalizing_at: UnixTime | None = None
    completed_at: UnixTime | None
    failed_at: UnixTime | None = None
    expired_at: UnixTime | None = None
    cancelling_at: UnixTime | None = None
    cancelled_at: UnixTime | None = None
    request_counts: BatchCounts
    usage: BatchUsage
    labels: dict[str, str] | None = field(name="metadata")
    waiting: str | None = None
    """Reason why nothing of it is computed now, if there is one."""

    @property
    def total(self) -> int:
        """Rows, once the file is checked."""
        return self.request_counts.total

    @property
    def completed(self) -> int:
        return self.request_counts.completed

    @property
    def failed(self) -> int:
        return self.request_counts.failed

    @property
    def input_tokens(self) -> int:
        return self.usage.input_tokens

    @property
    def output_tokens(self) -> int:
        return self.usage.output_tokens

    @property
    def errors(self) -> tuple[BatchError, ...]:
        """Errors because of which it failed, such as wrong lines of its file."""
        return () if self.problems is None else self.problems.data

    @property
    def metadata(self) -> dict[str, str]:
        """Labels that the batch was made with."""
        return self.labels or {}

    @property
    def ended(self) -> bool:
        """Return True if its status is final."""
        return self.status in ENDED

    @property
    def done(self) -> int:
        """Rows that have an answer or an error."""
        return self.completed + self.failed
