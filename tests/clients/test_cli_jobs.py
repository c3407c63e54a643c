"""`onebase jobs` in this process, against a double on a real port.

What is said is in `golden/jobs-*.txt`; here is what is sent, what scripts get, and what is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.clients.golden import Transcript
from tests.clients.registry_double import NOW, RefusalError
from tests.clients.training_double import (
    CURVE,
    FAILURE,
    REPORT,
    Trainer,
    event,
    job_id,
    step,
    succeeded,
)

from onebase._terminal.jobs import EventLines
from onebase.cli import jobs as command
from onebase.cli import main
from onebase.cli.jobs.create import parse_labels, parse_settings
from onebase.cli.jobs.show import time_taken
from onebase_protocol.training import TrainingEvent

pytestmark = pytest.mark.usefixtures("slept")
ID = job_id(1)
SHORT = ID[:14]


@pytest.fixture
def trainer(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    monkeypatch.setenv("ONEBASE_URL", serve(made.script).url)
    return made


@pytest.fixture
def train(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    return file


@pytest.fixture
def shell(transcript: Callable[[str], Transcript], trainer: Trainer) -> Transcript:
    return transcript(os.environ["ONEBASE_URL"])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """The JSON that a command prints."""
    assert main(["jobs", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of wrong arguments."""
    with pytest.raises(SystemExit) as caught:
        main(["jobs", *arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_job_that_goes_on_from_a_version_asks_for_it_and_shows_it_between_base_and_adapter(
    trainer: Trainer, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs", "create", str(train), "--model", "acme@3f2a9c41"]) == 0
    assert next(iter(trainer.jobs.values()))["model"] == "acme@3f2a9c41"
    parent = {"name": "acme", "version": "a" * 64}
    measured = REPORT | {"loss_parent": 1.5, "metrics_parent": {"exact_match": 0.5}}
    facts = succeeded() | {"report": measured, "parent": parent, "model": "acme@aaaaaaaaaaaa"}
    targets = [f"model.layers.{number}.q_proj" for number in range(30)]
    trainer.add(2, **facts)
    trainer.add_file("file-curve", CURVE.encode())
    trainer.jobs[job_id(2)]["method"]["supervised"]["hyperparameters"]["targets"] = targets
    capsys.readouterr()
    assert main(["jobs", "show", job_id(2)]) == 0
    said = capsys.readouterr().out
    assert ["base", "parent", "adapter"] in [line.split() for line in said.splitlines()]
    assert ["exact_match", "25.0%", "50.0%", "75.0%"] in [line.split() for line in said.splitlines()]
    assert "supervised on acme@aaaaaaaaaaaa" in said
    assert "and 22 more" in said
    shown = printed(capsys, "show", job_id(2))
    assert (shown["parent"], shown["report"]["loss_parent"]) == (f"acme@{'a' * 64}", 1.5)


def test_show_compares_with_the_version_that_was_active_and_says_which_one_was_replaced(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: Any = REPORT | {"active": "a" * 64, "loss_active": 1.5, "metrics_active": {"exact_match": 0.5}}
    measured |= {"better_than": {"base": True, "active": True}}
    trainer.add(1, **succeeded() | {"report": measured, "replaced": "a" * 64})
    trainer.add(
        2, **succeeded() | {"report": measured | {"loss_active": 0.5, "better": False}, "activated": False}
    )
    why = {"active": "b" * 64, "not_compared": "it classifies texts"}
    trainer.add(3, **succeeded() | {"report": REPORT | why, "activated": False})
    trainer.add(4, **succeeded())
    trainer.add_file("file-curve", CURVE.encode())
    said = []
    for number in range(1, 5):
        assert main(["jobs", "show", job_id(number)]) == 0
        said.append(capsys.readouterr().out)
    lines = [line.split() for line in said[0].splitlines()]
    assert ["base", "active", "adapter"] in lines
    assert ["held-out", "loss", "2.5000", "1.5000", "1.2500"] in lines
    assert ["exact_match", "25.0%", "50.0%", "75.0%"] in lines
    assert "Compared with acme@aaaaaaaaaaaa, which was active when training ended." in said[0]
    assert "active: requests for acme get it; it replaced acme@aaaaaaaaaaaa" in said[0]
    assert ["held-out", "loss", "2.5000", "0.5000", "1.2500"] in [
        line.split() for line in said[1].splitlines()
    ]
    assert "Not compared with acme@bbbbbbbbbbbb, which was active when training ended: it classif" in said[2]
    assert ["base", "adapter"] in [line.split() for line in said[3].splitlines()]
    assert "No version of acme was active when training ended, to compare it with." in said[3]
    shown = printed(capsys, "show", job_id(1))
    assert (shown["replaced"], shown["report"]["active"]) == ("a" * 64, "a" * 64)
    assert shown["report"]["better_than"] == {"base": True, "active": True}


SLICES: Any = {
    "by": "exact_match", "against": "base", "slice_count": 2, "regressed": ["de"], "changed_count": 7,
    "slices": [
        {"slice": "de", "rows": 20, "measured": 12, "before": 0.5, "active": 0.75, "after": 0.25,
         "worse_by": 0.5, "regressed": True, "regressed_against": ["base", "active"], "loss_before": 1.0,
         "loss_active": 0.75, "loss_after": 1.5, "metrics_before": {"exact_match": 0.5},
         "metrics_active": {"exact_match": 0.75}, "metrics_after": {"exact_match": 0.25}},
        {"slice": "fr", "rows": 20, "measured": 12, "before": 0.25, "active": 0.5, "after": 0.75,
         "worse_by": 0.0, "regressed": False, "regressed_against": [], "loss_before": 1.0,
         "loss_active": 0.75, "loss_after": 0.5, "metrics_before": {"exact_match": 0.25},
         "metrics_active": {"exact_match": 0.5}, "metrics_after": {"exact_match": 0.75}},
    ],
    "changed": [
        {"line": 3, "slice": "de", "metric": "exact_match", "against": "active", "reference": "ja",
         "before": "ja", "after": "\x1b[0m"},
    ],
}  # fmt: skip


def test_show_has_a_table_of_slices_and_the_rows_that_are_wrong_now(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1, **succeeded() | {"report": REPORT | {"slices": SLICES}, "activated": False})
    trainer.add_file("file-curve", CURVE.encode())
    assert main(["jobs", "show", ID]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["exact_match", "by", "slice", "rows", "base", "active", "adapter"] in lines
    assert ["de", "12", "50.0%", "75.0%", "25.0%", "worse", "than", "allowed"] in lines
    assert ["fr", "12", "25.0%", "50.0%", "75.0%"] in lines
    assert "line 3 (de) was right by exact_match and is wrong: '\\x1b[0m' for 'ja'" in said
    assert "7 rows were right and are wrong" in said
    assert printed(capsys, "show", ID)["report"]["slices"] == SLICES


def test_show_says_how_labels_are_told_apart(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"label": "ja", "rows": 3, "precision": 0.75, "recall": 1.0, "f1": 0.857}
    poor = {"label": "\x1b[0m", "rows": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    figures = {
        "labels": [good, poor],
        "confusion": [[3, 0], [1, 0]],
        "confused": [{"label": "\x1b[0m", "given": "ja", "rows": 1}],
    }
    base = {"labels": [good | {"f1": 0.5}], "confusion": None, "confused": []}
    classes: Any = {
        "labels": ["ja", "\x1b[0m"], "rows": 4, "base_by": "decide", "base": base, "adapter": figures,
    }  # fmt: skip
    trainer.add(1, **succeeded() | {"report": REPORT | {"classes": classes}})
    trainer.add_file("file-curve", CURVE.encode())
    assert main(["jobs", "show", ID]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert "\x1b" not in said
    assert ["ja", "3", "50.0%", "85.7%", "75.0%", "100.0%"] in lines
    assert ["ja", "3", "0"] in lines
    assert "the label whose name it finds likeliest" in said
    assert printed(capsys, "show", ID)["report"]["classes"] == classes
    classes["adapter"] = figures | {"confusion": None}
    assert main(["jobs", "show", ID]) == 0
    assert "taken for ja in 1 row" in capsys.readouterr().out


def test_the_first_digits_of_an_id_show_as_much_as_the_whole(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1, **succeeded() | {"report": REPORT | {"slices": SLICES}})
    trainer.add_file("file-curve", CURVE.encode())
    said = [
        (main(["jobs", "show", name]), capsys.readouterr().out) for name in (ID, ID[: len("ftjob-") + 23])
    ]
    assert said[0] == said[1]
    assert "by slice" in said[0][1]
    assert trainer.asked[-2][1] == f"/v1/fine_tuning/jobs/{ID}"


def test_create_takes_what_a_slice_is_and_how_much_worse_one_may_get(
    trainer: Trainer, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max-regression", "0.02", "--slice-by", "lang")
    assert main(["jobs", "create", str(train), *options]) == 0
    sent = trainer.created[-1]["method"]["supervised"]["hyperparameters"]
    assert sent == {"max_regression": 0.02, "slice_by": "lang"}
    assert "--max-regression" in wrong(capsys, "create", str(train), "--max-regression", "much")


# ---- beginning ---------------------------------------------------------------------------------------


def test_create_sends_the_file_and_says_how_to_go_on(
    trainer: Trainer, shell: Transcript, train: Path
) -> None:
    settings = ["--set", "r=8", "--set", "targets=q_proj,v_proj", "--set", "use-rslora=true"]
    shell.run("jobs", "create", str(train), "--name", "acme", *settings, "--seed", "3")
    body = trainer.asked[-1][2]
    assert body["seed"] == 3
    assert body["method"]["supervised"]["hyperparameters"] == {
        "r": 8,
        "targets": ["q_proj", "v_proj"],
        "use_rslora": True,
    }
    trainer.live = [(step(2, 1), {"status": "running"}), (event(3, "proven"), succeeded())]
    trainer.add_file("file-curve", CURVE.encode())
    shell.run("jobs", "create", str(train), "--name", "acme", "--watch")
    trainer.refusal = RefusalError(400, "invalid_value", "r is 0.", param="hyperparameters.r")
    shell.run("jobs", "create", "file-1", "--set", "r=0")
    shell.check("jobs-create")


def test_create_passes_on_all_that_it_is_told(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "dpo", "--activate", "never", "--metadata", "team=a=b", "--validation", "file-2"]
    assert printed(capsys, "create", "file-1", "--name", "acme", *options)["id"] == ID
    body = trainer.asked[-1][2]
    assert (body["method"], body["activate"]) == ({"type": "dpo", "dpo": {"hyperparameters": {}}}, "never")
    assert (body["metadata"], body["validation_file"]) == ({"team": "a=b"}, "file-2")
    printed(capsys, "create", "file-1", "--method", "classification", "--set", "best_by=f1")
    classification = {"type": "classification", "classification": {"hyperparameters": {"best_by": "f1"}}}
    assert trainer.asked[-1][2]["method"] == classification


def test_what_cannot_be_sent_is_a_wrong_argument(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs", "create", "no.jsonl"]) == 2
    assert "no.jsonl is not there" in capsys.readouterr().err
    assert "--set: write NAME=VALUE" in wrong(capsys, "create", "file-1", "--set", "r")
    assert "did you mean use_dora?" in wrong(capsys, "create", "file-1", "--set", "dora=true")
    assert "use the option --seed" in wrong(capsys, "create", "file-1", "--set", "seed=1")
    assert "--metadata: write KEY=VALUE" in wrong(capsys, "create", "file-1", "--metadata", "x")
    assert trainer.asked == []


def test_settings_become_what_the_server_wants() -> None:
    given = ["r=8", "learning_rate=1e-4", "packing=false", "init=eva", "epochs=auto", "max-steps=3"]
    given += ["metrics=exact_match, json_valid", "metrics=contains:yes", "sample_prompts=Hi, there"]
    given += ["sample_prompts=And?", "rank_pattern=down_proj=32,up_proj=8", 'alpha_pattern={"o_proj": 2.5}']
    given += ['targets=["q_proj"]', "best_by=one_of:A|B=C", "learning_rate_multiplier=2"]
    assert parse_settings(given) == {
        "r": 8,
        "learning_rate": 1e-4,
        "packing": False,
        "init": "eva",
        "epochs": "auto",
        "max_steps": 3,
        "metrics": ["exact_match", "json_valid", "contains:yes"],
        "sample_prompts": ["Hi, there", "And?"],
        "rank_pattern": {"down_proj": 32, "up_proj": 8},
        "alpha_pattern": {"o_proj": 2.5},
        "targets": ["q_proj"],
        "best_by": "one_of:A|B=C",
        "learning_rate_multiplier": 2,
    }
    assert parse_labels([]) is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("rank_pattern=down_proj", "write LAYER=NUMBER"),
        ("targets=[q", "is not JSON"),
        ("alpha_pattern={", "is not JSON"),
        ("xyzzy=1", "there are beta, r,"),
    ],
)
def test_a_setting_that_cannot_be_read_says_how_it_is_written(given: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_settings([given])


# ---- looking -----------------------------------------------------------------------------------------


def test_list_is_tab_separated_and_whole_through_a_pipe(
    trainer: Trainer, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run("jobs", "list")
    assert printed(capsys, "list") == []
    trainer.add(1, progress={"phase": "training", "step": 4, "steps": 4}, **succeeded())
    running = {"phase": "training", "step": 2, "steps": 10, "eval_loss": 1.5, "seconds_left": 65.0}
    trainer.add(2, "running", progress=running)
    shell.run("jobs", "list")
    shell.check("jobs-list")
    assert [one["id"] for one in printed(capsys, "list", "--limit", "1")] == [job_id(2)]


def test_show_has_the_losses_and_base_against_adapter(
    trainer: Trainer, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1, **succeeded())
    trainer.add_file("file-curve", CURVE.encode())
    progress = {"phase": "training", "step": 1, "steps": 4, "loss": 1.5}
    trainer.add(2, progress=progress, validation_file="file-2")
    shell.run("jobs", "show", ID)
    shell.run("jobs", "show", job_id(2))
    shell.run("jobs", "show", "ffff")
    shell.check("jobs-show")
    shown = printed(capsys, "show", ID)
    assert shown["report"]["loss_after"] == REPORT["loss_after"]
    assert shown["curve"][-1] == {"step": 2, "train_loss": 1.5, "valid_loss": 1.25}


def test_the_beginning_of_an_id_is_enough_if_it_says_which(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(0x3F2A << 80)
    trainer.add(0x3F2B << 80)
    wanted = job_id(0x3F2A << 80)
    assert printed(capsys, "show", "3f2a")["id"] == wanted
    assert printed(capsys, "show", "ftjob-3f2a0000")["id"] == wanted
    assert main(["jobs", "show", "3f2"]) == 2
    assert "give at least 4 digits" in capsys.readouterr().err
    trainer.add((0x3F2A << 80) + 1)
    assert main(["jobs", "show", "3f2a"]) == 2
    assert "the ids of several jobs begin like this: ftjob-3f2a" in capsys.readouterr().err


def test_events_are_printed_from_the_oldest_on(
    trainer: Trainer, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [
        {"line": 3, "field": "messages", "reason": "gone"},
        {"line": 4, "field": "", "reason": "bad"},
    ]
    sample = {"kind": "sampled", "step": 2, "prompt": "Hi", "text": "Ho\x1b[31m"}
    told = [
        event(1, "created"),
        event(2, "bad lines", level="error", data={"problems": problems}),
        event(3, "a sample", data=sample),
    ]
    trainer.add(1, "failed", *told)
    shell.run("jobs", "events", ID)
    shell.check("jobs-events")
    assert [one["message"] for one in printed(capsys, "events", ID, "--limit", "2")] == [
        "bad lines",
        "a sample",
    ]
    assert main(["jobs", "events", ID, "--follow", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [one["id"] for one in told]


def test_replies_that_could_mostly_not_be_graded_are_said_once_until_most_can_be() -> None:
    log, said = EventLines(), []
    for at, share in enumerate((0.5, 0.75, 1.0, 0.75, 0.5, 1.0), start=1):
        told = msgspec.convert(step(at, at, rewards_mean=0.1, rewards_failed=share), TrainingEvent)
        said += [text.partition(", and")[0] for text, _ in log.of(told)]
    ungraded = "of the replies could not be graded"
    assert said == [f"step 2: 75% {ungraded}", f"step 6: 100% {ungraded}"]


def test_an_evaluation_between_steps_does_not_have_their_failing_grader_said_again() -> None:
    log, said = EventLines(), []
    for at in (1, 2):
        held_out = step(at, at, train_loss=None, valid_loss=-0.1, rewards_mean=0.1)
        for one in (step(at, at, rewards_mean=0.1, rewards_failed=1.0), held_out):
            said += [text.partition(": ")[2] for text, _ in log.of(msgspec.convert(one, TrainingEvent))]
    failed = "100% of the replies could not be graded, and got the lowest reward"
    assert said == [failed, "held-out reward 0.1000", "held-out reward 0.1000"]


def test_checkpoints_are_a_table(
    trainer: Trainer, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1)
    shell.run("jobs", "checkpoints", ID)
    metrics = {"train_loss": 1.5}
    trainer.checkpoints = [
        {"id": "ftckpt-1", "created_at": NOW, "step_number": 3, "metrics": metrics,
         "fine_tuned_model_checkpoint": "acme:ftjob-1:step-3"}
    ]  # fmt: skip
    shell.run("jobs", "checkpoints", ID)
    shell.check("jobs-checkpoints")
    assert printed(capsys, "checkpoints", ID)[0]["step"] == 3


# ---- watching and changing ---------------------------------------------------------------------------


def test_watch_ends_with_the_job(
    trainer: Trainer, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1, "running", event(1), progress={"phase": "training"})
    trainer.live = [(step(2, 1), {}), (event(3, "proven"), succeeded() | {"activated": False})]
    trainer.add_file("file-curve", CURVE.encode())
    shell.run("jobs", "watch", SHORT)
    assert printed(capsys, "watch", ID)["status"] == "succeeded"
    trainer.add(2, "failed", error=FAILURE, resumable=True)
    shell.run("jobs", "watch", job_id(2))
    trainer.add(3, "paused", resumable=True)
    shell.run("jobs", "watch", job_id(3))
    message = "train.jsonl: 22 problems\n  line 3: not JSON\n  and 21 more"
    broken = {"status": "failed", "error": {"code": "invalid_file", "message": message, "param": None}}
    trainer.add(4, "validating_files")
    problems = [{"line": 3, "field": "", "reason": "not JSON"}]
    told = event(2, "training_file: problems", level="error", data={"problems": problems})
    trainer.live = [(told, {}), (event(3, message, level="error", data={"code": "invalid_file"}), broken)]
    shell.run("jobs", "watch", job_id(4))
    shell.check("jobs-watch")
    assert printed(capsys, "watch", job_id(2), status=1)["error"]["code"] == "out_of_memory"


def test_a_job_is_paused_resumed_and_cancelled(
    trainer: Trainer, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1)
    for action in ("pause", "resume", "stop", "show", "cancel", "pause"):
        shell.run("jobs", action, ID)
    shell.check("jobs-change")
    trainer.add(2)
    assert printed(capsys, "pause", job_id(2))["status"] == "paused"


DATA: Any = {
    "source": "train.jsonl", "rows": 20, "samples": 20, "tokens": 2000, "supervised_tokens": 500,
    "shortest": 80, "median": 100, "longest": 120, "named_by": "line", "histogram": [],
    "counts": {"truncated": 0, "dropped": 2, "duplicates": 1, "leakage": 0, "same_prompt": 0},
    "truncated": [], "dropped": [4, 9], "duplicates": [[7, 3]], "leakage": [], "same_prompt": [],
    "examples": [
        {"row": 1, "line": 1, "side": "", "segments": [
            {"text": "<user>Two \x1b[31mhats?\n", "supervised": False}, {"text": "Yes.", "supervised": True},
        ]},
    ],
    "evaluation": {"rows": 4},
}  # fmt: skip


def test_a_job_on_hold_shows_its_data_and_what_it_will_take_and_how_to_begin(
    trainer: Trainer, shell: Transcript, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    estimate = {"seconds": 125.0, "total": 700_000_000, "memory_limit": 2_000_000_000, "parameters": 230_400}
    held = {"status": "paused", "resumable": True, "estimate": estimate | {"adapter_bytes": 921_600}}
    checked = event(2, "The files are sound.", data={"kind": "data_checked", "report": DATA})
    told = event(3, "It waits: resume it to train.", data={"kind": "held"})
    trainer.live = [(checked, {}), (told, held)]
    shell.run("jobs", "create", str(train), "--name", "acme", "--hold")
    assert trainer.created[-1]["hold"] is True
    shell.run("jobs", "show", ID)
    shell.run("jobs", "create", str(train), "--hold", "--watch")
    shell.check("jobs-hold")
    assert printed(capsys, "show", ID)["data"]["rows"] == 20
    assert printed(capsys, "watch", ID)["data"]["rows"] == 20
    capsys.readouterr()
    assert main(["jobs", "resume", ID]) == 0
    assert "acme begins to train." in capsys.readouterr().out
    trainer.add(4, "paused", resumable=True, hold=True)  # before its files were checked
    assert main(["jobs", "resume", job_id(4)]) == 0
    assert "acme continues." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "about 10 min 00 s"),
        (
            {"seconds_from": "measured", "seconds_low": 600.0, "seconds_high": 650.0},
            "about 10 min 00 s (measured just now)",
        ),
        (
            {"seconds_from": "measured", "seconds_low": 600.0, "seconds_high": 2400.0},
            "10 min 00 s to 40 min 00 s (measured just now, machine busy)",
        ),
        (
            {
                "seconds_from": "finished_jobs",
                "seconds_low": 300.0,
                "seconds_high": 900.0,
                "finished_jobs": 3,
            },
            "5 min 00 s to 15 min 00 s (as the last 3 jobs on this base)",
        ),
    ],
)
def test_the_time_of_training_is_a_range_that_says_where_it_is_from(more: Any, said: str) -> None:
    assert time_taken({"seconds": 600.0} | more) == said
    assert time_taken({"seconds": None}) == ""


def test_a_file_whose_shape_is_wrong_fails_before_anything_is_sent(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "answer": "b"}\n{"text": "good"}\n{\n')
    assert main(["jobs", "create", str(bad), "--name", "acme"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"onebase: 2 problems in {bad}; nothing was sent and nothing is trained"
    assert said[1] == "  line 1: completion: missing; did you mean completion for answer?"
    assert said[2].startswith("  line 3: it is not JSON")
    assert (trainer.created, trainer.asked) == ([], [])
    assert main(["jobs", "create", str(bad), "--name", "acme", "--json"]) == 1
    assert [one["line"] for one in json.loads(capsys.readouterr().out)["problems"][str(bad)]] == [1, 3]
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "good"}\n')
    assert main(["jobs", "create", str(good), "--validation", str(bad), "--name", "acme"]) == 1
    assert trainer.created == []


def test_a_setting_is_an_option_too_and_held_out_data_has_its_old_names(
    trainer: Trainer, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (
        ["--set", "r=32", "--set", "use_dora=true", "--set", "metrics=json_valid", "--validation", "file-9"],
        ["--r", "32", "--use-dora", "--metric", "json_valid", "--eval-data", "file-9"],
        ["--r", "32", "--set", "use_dora=true", "--metrics", "json_valid", "--validation-file", "file-9"],
    ):
        assert main(["jobs", "create", str(train), "--name", "acme", *options]) == 0
    settings = [made["method"]["supervised"]["hyperparameters"] for made in trainer.created]
    assert settings == [{"r": 32, "use_dora": True, "metrics": ["json_valid"]}] * 3
    assert {made["validation_file"] for made in trainer.created} == {"file-9"}
    capsys.readouterr()
    for wrong, hint in (
        ("--vaildation=x", "there is no option --vaildation; did you mean --validation?"),
        ("--eval-dat", "there is no option --eval-dat; did you mean --validation?"),
        ("--metadta", "did you mean --metadata?"),
        ("--zzzzzz", "onebase: there is no option --zzzzzz\n"),
    ):
        with pytest.raises(SystemExit):
            main(["jobs", "create", str(train), "--name", "acme", wrong])
        assert hint in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["jobs", "create", "--nmae", "acme"])
    assert "there is no option --nmae; did you mean --name?" in capsys.readouterr().err


def test_a_report_begins_with_replies_and_warns_where_better_is_not(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = [
        {"line": 7, "slice": "de", "prompt": "Which  colour?", "reference": '{"c": "red"}', "base": "Red.",
         "active": '{"c": "blue"}', "adapter": '{"c": "red", "c": "red"}'},
    ]  # fmt: skip
    warning = "It is better by held-out loss, but none of its replies to held-out prompts is valid JSON."
    trainer.add(1, **succeeded() | {"report": REPORT | {"replies": replies, "warnings": [warning]}})
    trainer.add_file("file-curve", CURVE.encode())
    assert main(["jobs", "show", job_id(1)]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert "held-out line 7 (de): Which colour?" in said
    assert ["active", '{"c":', '"blue"}'] in lines
    assert ["adapter", '{"c":', '"red",', '"c":', '"red"}'] in lines
    assert f"! {warning}" in said
    assert said.index("held-out line 7") < said.index("held-out loss  2.5")
    shown = printed(capsys, "show", job_id(1))["report"]
    assert (shown["replies"][0]["parent"], shown["warnings"]) == (None, [warning])


def test_help_names_every_action_and_each_explains_itself(
    shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in command.ACTIONS:
        assert f"\n  {action} " in command.HELP
        with pytest.raises(SystemExit) as caught:
            main(["jobs", action, "--help"])
        assert caught.value.code == 0
        assert f"usage: onebase jobs {action}" in capsys.readouterr().out
    shell.run("jobs", "--help")
    shell.run("jobs", "creat")
    shell.check("jobs")
    assert main(["jobs"]) == 2
