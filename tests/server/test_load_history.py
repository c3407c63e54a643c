"""Load of the last hours: readings become points a minute, and buckets become quantiles."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from onebase_server.telemetry import history
from onebase_server.telemetry.histogram import quantile
from onebase_server.telemetry.history import LoadRecorder
from onebase_server.telemetry.measurements import RequestMeasurements


@pytest.mark.parametrize(
    ("counts", "part", "value"),
    [
        ([0, 0, 0, 0], 0.5, None),
        ([4, 0, 0, 0], 0.5, 0.5),
        ([1, 1, 2, 0], 0.5, 2.0),
        ([0, 0, 10, 0], 0.95, 2.0 + 0.95 * 2.0),
        ([0, 0, 0, 3], 0.5, 4.0),
    ],
)
def test_a_quantile_lies_within_its_bucket(counts: list[int], part: float, value: float | None) -> None:
    found = quantile((1.0, 2.0, 4.0), counts, part)

    assert found == (None if value is None else pytest.approx(value))


def test_each_point_has_what_came_since_the_one_before_and_probes_are_no_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    measured, answers, totals = RequestMeasurements(), Counter[tuple[str, int]](), Counter[str]()
    recorder = LoadRecorder(measured, answers, lambda name: totals[name], lambda: None)

    answers.update({("/generate", 200): 3, ("/generate", 503): 1, ("/health", 503): 9})
    measured.finished["error"] += 1
    totals["generated_tokens"] = 40
    for seconds in (0.15, 0.2, 3.0):
        measured.first_token.observe(seconds)
    clock[0] = 1060.0
    recorder.add_reading()
    clock[0] = 1090.0
    answers["/generate", 200] += 2

    (point,) = recorder.points()
    assert (point.answers, point.errors, point.requests, point.generated_tokens) == (4, 2, 3, 40)
    assert (point.at, point.seconds) == (1060.0, 60.0)
    assert point.first_token_p50 is not None
    assert point.first_token_p95 is not None
    assert 0.1 <= point.first_token_p50 <= 0.25 < 2.5 <= point.first_token_p95 <= 5.0
    newest = recorder.since(60.0)
    assert (newest.answers, newest.requests, newest.first_token_p50) == (2, 0, None)
    assert recorder.since(3600.0).answers == 6


def test_no_more_than_six_hours_are_kept() -> None:
    totals: Any = Counter[str]()
    recorder = LoadRecorder(RequestMeasurements(), Counter(), lambda name: totals[name], lambda: None)
    for _ in range(history.MOST_POINTS + 5):
        recorder.add_reading()

    assert len(recorder.points()) == history.MOST_POINTS
