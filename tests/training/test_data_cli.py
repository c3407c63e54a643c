"""`onebase data check`: what it prints, and its exit status.

Text from anybody on a terminal.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.training.data_support import chat, write_rows

from onebase_engine.base import quantized_cache
from onebase_training.cli import sweep, train
from onebase_training.cli.data import main
from onebase_training.cli.options import printable


def test_sound_data_is_reported_with_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_rows(tmp_path / "train.jsonl", [chat("q", "a"), chat("r", "b")])
    held = write_rows(tmp_path / "held.jsonl", [chat("q", "a")])
    assert main(["check", str(train), "--eval-data", str(held)]) == 0
    out = capsys.readouterr().out
    assert "«a<|im_end|>»" in out
    assert "also in the evaluation data" in out
    assert "held.jsonl" in out


def test_a_pipe_gets_whole_lines_with_tabs_and_neither_rules_nor_padding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("q" * n, "word " * 60) for n in (1, 200, 400)]
    train, held = write_rows(tmp_path / "train.jsonl", rows), write_rows(tmp_path / "held.jsonl", rows)
    assert main(["check", str(train), "--eval-data", str(held)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["\ttrain\tevaluation", f"source\t{train}\t{held}", "rows\t3\t3"]
    assert not [line for line in lines if line != line.rstrip(" ") or "─" in line or "█" in line]
    assert any("word " * 60 in line + " " for line in lines)


@pytest.mark.parametrize("command", [["train", "--name", "x"], ["sweep"]], ids=["train", "sweep"])
def test_bad_data_ends_a_run_before_the_base_is_loaded(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(quantized_cache, "load_kept_base", loaded.append)
    run = {"train": train, "sweep": sweep}[command[0]].main
    bad = write_rows(tmp_path / "train.jsonl", [{}])
    assert run([*command[1:], "--data", str(bad), "--out", str(tmp_path / "run")]) == 1
    assert "the row has nothing" in capsys.readouterr().err
    assert not loaded


def test_every_problem_of_both_files_is_printed_as_editors_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{}] * 40)
    held = write_rows(tmp_path / "held.jsonl", [chat("q", "a"), {"messages": [{"role": "user\x1b[2J"}]}])
    assert main(["check", str(train), "--eval-data", str(held)]) == 1
    captured = capsys.readouterr()
    printed = captured.out.splitlines()
    assert len(printed) == 41
    assert printed[0].startswith(f"{train}:1: the row has nothing")
    assert printed[-1].startswith(f"{held}:2: messages[0].role: ")
    assert "\x1b" not in captured.out
    assert "41 problems" in captured.err


def test_fields_and_file_names_cannot_steer_the_terminal_or_begin_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\nrows.jsonl:1: [red]"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", f"contentt{evil}": "a"}]}
    bad = write_rows(tmp_path / f"{evil}.jsonl", [row])
    assert main(["check", str(bad)]) == 1
    captured = capsys.readouterr()
    (printed,) = captured.out.splitlines()
    assert not {"\x1b", "\x07"} & set(captured.out + captured.err)
    assert "[red]" in printed


def test_json_holds_the_report_or_the_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_rows(tmp_path / "train.jsonl", [chat("q", "a")])
    assert main(["check", str(train), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": ""}])
    assert main(["check", str(bad), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem == {"file": str(bad), "line": 1, "field": "text", "reason": "the text is empty"}


def test_the_options_of_a_recipe_are_those_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "train.jsonl", [chat("q", "word " * 100), chat("q", "a")])
    assert main(["check", str(train), "--max-length", "60"]) == 1
    assert "raise max_length" in capsys.readouterr().out
    assert main(["check", str(train), "--max-length", "60", "--too-long", "drop", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == [1]
    assert main(["check", str(train), "--method", "dpo"]) == 1
    assert "the method is dpo" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["look"], ["check"], ["check", "x.jsonl", "--max-length", "many"], ["check", "x.jsonl", "--r", "8"]],
)
def test_wrong_options_end_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_setting_out_of_its_limits_or_a_base_that_is_none_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "train.jsonl", [chat("q", "a")])
    assert main(["check", str(train), "--max-length", "2"]) == 2
    assert "--max-length" in capsys.readouterr().err
    assert main(["check", str(train), "--base", str(tmp_path)]) == 2
    assert "holds no base" in capsys.readouterr().err


def test_looking_at_data_loads_no_model(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [chat("q", "a")])
    code = (
        "import sys; from onebase_training.cli.data import main; "
        f"status = main(['check', {str(train)!r}]); "
        "sys.exit(status or any(name in sys.modules for name in ('peft', 'bitsandbytes', 'pyarrow')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "character", ["\x1b", "\x07", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028", "\udce9", "\U000e0041"]
)
def test_what_steers_a_terminal_or_cannot_be_encoded_is_replaced(character: str) -> None:
    shown = printable(f"a{character}b")
    assert shown == "a\N{REPLACEMENT CHARACTER}b"
    assert shown.encode()


@pytest.mark.parametrize("text", ["two\nlines\tof text", "40\u00a0€", "日本語 עברית नमस्ते", "👩\u200d🔬", ""])
def test_text_of_any_script_stays_as_it_is(text: str) -> None:
    assert printable(text) == text
