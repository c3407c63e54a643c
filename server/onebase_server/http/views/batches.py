"""Batches as the JSON that callers get: OpenAI's, and why one waits."""

from __future__ import annotations

from onebase_adapters.registry import BatchRecord, BatchState
from onebase_protocol import batches as wire
from onebase_protocol.common import CachedTokens


def batch_view(batch: BatchRecord, waiting: str | None) -> wire.Batch:
    """Return a batch as callers see it. waiting: why nothing of it is computed now."""
    prompt, cached, completion = (batch.usage.get(name, 0) for name in ("prompt", "cached", "completion"))
    return wire.Batch(
        id=batch.id,
        endpoint=batch.endpoint,
        problems=wire.BatchProblems(data=batch.errors) if batch.errors else None,
        input_file_id=batch.input_file,
        completion_window=batch.window,
        status=batch.state,
        output_file_id=batch.output_file,
        error_file_id=batch.error_file,
        created_at=int(batch.created_at),
        expires_at=int(batch.expires_at),
        in_progress_at=_at(batch, "in_progress"),
        finalizing_at=_at(batch, "finalizing"),
        completed_at=_at(batch, "completed"),
        failed_at=_at(batch, "failed"),
        expired_at=_at(batch, "expired"),
        cancelling_at=_at(batch, "cancelling"),
        cancelled_at=_at(batch, "cancelled"),
        request_counts=wire.BatchCounts(batch.total, batch.completed, batch.failed),
        usage=wire.BatchUsage(
            input_tokens=prompt,
            input_tokens_details=CachedTokens(cached),
            output_tokens=completion,
            total_tokens=prompt + completion,
        ),
        labels=None if batch.labels is None else dict(batch.labels),
        waiting=None if batch.ended else waiting,
    )


def _at(batch: BatchRecord, state: BatchState) -> int | None:
    time = batch.times.get(state)
    return None if time is None else int(time)
