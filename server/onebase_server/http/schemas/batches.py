"""The wire model of the routes about batches, as OpenAI's."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from onebase_edge.settings import SettingsError, parse_duration
from onebase_server.batches.rows import ENDPOINTS
from onebase_server.http.schemas.jobs import FileId, Labels
from onebase_server.requests.schemas.wire import FieldError, Wire

LEAST_WINDOW, MOST_WINDOW = 3600.0, 30 * 86400.0


class CreateBatchRequest(Wire):
    """Body of POST /v1/batches."""

    input_file_id: FileId
    endpoint: str = Field(max_length=100, json_schema_extra={"enum": list(ENDPOINTS)})
    completion_window: str = Field(max_length=20, description="`24h` as OpenAI's; from 1h to 30d")
    metadata: Labels | None = None
    output_expires_after: dict[str, Any] | None = Field(default=None, description="not served: files stay")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.endpoint not in ENDPOINTS:
            raise FieldError("endpoint", f"batches are for {', '.join(ENDPOINTS)}")
        if self.output_expires_after is not None:
            raise FieldError("output_expires_after", "files stay until they are deleted; leave it out")
        if not LEAST_WINDOW <= self.seconds <= MOST_WINDOW:
            raise FieldError("completion_window", "write 24h, or another time from 1h to 30d")
        return self

    @property
    def seconds(self) -> float:
        """Completion window in seconds; 0 if it is not a duration."""
        try:
            return parse_duration(self.completion_window)
        except SettingsError:
            return 0.0
