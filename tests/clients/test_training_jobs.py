"""Jobs and their files as both clients make, find and change them, against a double on a real port."""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from msgspec import convert
from tests.clients.registry_double import BASE, NOW, RefusalError
from tests.clients.training_double import CURVE, FAILURE, REPORT, Trainer, event, job, job_id, step, succeeded

from onebase import (
    APIConnectionError,
    BadRequestError,
    ConflictError,
    CurvePoint,
    InvalidResponseError,
    NotFoundError,
    Progress,
    TrainingCheckpoint,
    TrainingEvent,
    TrainingFailure,
    TrainingFile,
    TrainingProgress,
    TrainingReport,
    TrainingSettings,
    TrainingStop,
    TrainingStoppedError,
)
from onebase._core.training import curve_of_events
from onebase.cli.command import plain
from onebase_training.recipe import recipe_fields, recipe_fields_by_name

pytestmark = pytest.mark.usefixtures("slept")
ROWS = b'{"prompt": "a", "completion": "b"}\n'
DIGEST = hashlib.sha256(ROWS).hexdigest()


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def call(sdk: Any, serve: Callable[..., Any], trainer: Trainer) -> Callable[..., Any]:
    """Runs an action with a client of the double."""
    url = serve(trainer.script).url
    return lambda action, **options: sdk.call(action, url=url, **options)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_bytes(ROWS)
    return file


async def _settled(value: Any) -> Any:
    return await value if hasattr(value, "__await__") else value


def on_job(wanted: str, then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An action on a job that is first asked for."""

    def action(client: Any) -> Any:
        found = client.training.get(wanted)
        if not hasattr(found, "__await__"):
            return then(found)

        async def go() -> Any:
            return await _settled(then(await found))

        return go()

    return action


# ---- making them -------------------------------------------------------------------------------------


def test_a_path_is_uploaded_and_trained_on(call: Any, trainer: Trainer, train: Path) -> None:
    made = call(
        lambda client: client.training.create(
            train, name="acme", r=8, targets=("q_proj", "v_proj"), rank_pattern={"o_proj": 4}, epochs="auto"
        )
    )
    assert (made.id, made.name, made.status) == (job_id(1), "acme", "validating_files")
    assert trainer.files["file-1"] == (trainer.files["file-1"][0], ROWS)
    assert trainer.files["file-1"][0]["filename"] == "train.jsonl"
    *_, body = [body for method, target, body in trainer.asked if target == "/v1/fine_tuning/jobs"]
    settings = {"r": 8, "targets": ["q_proj", "v_proj"], "rank_pattern": {"o_proj": 4}, "epochs": "auto"}
    assert body == {
        "model": BASE,
        "training_file": "file-1",
        "name": "acme",
        "activate": "if_better",
        "method": {"type": "supervised", "supervised": {"hyperparameters": settings}},
    }


def test_ids_are_used_as_they_are_and_all_else_is_said(call: Any, trainer: Trainer, train: Path) -> None:
    told: list[Progress] = []
    call(
        lambda client: client.training.create(
            "file-abc",
            validation_file=str(train),
            method="dpo",
            beta=0.2,
            seed=7,
            metadata={"team": "support"},
            activate="never",
            model="another",
            hold=True,
            progress=told.append,
        )
    )
    jobs = "/v1/fine_tuning/jobs"
    looked = f"/v1/files?purpose=fine-tune&sha256={DIGEST}&order=asc&limit=100"
    assert [target for _, target, _ in trainer.asked] == [jobs, looked, "/v1/files", jobs]
    assert trainer.asked[-1][2] == {
        "model": "another",
        "training_file": "file-abc",
        "validation_file": "file-1",
        "activate": "never",
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
        "seed": 7,
        "metadata": {"team": "support"},
        "hold": True,
    }
    assert told[-1].bytes_done == told[-1].bytes_total == train.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"rank": 8}, TypeError, "unknown setting 'rank'; there are: beta, r,"),
        ({"alpha": float("nan")}, ValueError, "alpha cannot be sent"),
        ({"dropout": object()}, TypeError, "dropout cannot be sent"),
        (
            {"validation_file": "no.jsonl"},
            ValueError,
            r"validation_file: no\.jsonl is not there: give the path",
        ),
        ({"validation_file": "/"}, ValueError, "validation_file: / is a folder"),
        ({"validation_file": Path("file-abc")}, ValueError, "file-abc is not there"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_sent(
    call: Any, trainer: Trainer, train: Path, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call(lambda client: client.training.create(train, **arguments))
    assert trainer.asked == []


REFUSAL = RefusalError(400, "invalid_value", "r is 0", param="method.supervised.hyperparameters.r")


def test_a_job_is_refused_before_its_file_is_sent(call: Any, trainer: Trainer, train: Path) -> None:
    trainer.refusal = REFUSAL
    with pytest.raises(BadRequestError, match="r is 0") as caught:
        call(lambda client: client.training.create("file-mine", validation_file=str(train), r=0))
    assert caught.value.param == "method.supervised.hyperparameters.r"
    assert trainer.forms == []


def test_what_was_uploaded_for_a_refused_job_is_deleted(call: Any, trainer: Trainer, train: Path) -> None:
    def upload_and_refuse(request: Any) -> None:
        request.reply(200, trainer._upload(request))
        trainer.refusal = REFUSAL

    trainer.add_file("file-mine", ROWS)
    trainer.first = [models, no_file, none_like_it, upload_and_refuse]
    with pytest.raises(BadRequestError, match="r is 0"):
        call(lambda client: client.training.create(train, r=0))
    assert [method for method, _, _ in trainer.asked] == ["GET", "POST", "GET", "POST", "POST", "DELETE"]
    with pytest.raises(BadRequestError):
        call(lambda client: client.training.create("file-mine", r=0))
    assert list(trainer.files) == ["file-mine"]


def models(request: Any) -> None:
    request.reply(200, {"data": [{"id": BASE}]})


def no_file(request: Any) -> None:
    error = {"message": "There is no file.", "code": "file_not_found", "param": "training_file"}
    request.reply(400, {"error": error | {"type": "invalid_request_error"}})


def test_a_job_that_may_have_begun_is_not_begun_again(call: Any, trainer: Trainer, train: Path) -> None:
    trainer.first = [models, no_file, none_like_it, lambda request: request.reply(
        200, trainer._upload(request)), lambda request: request.hang_up()]  # fmt: skip
    with pytest.raises(APIConnectionError):
        call(lambda client: client.training.create(train))
    assert [method for method, _, _ in trainer.asked] == ["GET", "POST", "GET", "POST", "POST"]
    assert list(trainer.files) == ["file-1"]


def test_the_same_content_is_sent_once_and_a_refused_job_deletes_no_file_that_was_there(
    call: Any, trainer: Trainer, train: Path, tmp_path: Path
) -> None:
    first = call(lambda client: client.files.upload(train))
    assert call(lambda client: client.files.upload(train)) == first
    job = call(lambda client: client.training.create(train))
    assert job.info.training_file == first.id
    assert len(trainer.forms) == 1

    def found_and_refused(request: Any) -> None:
        trainer.refusal = REFUSAL
        request.reply(200, {"object": "list", "data": [trainer.files[first.id][0]], "has_more": False})

    trainer.first = [models, no_file, found_and_refused]
    with pytest.raises(BadRequestError, match="r is 0"):
        call(lambda client: client.training.create(train))
    other = tmp_path / "other.jsonl"
    other.write_bytes(train.read_bytes())
    assert call(lambda client: client.files.upload(other)).filename == "other.jsonl"
    assert list(trainer.files) == [first.id, "file-2"]


def none_like_it(request: Any) -> None:
    request.reply(200, {"object": "list", "data": [], "has_more": False})


def test_every_setting_of_a_recipe_has_its_keyword() -> None:
    others = {"method", "seed", "grader"}  # given next to the settings
    assert set(TrainingSettings.__annotations__) == dict(recipe_fields_by_name()).keys() - others


def test_a_setting_is_described_as_its_option_of_the_command_line_is() -> None:
    settings = ast.parse(textwrap.dedent(inspect.getsource(TrainingSettings))).body[0]
    assert isinstance(settings, ast.ClassDef)
    said = {}
    for field, text in itertools.pairwise(settings.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr), field.target.id
            said[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    assert said == {item.name: _described(item, kind) for item, kind in recipe_fields() if item.name in said}
    assert said.keys() == TrainingSettings.__annotations__.keys()


def _described(item: Field[Any], kind: Any) -> str:
    """A setting's help text, and what the command line shows as choices and default."""
    notes = []
    if get_origin(kind) is Literal:
        *first, last = [f"`{choice}`" for choice in get_args(kind)]
        notes.append(f"{', '.join(first)} or {last}")
    default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
    if default is not MISSING and default not in ("auto", ""):
        shown = default if isinstance(default, str) else json.dumps(default).removesuffix(".0")
        notes.append(f"default: {shown}")
    text: str = item.metadata["help"]
    more = f" ({'; '.join(notes)})" if notes else ""
    return f"{text[0].upper()}{text[1:]}{more}."


# ---- finding them ------------------------------------------------------------------------------------


def test_a_job_is_typed_to_its_last_figure(call: Any, trainer: Trainer) -> None:
    progress = {"phase": "training", "step": 3, "steps": 4, "loss": 1.5, "new_figure": 1}
    trainer.add(1, progress=progress, metadata={"team": "a"}, **succeeded())
    info = call(lambda client: client.training.get(job_id(1))).info
    assert (info.method, info.settings["r"], info.metadata) == ("supervised", 16, {"team": "a"})
    assert info.progress == TrainingProgress("training", 3, 4, 1.5)
    assert info.progress.fraction == 0.75
    assert info.report == TrainingReport(**REPORT)
    assert (info.ended, info.activated, info.created_at) == (True, True, NOW)
    assert info.fine_tuned_model == "acme@3f2a9c413f2a"


def test_why_a_job_failed_is_part_of_it(call: Any, trainer: Trainer) -> None:
    failure = {"code": "invalid_file", "message": "line 3: not JSON", "param": "training_file"}
    trainer.add(1, "failed", error=failure, resumable=False)
    found = call(lambda client: client.training.get(job_id(1)))
    assert found.error == TrainingFailure("invalid_file", "line 3: not JSON", "training_file")
    assert not found.resumable
    assert "failed" in repr(found)


def test_lists_are_put_together_from_their_pages(call: Any, trainer: Trainer) -> None:
    for number in range(1, 251):
        trainer.add(number, metadata={"half": str(number % 2)})
    newest_first = [job_id(number) for number in range(250, 0, -1)]
    assert [one.id for one in call(lambda client: client.training.list())] == newest_first
    assert len(trainer.asked) == 3
    assert [one.id for one in call(lambda client: client.training.list(limit=101))] == newest_first[:101]
    odd = call(lambda client: client.training.list(metadata={"half": "1"}))
    assert [one.id for one in odd] == newest_first[1::2]
    with pytest.raises(ValueError, match="limit is 0"):
        call(lambda client: client.training.list(limit=0))


def test_a_job_on_hold_is_waited_for_until_it_is_checked_and_tells_what_is_in_its_files(
    call: Any, trainer: Trainer
) -> None:
    trainer.add(1, "validating_files", event(1), hold=True)
    checked = event(2, data={"kind": "data_checked", "report": {"rows": 3}})
    trainer.live = [(checked, {}), (event(3), {"status": "paused", "estimate": {"seconds": 2.0}})]
    job = call(on_job(job_id(1), lambda one: one.wait(progress=False)))
    assert (job.status, job.info.held, job.estimate, job.report) == ("paused", True, {"seconds": 2.0}, None)
    assert call(on_job(job_id(1), lambda one: one.data_report())) == {"rows": 3}
    trainer.add(2, "paused", event(1), resumable=True)
    with pytest.raises(TrainingStoppedError, match="resume it to continue"):
        call(on_job(job_id(2), lambda one: one.wait(progress=False)))
    trainer.add(3, "failed", event(1), error=FAILURE)
    assert call(on_job(job_id(3), lambda one: one.data_report())) is None
    trainer.add(4, "running", event(1), step(2, 1))
    assert call(on_job(job_id(4), lambda one: one.data_report())) is None


def test_a_job_that_is_stopped_says_by_whom_and_where(call: Any, trainer: Trainer) -> None:
    trainer.add(1)
    assert call(on_job(job_id(1), lambda one: one.stop())).stopped == TrainingStop(None, 4, "key-1", NOW)
    stopped = {"step": 3, "steps": 4, "by": "", "at": NOW}
    trainer.add(2, **succeeded(), stopped=stopped)
    assert call(on_job(job_id(2), lambda one: one.refresh())).stopped == TrainingStop(3, 4, "", NOW)


def test_events_are_paged_from_the_newest_to_the_oldest(call: Any, trainer: Trainer) -> None:
    told = [event(number, f"message {number}") for number in range(1, 131)]
    trainer.add(1, "running", *told)
    newest = call(on_job(job_id(1), lambda one: one.events()))
    assert [one.message for one in newest] == [f"message {number}" for number in range(130, 30, -1)]
    assert newest[0] == convert(told[-1], TrainingEvent)
    assert (newest[0].level, newest[0].type, newest[0].data) == ("info", "message", {})
    older = call(on_job(job_id(1), lambda one: one.events(limit=None, after=newest[-1].id)))
    assert [one.message for one in older] == [f"message {number}" for number in range(30, 0, -1)]
    assert [one.message for one in call(on_job(job_id(1), lambda one: one.events(limit=2)))] == [
        "message 130",
        "message 129",
    ]


def test_checkpoints_are_typed(call: Any, trainer: Trainer) -> None:
    trainer.add(1)
    metrics = {"step": 3.0, "train_loss": 1.5}
    trainer.checkpoints = [
        {"id": "ftckpt-1", "created_at": NOW, "step_number": 3, "metrics": metrics,
         "fine_tuned_model_checkpoint": "acme:ftjob-1:step-3"}
    ]  # fmt: skip
    assert call(on_job(job_id(1), lambda one: one.checkpoints())) == (
        TrainingCheckpoint(
            id="ftckpt-1", created_at=NOW, step=3, model="acme:ftjob-1:step-3", metrics=metrics
        ),
    )


def test_the_curve_of_a_job_that_has_succeeded_is_its_result_file(call: Any, trainer: Trainer) -> None:
    trainer.add(1, **succeeded())
    trainer.add_file("file-curve", CURVE.encode(), "fine-tune-results")
    points = (CurvePoint(0, None, 2.5), CurvePoint(1, 2.25, None), CurvePoint(2, 1.5, 1.25))
    assert call(on_job(job_id(1), lambda one: one.curve())) == points
    trainer.add_file("file-curve", b"<html>", "fine-tune-results")
    trainer.add_file("file-curve", b"step,train_loss\nx,1\n", "fine-tune-results")
    with pytest.raises(InvalidResponseError, match="no curve"):
        call(on_job(job_id(1), lambda one: one.curve()))


def test_the_curve_of_a_job_that_runs_is_in_its_events(call: Any, trainer: Trainer) -> None:
    held_out = {"step": 2, "valid_loss": 1.75}
    told = [event(1), step(2, 1), step(3, 2), event(4, type="metrics", data=held_out)]
    trainer.add(1, "running", *told)
    points = (CurvePoint(1, 2.0, None), CurvePoint(2, 1.0, 1.75))
    assert call(on_job(job_id(1), lambda one: one.curve())) == points


def test_a_step_that_was_done_again_counts_as_it_was_the_last_time() -> None:
    told = [convert(one, TrainingEvent) for one in (step(1, 1), step(2, 2), step(3, 2, train_loss=0.5))]
    assert curve_of_events(told[::-1]) == (CurvePoint(1, 2.0, None), CurvePoint(2, 0.5, None))


# ---- changing them -----------------------------------------------------------------------------------


def test_a_job_is_paused_resumed_and_cancelled(call: Any, trainer: Trainer) -> None:
    trainer.add(1)
    paused = call(on_job(job_id(1), lambda one: one.pause()))
    assert (paused.id, paused.status) == (job_id(1), "paused")
    assert call(on_job(job_id(1), lambda one: one.resume())).status == "queued"
    assert call(on_job(job_id(1), lambda one: one.cancel())).status == "cancelled"
    with pytest.raises(ConflictError, match="is cancelled") as caught:
        call(on_job(job_id(1), lambda one: one.pause()))
    assert caught.value.code == "job_state"


def test_a_change_is_asked_for_again_after_a_lost_connection(call: Any, trainer: Trainer) -> None:
    trainer.add(1)
    trainer.first = [
        lambda request: request.reply(200, trainer.jobs[job_id(1)]),
        lambda request: request.hang_up(),
    ]
    assert call(on_job(job_id(1), lambda one: one.cancel())).status == "cancelled"
    assert [method for method, _, _ in trainer.asked] == ["GET", "POST", "POST"]


def test_refresh_asks_again(call: Any, trainer: Trainer) -> None:
    trainer.add(1)

    def look(one: Any) -> Any:
        trainer.jobs[job_id(1)] |= succeeded()
        return one.refresh()

    assert call(on_job(job_id(1), look)).report.loss_after == 1.25


def test_what_is_not_there_is_an_error_of_its_own(call: Any) -> None:
    with pytest.raises(NotFoundError) as caught:
        call(lambda client: client.training.get("ftjob-none"))
    assert caught.value.code == "job_not_found"
    with pytest.raises(ValueError, match="empty"):
        call(lambda client: client.training.get(""))


@pytest.mark.parametrize("gone", ["id", "status", "method", "report", "progress", "result_files", "metadata"])
def test_a_job_without_one_of_its_fields_is_no_answer(call: Any, trainer: Trainer, gone: str) -> None:
    body = job()
    del body[gone]
    trainer.first = [lambda request: request.reply(200, body)]
    with pytest.raises(InvalidResponseError, match=gone):
        call(lambda client: client.training.get(job_id(1)))


@pytest.mark.parametrize("wrong", [{"method": None}, {"metadata": 3}, {"report": []}, {"result_files": None}])
def test_a_field_of_the_wrong_type_is_no_answer(call: Any, trainer: Trainer, wrong: dict[str, Any]) -> None:
    trainer.first = [lambda request: request.reply(200, job(**wrong))]
    with pytest.raises(InvalidResponseError):
        call(lambda client: client.training.get(job_id(1)))


# ---- files -------------------------------------------------------------------------------------------


def test_files_are_sent_listed_read_and_deleted(call: Any, trainer: Trainer, train: Path) -> None:
    made = call(lambda client: client.files.upload(train))
    assert made == TrainingFile(
        id="file-1",
        filename="train.jsonl",
        bytes=len(ROWS),
        purpose="fine-tune",
        created_at=NOW,
        sha256=DIGEST,
    )
    assert call(lambda client: client.files.get("file-1")) == made
    assert call(lambda client: client.files.content("file-1")) == ROWS
    for number in range(150):
        trainer.add_file(f"file-more{number}", b"x")
    assert len(call(lambda client: client.files.list())) == 151
    call(lambda client: client.files.list(purpose="fine-tune"))
    assert trainer.asked[-1][1] == "/v1/files?purpose=fine-tune&after=file-more98&limit=100"
    call(lambda client: client.files.delete("file-1"))
    with pytest.raises(NotFoundError):
        call(lambda client: client.files.get("file-1"))


def test_a_file_that_is_not_there_is_told_before_anything_is_sent(call: Any, trainer: Trainer) -> None:
    with pytest.raises(ValueError, match=r"path: no\.jsonl is not there"):
        call(lambda client: client.files.upload("no.jsonl"))
    assert trainer.asked == []


def test_a_files_name_cannot_end_its_header(call: Any, trainer: Trainer, tmp_path: Path) -> None:
    odd = tmp_path / 'a"; x="\r\n\r\né.jsonl'
    odd.write_bytes(ROWS)
    made = call(lambda client: client.files.upload(odd))
    assert made.filename == "a%22; x=%22%0D%0A%0D%0Aé.jsonl"
    assert trainer.files[made.id][1] == ROWS


def test_all_that_is_printed_of_a_job_is_json(call: Any, trainer: Trainer) -> None:
    trainer.add(1, **succeeded())
    info = call(lambda client: client.training.get(job_id(1))).info
    assert json.loads(json.dumps(plain(info)))["report"]["metrics_after"] == {"exact_match": 0.75}
