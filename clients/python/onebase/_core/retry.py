"""Whether to try again after a failure, and after which pause. The caller sleeps."""

from __future__ import annotations

import email.utils
import logging
import math
import random
from datetime import datetime
from typing import Final

from ..errors import APIConnectionError, APIStatusError, APITimeoutError, OneBaseError
from .requests import Call

FIRST_DELAY_S: Final = 0.5
LONGEST_DELAY_S: Final = 8.0
LONGEST_RETRY_AFTER_S: Final = 60.0
"""A server that asks for more than this gets no retry: better an error than a client that seems to hang."""
NOTED_DELAY_S: Final = 2.0
"""Least pause for which a server asks that is noted in the log `onebase`, which the command shows."""
EXHAUSTED: Final = "insufficient_quota"
"""The code of a 429 that stays one, however long one waits."""
RECONNECTS: Final = 10
"""Failed attempts in a row before a Backoff gives up: about a minute, enough to restart a server."""


_log = logging.getLogger("onebase")


def retry_delay(
    error: OneBaseError, call: Call, attempt: int, max_retries: int, jitter: float
) -> float | None:
    """Return the seconds until `call` is sent again, or None to give up and raise `error`.

    Args:
        attempt: The number of the attempt that failed, from 0.
        jitter: Random, in [0, 1). It spreads clients that failed at the same moment.
    """
    if attempt >= max_retries or not _may_repeat(error, call):
        return None
    backoff = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt, 16))
    wanted = error.retry_after if isinstance(error, APIStatusError) else None
    if wanted is None:
        return backoff * (0.5 + 0.5 * jitter)
    if wanted > LONGEST_RETRY_AFTER_S:
        return None
    delay = wanted * (1.0 + 0.1 * jitter)
    if delay >= NOTED_DELAY_S:
        _log.info("%s Trying again in %.0f s.", error, delay)
    return delay


def _may_repeat(error: OneBaseError, call: Call) -> bool:
    if isinstance(error, APIStatusError):
        return error.status in call.retry_statuses and error.code != EXHAUSTED
    if isinstance(error, APIConnectionError | APITimeoutError):
        return call.repeatable or not error.sent
    return False


class ReconnectBackoff:
    """Pauses that grow while a server is away, for as long as a restart takes."""

    def __init__(self) -> None:
        self._failures = 0

    def reset(self) -> None:
        """Record that the server is there."""
        self._failures = 0

    def delay(self, error: OneBaseError | None, call: Call) -> float:
        """Return the seconds until the next attempt at `call`, after `error` or an answer that ended early.

        Raises:
            OneBaseError: another attempt cannot help, or there were enough.
        """
        if error is not None and not _may_pass(error, call):
            raise error
        self._failures += 1
        if self._failures > RECONNECTS:
            raise error or APIConnectionError("the stream of events always ends at once", sent=True)
        return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (self._failures - 1)) * (0.5 + random.random() / 2)


def _may_pass(error: OneBaseError, call: Call) -> bool:
    """Return True if the error may be over soon, as a restart of the server is."""
    if isinstance(error, APIStatusError):
        return error.status in call.retry_statuses and error.code != EXHAUSTED
    return isinstance(error, APIConnectionError | APITimeoutError)


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number, or a date after `now` (with its
    time zone).

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
