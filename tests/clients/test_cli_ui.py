"""What the command draws: layers from modules, bars, charts, tables that fit, and how two versions differ."""

from __future__ import annotations

import io
import math
import re
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import convert
from rich.console import Console
from tests.clients.registry_double import ALL_TARGETS, COMMIT, NOW, Registry, module, report, version
from tests.clients.training_double import REPORT, event, job, job_id, succeeded

from onebase import (
    Activation,
    Adapter,
    AdapterVersion,
    CurvePoint,
    ModuleReport,
    Progress,
    TrainingEvent,
    TrainingJobInfo,
)
from onebase._terminal.jobs import JobDisplay
from onebase._terminal.ui import (
    ProgressDisplay,
    bar,
    duration,
    show_pieces,
    size,
    sparkline,
    table,
    when,
)
from onebase.cli.adapters.diff import Diff, Fact, LayerPair, RankPair, diff, print_diff
from onebase.cli.adapters.show import COLUMNS, print_adapter, print_version
from onebase.cli.adapters.versions import (
    ModulePlace,
    grouped,
    layer_norms,
    norm_charts,
    place,
    proof,
    ranges,
    targets,
    total_norm,
)
from onebase.cli.jobs.show import COLUMNS as JOB_COLUMNS
from onebase.cli.jobs.show import print_job
from onebase.cli.server import COLUMNS as MODEL_COLUMNS
from onebase.cli.server import table_rows
from onebase.types import Model, Piece

parse_adapter, parse_version = partial(convert, type=Adapter), partial(convert, type=AdapterVersion)
parse_job, parse_event = partial(convert, type=TrainingJobInfo), partial(convert, type=TrainingEvent)


def screen(width: int, **options: Any) -> Console:
    return Console(width=width, file=io.StringIO(), record=True, highlight=False, **options)


def seen(out: Console) -> list[str]:
    return [line.rstrip() for line in out.export_text().splitlines()]


def lora(name: str, norm: float = 1.0) -> ModuleReport:
    return ModuleReport(name, "lora", 8, 16.0, 1000, norm)


# ---- layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.3.self_attn.q_proj", ModulePlace(3, "q_proj")),
        ("model.language_model.layers.11.mlp.up_proj", ModulePlace(11, "up_proj")),
        ("lm_head", ModulePlace(None, "lm_head")),
        ("model.norm", ModulePlace(None, "norm")),
    ],
)
def test_a_module_is_in_a_layer_or_outside_of_them(name: str, where: ModulePlace) -> None:
    assert place(name) == where


def test_a_layers_norm_is_that_of_all_its_modules_together() -> None:
    modules = [
        lora("model.layers.10.q_proj", 3.0),
        lora("model.layers.10.v_proj", 4.0),
        lora("lm_head", 2.0),
        lora("model.layers.9.q_proj", 1.0),
    ]
    assert list(layer_norms(modules).items()) == [("9", 1.0), ("10", 5.0), ("lm_head", 2.0)]
    assert total_norm(modules) == pytest.approx(math.sqrt(30))


@given(st.sets(st.integers(0, 60)))
def test_ranges_lose_no_layer(numbers: set[int]) -> None:
    found: set[int] = set()
    for run in filter(None, ranges(numbers).split(", ")):
        first, _, last = run.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == numbers


def test_ranges_are_short() -> None:
    assert ranges([3, 1, 2, 0, 7]) == "0-3, 7"


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 60), st.booleans())
def test_a_bar_never_leaves_its_room_and_shows_whatever_is_there(
    a: float, b: float, width: int, ascii_only: bool
) -> None:
    small, large = sorted((a, b))
    drawn = bar(small, large, width, ascii_only=ascii_only)
    assert len(drawn) <= width
    assert bool(drawn) == (small > 0)
    assert drawn.isascii() or not ascii_only


def test_a_bar_is_as_long_as_its_value() -> None:
    assert bar(1.0, 1.0, 4) == "████"
    assert bar(0.5, 1.0, 4) == "██"
    assert bar(0.625, 1.0, 4) == "██▌"
    assert bar(1e-9, 1.0, 4) == "▏"


def test_small_charts_share_a_scale_and_leave_untouched_layers_blank() -> None:
    groups = {
        "q_proj": [lora("layers.0.x.q_proj", 8.0), lora("layers.2.x.q_proj", 4.0)],
        "v_proj": [lora("m.layers.1.x.v_proj", 1.0)],
        "lm_head": [lora("lm_head", 100.0)],
    }
    groups["q_proj"] = [lora("m.layers.0.x.q_proj", 8.0), lora("m.layers.2.x.q_proj", 4.0)]
    assert norm_charts(groups, 32) == {"q_proj": "█ ▅", "v_proj": " ▂", "lm_head": ""}
    assert norm_charts(groups, 32, ascii_only=True)["q_proj"] == "@ *"


def test_many_layers_share_characters() -> None:
    groups = {"q_proj": [lora(f"m.layers.{layer}.q_proj", layer + 1.0) for layer in range(80)]}
    assert len(norm_charts(groups, 32)["q_proj"]) == 32


def test_targets_stand_in_the_order_of_a_block() -> None:
    assert targets(["lm_head", "v_proj", "fc1", "down_proj", "q_proj"]) == "q v down fc1 lm_head"


# ---- two versions ------------------------------------------------------------------------------------


@pytest.fixture
def found() -> Diff:
    """All layers at rank 8 against the upper ones at rank 16, with the head."""
    a = version("acme-support", "1", report=report(ALL_TARGETS))
    b = report(("q_proj", "v_proj"), range(8, 30), 16, 0.5, [module("lm_head", 16, 2.0)])
    source = {"kind": "hub", "repo": "acme/legal", "commit": COMMIT}
    return diff(parse_version(a), parse_version(version("legal", "2", report=b, source=source)))


def test_a_comparison_finds_what_differs(found: Diff) -> None:
    facts = {fact.title: fact for fact in found.facts}
    assert facts["rank"] == Fact("rank", "8", "16")
    assert facts["rank"].differs
    assert not facts["kind"].differs
    assert facts["targets"] == Fact("targets", "q k v o gate up down", "q v lm_head")
    assert facts["from"].b == "hub acme/legal@a1b2c3d"
    assert [pair.layer for pair in found.layers] == [*map(str, range(30)), "lm_head"]
    assert found.layers[0].b is None
    assert found.layers[-1] == LayerPair("lm_head", None, 2.0)
    assert len(found.ranks) == 2 * 22
    assert found.ranks[0] == RankPair("model.layers.8.self_attn.q_proj", (8, 16.0), (16, 32.0))
    assert len(found.only_a) == 7 * 30 - 2 * 22
    assert found.only_b == ("lm_head",)


def test_a_version_does_not_differ_from_itself() -> None:
    same = parse_version(version("acme", "1"))
    found = diff(same, same)
    assert not any(fact.differs for fact in found.facts)
    assert (found.ranks, found.only_a, found.only_b) == ((), (), ())
    assert all(pair.a == pair.b for pair in found.layers)


def test_modules_are_told_by_target_and_layers() -> None:
    names = [f"m.layers.{layer}.x.{target}" for target in ("v_proj", "q_proj") for layer in (0, 1, 2)]
    assert grouped([*names, "m.layers.5.x.o_proj", "lm_head"]) == [
        "q_proj v_proj in layers 0-2",
        "o_proj in layer 5",
        "lm_head",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_a_comparison_fits_the_terminal_and_draws_each_layer(found: Diff, width: int) -> None:
    out = screen(width, force_terminal=True)
    print_diff(out, found)
    lines = seen(out)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    rows = [line.split() for line in lines if line.split() and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == [str(layer) for layer in range(30)]
    assert rows[29][1] == f"{max(pair.a or 0 for pair in found.layers):.2f}"
    assert len(rows[29][2]) == {80: 29, 120: 40}[width]
    assert rows[0][3] == "-"
    assert "only in legal@" in "\n".join(lines)
    assert "  lm_head" in lines
    assert "  rank 8 and 16, alpha 16 and 32: q_proj v_proj in layers 8-29" in lines


def test_long_names_are_cut_and_break_no_line() -> None:
    one = parse_version(version("hub:an-organization/a-rather-long-name-of-a-repository@main", "1"))
    out = screen(80, force_terminal=True)
    print_diff(out, diff(one, one))
    assert max(map(len, seen(out))) <= 80


# ---- tables ------------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.activate("acme-support", made.add("acme-support", "1", report=report(ALL_TARGETS)))
    made.activate("hub:acme/loras@main", made.add("hub:acme/loras@main", "2"))
    made.add("fresh", "3", "proving")
    made.pinned.add("acme-support")
    return made


@pytest.mark.parametrize(("width", "columns"), [(80, 7), (100, 8), (120, 9), (160, 12)])
def test_the_list_fits_and_shows_more_where_there_is_room(
    registry: Registry, width: int, columns: int
) -> None:
    out = screen(width)
    drawn = table(COLUMNS, [parse_adapter(registry.adapter(name)) for name in registry.versions], width)
    out.print(drawn)
    lines = seen(out)
    assert len(drawn.columns) == columns
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert "slot pinned" in lines[1]
    assert lines[3].split()[:2] == ["fresh", "proving"]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_the_models_fit_and_no_number_is_cut(registry: Registry, width: int) -> None:
    found = [parse_adapter(registry.adapter(name)) for name in registry.versions]
    models = [Model(id="smollm2-135m-instruct"), *(Model(id=adapter.name) for adapter in found)]
    out = screen(width)
    out.print(table(MODEL_COLUMNS, table_rows(models, found), width))
    lines = seen(out)
    assert max(map(len, lines)) <= width
    assert not re.search(r"\s\d[.,\d]*…", "\n".join(lines))
    assert len(lines) == 2 + len(found)


@pytest.mark.parametrize("width", [80, 120])
def test_an_adapter_and_its_versions_fit(registry: Registry, width: int) -> None:
    source = {"kind": "hub", "repo": "an-organization/loras", "commit": COMMIT, "subfolder": "support"}
    progress = {"stage": "proving", "fraction": 0.42}
    versions = [
        version("acme-support", "4", "proving", progress=progress),
        version("acme-support", "1", active=True, source=source),
        version("acme-support", "5", "failed", error={"code": "no_effect", "message": "nothing " * 30}),
    ]
    history = [Activation("activate", "3f2a" * 16, None, "ci", NOW)]
    out = screen(width)
    found = parse_adapter(registry.adapter("acme-support"))
    print_adapter(out, found, [parse_version(one) for one in versions], history)
    lines = seen(out)
    assert max(map(len, lines)) <= width
    assert lines[0] == "acme-support  active  pinned"
    assert "proving 42%" in lines[4]
    assert "hub an-organization/" in lines[5]
    assert lines[5].endswith(when(NOW))


def test_text_from_the_server_cannot_steer_the_terminal(registry: Registry) -> None:
    out = screen(80)
    evil = "\x1b]0;title\x07[bold]x"
    failed = version(evil, "1", "failed", error={"code": evil, "message": evil}, created_by=evil, base=evil)
    print_version(out, parse_version(failed))
    shown = registry.adapter("acme-support") | {"name": evil, "base": evil}
    print_adapter(
        out, parse_adapter(shown), [parse_version(failed)], [Activation(evil, evil, evil, evil, NOW)]
    )
    text = out.export_text()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x" in text


def test_a_proof_is_told_in_a_sentence() -> None:
    facts = report()["proof"]
    told = parse_version(version("a", "1")).report
    assert told is not None
    assert facts["texts"] == 4
    changed = version("a", "1", report=report() | {"proof": facts | {
        "exact": False, "modules_exact": 7, "largest_difference": 0.00312, "modules_changed": 58, "texts": 0,
    }})  # fmt: skip
    other = parse_version(changed).report
    assert other is not None
    assert proof(other.proof) == (
        "proven in 3.2 s: 60 modules equal PEFT's within 0.00312, 7 of them bit for bit, 58 of them changed"
    )


@pytest.mark.parametrize(
    ("passed", "told"),
    [(0, "just now"), (59, "just now"), (61, "1 min ago"), (7200, "2 h ago"), (90000, "1 day ago")],
)
def test_times_are_told_as_people_do(passed: float, told: str) -> None:
    assert when(NOW - passed, NOW) == told


def test_old_times_are_dates() -> None:
    assert when(NOW - 1e6, NOW).startswith("2026-09-")
    assert when(NOW + 30, NOW) == "just now"


def test_sizes_have_a_unit_that_fits() -> None:
    assert [size(count) for count in (999, 1000, 4_938_268, 2.5e9)] == ["999 B", "1.0 kB", "4.9 MB", "2.5 GB"]


# ---- bars while it goes on ---------------------------------------------------------------------------


def test_each_phase_has_a_bar_that_says_how_far_and_how_long() -> None:
    out = screen(80, force_terminal=True)
    times = iter([0.0, 1.0, 2.0, 2.0, 2.0, 5.5])
    with ProgressDisplay(out, lambda: next(times)) as display:
        display(Progress("uploading", 0.5, 2_000_000, 4_000_000))
        display(Progress("uploading", 1.0, 4_000_000, 4_000_000))
        display(Progress("validating"))
        display(Progress("proving", 0.5))
        display(Progress("ready"))
        assert display.is_at_server
    sent, proven = [line for line in seen(out) if line][-2:]
    assert sent.endswith("✓ sending  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 4.0 MB  2.0 s")
    assert proven == "✓ proving  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 3.5 s"


def test_each_file_that_is_sent_on_its_own_has_a_bar_or_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        Progress("uploading", 1.0, size, size, f"{name}.jsonl") for name, size in (("train", 2), ("eval", 1))
    ]
    out = screen(80, force_terminal=True)
    with ProgressDisplay(out, lambda: 0.0) as display:
        for step in steps:
            display(step)
    text = out.export_text()
    assert "✓ sending train.jsonl" in text
    assert "sending eval.jsonl" in text
    with ProgressDisplay(screen(80)) as display:
        for step in (*steps, steps[-1]):
            display(step)
    assert capsys.readouterr().err == "uploading train.jsonl 2 B\nuploading eval.jsonl 1 B\n"


def test_a_failure_stops_the_bar() -> None:
    out = screen(80, force_terminal=True)
    with ProgressDisplay(out, lambda: 0.0) as display:
        display(Progress("proving", 0.5))
        display(Progress("failed"))
    last = next(line for line in reversed(seen(out)) if line)
    assert last.endswith("failed")
    assert "✓" not in last


def test_a_terminal_of_few_characters_gets_ascii(found: Diff) -> None:
    out = Console(width=80, file=io.TextIOWrapper(io.BytesIO(), "ascii"), record=True, highlight=False)
    print_diff(out, found)
    print_version(out, parse_version(version("acme", "1")))
    assert out.export_text().isascii()


# ---- jobs --------------------------------------------------------------------------------------------


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
        display.show(parse_job(job(1, "queued")))
        display.note(parse_event(event(5, "The job waits for its turn.")))
        stale = {"phase": "validating_files", "step": 0, "steps": None}
        display.show(parse_job(job(1, progress=stale)))
        many = [{"line": line, "reason": "bad"} for line in range(1, 31)]
        display.note(parse_event(event(6, "bad lines", level="error", data={"problems": many})))
        display.note(parse_event(event(7, "f: 30 problems", level="error", data={"code": "invalid_file"})))
        display.show(parse_job(job(1, **succeeded())))
    lines = out.export_text().splitlines()
    steps = [line for line in lines if line.startswith("step ") and "loss 1.0000" in line]
    assert steps == [f"step {number}/100  loss 1.0000  9 s left" for number in (1, *range(5, 101, 5))]
    others = [line for line in lines if line not in steps]
    assert others == [
        "checking the files",
        "training",
        "base: held-out loss 2.5000",
        "step 3: held-out loss 2.5000  best",
        "adapter, 2 held-out rows: exact_match 50.0%",
        "The job waits for its turn.",
        "starting",
    ]


def test_a_job_that_waits_when_it_is_first_seen_says_so() -> None:
    out = screen(200)
    with JobDisplay(out) as display:
        display.show(parse_job(job(1, "queued")))
    assert out.export_text() == "waiting for its turn\n"


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
    out.print(table(JOB_COLUMNS, jobs, width))
    titles, first, _ = out.export_text().splitlines()
    shown = [column for column in JOB_COLUMNS if column.title in titles.split()]
    assert titles.split() == [column.title for column in shown]
    assert {column.title for column in JOB_COLUMNS if not column.spare} <= {one.title for one in shown}
    assert len(titles.rstrip()) <= width
    assert (len(shown) == len(JOB_COLUMNS)) == (width >= 120)
    assert first.split()[:3] == [job_id(1)[:14], first.split()[1], "succeeded"]
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


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_thought_in_grey_and_a_pipe_gets_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    show_pieces([Piece(0, "", reasoning="I see\033[1m."), Piece(0, "Yes"), Piece(0, ".", "stop")])
    grey = "\033[2mI see[1m.\033[0m\n\n"
    assert capsys.readouterr().out == (grey if terminal else "") + "Yes."
