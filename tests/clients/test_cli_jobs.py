"""`onebase jobs` in this process, against a double on a real port, and what it draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.clients.registry_double import BASE, NOW, RefusalError
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

from onebase.cli import jobs as command
from onebase.cli import main
from onebase.cli.jobs.create import parse_labels, parse_settings
from onebase.cli.ui import when

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


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    """What a command prints to stdout and stderr."""
    assert main(["jobs", *arguments]) == status
    out, err = capsys.readouterr()
    return out, err


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """The JSON that a command prints."""
    return json.loads(said(capsys, *arguments, "--json", status=status)[0])


def wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of wrong arguments."""
    with pytest.raises(SystemExit) as caught:
        main(["jobs", *arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


# ---- beginning ---------------------------------------------------------------------------------------


def test_create_sends_the_file_and_says_how_to_go_on(
    trainer: Trainer, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "r=8", "--set", "targets=q_proj,v_proj", "--set", "use-rslora=true"]
    out, err = said(capsys, "create", str(train), "--name", "acme", *settings, "--seed", "3")
    assert out == f"{ID}  acme: train.jsonl is being checked.\n"
    assert err == f"uploading {len(trainer.forms[0])} B\nWatch it: onebase jobs watch {SHORT}\n"
    body = trainer.asked[-1][2]
    assert body["seed"] == 3
    assert body["method"]["supervised"]["hyperparameters"] == {
        "r": 8,
        "targets": ["q_proj", "v_proj"],
        "use_rslora": True,
    }


def test_create_passes_on_all_that_it_is_told(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "dpo", "--activate", "never", "--metadata", "team=a=b", "--validation", "file-2"]
    assert printed(capsys, "create", "file-1", "--name", "acme", *options)["id"] == ID
    body = trainer.asked[-1][2]
    assert (body["method"], body["activate"]) == ({"type": "dpo", "dpo": {"hyperparameters": {}}}, "never")
    assert (body["metadata"], body["validation_file"]) == ({"team": "a=b"}, "file-2")


def test_create_and_watch_in_one(trainer: Trainer, train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.live = [(step(2, 1), {"status": "running"}), (event(3, "proven"), succeeded())]
    trainer.add_file("file-curve", CURVE.encode())
    out, err = said(capsys, "create", str(train), "--name", "acme", "--watch")
    assert out.startswith("acme  succeeded\n")
    assert err.endswith('proven\nAsk it: onebase generate --adapter acme "..."\n')


def test_what_cannot_be_sent_is_a_wrong_argument(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no.jsonl is not there" in said(capsys, "create", "no.jsonl", status=2)[1]
    assert "--set: write NAME=VALUE" in wrong(capsys, "create", "file-1", "--set", "r")
    assert "did you mean use_dora?" in wrong(capsys, "create", "file-1", "--set", "dora=true")
    assert "use the option --seed" in wrong(capsys, "create", "file-1", "--set", "seed=1")
    assert "--metadata: write KEY=VALUE" in wrong(capsys, "create", "file-1", "--metadata", "x")
    assert trainer.asked == []


def test_a_refused_setting_is_named(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.refusal = RefusalError(400, "invalid_value", "r is 0.", param="hyperparameters.r")
    _, err = said(capsys, "create", "file-1", "--set", "r=0", status=1)
    assert err == "onebase: r is 0. (HTTP 400, hyperparameters.r)\n"


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
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1, progress={"phase": "training", "step": 4, "steps": 4}, **succeeded())
    running = {"phase": "training", "step": 2, "steps": 10, "eval_loss": 1.5, "seconds_left": 65.0}
    trainer.add(2, "running", progress=running)
    out, _ = said(capsys, "list")
    titles, *rows = (line.split("\t") for line in out.splitlines())
    facts = [dict(zip(titles, row, strict=True)) for row in rows]
    assert facts[0] | {"created": ""} == {
        "id": job_id(2)[:14], "name": "acme", "status": "running", "step": "2/10", "left": "1 min 05 s",
        "base": "", "adapter": "1.5000", "active": "", "method": "supervised", "created": "",
    }  # fmt: skip
    assert facts[1] == facts[0] | {
        "id": SHORT, "status": "succeeded", "step": "4/4", "left": "", "base": "2.5000",
        "adapter": "1.2500", "active": "yes",
    }  # fmt: skip
    assert [one["id"] for one in printed(capsys, "list", "--limit", "1")] == [job_id(2)]


def test_a_server_without_jobs_says_how_to_begin_one(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "list") == (
        "",
        "The server has no jobs. Begin one: onebase jobs create FILE --name NAME\n",
    )
    assert printed(capsys, "list") == []


def test_show_has_the_losses_and_base_against_adapter(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1, **succeeded())
    trainer.add_file("file-curve", CURVE.encode())
    out, _ = said(capsys, "show", ID)
    assert out.splitlines()[:4] == [
        "acme  succeeded",
        f"  {ID}, created {when(NOW)}",
        f"  supervised on {BASE}, from file-1",
        "  r 16, alpha 32, targets all-linear",
    ]
    assert "training loss  █▁  2.2500 -> 1.5000" in out
    assert "held-out loss  2.5000   1.2500" in out
    assert "exact_match     25.0%    75.0%" in out
    assert "4 steps, the best one 3; 4,000 tokens in 8 s, 500 tokens/s; 230,400 parameters, 921.6 kB" in out
    assert out.endswith("acme@3f2a9c413f2a  active: requests for acme get it\n")
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
    assert "give at least 4 digits" in said(capsys, "show", "3f2", status=2)[1]
    trainer.add((0x3F2A << 80) + 1)
    assert "the ids of several jobs begin like this: ftjob-3f2a" in said(capsys, "show", "3f2a", status=2)[1]
    _, err = said(capsys, "show", "ffff", status=1)
    assert err.endswith("`onebase jobs list` lists the jobs that the server has.\n")


def test_events_are_told_from_the_oldest_on(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
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
    out, _ = said(capsys, "events", ID)
    assert [line[10:] if line[2:3] == ":" else line for line in out.splitlines()] == [
        "created",
        "bad lines",
        "  line 3, messages: gone",
        "  line 4: bad",
        "step 2: Hi -> Ho[31m",
    ]
    assert [one["message"] for one in printed(capsys, "events", ID, "--limit", "2")] == [
        "bad lines",
        "a sample",
    ]
    out, _ = said(capsys, "events", ID, "--follow", "--json")
    assert [json.loads(line)["id"] for line in out.splitlines()] == [one["id"] for one in told]


def test_checkpoints_are_a_table(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.add(1)
    assert said(capsys, "checkpoints", ID)[1] == f"Job {SHORT} has no checkpoints (it is running).\n"
    metrics = {"train_loss": 1.5}
    trainer.checkpoints = [{"id": "ftckpt-1", "created_at": NOW, "step_number": 3, "metrics": metrics}]
    out, _ = said(capsys, "checkpoints", ID)
    assert out.splitlines()[1].split("\t")[:3] == ["3", "1.5000", ""]
    assert printed(capsys, "checkpoints", ID)[0]["step"] == 3


# ---- watching and changing ---------------------------------------------------------------------------


def test_watch_ends_with_the_job(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.add(1, "running", event(1), progress={"phase": "training"})
    trainer.live = [(step(2, 1), {}), (event(3, "proven"), succeeded() | {"activated": False})]
    trainer.add_file("file-curve", CURVE.encode())
    out, err = said(capsys, "watch", SHORT)
    assert "held-out loss  2.5000   1.2500" in out
    assert err.splitlines()[:2] == ["training", "step 1/4  loss 2.0000  1,234 tokens/s"]
    assert err.endswith(
        'Try it: onebase generate --adapter acme@3f2a9c413f2a "..."\n'
        "Activate it: onebase adapters activate acme 3f2a9c413f2a\n"
    )
    assert printed(capsys, "watch", ID)["status"] == "succeeded"


def test_watch_says_why_a_job_failed_and_how_to_go_on(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1, "failed", error=FAILURE, resumable=True)
    out, err = said(capsys, "watch", ID, status=1)
    assert out == ""
    assert err.endswith(
        f"onebase: job {ID} (acme) failed (out_of_memory): The job needed more memory.\n"
        f"To continue from its last checkpoint: onebase jobs resume {SHORT}\n"
    )
    assert printed(capsys, "watch", ID, status=1)["error"]["code"] == "out_of_memory"


def test_a_job_is_paused_resumed_and_cancelled(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.add(1)
    assert said(capsys, "pause", ID) == (
        f"{SHORT}  acme pauses.\n",
        f"To continue it: onebase jobs resume {SHORT}\n",
    )
    assert said(capsys, "resume", ID)[0] == f"{SHORT}  acme continues.\n"
    assert said(capsys, "cancel", ID)[0] == f"{SHORT}  acme is cancelled.\n"
    assert "is cancelled." in said(capsys, "pause", ID, status=1)[1]
    trainer.add(2)
    assert printed(capsys, "pause", job_id(2))["status"] == "paused"


def test_help_names_every_action_and_each_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "--help"]) == 0
    out = capsys.readouterr().out
    for action in command.ACTIONS:
        assert f"\n  {action} " in out
        with pytest.raises(SystemExit) as caught:
            main(["jobs", action, "--help"])
        assert caught.value.code == 0
        assert f"usage: onebase jobs {action}" in capsys.readouterr().out
    assert main(["jobs"]) == 2
    assert main(["jobs", "creat"]) == 2
    assert "Did you mean `onebase jobs create`?" in capsys.readouterr().err
