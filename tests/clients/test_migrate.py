"""`onebase migrate openai`: what is taken over of a job at OpenAI, what is said of the rest, whole runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.clients.real_server import Server

from onebase import Client
from onebase.cli import main, migrate
from onebase.cli.migrate import MOST_JOB_BYTES, Wanted, read_wanted

WAS = "ft:gpt-4o-mini-2024-07-18:acme:Support v2:7p4lURel"
JOB: dict[str, Any] = {
    "id": "ftjob-abc123", "object": "fine_tuning.job", "model": "gpt-4o-mini-2024-07-18", "created_at": 1,
    "status": "succeeded", "finished_at": 2, "fine_tuned_model": WAS, "organization_id": "org-1",
    "result_files": [],
    "training_file": "file-1", "validation_file": None, "seed": 1234, "metadata": {"team": "support"},
    "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.8}, "integrations": [],
    "method": {"type": "supervised", "supervised": {
        "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.8}}},
    "error": {}, "user_provided_suffix": None, "trained_tokens": 99,
}  # fmt: skip


def chat_rows(count: int) -> str:
    lines = []
    for number in range(count):
        said = [
            {"role": "user", "content": f"{number} and 1?"},
            {"role": "assistant", "content": f"{number + 1}"},
        ]
        lines.append(json.dumps({"messages": said, "parallel_tool_calls": False}))
    return "\n".join(lines) + "\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "my rows.jsonl"
    file.write_text(chat_rows(12))
    return file


def wanted(rows: Path, job: dict[str, Any] | None = None, **options: Any) -> Wanted:
    given = {
        "file": str(rows),
        "job": None,
        "name": None,
        "set": [],
        "validation": None,
        "recorded": None,
        "grader": None,
        **options,
    }
    if job is not None:
        place = rows.with_name("job.json")
        place.write_text(json.dumps(job))
        given["job"] = str(place)
    return read_wanted(argparse.Namespace(**given))


def test_settings_suffix_seed_and_metadata_are_taken_over(rows: Path) -> None:
    found = wanted(rows, JOB)
    assert found.name == "Support-v2"
    assert (found.method, found.seed, found.was) == ("supervised", 1234, WAS)
    settings = {name: value for name, value in found.settings.items() if name != "metrics"}
    assert settings == {"epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.8}
    assert found.metadata == {"team": "support", "openai_job": "ftjob-abc123"}
    assert any("trained again, on this server's base" in sentence for sentence in found.lost)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"user_provided_suffix": "mine"}, "mine"),
        ({"fine_tuned_model": "ft:gpt-4o:org::7p4lURel"}, "my-rows"),
        ({"fine_tuned_model": None, "status": "failed"}, "my-rows"),
        ({"fine_tuned_model": "ft:gpt-4o:org:../..:x"}, "my-rows"),
    ],
)
def test_the_name_is_the_suffix_or_that_of_the_file(rows: Path, change: dict[str, Any], name: str) -> None:
    assert wanted(rows, JOB | change).name == name
    assert wanted(rows, JOB | change, name="given").name == "given"


def test_older_jobs_and_auto_are_read_and_set_goes_first(rows: Path) -> None:
    old = {**JOB, "method": None, "hyperparameters": {"n_epochs": "auto", "batch_size": 8}}
    assert wanted(rows, old).settings.get("batch_size") == 8
    assert "epochs" not in wanted(rows, old).settings
    found = wanted(rows, JOB, set=["epochs=1", "learning_rate_multiplier=1", "metrics=json_valid"])
    assert (found.settings["epochs"], found.settings["metrics"]) == (1, ["json_valid"])
    assert not any("learning_rate_multiplier" in sentence for sentence in found.lost)


def test_preferences_are_seen_in_the_job_or_in_the_rows(rows: Path, tmp_path: Path) -> None:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}
    found = wanted(rows, {**JOB, "method": method, "hyperparameters": None})
    assert (found.method, found.settings["beta"], found.settings["epochs"]) == ("dpo", 0.2, 1)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('\n{"input": {}, "preferred_output": [], "non_preferred_output": []}\n')
    assert wanted(pairs).method == "dpo"
    for odd in ("", "no json\n", "[" * 100_000, "7\n"):
        pairs.write_text(odd)
        assert wanted(pairs).method == "supervised"


GRADER = {
    "type": "string_check", "name": "asked", "input": "{{sample.output_text}}",
    "reference": "{{item.letter}}", "operation": "ilike",
}  # fmt: skip


def by_rewards(grader: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A job of reinforcement fine-tuning, as OpenAI's API gives it."""
    hyperparameters = {
        "n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 1.0, "reasoning_effort": "medium",
        "compute_multiplier": 0.5, "eval_interval": 2, "eval_samples": 1,
    }  # fmt: skip
    inside = {"grader": grader, "hyperparameters": hyperparameters, **more}
    return {**JOB, "hyperparameters": None, "method": {"type": "reinforcement", "reinforcement": inside}}


def test_a_grader_is_taken_over_unless_it_asks_a_judge_that_only_openai_has(rows: Path) -> None:
    found = wanted(rows, by_rewards(GRADER, response_format={"type": "json_schema"}))
    assert (found.method, found.grader) == ("reinforcement", GRADER)
    assert found.settings == {
        "epochs": 2, "batch_size": 2, "learning_rate_multiplier": 1.0, "compute_multiplier": 0.5,
        "eval_every": 2, "eval_samples": 1,
    }  # fmt: skip
    assert any("no meaning here: reasoning_effort." in sentence for sentence in found.lost)
    assert any("response_format is not applied" in sentence for sentence in found.lost)

    judge = {"type": "score_model", "name": "nice", "model": "gpt-4o", "input": []}
    several = {"type": "multi", "name": "all", "graders": {"a": GRADER, "b": judge}, "calculate_output": "b"}
    for asks in (judge, several):
        with pytest.raises(ValueError, match=r"--job: its grader asks 'gpt-4o'.+--grader"):
            wanted(rows, by_rewards(asks))
    given = json.dumps(GRADER)
    assert wanted(rows, by_rewards(several), grader=given).grader == GRADER
    alone = wanted(rows, grader=given)
    assert (alone.method, alone.grader, alone.settings) == ("reinforcement", GRADER, {})
    with pytest.raises(ValueError, match="--grader: it is for reinforcement, and the method is supervised"):
        wanted(rows, JOB, grader=given)


@pytest.mark.parametrize("metric", ["cosine", "meteor"])
def test_a_grader_that_computes_what_this_server_does_not_is_refused(rows: Path, metric: str) -> None:
    alike = {
        "type": "text_similarity", "name": "alike", "input": "{{sample.output_text}}",
        "reference": "{{item.letter}}", "evaluation_metric": metric,
    }  # fmt: skip
    several = {"type": "multi", "name": "all", "graders": {"a": GRADER, "b": alike}, "calculate_output": "b"}
    for computes in (alike, several):
        with pytest.raises(ValueError, match=rf"--job: its grader computes {metric}, .+rouge_l.+--grader"):
            wanted(rows, by_rewards(computes))
        assert wanted(rows, by_rewards(computes), grader=json.dumps(GRADER)).grader == GRADER
    taken = {**alike, "evaluation_metric": "rouge_l"}
    assert wanted(rows, by_rewards(taken)).grader == taken


def test_the_image_of_a_python_grader_is_left_out_and_said(rows: Path) -> None:
    plain = {"type": "python", "name": "py", "source": "def grade(sample, item):\n    return 1.0\n"}
    imaged = {**plain, "image_tag": "2025-05-08"}

    def several(one: dict[str, Any]) -> dict[str, Any]:
        graders = {"a": GRADER, "b": one}
        return {"type": "multi", "name": "all", "graders": graders, "calculate_output": "a + b"}

    for given, kept in ((imaged, plain), (several(imaged), several(plain))):
        found = wanted(rows, by_rewards(given))
        assert found.grader == kept
        assert any("image_tag (2025-05-08) is left out" in sentence for sentence in found.lost)
    for job, options in (
        (by_rewards({**plain, "image_tag": None}), {}),
        (by_rewards(imaged), {"grader": json.dumps(plain)}),
    ):
        found = wanted(rows, job, **options)
        assert found.grader == plain
        assert not any("image_tag" in sentence for sentence in found.lost)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "ft:gpt-4o:org:first:1"}, "It went on from ft:gpt-4o:org:first:1"),
        ({"validation_file": "file-9"}, "Its validation file file-9 is not here"),
        ({"integrations": [{"type": "wandb"}]}, "integrations are not called"),
        ({"status": "cancelled"}, "The job there is cancelled"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"compute_multiplier": 2}}}},
            "no meaning here: compute_multiplier",
        ),
        ({}, "factor on this server's own rate"),
    ],
)
def test_what_does_not_carry_over_is_said(rows: Path, change: dict[str, Any], says: str) -> None:
    assert any(says in sentence for sentence in wanted(rows, JOB | change).lost)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not JSON"),
        (b"[1]", "no fine-tuning job"),
        (b'{"object": "file"}', "jobs.retrieve"),
        (b'{"object": "fine_tuning.job", "method": {"type": "reinforcement"}}', "it has no grader"),
        (b'{"object": "fine_tuning.job", "method": {"type": "other"}}', "'other', which is not run here"),
        (b"[" * 100_000, "not JSON"),
        (b" " * (MOST_JOB_BYTES + 1), "give the JSON of one job"),
        (b"\xff", "not JSON"),
    ],
)
def test_a_job_that_cannot_be_read_is_refused(
    rows: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    place = rows.with_name("job.json")
    place.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["migrate", "openai", "--file", str(rows), "--job", str(place), "--yes"])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "odd",
    [
        {"method": 1}, {"method": {"type": "dpo", "dpo": 7}}, {"metadata": [1]}, {"hyperparameters": "auto"},
        {"seed": "x"}, {"fine_tuned_model": 7},
    ],
)  # fmt: skip
def test_fields_of_other_kinds_are_left_out(rows: Path, odd: dict[str, Any]) -> None:
    assert wanted(rows, JOB | odd).name


def test_it_asks_before_it_trains_and_nobody_can_be_asked_in_a_pipe(
    rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(SystemExit):
        main(["migrate", "openai", "--file", str(rows)])
    assert "--yes" in capsys.readouterr().err
    assert main(["migrate"]) == 2
    assert main(["migrate", "--help"]) == 0
    assert main(["migrate", "azure"]) == 2
    with pytest.raises(SystemExit):
        main(["migrate", "openai", "--file", "nowhere.jsonl", "--yes"])


# ---- against a server --------------------------------------------------------------------------------

QUICK = [
    "--set", "r=4", "--set", "targets=q_proj", "--set", "max_steps=2", "--set", "metric_tokens=4",
    "--set", "eval_split=0.2",
]  # fmt: skip


def test_a_job_becomes_an_adapter_that_answers_and_the_changes_are_shown(
    server: Server, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_URL", server.url)
    place = rows.with_name("job.json")
    place.write_text(json.dumps(JOB))
    command = ["migrate", "openai", "--file", str(rows), "--job", str(place), *QUICK, "--activate", "always"]
    assert main([*command, "--yes"]) == 0
    printed = capsys.readouterr()
    assert "The rows are sound. Training takes" in printed.err
    assert "of memory next to the base" in printed.err
    assert ["base", "adapter"] in [line.split() for line in printed.out.splitlines()]
    for measure in ("held-out loss", "exact_match", "word_f1"):
        assert measure in printed.out
    assert f'- model="{WAS}"' in printed.out
    assert '+ model="Support-v2"' in printed.out
    assert f'+ client = OpenAI(base_url="{server.url}/v1"' in printed.out
    with Client(server.url) as client:
        assert client.chat("1 and 1?", adapter="Support-v2", max_tokens=2).text is not None
        (job,) = client.training.list(metadata={"openai_job": "ftjob-abc123"})
        assert (job.info.seed, job.info.settings["epochs"]) == (1234, 2.0)
        assert (job.info.settings["batch_size"], job.info.settings["r"]) == (4, 4)


def test_a_job_of_rewards_learns_from_its_grader(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_URL", server.url)
    prompts = [
        {"messages": [{"role": "user", "content": f"Say number {one}."}], "letter": "k"} for one in range(8)
    ]
    file, place = tmp_path / "prompts.jsonl", tmp_path / "job.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    place.write_text(json.dumps(by_rewards(GRADER)))
    quick = ["--set", "r=4", "--set", "max_steps=2", "--set", "sample_tokens=4", "--set", "temperature=0.3"]
    command = ["migrate", "openai", "--file", str(file), "--job", str(place), "--name", "by-rewards", *quick]
    assert main([*command, "--yes"]) == 0
    printed = capsys.readouterr()
    assert "no meaning here: reasoning_effort." in printed.err
    assert "held-out reward" in printed.out
    assert '+ model="by-rewards' in printed.out
    with Client(server.url) as client:
        (job,) = [one for one in client.training.list() if one.name == "by-rewards"]
        method = job.info.method_settings
    assert method["type"] == "reinforcement"
    assert method["reinforcement"]["grader"] == GRADER
    assert method["reinforcement"]["hyperparameters"]["group_size"] == 4


def test_a_no_leaves_nothing_on_the_server_and_a_yes_trains(
    server: Server, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_URL", server.url)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    asked: list[str] = []

    def say(text: str) -> Any:
        return lambda prompt: asked.append(prompt) or text

    slow = [*QUICK, "--set", "max_steps=2000", "--set", "eval_every=1000", "--set", "metrics=exact_match"]
    with Client(server.url) as client:
        before = {file.id for file in client.files.list()}
        monkeypatch.setattr("builtins.input", say("n"))
        assert main(["migrate", "openai", "--file", str(rows), "--name", "declined", *slow]) == 1
        assert asked == ["Train it? [y/N] "]
        assert "Nothing was trained" in capsys.readouterr().err
        (job,) = [one for one in client.training.list() if one.name == "declined"]
        assert job.status == "cancelled"
        assert {file.id for file in client.files.list()} == before

        def interrupt(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(migrate, "time", SimpleNamespace(sleep=interrupt))
        assert main(["migrate", "openai", "--file", str(rows), "--name", "interrupted", *slow]) == 1
        (job,) = [one for one in client.training.list() if one.name == "interrupted"]
        assert job.status == "cancelled"
        assert {file.id for file in client.files.list()} == before


def test_bad_rows_are_named_and_nothing_is_asked(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_URL", server.url)
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    bad = tmp_path / "vision.jsonl"
    bad.write_text(
        chat_rows(2) + json.dumps({"messages": [image, {"role": "assistant", "content": "x"}]}) + "\n"
    )
    assert main(["migrate", "openai", "--file", str(bad), "--yes"]) == 1
    said = capsys.readouterr().err
    assert "line 3" in said
    assert "an image (image_url) cannot be learned" in said


def test_json_has_the_job_and_the_changes(
    server: Server, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_URL", server.url)
    options = ["--name", "in-json", "--yes", "--json", "--activate", "never", *QUICK]
    assert main(["migrate", "openai", "--file", str(rows), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["job"]["status"] == "succeeded"
    assert found["client"]["model"] == found["job"]["fine_tuned_model"]
    assert found["client"]["base_url"] == f"{server.url}/v1"
