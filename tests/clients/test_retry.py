from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase._core.requests import HEALTH, MODELS, Call, generate
from onebase._core.retry import LONGEST_DELAY_S, parse_retry_after, retry_delay
from onebase.cli.command import notices
from onebase.errors import (
    APIConnectionError,
    APITimeoutError,
    ErrorDetail,
    OneBaseError,
    StreamError,
    status_error,
)

GENERATE = generate("hi", None, None, {}, stream=True)
NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def status(status: int, retry_after: float | None = None, code: str | None = None) -> OneBaseError:
    return status_error(status, ErrorDetail("no", code=code), retry_after=retry_after)


@pytest.mark.parametrize(
    ("call", "error", "repeated"),
    [
        (GENERATE, APIConnectionError("refused", sent=False), True),
        (GENERATE, APIConnectionError("broke", sent=True), False),
        (GENERATE, APITimeoutError("connecting", sent=False), True),
        (GENERATE, APITimeoutError("waiting", sent=True), False),
        (GENERATE, status(429), True),
        (GENERATE, status(503), True),
        (GENERATE, status(500), False),
        (GENERATE, status(502), False),
        (GENERATE, status(504), False),
        (GENERATE, status(400), False),
        (GENERATE, StreamError(ErrorDetail("late")), False),
        (MODELS, APIConnectionError("broke", sent=True), True),
        (MODELS, APITimeoutError("waiting", sent=True), True),
        (MODELS, status(429), True),
        (MODELS, status(502), True),
        (MODELS, status(504), True),
        (MODELS, status(500), False),
        (MODELS, status(404), False),
        (HEALTH, status(429), True),
        (HEALTH, status(429, code="insufficient_quota"), False),
        (GENERATE, status(429, code="insufficient_quota"), False),
        (GENERATE, status(429, code="rate_limit_exceeded"), True),
    ],
)
def test_only_what_cannot_do_harm_twice_is_sent_again(
    call: Call, error: OneBaseError, repeated: bool
) -> None:
    assert (retry_delay(error, call, 0, 2, 0.5) is not None) is repeated


def test_attempts_end_at_max_retries() -> None:
    assert retry_delay(status(503), GENERATE, 1, 2, 0.5) is not None
    assert retry_delay(status(503), GENERATE, 2, 2, 0.5) is None
    assert retry_delay(status(503), GENERATE, 0, 0, 0.5) is None


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_back_off_doubles_up_to_a_limit_and_jitter_only_shortens_it(attempt: int, jitter: float) -> None:
    delay = retry_delay(status(503), GENERATE, attempt, 10_001, jitter)
    full = min(LONGEST_DELAY_S, 0.5 * 2 ** min(attempt, 50))
    assert delay is not None
    assert full / 2 <= delay <= full


@given(st.floats(0, 60), st.floats(0, 1, exclude_max=True))
def test_retry_after_is_never_undercut(seconds: float, jitter: float) -> None:
    delay = retry_delay(status(429, retry_after=seconds), GENERATE, 5, 9, jitter)
    assert delay is not None
    assert seconds <= delay <= seconds * 1.1


def test_a_server_that_asks_for_minutes_is_reported_and_not_waited_for() -> None:
    assert retry_delay(status(429, retry_after=61), GENERATE, 0, 2, 0.0) is None


def test_the_command_says_for_how_long_it_waits_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    with notices():
        retry_delay(status(429, retry_after=59), GENERATE, 0, 2, 0.0)
        retry_delay(status(429, retry_after=1), GENERATE, 0, 2, 0.0)
    retry_delay(status(429, retry_after=58), GENERATE, 0, 2, 0.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("onebase: ")
    assert line.endswith(" Trying again in 59 s.")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Thu, 01 Jan 2026 12:00:30 GMT", 30.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("Thu, 01 Jan 2026 12:00:30", None),
        ("soon", None),
        ("inf", None),
        ("nan", None),
        ("", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_date(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header, NOW) == seconds
