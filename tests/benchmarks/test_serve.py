"""What `make bench` asks and of whom, what it refuses, and how it judges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import goals
from bench import machine, peers
from bench.machine import BusyError, demand_quiet
from bench.plots import draw
from bench.report import Run, summarize, sweep_points
from bench.stream import Sample
from bench.workload import SWEEPS, Block, Prompts, Shape, main_block, requests_of, sweep_blocks
from onebase_engine.base.default_base import fetch_default_base


def blocks() -> list[Block]:
    return [main_block(Shape()), *sweep_blocks(Shape(), SWEEPS)]


def runs(speed: float, target: str = "onebase") -> list[Run]:
    """Every scenario once, each stream as fast as the other."""
    samples = [Sample(0.0, 0.5, 0.5 + 63 / speed, 64, "text")]
    return [Run(target, one.key, 1, speed, samples) for block in blocks() for one in block.scenarios]


def test_every_load_has_a_name_of_its_own_and_adapters_that_its_target_has() -> None:
    scenarios = [scenario for block in blocks() for scenario in block.scenarios]
    assert len({scenario.key for scenario in scenarios}) == len(scenarios)
    for block in blocks():
        names = {f"a{index}" for index in range(len(block.ranks))}
        asked = {name for scenario in block.scenarios for name in scenario.adapters if name is not None}
        assert asked <= names, block.key


def test_prompts_have_the_length_that_the_load_says_and_none_begins_like_another() -> None:
    prompts = Prompts(fetch_default_base(), 85, 0)
    scenario = next(one for block in blocks() for one in block.scenarios if one.key == "prompts-long")
    requests = requests_of(scenario, prompts, 1)
    assert len({request.prompt[:12] for request in requests}) == scenario.streams
    lengths = [len(prompts._tokenizer.encode(request.prompt).ids) for request in requests]
    assert all(abs(length - scenario.prompt_tokens) <= 2 for length in lengths)


def test_a_prompt_to_copy_begins_its_own_passage_once_more() -> None:
    prompt = Prompts(fetch_default_base(), 85, 0).make_copy("x", length=150)
    first, second, begun = prompt.split("\n\n")
    assert first == second
    assert first.startswith(begun)
    assert 0 < len(begun) < len(first)


def test_a_sweep_runs_along_its_axis_with_the_figures_of_each_load() -> None:
    scenarios = [scenario for block in blocks() for scenario in block.scenarios]
    points = sweep_points(summarize([*runs(10), *runs(20, "peft")]), scenarios, "streams")
    assert [x for x, _ in points["onebase"]] == [1, 2, 4, 8, 16, 32]
    assert {figures.tokens_per_second for _, figures in points["peft"]} == {20}


def test_the_plots_are_drawn_of_what_was_measured(tmp_path: Path) -> None:
    from matplotlib.image import imread

    scenarios = [scenario for block in blocks() for scenario in block.scenarios]
    measured = [*runs(10), *(run for run in runs(20, "peft") if not run.scenario.startswith("rank"))]
    draw(measured, summarize(measured), scenarios, "a title", tmp_path / "serve.png")
    height, width, _ = imread(tmp_path / "serve.png").shape
    assert width > height > 500


def test_goals_are_judged_by_the_figures_and_not_where_a_peer_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {
        "single": {"onebase": {"tokens_per_second": 60.0}, "llama.cpp": {"tokens_per_second": 70.0}},
        "alike": {"onebase": {"tpot_p50": 0.040}},
        "beside": {"onebase": {"tpot_p50": 0.044}},
    }
    (tmp_path / "serve.json").write_text(json.dumps({"figures": figures}))
    goals.publish(goals.read(tmp_path), Console(), tmp_path)
    lines = (tmp_path / "goals.md").read_text().splitlines()
    assert "| 1 stream, 1 adapter | llama.cpp | ≥ 0.8 | 0.86 | met |" in lines
    assert "| 1 stream, 1 adapter | vllm | ≥ 3.5 |  | not measured |" in lines
    assert "| TPOT of rank 8, one row of rank 128 | rank 8 alone | ≤ 1.03 | 1.10 | missed |" in lines


def test_every_goal_names_figures_that_the_benchmarks_write() -> None:
    scenarios = {scenario.key: block for block in blocks() for scenario in block.scenarios}
    for goal in goals.GOALS:
        for figure in (goal.own, goal.other):
            if isinstance(figure, tuple) and figure[0] == "serve":
                _, key, target, _ = figure
                only = scenarios[key].only
                assert only is None or target in only, goal


def test_a_busy_machine_is_refused_unless_told_otherwise() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            with pytest.raises(BusyError, match="--busy"):
                demand_quiet(False, Console(), seconds=1.0)
            demand_quiet(True, Console(), seconds=0.2)
        finally:
            process.kill()


@pytest.mark.parametrize(("used", "refused"), [(0.01, False), (0.4, True)])
def test_what_keeps_a_machine_busy_is_named(
    used: float, refused: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(
        [{1: (5.0, "init"), 7: (2.0, "cc1")}, {1: (5.0, "init"), 7: (2.0 + used, "cc1"), 9: (4.0, "new")}]
    )
    monkeypatch.setattr(machine, "_processor_seconds", lambda: next(seconds))
    demand_quiet(True, Console(), seconds=1.0)
    assert ("cc1 (process 7) 40%" in capsys.readouterr().out) == refused


def test_a_peer_is_installed_once_and_again_after_an_installation_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path))
    tries: list[Path] = []

    def install(folder: Path, run: peers.Run) -> None:
        tries.append(folder)
        run(sys.executable, "-c", "print('half of it')")
        (folder / "program").touch()
        if len(tries) == 1:
            run(sys.executable, "-c", "raise SystemExit('the network is gone')")

    monkeypatch.setitem(peers.PEERS, "peer", peers.Peer("peer", "1", "program", install, "a moment"))
    with pytest.raises(peers.PeerError, match="the network is gone"):
        peers.installed("peer", Console())
    for _ in range(2):
        assert peers.installed("peer", Console()) == tmp_path / "peers" / "peer-1" / "program"
    assert len(tries) == 2
