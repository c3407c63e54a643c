"""Whether to try again after a failure, and how long to wait first. Pure: the caller sleeps."""

from __future__ import annotations

import email.utils
import math
from datetime import datetime

from ._requests import Call
from .errors import APIConnectionError, APIStatusError, APITimeoutError, OneBaseError

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 8.0
LONGEST_RETRY_AFTER_S = 60.0
"""A server that asks for more than this gets no retry: the caller should know instead of hanging."""


def retry_delay(
    error: OneBaseError, call: Call, attempt: int, max_retries: int, jitter: float
) -> float | None:
    """Seconds to wait before sending `call` again, or None to give up and raise `error`.

    Args:
        attempt: How often it was sent before the one that failed, from 0.
        jitter: Random, in [0, 1): spreads clients that failed at the same moment.
    """
    if attempt >= max_retries or not _may_repeat(error, call):
        return None
    backoff = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt, 16))
    wanted = error.retry_after if isinstance(error, APIStatusError) else None
    if wanted is None:
        return backoff * (0.5 + 0.5 * jitter)
    if wanted > LONGEST_RETRY_AFTER_S:
        return None
    return wanted * (1.0 + 0.1 * jitter)


def _may_repeat(error: OneBaseError, call: Call) -> bool:
    if isinstance(error, APIStatusError):
        return error.status in call.retry_statuses
    if isinstance(error, APIConnectionError | APITimeoutError):
        return call.repeatable or not error.sent
    return False


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date after `now` (with its time zone).

    https://www.rfc-editor.org/rfc/rfc9110#field.retry-after
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return _seconds_until(value, now)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _seconds_until(date: str, now: datetime) -> float | None:
    try:
        then = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return None
    if then.tzinfo is None:
        return None
    return max(0.0, (then - now).total_seconds())
