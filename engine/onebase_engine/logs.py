"""Logs that each process writes to stderr: lines for people, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from onebase_engine.machine import describe_refusal, find_refusal

LOG_FORMAT = "ONEBASE_LOG_FORMAT"
"""Environment variable with the log format, `text` or `json`, which the api also passes to its children."""
REQUEST: ContextVar[Mapping[str, str]] = ContextVar("onebase_request", default={})  # noqa: B039 (never changed)
"""Fields that every log record of a request gets: `request_id`, and `trace_id` if it is traced."""
FIELDS = "fields"
"""Key of a logging call's `extra` whose mapping is added to the JSON line."""


def set_up_logs(process: str, level: int | str, form: str | None = None) -> None:
    """Log to stderr from now on. `process`: its name in the lines; `form`: LOG_FORMAT's value by default."""
    chosen = form or os.environ.get(LOG_FORMAT, "text")
    handler = logging.StreamHandler(sys.stderr)
    if chosen == "json":
        handler.setFormatter(JsonFormatter(process))
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread
    else:
        name = "%(name)s:" if process == "api" else process
        handler.setFormatter(TextFormatter(f"%(levelname)s {name} %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _RefusalFormatter(logging.Formatter):
    """Replaces the traceback of memory or threads that the system refused by a sentence with the remedy and
    the place: any line may be where they run out."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's)
        refused = None if ei[1] is None else find_refusal(ei[1])
        if refused is None:
            return super().formatException(ei)
        place = ""
        for frame, line in traceback.walk_tb(refused.__traceback__):
            place = f", at {frame.f_code.co_filename}:{line}"
        return f"{describe_refusal(refused)}{place}"


class TextFormatter(_RefusalFormatter):
    """Appends the request's id to the message, unless the message contains it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's)
        text = super().formatMessage(record)
        request = REQUEST.get().get("request_id", "")
        return text if request in text else f"{text} {request}"


class JsonFormatter(_RefusalFormatter):
    """Writes an object with `time` (RFC 3339), `level`, `process`, `logger`, `message` and further fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **REQUEST.get(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("onebase").critical("the process ends", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is not None:
        logging.getLogger("onebase").error("a thread ended", exc_info=failed.exc_value)
