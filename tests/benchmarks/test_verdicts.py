"""Figures must say what the samples hold, and nothing kinder."""

from __future__ import annotations

import pytest

from bench.figures import Run, equal_texts, summarize
from bench.report import percentile
from bench.stream import Sample


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1)])
def test_percentiles_are_by_nearest_rank(share: float, value: int) -> None:
    assert percentile(range(100, 0, -1), share) == value


def sample(ttft: float, text: str = "") -> Sample:
    return Sample(started=0.0, ttft=ttft, ended=ttft + 6.3, tokens=64, text=text)


def test_throughput_is_the_median_of_rounds_and_latency_is_over_all_streams() -> None:
    runs = [Run("x", "mixed", n, speed, [sample(n)]) for n, speed in ((1, 10.0), (2, 500.0), (3, 30.0))]
    figures = summarize(runs)["mixed"]["x"]
    assert figures.tokens_per_second == 30.0
    assert (figures.ttft_p50, figures.ttft_p99) == (2, 3)
    assert figures.tpot_p50 == pytest.approx(0.1)


def test_texts_are_compared_stream_by_stream_within_a_round() -> None:
    runs = [
        Run("x", "single", 1, 1.0, [sample(1, "a"), sample(1, "b")]),
        Run("peft", "single", 1, 1.0, [sample(1, "b"), sample(1, "b")]),
        Run("x", "single", 2, 1.0, [sample(1, "c")]),
    ]
    assert equal_texts(runs, "x", "peft") == {"single": (1, 2)}
