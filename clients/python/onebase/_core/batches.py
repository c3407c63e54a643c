"""Batches: what is sent, what the answers mean, and who observes a wait."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Final

from ..batch_types import Batch, BatchResult
from ..errors import InvalidResponseError
from .requests import Body, Call, encode
from .training import path_of, query_of

BATCHES: Final = "/v1/batches"
FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 3.0
"""Longest pause between two looks at a batch; each is half as long again as the one before."""


def create(file_id: str, endpoint: str, window: str, metadata: Mapping[str, str] | None) -> Call:
    """Return the call that makes a batch. It is not idempotent: sent twice, it makes two."""
    body: Body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window}
    if metadata is not None:
        body["metadata"] = dict(metadata)
    return Call("POST", BATCHES, encode(body))


def list_batches(after: str | None, limit: int) -> Call:
    return Call("GET", query_of(BATCHES, after=after, limit=str(limit)))


def batch(batch_id: str) -> Call:
    return Call("GET", path_of(BATCHES, batch_id))


def cancel(batch_id: str) -> Call:
    return Call("POST", path_of(BATCHES, batch_id, "cancel"), idempotent=True)


def results_of(content: bytes) -> Iterator[BatchResult]:
    """Yield the rows of an output or an error file.

    Raises:
        InvalidResponseError: it is no such file.
    """
    for line in content.splitlines():
        try:
            record = json.loads(line)
            response = record["response"]
            status, body = (response["status_code"], response["body"]) if response else (None, None)
            yield BatchResult(record["custom_id"], status, body, record["error"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidResponseError(f"the file is no result of a batch: {error}") from error


class BatchObserver:
    """Follows a wait for a batch, in a `with` block. This one does nothing."""

    def __enter__(self) -> BatchObserver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, batch: Batch) -> None:
        """Record the batch as it is now."""
