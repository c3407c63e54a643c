"""What `job.wait` and `onebase jobs` draw: lines and bars of a run, charts of losses, lists that fit."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.clients.training_double import REPORT, event, job, job_id, succeeded

from onebase import CurvePoint
from onebase._core.training import parse_event, parse_job
from onebase.cli.jobs.display import JobDisplay
from onebase.cli.jobs.show import COLUMNS, print_job
from onebase.cli.ui import duration, sparkline, table

SHORT = job_id(1)[:14]


def screen(width: int, **options: Any) -> Console:
    return Console(width=width, file=io.StringIO(), record=True, highlight=False, **options)


def test_lines_tell_a_run_where_no_bar_moves() -> None:
    out = screen(200)
    at = {"phase": "training", "step": 0, "steps": 100}
    with JobDisplay(out) as display:
        display.show(parse_job(job(1, "validating_files")))
        display.show(parse_job(job(1, "queued")))
        for number in range(1, 101):
            display.show(parse_job(job(1, progress=at | {"step": number, "loss": 1.0, "seconds_left": 9.0})))
            display.show(parse_job(job(1, progress=at | {"step": number, "loss": 1.0, "seconds_left": 9.0})))
        figures = {"step": 0, "valid_loss": 2.5, "best": False}
        display.note(parse_event(event(1, type="metrics", data=figures)))
        display.note(parse_event(event(2, type="metrics", data=figures | {"step": 3, "best": True})))
        measured = {"subject": "adapter", "rows": 2, "metrics": {"exact_match": 0.5}}
        display.note(parse_event(event(3, type="metrics", data=measured)))
        display.note(parse_event(event(4, "Step 3: checkpoint saved.", data={"kind": "saved"})))
        many = [{"line": line, "reason": "bad"} for line in range(1, 31)]
        display.note(parse_event(event(5, "bad lines", level="error", data={"problems": many})))
        display.show(parse_job(job(1, **succeeded())))
    lines = out.export_text().splitlines()
    steps = [line for line in lines if line.startswith("step ") and "loss 1.0000" in line]
    assert steps == [f"step {number}/100  loss 1.0000  9 s left" for number in (1, *range(5, 101, 5))]
    others = [line for line in lines if line not in steps]
    assert others[:6] == [
        "checking the files",
        "waiting for its turn",
        "training",
        "base: held-out loss 2.5000",
        "step 3: held-out loss 2.5000  best",
        "adapter, 2 held-out rows: exact_match 50.0%",
    ]
    assert others[6] == "bad lines"
    assert others[-2:] == ["  line 20: bad", "  and 10 more: `onebase jobs events` has them"]


def test_a_bar_moves_at_a_terminal_and_what_it_was_told_stays() -> None:
    out = screen(160, force_terminal=True)
    with JobDisplay(out) as display:
        display.show(parse_job(job(1, "queued", name="ac[b]me")))
        figures = {"step": 3, "steps": 4, "loss": 1.5, "tokens_per_second": 1234.0, "seconds_left": 3723.0}
        display.show(parse_job(job(1, name="ac[b]me", progress={"phase": "training"} | figures)))
        display.note(parse_event(event(1, "[red]a notice", level="warn")))
    text = out.export_text()
    assert "ac[b]me  training" in text
    assert "3/4  loss 1.5000  1,234 tokens/s  1 h 02 min left" in text
    assert "[red]a notice" in text


def test_a_job_that_runs_shows_how_far_it_is() -> None:
    out = screen(100)
    progress = {"phase": "training", "step": 1, "steps": 4, "loss": 1.5}
    print_job(out, parse_job(job(1, progress=progress, validation_file="file-2")), ())
    text = out.export_text()
    assert "acme  running, step 1 of 4" in text
    assert "measured on file-2" in text
    assert "training  loss 1.5000" in text


def test_a_job_that_held_nothing_out_has_no_table_of_losses() -> None:
    report = REPORT | {"loss_before": None, "loss_after": None, "metrics_before": {}, "metrics_after": {}}
    out = screen(100)
    print_job(out, parse_job(job(1, **succeeded() | {"report": report})), (CurvePoint(1, 2.0, None),))
    text = out.export_text()
    assert "held-out" not in text
    assert "adapter" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_long_name_is_cut_so_that_the_list_fits(width: int) -> None:
    name = "a-very-long-name-" * 4
    jobs = [parse_job(job(1, name=name, **succeeded())), parse_job(job(2, name="b"))]
    out = screen(width)
    out.print(table(COLUMNS, jobs, width))
    titles, first, _ = out.export_text().splitlines()
    shown = [column.title for column in COLUMNS if width >= column.at]
    assert titles.split() == shown
    assert first.split()[:3] == [SHORT, first.split()[1], "succeeded"]
    assert (name in first) == (width == 200)
    assert "1.2500" in first
    assert "yes" in first


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 60))
def test_a_chart_has_a_character_for_each_value_or_share_of_them(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(width, len(values))


def test_a_chart_rises_and_falls_with_the_values() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([8, 1], 8, ascii_only=True) == "@_"
    assert sparkline([0, 2, 6, 8], 2) == "▁█"
    assert sparkline([3, 3, 3], 8) == "▁▁▁"
    assert sparkline([], 8) == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3725, "1 h 02 min")],
)
def test_a_duration_is_said_as_people_do(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
