"""`onebase migrate openai --record`: an old model's answers, recorded and measured, and an adapter that is
activated only if it is as good."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.clients.openai_double import KEY, OpenAIDouble, served
from tests.clients.training_double import REPORT

from onebase import TrainingReport
from onebase.cli import main, migrate, openai_answers
from onebase.cli.openai_answers import QualityGate, graders_of, metric_of, read_gate, score

MODEL = "ft:gpt-4o-mini-2024-07-18:acme:orders:7p4lURel"


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[OpenAIDouble]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai_answers, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    with served(OpenAIDouble(MODEL)) as double:
        yield double


def prompts(count: int, *, replies: bool = True) -> Path:
    """A file of questions whose own reply is JSON."""
    lines = []
    for number in range(count):
        messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": f"q{number}"}]
        if replies:
            messages.append({"role": "assistant", "content": f'{{"n": {number}}}'})
        lines.append(json.dumps({"messages": messages}) + "\n")
    file = Path("prompts.jsonl")
    file.write_text("".join(lines))
    return file


def run(double: OpenAIDouble, *options: str) -> int:
    given = ["--record", "prompts.jsonl", "--model", MODEL, "--openai-url", double.url, "--yes", *options]
    return main(["migrate", "openai", *given])


def read(name: str) -> list[Any]:
    return [json.loads(line) for line in Path("prompts-openai", name).read_text().splitlines()]


def test_answers_become_rows_to_train_on_held_out_rows_and_a_gate(
    old: OpenAIDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(20)
    old.answers = {f"q{number}": f'{{"n": {number}}}' if number % 2 else "no JSON" for number in range(20)}
    assert run(old, "--price", "3/12") == 0
    said = capsys.readouterr()
    assert f"{MODEL} at {old.url} is asked 20 prompts, billed to your key: about" in said.err
    assert "20 answers of" in said.out
    assert ", <$0.01 by --price" in said.out
    assert [body["temperature"] for body in old.asked] == [0] * 20
    assert all(body["messages"][-1]["role"] == "user" for body in old.asked)  # never the row's own reply
    train, held_out, gate = read("train.jsonl"), read("heldout.jsonl"), read_gate(Path("prompts-openai"))
    assert (len(train), len(held_out), gate.rows) == (16, 4, 4)
    for row in train:
        question, answer = row["messages"][-2]["content"], row["messages"][-1]["content"]
        assert answer == old.answers[question]
    right = [row["messages"][-2]["content"] for row in held_out]
    for row, question in zip(held_out, right, strict=True):
        assert (
            row["messages"][-1]["content"] == f'{{"n": {question[1:]}}}'
        )  # the row's own, not the old answer
    share = sum(int(question[1:]) % 2 for question in right) / 4
    assert gate.metrics == {"json_valid": share, "exact_match": share}


def test_what_is_recorded_is_not_asked_again_and_a_line_that_was_cut_off_is(
    old: OpenAIDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(10)
    error = {"message": "You exceeded your current quota.", "type": "insufficient_quota", "param": None}
    original = old.answer

    def fail(body: dict[str, Any]) -> dict[str, Any]:
        if len(old.asked) == 5:
            old.refusals = [(429, error | {"code": "insufficient_quota"}, {})]
        return original(body)

    old.answer = fail  # type: ignore[method-assign]
    assert run(old) == 1
    said = capsys.readouterr().err
    assert "You exceeded your current quota." in said
    assert "5 answers are in prompts-openai/answers.jsonl: the same command goes on from there." in said
    old.answer = original  # type: ignore[method-assign]
    file = Path("prompts-openai/answers.jsonl")
    file.write_text(file.read_text()[:-20])  # as after a crash
    old.asked.clear()
    assert run(old) == 0
    assert len(old.asked) == 6
    assert len(read("answers.jsonl")) == 10
    assert "(4 are recorded already)" in capsys.readouterr().err
    assert run(old) == 0
    assert len(old.asked) == 6
    with pytest.raises(SystemExit):
        main(["migrate", "openai", "--record", "prompts.jsonl", "--model", "other", "--yes"])
    assert f"has answers of {MODEL}: give another folder with --out" in capsys.readouterr().err


def test_an_overload_is_waited_for_and_a_refusal_is_said(
    old: OpenAIDouble, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(5)
    limited = {
        "message": "Rate limit reached",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    broken = {"message": "The server had an error", "type": "server_error", "param": None, "code": None}
    old.refusals = [(429, limited, {"retry-after": "2"}), (500, broken, {})]
    waits: list[float] = []
    monkeypatch.setattr(openai_answers, "sleep", waits.append)
    assert run(old) == 0
    assert (waits, len(old.asked)) == ([2.0, 2.0], 7)
    capsys.readouterr()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    assert run(old, "--out", "again") == 1
    said = capsys.readouterr().err
    assert "HTTP 401: Incorrect API key provided" in said
    assert "sk-wrong" not in said
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SystemExit):
        run(old)
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err


def test_nothing_is_asked_before_the_cost_is_agreed_to(
    old: OpenAIDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(5)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    given = ["--record", "prompts.jsonl", "--model", MODEL, "--openai-url", old.url, "--price", "1000/2000"]
    assert main(["migrate", "openai", *given]) == 1
    assert (asked, old.asked) == (["Ask for them? [y/N] "], [])
    assert ", about $" in capsys.readouterr().err


def test_answers_that_are_cut_off_are_not_trained_on_and_tool_calls_are_kept(old: OpenAIDouble) -> None:
    prompts(10, replies=False)
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    old.answers = {f"q{number}": "cut…" for number in range(0, 10, 2)} | {"q1": [call], "q3": [call]}
    assert run(old) == 0
    replies = [row["messages"][-1] for row in read("train.jsonl")]
    assert not any(reply.get("content") == "cut…" for reply in replies)
    rows = [*replies, *(row["messages"][-1] for row in read("heldout.jsonl"))]
    assert sum("tool_calls" in reply for reply in rows) == 2
    gate = read_gate(Path("prompts-openai"))
    assert (gate.rows, gate.metrics) == (2, {})  # no replies but the old model's: nothing to reach


def test_a_model_that_takes_no_temperature_is_asked_without(
    old: OpenAIDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(5)
    said = "Unsupported value: 'temperature' does not support 0 with this model."
    error = {"message": said, "type": "invalid_request_error", "param": "temperature"}
    old.refusals = [(400, error | {"code": "unsupported_value"}, {})]
    assert run(old) == 0
    assert ["temperature" in body for body in old.asked] == [True] + [False] * 5
    assert "takes no temperature: its answers are sampled" in capsys.readouterr().err
    old.refusals = [(400, error, {}), (400, error, {})]
    assert run(old, "--out", "again") == 1
    assert f"HTTP 400: {said}" in capsys.readouterr().err


def test_an_answer_that_was_cut_off_is_asked_again_with_a_higher_limit(
    old: OpenAIDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(5)
    old.answers = {"q1": "cut…", "q2": "cut…"}
    assert run(old, "--answer-tokens", "10") == 0
    assert "2 answers were cut off: a higher --answer-tokens" in capsys.readouterr().err
    for limit, more in (("10", []), ("20", ["q1", "q2"]), ("20", [])):
        old.asked.clear()
        old.answers = {"q1": "cut…"}
        assert run(old, "--answer-tokens", limit) == 0
        assert [body["messages"][-1]["content"] for body in old.asked] == more
    assert "2 prompts (3 are recorded already)" in capsys.readouterr().err
    file = Path("prompts-openai/answers.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["max_tokens"]  # as earlier releases wrote it
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    old.asked.clear()
    assert run(old, "--answer-tokens", "20") == 0
    assert len(old.asked) == 1


@pytest.mark.parametrize("place", ["tools", "reply"])
def test_a_tool_that_is_no_function_is_refused_before_anything_is_asked(
    old: OpenAIDouble, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    custom = {"type": "custom", "custom": {"name": "sh", "input": "ls"}}
    messages: list[Any] = [{"role": "user", "content": "q"}]
    row: dict[str, Any] = {"messages": messages}
    if place == "tools":
        row["tools"] = [custom]
    else:
        messages.append({"role": "assistant", "tool_calls": [custom]})
    Path("prompts.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        run(old)
    said = capsys.readouterr().err
    assert "line 1: a tool" in said
    assert "leave the row out" in said
    assert not old.asked
    with pytest.raises(ValueError, match="no call of a function"):
        openai_answers.text_of({"tool_calls": [custom]})


@pytest.mark.parametrize("line", ['{"key": "x"}', "7", '{"asked": "m"}'])
def test_a_line_that_is_no_answer_is_named_and_left_as_it_is(
    old: OpenAIDouble, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    prompts(5)
    file = Path("prompts-openai/answers.jsonl")
    file.parent.mkdir()
    file.write_text(line + "\n")
    with pytest.raises(SystemExit):
        run(old)
    assert "answers.jsonl, line 1 is no recorded answer: remove it" in capsys.readouterr().err
    assert (file.read_text(), old.asked) == (line + "\n", [])


CHECK = {"type": "string_check", "name": "same", "input": "{{ sample.output_text }}", "operation": "eq",
         "reference": "{{item.answer}}"}  # fmt: skip
LIKE = CHECK | {"name": "polite", "operation": "like", "reference": "Thank"}
SIMILAR = {"type": "text_similarity", "name": "near", "input": "{{sample.output_text}}",
           "reference": "{{item.answer}}", "evaluation_metric": "rouge_l", "pass_threshold": 0.8}  # fmt: skip
SCORE = {"type": "score_model", "name": "judge", "model": "gpt-4o", "input": []}


def test_graders_and_evals_are_read_where_they_have_a_counterpart(
    old: OpenAIDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    multi = {"type": "multi", "graders": {"a": LIKE, "b": SIMILAR}, "calculate_output": "a + b"}
    job = {"object": "fine_tuning.job", "fine_tuned_model": MODEL, "method": {
        "type": "reinforcement", "reinforcement": {"grader": CHECK}}}  # fmt: skip
    found = [metric_of(grader) for grader in graders_of([job, {"testing_criteria": [multi, SCORE]}])]
    assert [metric for metric, _ in found] == ["exact_match", "contains:Thank", "word_f1", None]
    assert found[3][1] == "The grader judge (score_model) has no counterpart here: it is not measured."
    prompts(10)
    Path("job.json").write_text(json.dumps(job))
    Path("evals.json").write_text(json.dumps({"object": "eval", "testing_criteria": [multi, SCORE]}))
    given = ["--record", "prompts.jsonl", "--openai-url", old.url, "--yes", "--job", "job.json"]
    assert main(["migrate", "openai", *given, "--evals", "evals.json"]) == 0
    assert set(read_gate(Path("prompts-openai")).metrics) == {"exact_match", "contains:Thank", "word_f1"}
    assert "The grader judge (score_model)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reply", "reference", "value"),
    [
        ("exact_match", " a\n", "a", 1.0),
        ("json_valid", '{"a": 1, "a": 2}', "", 0.0),
        ("json_valid", "[NaN]", "", 0.0),
        ("json_valid", ' {"a": [1]} ', "", 1.0),
        ("word_f1", "The red hat", "the hat", 0.8),
        ("word_f1", "", "", 1.0),
        ("contains:b", "abc", "", 1.0),
        ("lacks:b", "abc", "", 0.0),
    ],
)
def test_an_old_answer_is_scored_as_the_server_scores_a_reply(
    name: str, reply: str, reference: str, value: float
) -> None:
    metrics = pytest.importorskip("onebase_training.metrics")
    assert score(name, reply, reference) == pytest.approx(value)
    assert metrics.score(name, reply, reference) == pytest.approx(value)


@pytest.mark.parametrize(
    ("reached", "better_than", "active"),
    [
        (0.75, {"base": True}, True),
        (0.25, {"base": True}, False),
        (0.75, {"base": True, "active": False}, False),
    ],
)
def test_an_adapter_is_activated_only_if_it_is_as_good_as_the_old_model(
    capsys: pytest.CaptureFixture[str], reached: float, better_than: dict[str, bool], active: bool
) -> None:
    gate = QualityGate(MODEL, 4, {"exact_match": 0.5}, 40)
    measured = REPORT | {"metrics_after": {"exact_match": reached}, "better_than": better_than}
    report = msgspec.convert(measured, TrainingReport)
    job: Any = SimpleNamespace(
        name="acme", activated=False, info=SimpleNamespace(report=report, version="v" * 64)
    )
    activated: list[Any] = []

    def activate(name: str, version: str, *, expected: str | None) -> None:
        activated.append((name, version, expected))

    client: Any = SimpleNamespace(adapters=SimpleNamespace(activate=activate))
    args = argparse.Namespace(activate="if_better")
    assert migrate._judge(client, job, gate, args) is active
    assert activated == ([("acme", "v" * 64, None)] if active else [])
    said = capsys.readouterr().err
    assert f"exact_match: {MODEL} 50.0%, base 25.0%, adapter {reached:.1%}" in said
    assert ("requests for acme get it" in said) is active
    args.activate = "never"
    assert migrate._judge(client, job, gate, args) is False
    assert len(activated) == active


def test_an_adapter_is_measured_on_the_rows_that_the_old_model_was_measured_on(old: OpenAIDouble) -> None:
    prompts(20)
    assert run(old) == 0
    args = argparse.Namespace(
        recorded="prompts-openai",
        file=None,
        validation=None,
        job=None,
        name=None,
        set=[],
        grader=None,
        activate="if_better",
    )
    gate = migrate._use_recorded(args)
    wanted = migrate.read_wanted(args, gate)
    assert (args.file, args.validation) == ("prompts-openai/train.jsonl", "prompts-openai/heldout.jsonl")
    assert (wanted.name, wanted.method, wanted.was) == ("prompts-openai", "supervised", MODEL)
    assert wanted.settings["metrics"] == ["json_valid", "exact_match"]
    assert (wanted.settings["metric_rows"], wanted.settings["metric_tokens"]) == (4, 32)
    # Other metrics never take the place of those that are compared.
    args.set = ["metrics=word_f1"]
    assert migrate.read_wanted(args, gate).settings["metrics"] == ["json_valid", "exact_match", "word_f1"]
    args.set = ["metric_rows=0"]
    with pytest.raises(ValueError, match="--set metric_rows=0: replies are compared"):
        migrate.read_wanted(args, gate)
    assert "metrics" not in migrate.read_wanted(args).settings


def test_an_adapter_that_was_not_measured_is_not_said_to_be_worse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = msgspec.convert(REPORT | {"metrics_after": {"word_f1": 0.5}}, TrainingReport)
    job: Any = SimpleNamespace(activated=False, info=SimpleNamespace(report=report, version="v" * 64))
    args, client = argparse.Namespace(activate="if_better"), None
    assert migrate._judge(client, job, QualityGate(MODEL, 4, {"exact_match": 0.5}, 40), args) is False  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "exact_match: not measured here" in said
    assert "does not reach" not in said


def test_a_folder_without_recorded_answers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], serve: Callable[..., Any]
) -> None:
    with pytest.raises(SystemExit):
        main(["migrate", "openai", "--recorded", str(tmp_path), "--yes"])
    assert "holds no recorded answers" in capsys.readouterr().err
