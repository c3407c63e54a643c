"""Batches as the JSON that callers get: OpenAI's, and why one waits."""

from __future__ import annotations

from onebase_adapters.registry import BatchRecord, BatchState
from onebase_server.http.schemas.answers import BatchAnswer, BatchProblem


def batch_view(batch: BatchRecord, waiting: str | None) -> BatchAnswer:
    """Return a batch as callers see it. waiting: why nothing of it is computed now."""
    used = {name: batch.usage.get(name, 0) for name in ("prompt", "cached", "completion")}
    errors: list[BatchProblem] = [
        {"code": error.code, "line": error.line, "message": error.message, "param": error.param}
        for error in batch.errors
    ]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": None,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file,
        "completion_window": batch.window,
        "status": batch.state,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": int(batch.created_at),
        "expires_at": int(batch.expires_at),
        "in_progress_at": _at(batch, "in_progress"),
        "finalizing_at": _at(batch, "finalizing"),
        "completed_at": _at(batch, "completed"),
        "failed_at": _at(batch, "failed"),
        "expired_at": _at(batch, "expired"),
        "cancelling_at": _at(batch, "cancelling"),
        "cancelled_at": _at(batch, "cancelled"),
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": used["prompt"],
            "input_tokens_details": {"cached_tokens": used["cached"]},
            "output_tokens": used["completion"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["prompt"] + used["completion"],
        },
        "metadata": None if batch.labels is None else dict(batch.labels),
        "waiting": None if batch.ended else waiting,
    }


def _at(batch: BatchRecord, state: BatchState) -> int | None:
    time = batch.times.get(state)
    return None if time is None else int(time)
