"""Figures of the training benchmark from the runs of its targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train
from bench.training import WARM_UP, TrainRun, rows_of, summarize_training

TOKENS = [900, 900, 100, 300]


def run(target: str, repeat: int, seconds: float, peak: int = 10**9) -> TrainRun:
    """A run whose steps after the warm-up take `seconds` in all."""
    ends = [100.0, 107.0, 107.0 + seconds / 2, 107.0 + seconds]
    cpu = [2 * end for end in ends]
    return TrainRun(target, repeat, ends, cpu, peak, [3.0, 2.0, 1.5, 1.0], f"/{target}/{repeat}")


def test_speed_counts_the_real_tokens_and_the_time_after_the_warm_up() -> None:
    assert WARM_UP == 2
    assert run("onebase", 1, 4.0).tokens_per_second(TOKENS) == pytest.approx(100.0)


def test_figures_are_medians_over_the_repeats_and_ratios_are_the_first_target_s() -> None:
    runs = [run("onebase", n, seconds) for n, seconds in enumerate((2.0, 4.0, 40.0))]
    runs += [run("trl", n, 8.0, peak=3 * 10**9) for n in range(3)]
    held_out = {one.adapter: 1.0 + one.repeat for one in runs}
    figures = summarize_training(runs, TOKENS, held_out)
    assert figures["onebase"].tokens_per_second == pytest.approx(100.0)
    assert figures["onebase"].held_out == 2.0
    rows = rows_of(figures, "onebase")
    assert [row[:5] for row in rows] == [
        ["onebase", "100", "", "50", "1.00"],
        ["trl", "50", "2.00x", "25", "3.00"],
    ]


def test_there_is_no_ratio_to_a_target_that_failed() -> None:
    figures = summarize_training([run("trl", 1, 8.0)], TOKENS, {"/trl/1": 1.0})
    assert rows_of(figures, "onebase")[0][2] == ""


@pytest.mark.full
@pytest.mark.usefixtures("forks")
def test_a_run_is_measured_and_what_it_saved_is_evaluated(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join((train.DATA / "orders.heldout.jsonl").read_text().splitlines(True)[:2]))
    options = ["--targets", "onebase", "--steps", "3", "--batch", "2", "--repeats", "1", "--threads", "1"]
    files = ["--held-out", str(held_out), "--output", str(tmp_path)]
    assert train.main([*options, *files, "--busy"]) == 0
    figures = json.loads((tmp_path / "train.json").read_text())["figures"]["onebase"]
    assert figures["tokens_per_second"] > 0
    assert 0 < figures["held_out"] < 10
