"""Jobs by OpenAI's own client: their way from a file to an adapter that is served, and what may be asked."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from onebase_server.http.metrics import MetricsCollector, render

from .support import Server, Starter
from .training_support import (
    BASE,
    add_file,
    blobs,
    ended,
    job_folder,
    make_job,
    openai_client,
    run_job,
    sha256,
    step_of,
    wait_job,
)


@pytest.fixture(scope="module")
def server(serve_scripted: Starter) -> Iterator[Server]:
    with serve_scripted("words", "--max-train-file", "2MB", "--max-body", "100kB") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return openai_client(server)


def test_a_job_ends_as_an_active_adapter_that_answers(server: Server, client: OpenAI) -> None:
    job = run_job(server, client, "rows", suffix="orders", seed=7, metadata={"team": "a"})
    assert (job.status, job.error, job.seed, job.metadata) == ("succeeded", None, 7, {"team": "a"})
    assert job.model == BASE
    assert job.trained_tokens == 640
    assert job.finished_at >= job.created_at
    assert job.fine_tuned_model == f"ft-orders@{job.version[:12]}"
    assert job.activated is True
    assert (job.progress["step"], job.progress["steps"]) == (10, 10)
    for model in (job.fine_tuned_model, "ft-orders"):
        answer = client.completions.create(model=model, prompt="one two", max_tokens=2)
        assert answer.choices[0].text
        assert client.models.retrieve(model).id == model
    version = server.client().get(f"/v1/adapters/ft-orders/versions/{job.version}").json()
    assert version["source"] == {"kind": "training", "job": job.id}


def test_a_job_tells_its_steps_and_ends_with_a_curve(server: Server, client: OpenAI) -> None:
    job = run_job(server, client, "rows")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))[::-1]
    steps = [event.data for event in events if event.type == "metrics"]
    assert [data["step"] for data in steps] == list(range(1, 11))
    assert steps[1]["train_loss"] == 0.5
    assert events[0].message.startswith("The job is created")
    assert [event.id for event in events] == sorted({event.id for event in events})
    curve = client.files.content(job.result_files[0]).text
    assert curve == "step,train_loss,valid_loss\n0,,2.0\n1,1.0,\n2,0.5,1.0\n"
    assert client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    folder = job_folder(server.data_dir, job.id)
    server.wait_for(lambda: not folder.exists())  # the version is in the store


def test_a_job_goes_on_from_a_version_by_each_of_its_names(server: Server, client: OpenAI) -> None:
    first = run_job(server, client, "rows", suffix="chain")
    digest = first.version[:12]
    spelled = f"ft:{BASE}:default:chain:{digest}"
    for model in (first.fine_tuned_model, "ft-chain", spelled):
        file = add_file(client, "rows")
        job = client.fine_tuning.jobs.create(
            model=model, training_file=file, extra_body={"name": f"next-{len(model)}"}
        )
        done = wait_job(server, client, job.id, ended)
        assert (done.status, done.model) == ("succeeded", first.fine_tuned_model)
        assert done.parent == {"name": "ft-chain", "version": first.version}
        assert (done.method.supervised.hyperparameters.r, done.method.supervised.hyperparameters.alpha) == (
            8,
            16,
        )
        version = server.client().get(f"/v1/adapters/{done.name}/versions/{done.version}").json()
        assert version["source"]["parent"] == {"name": "ft-chain", "version": first.version}
    answer = client.completions.create(model=spelled, prompt="one", max_tokens=1)
    assert answer.choices[0].text
    assert client.models.retrieve(spelled).id == spelled


def test_what_goes_on_from_an_own_adapter_is_by_default_one_more_version_of_it(
    server: Server, client: OpenAI
) -> None:
    first = run_job(server, client, "rows", suffix="more")
    second = run_job(server, client, "rows", model="ft-more")
    assert second.name == "ft-more"
    adapter = server.client().get("/v1/adapters/ft-more").json()
    assert adapter["version"] == second.version
    assert first.version != second.version
    worse = run_job(server, client, "worse", model=second.fine_tuned_model)
    assert worse.activated is False
    said = [event.message for event in client.fine_tuning.jobs.list_events(worse.id)]
    assert f"no better than the base and {second.fine_tuned_model}, which is active" in said[0]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"model": "nobody"}, "model", "There is no adapter 'nobody'"),
        ({"model": "ft-fixed@00000000"}, "model", "no version"),
        ({"model": "ft:gpt-4o-mini-2024-07-18:org:fixed:7p4lURel"}, "model", "no version '7p4lURel'"),
        ({"hyperparameters": {"r": 16}}, "hyperparameters.r", "Leave r out"),
        ({"hyperparameters": {"targets": "attention"}}, "hyperparameters.targets", "Leave targets out"),
        ({"hyperparameters": {"use_dora": True}}, "hyperparameters.use_dora", "ft-fixed@"),
    ],
)
def test_what_does_not_go_with_the_version_that_it_goes_on_from_is_refused(
    server: Server, client: OpenAI, body: dict[str, Any], param: str, says: str
) -> None:
    if server.client().get("/v1/adapters/ft-fixed").status_code == 404:
        run_job(server, client, "rows", suffix="fixed")
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        make_job(client, "rows", **{"model": "ft-fixed", **body})
    assert refused.value.param == param


@pytest.mark.parametrize("own", [True, False])
def test_a_job_goes_on_though_its_parent_is_deleted_and_says_so_if_its_own_copy_is_gone_too(
    server: Server, client: OpenAI, own: bool
) -> None:
    first = run_job(server, client, "rows", suffix="gone")
    job = make_job(client, "until-paused", model="ft-gone", extra={"name": f"after-gone-{own}"})
    wait_job(server, client, job.id, lambda job: (job.progress or {}).get("step") == 5)
    client.fine_tuning.jobs.pause(job.id)
    assert server.client().delete("/v1/adapters/ft-gone?force=true").status_code == 200
    blobs(server.data_dir)[sha256(first.id)].unlink()  # as the store's next sweep would
    if not own:
        (job_folder(server.data_dir, job.id) / "parent_weights").unlink()
    client.fine_tuning.jobs.resume(job.id)
    done = wait_job(server, client, job.id, ended)
    if own:
        assert done.status == "succeeded"
    else:
        assert (done.status, done.error.code, done.error.param) == ("failed", "file_not_found", "model")


@pytest.mark.parametrize(
    ("content", "wish", "activated"),
    [
        ("rows", "if_better", True),
        ("worse", "if_better", False),
        ("rows", "if_better_than_base", True),
        ("worse", "if_better_than_base", False),
        ("worse", "always", True),
        ("x", "never", False),
    ],
)
def test_what_comes_out_is_activated_as_wished(
    server: Server, client: OpenAI, content: str, wish: str, activated: bool
) -> None:
    name = f"wish-{wish}-{content}"
    job = run_job(server, client, content, extra={"name": name, "activate": wish})
    assert (job.status, job.activated) == ("succeeded", activated)
    adapter = server.client().get(f"/v1/adapters/{name}").json()
    assert adapter["active"] is activated
    assert client.completions.create(model=job.fine_tuned_model, prompt="one", max_tokens=1).choices[0].text


@pytest.mark.parametrize(
    ("content", "wish", "activated", "says"),
    [
        (
            "rows",
            "if_better",
            True,
            "On held-out rows it is better than the base and {old}. It replaced {old}.",
        ),
        ("worse-than-active", "if_better", False, "rows it is no better than {old}, which is active."),
        (
            "not-comparable",
            "if_better",
            False,
            "not be compared with {old}, which is active: its labels are oth",
        ),
        ("worse-than-active", "if_better_than_base", True, "it is better than the base. It replaced {old}."),
        ("not-comparable", "if_better_than_base", True, "it is better than the base. It replaced {old}."),
        ("worse-than-active", "always", True, "get it. It replaced {old}."),
    ],
)
def test_a_version_takes_the_place_of_the_active_one_if_its_jobs_rule_says_so(
    server: Server, client: OpenAI, content: str, wish: str, activated: bool, says: str
) -> None:
    name = f"again-{wish}-{content}"
    old = run_job(server, client, "rows", extra={"name": name})
    assert (old.activated, old.replaced) == (True, None)
    first = next(iter(client.fine_tuning.jobs.list_events(old.id)))
    assert first.message.endswith("it is better than the base; no version was active to compare it with.")
    job = run_job(server, client, content, extra={"name": name, "activate": wish})
    assert (job.status, job.activated) == ("succeeded", activated)
    assert job.replaced == (old.version if activated else None)
    assert job.report["active"] == old.version
    assert (
        server.client().get(f"/v1/adapters/{name}").json()["version"] == (job if activated else old).version
    )
    said = next(iter(client.fine_tuning.jobs.list_events(job.id)))
    assert says.format(name=name, old=old.fine_tuned_model) in said.message
    assert said.level == ("warn" if content == "not-comparable" and not activated else "info")


def test_a_job_tells_whether_its_version_is_active_now(server: Server, client: OpenAI) -> None:
    job = run_job(server, client, "rows", extra={"name": "for-a-while", "activate": "always"})

    def active() -> bool:
        (listed,) = [one for one in client.fine_tuning.jobs.list() if one.id == job.id]
        assert listed.activated == client.fine_tuning.jobs.retrieve(job.id).activated
        return bool(listed.activated)

    assert active()
    with server.client() as http:
        assert http.post("/v1/adapters/for-a-while/deactivate").is_success
        assert not active()
        assert http.post("/v1/adapters/for-a-while/activate", json={"version": job.version}).is_success
        assert active()
        assert http.delete("/v1/adapters/for-a-while").is_success
    assert not active()


@pytest.mark.parametrize("wish", ["if_better", "always"])
def test_an_adapter_that_is_worse_on_a_slice_than_allowed_is_not_activated(
    server: Server, client: OpenAI, wish: str
) -> None:
    settings: Any = {"max_regression": 0.02, "slice_by": "lang"}
    job = run_job(
        server,
        client,
        "regresses",
        hyperparameters=settings,
        extra={"name": f"slices-{wish}", "activate": wish},
    )
    assert (job.status, job.activated, job.report["better"]) == ("succeeded", False, True)
    assert job.report["slices"]["regressed"] == ["de"]
    said = next(iter(client.fine_tuning.jobs.list_events(job.id)))
    assert "on de it is worse by more than 0.02" in said.message
    (listed,) = [one for one in client.fine_tuning.jobs.list() if one.id == job.id]
    assert listed.report["slices"] is None  # type: ignore[attr-defined]
    assert server.client().get(f"/v1/adapters/slices-{wish}").json()["active"] is False
    assert client.completions.create(model=job.fine_tuned_model, prompt="one", max_tokens=1).choices[0].text


def test_every_bad_line_is_told_and_named_with_its_file(server: Server, client: OpenAI) -> None:
    job = run_job(server, client, "broken")
    assert (job.status, job.error.code, job.error.param) == ("failed", "invalid_file", "training_file")
    assert job.resumable is False
    told = [event for event in client.fine_tuning.jobs.list_events(job.id) if event.level == "error"]
    problems: Any = [problem for event in told for problem in (event.data or {}).get("problems", [])]
    assert [problem["line"] for problem in problems] == [1, 3]
    assert job.fine_tuned_model is None


def test_an_adapter_that_is_not_proved_fails_its_job(server: Server, client: OpenAI) -> None:
    job = run_job(server, client, "broken-adapter")
    assert (job.status, job.error.code) == ("failed", "broken_weights")
    assert "these weights are broken" in job.error.message
    server.wait_for(lambda: not job_folder(server.data_dir, job.id).exists())


def test_jobs_run_one_at_a_time_in_their_order(server: Server, client: OpenAI) -> None:
    first = make_job(client, "slow")
    second = make_job(client, "rows")
    wait_job(server, client, second.id, lambda job: job.status == "queued")
    wait_job(server, client, first.id, lambda job: job.status == "running")
    assert client.fine_tuning.jobs.retrieve(second.id).status == "queued"
    client.fine_tuning.jobs.cancel(first.id)
    assert wait_job(server, client, second.id, ended).status == "succeeded"
    assert client.fine_tuning.jobs.retrieve(first.id).status == "cancelled"


def test_a_paused_job_lets_its_process_go_and_goes_on_from_there(server: Server, client: OpenAI) -> None:
    job = make_job(client, "slow")
    wait_job(server, client, job.id, lambda job: (job.progress or {}).get("step", 0) > 2)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    server.wait_for(lambda: not server.trainer_pids())
    paused = client.fine_tuning.jobs.retrieve(job.id)
    assert (paused.status, paused.resumable) == ("paused", True)
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    newest = checkpoints[0]
    steps = [one.step_number for one in checkpoints]
    assert steps == sorted({*range(5, steps[0], 5), steps[0]}, reverse=True)
    assert newest.step_number == paused.progress["step"]
    assert newest.fine_tuning_job_id == job.id
    assert newest.metrics.train_loss == paused.progress["loss"]
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    wait_job(server, client, job.id, lambda job: job.progress["step"] > newest.step_number)
    events = [
        event.data["step"] for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"
    ]
    assert len(events) == len(set(events))
    client.fine_tuning.jobs.cancel(job.id)


def test_a_pause_is_answered_when_the_process_is_gone_and_what_it_said_is_written(
    server: Server, client: OpenAI
) -> None:
    job = make_job(client, "slow")
    wait_job(server, client, job.id, lambda job: (job.progress or {}).get("step", 0) > 2)
    paused: Any = client.fine_tuning.jobs.pause(job.id)
    assert not server.trainer_pids()
    newest = client.fine_tuning.jobs.checkpoints.list(job.id, limit=1).data[0]
    told = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
    assert paused.progress["step"] == newest.step_number
    assert told.message == f"Paused. A resumed job continues after step {newest.step_number}."
    assert client.fine_tuning.jobs.retrieve(job.id) == paused
    client.fine_tuning.jobs.cancel(job.id)


def test_a_job_on_hold_waits_with_its_estimate_and_blocks_no_other(server: Server, client: OpenAI) -> None:
    job = make_job(client, "rows", extra={"hold": True, "name": "held"})
    assert job.hold is True
    held = wait_job(server, client, job.id, lambda job: job.status != "validating_files")
    assert (held.status, held.resumable, held.hold, held.estimate) == ("paused", True, True, {"total": 1})
    server.wait_for(lambda: not server.trainer_pids())
    newest = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
    assert newest.message == "The job is checked, and 10 steps are planned. It waits: resume it to train."
    assert newest.data == {"kind": "held", "steps": 10, "estimate": {"total": 1}}
    assert run_job(server, client, "rows").status == "succeeded"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    with pytest.raises(openai.ConflictError, match="no step done"):
        stop(server, job.id)
    resumed: Any = client.fine_tuning.jobs.resume(job.id)
    assert (resumed.status, resumed.hold) == ("queued", False)
    done = wait_job(server, client, job.id, ended)
    assert (done.status, done.activated, done.hold) == ("succeeded", True, False)


def test_a_job_on_hold_fails_by_its_file_and_leaves_nothing_if_it_is_cancelled(
    server: Server, client: OpenAI
) -> None:
    failed = run_job(server, client, "broken", extra={"hold": True})
    assert (failed.status, failed.error.code, failed.resumable) == ("failed", "invalid_file", False)
    job = make_job(client, "rows", extra={"hold": True})
    wait_job(server, client, job.id, lambda job: job.status == "paused")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    server.wait_for(lambda: not job_folder(server.data_dir, job.id).exists())


def test_a_word_that_comes_before_the_check_is_done_is_refused_and_told_when_to_come(
    server: Server, client: OpenAI, tmp_path: Path
) -> None:
    may_check = tmp_path / "may-check"
    job = make_job(client, f"checked-after={may_check}", extra={"hold": True})
    try:
        with pytest.raises(openai.ConflictError, match="once its files are checked; send this again then"):
            client.fine_tuning.jobs.resume(job.id)
    finally:
        may_check.touch()  # else a checker waits for as long as the server lives
    assert wait_job(server, client, job.id, lambda job: job.status == "paused").hold is True
    client.fine_tuning.jobs.resume(job.id)
    assert wait_job(server, client, job.id, ended).status == "succeeded"


def test_a_job_on_hold_is_there_after_a_restart(serve_scripted: Starter) -> None:
    with serve_scripted("words") as server:
        client = openai_client(server)
        job = make_job(client, "rows", extra={"hold": True})
        wait_job(server, client, job.id, lambda job: job.status == "paused")
        server.process.kill()
        server.exit_status()
        with serve_scripted("words", data_dir=server.data_dir) as again:
            client = openai_client(again)
            held: Any = client.fine_tuning.jobs.retrieve(job.id)
            assert (held.status, held.hold, held.estimate) == ("paused", True, {"total": 1})
            client.fine_tuning.jobs.resume(job.id)
            assert wait_job(again, client, job.id, ended).status == "succeeded"


def stop(server: Server, job_id: str) -> Any:
    """OpenAI's client has no such method."""
    return openai_client(server).post(f"/fine_tuning/jobs/{job_id}/stop", cast_to=FineTuningJob)


def test_a_job_that_is_stopped_ends_at_its_next_step_as_it_would_at_its_last(
    server: Server, client: OpenAI
) -> None:
    job = make_job(client, "slow", extra={"name": "enough"})
    running = wait_job(server, client, job.id, lambda job: step_of(job) > 6)
    assert running.stopped is None
    stopping = stop(server, job.id)
    assert (stopping.stopped["step"], stopping.stopped["steps"], stopping.stopped["by"]) == (None, 3000, "")
    assert stopping.estimated_finish is None
    again = stop(server, job.id).stopped  # it may have ended meanwhile
    assert {**again, "step": None} == stopping.stopped
    done = wait_job(server, client, job.id, ended)
    assert (done.status, done.activated, done.error) == ("succeeded", True, None)
    last = done.report["steps"]
    assert step_of(running) <= last < 3000
    assert done.stopped == {**stopping.stopped, "step": last}
    told = {
        (event.data or {}).get("kind"): event
        for event in client.fine_tuning.jobs.list_events(job.id, limit=8)
    }
    assert told["stopped"].message == f"It stopped at step {last} of 3000, as it was asked to."
    assert told["stopped"].data["best_step"] == last
    assert client.completions.create(model="enough", prompt="one", max_tokens=1).choices[0].text
    assert stop(server, job.id).stopped == done.stopped


def test_a_paused_job_that_is_stopped_goes_on_for_that_alone(server: Server, client: OpenAI) -> None:
    job = make_job(client, "slow")
    wait_job(server, client, job.id, lambda job: step_of(job) > 2)
    paused = client.fine_tuning.jobs.pause(job.id)
    assert stop(server, job.id).status == "queued"
    done = wait_job(server, client, job.id, ended)
    assert (done.status, done.report["steps"], done.stopped["step"]) == (
        "succeeded",
        step_of(paused),
        step_of(paused),
    )


def test_a_job_without_a_step_has_nothing_that_could_be_kept(server: Server, client: OpenAI) -> None:
    first, second = make_job(client, "slow"), make_job(client, "rows")
    wait_job(server, client, second.id, lambda job: job.status == "queued")
    with pytest.raises(
        openai.ConflictError, match=r"is queued: it has no step done.*cancel it, or let it train first"
    ):
        stop(server, second.id)
    client.fine_tuning.jobs.cancel(first.id)
    with pytest.raises(openai.ConflictError, match="is cancelled: there is nothing left to stop"):
        stop(server, first.id)
    done = wait_job(server, client, second.id, ended)
    assert (done.status, done.stopped) == ("succeeded", None)


def test_a_job_whose_trainer_is_killed_while_it_stops_ends_where_it_was_to_stop(
    server: Server, client: OpenAI
) -> None:
    job = make_job(client, "slow dies-ending-once")
    wait_job(server, client, job.id, lambda job: step_of(job) > 6)
    stop(server, job.id)
    done = wait_job(server, client, job.id, ended)
    assert done.status == "succeeded"
    assert any("signal SIGKILL" in event.message for event in client.fine_tuning.jobs.list_events(job.id))
    assert 6 < done.report["steps"] == done.stopped["step"] < 3000


def test_a_job_that_was_to_stop_does_so_after_the_server_was_killed(serve_scripted: Starter) -> None:
    with serve_scripted("words") as server:
        client = openai_client(server)
        job = make_job(client, "slow dies-ending-once")
        wait_job(server, client, job.id, lambda job: step_of(job) > 6)
        stop(server, job.id)
        server.process.kill()
        server.exit_status()
        with serve_scripted("words", data_dir=server.data_dir) as again:
            done = wait_job(again, openai_client(again), job.id, ended)
            assert (done.status, done.activated) == ("succeeded", True)
            assert 6 < done.report["steps"] == done.stopped["step"] < 3000


def test_a_cancelled_job_leaves_nothing_and_stays_cancelled(server: Server, client: OpenAI) -> None:
    job = make_job(client, "slow")
    wait_job(server, client, job.id, lambda job: (job.progress or {}).get("step", 0) > 6)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    folder = job_folder(server.data_dir, job.id)
    server.wait_for(lambda: not server.trainer_pids() and not folder.exists())
    with pytest.raises(openai.ConflictError, match="only a paused one"):
        client.fine_tuning.jobs.resume(job.id)
    with pytest.raises(openai.ConflictError, match="only one that is queued or running"):
        client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_jobs_and_files_are_paged_and_found(server: Server, client: OpenAI) -> None:
    made = [run_job(server, client, "rows", metadata={"page": "1"}).id for _ in range(3)]
    found = [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"page": "1"})]
    assert found == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=100)][:3] == made[::-1]
    first = client.fine_tuning.jobs.list(limit=1)
    assert first.has_more
    files = [add_file(client, str(number)) for number in range(3)]
    assert [file.id for file in client.files.list(limit=2)][:3] == files[::-1]
    assert [file.id for file in client.files.list(order="asc")][-3:] == files


def test_a_file_comes_back_as_it_was_and_goes_when_no_job_needs_it(server: Server, client: OpenAI) -> None:
    text = '{"text": "ä"}\n' * 1000
    file = client.files.create(file=("../a b.JSONL", io.BytesIO(text.encode())), purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose) == ("a b.JSONL", len(text.encode()), "fine-tune")
    assert client.files.content(file.id).text == text
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(file.id)
    wait_job(server, client, job.id, ended)
    os.utime(blobs(server.data_dir)[sha256(text)], (1e9, 1e9))  # a new one may be somebody else's too
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert sha256(text) not in blobs(server.data_dir)


def test_files_that_jobs_cannot_read_are_refused_with_the_field(server: Server, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"rows\.txt"):
        add_file(client, "rows", name="rows.txt")
    with pytest.raises(openai.BadRequestError, match="empty"):
        add_file(client, "")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a.jsonl", io.BytesIO(b"x")), purpose="assistants")
    answer = server.client().post("/v1/files", data={"purpose": "fine-tune", "expires_after[seconds]": "9"})
    assert answer.json()["error"]["code"] in ("invalid_multipart", "invalid_value")
    assert not any(path.suffix == ".part" for path in blobs(server.data_dir).values())


def test_a_file_may_be_larger_than_a_body_and_not_larger_than_its_limit(
    server: Server, client: OpenAI
) -> None:
    assert client.files.retrieve(add_file(client, "x" * 1_500_000)).bytes == 1_500_000
    with pytest.raises(openai.APIStatusError, match="--max-train-file") as refused:
        add_file(client, "x" * 2_200_000)
    assert refused.value.status_code == 413
    assert not any(path.suffix == ".part" for path in blobs(server.data_dir).values())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "ft-none"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement"),
        ({"method": {"type": "supervised", "reinforcement": {"grader": {}}}}, "method.reinforcement"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": -1}}}},
            "method.supervised.hyperparameters.n_epochs",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"rank": 4}}}},
            "method.supervised.hyperparameters.rank",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"seed": 4}}}},
            "method.supervised.hyperparameters.seed",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"init": "pissa"}}}},
            "method.supervised.hyperparameters.init",
        ),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
        ({"extra_body": {"name": BASE}}, "name"),
        ({"extra_body": {"activate": "perhaps"}}, "activate"),
        ({"extra_body": {"surprise": 1}}, "surprise"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(client: OpenAI, body: dict[str, Any], param: str) -> None:
    file = body.pop("training_file", None) or add_file(client, "rows")
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(**{"model": BASE, "training_file": file, **body})
    assert refused.value.param == param
    assert param in refused.value.message


LABELS = {"type": "label_model", "name": "kind", "model": BASE, "labels": ["good", "bad"]}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": LABELS}}}, "score_model"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "result file"),
    ],
)
def test_what_openai_has_and_this_server_has_not_is_refused_with_what_to_do_instead(
    client: OpenAI, body: dict[str, Any], says: str
) -> None:
    file = add_file(client, "rows")
    with pytest.raises(openai.BadRequestError, match=says):
        client.fine_tuning.jobs.create(model=BASE, training_file=file, **body)


def test_what_openais_client_sends_for_nothing_changes_nothing(client: OpenAI) -> None:
    file = add_file(client, "rows")
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=file, suffix=None, validation_file=None, seed=None, metadata=None,
        integrations=[],
    )  # fmt: skip
    assert (job.object, job.integrations, job.metadata, job.seed) == ("fine_tuning.job", [], {}, 0)
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize(
    ("suffix", "name"), [("With Space", "ft-With-Space"), ("größe:v2", "ft-gr-e-v2"), ("/..", "ft--..")]
)
def test_a_suffix_may_be_any_text_and_what_no_name_can_have_becomes_a_dash(
    client: OpenAI, suffix: str, name: str
) -> None:
    assert make_job(client, "rows", suffix=suffix).name == name


def test_a_file_that_is_sent_as_bytes_is_taken_for_json_lines(client: OpenAI) -> None:
    file = client.files.create(file=b"rows", purpose="fine-tune")
    assert file.filename == "upload.jsonl"
    assert client.files.wait_for_processing(file.id).status == "processed"


def test_a_file_that_would_expire_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="kept until they are deleted"):
        client.files.create(
            file=b"rows", purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )


def test_settings_are_taken_by_openais_names_and_ours_and_auto_is_the_default(
    server: Server, client: OpenAI
) -> None:
    settings: Any = {
        "n_epochs": 2,
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
        "r": 4,
        "alpha": "auto",
    }
    job = run_job(
        server, client, "rows", method={"type": "supervised", "supervised": {"hyperparameters": settings}}
    )
    assert job.method.type == "supervised"
    taken = job.method.supervised.hyperparameters
    assert (taken.r, taken.alpha) == (4, "auto")
    halved: Any = {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 0.5}}}
    checked = run_job(server, client, "rows", method=halved, suffix="s" * 64)
    assert checked.hyperparameters.learning_rate_multiplier == 0.5
    assert checked.name == "ft-" + "s" * 61
    older = make_job(client, "rows", hyperparameters={"n_epochs": 1})
    assert older.hyperparameters.n_epochs == 1
    pairs: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    dpo = make_job(client, "rows", method=pairs)
    assert (dpo.method.type, dpo.method.dpo.hyperparameters.beta) == ("dpo", 0.2)


def test_unknown_jobs_are_not_found(client: OpenAI) -> None:
    for ask in (
        client.fine_tuning.jobs.retrieve,
        client.fine_tuning.jobs.cancel,
        client.fine_tuning.jobs.pause,
        client.fine_tuning.jobs.resume,
        client.fine_tuning.jobs.list_events,
        client.fine_tuning.jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError, match="no job"):
            ask("ftjob-none")


def test_figures_for_prometheus(server: Server, client: OpenAI) -> None:
    client.completions.create(model=BASE, prompt="one two", max_tokens=2)
    job = make_job(client, "slow")
    wait_job(server, client, job.id, lambda job: (job.progress or {}).get("step", 0) > 2)
    text = server.client().get("/metrics").text
    assert 'onebase_training_jobs{state="running"} 1.0' in text
    assert f'onebase_training_step{{job_id="{job.id}"}}' in text
    assert f'onebase_trainer_memory_bytes{{job_id="{job.id}"}}' in text
    assert 'vllm:num_requests_running{engine="0",model_name="smollm2-135m-instruct"} 0.0' in text
    client.fine_tuning.jobs.cancel(job.id)


def test_without_a_registry_nobody_is_told_that_there_are_no_jobs() -> None:
    nothing: Any = SimpleNamespace(base_name="base")
    scheduler: Any = SimpleNamespace(deaths=0, running=[])
    batches: Any = SimpleNamespace(flying=0, answered={})
    metrics = MetricsCollector(
        supervisor=nothing, catalog=nothing, residency=nothing, adapters=nothing, scheduler=scheduler,
        batches=batches, requests=nothing, answers=nothing, rollouts=nothing, request_log=nothing,
    )  # fmt: skip
    known, unknown = (
        render([*metrics._training(counts), *metrics._batch_figures(counts)]) for counts in ({}, None)
    )
    for counts in (
        b'onebase_training_jobs{state="running"} 0.0',
        b'onebase_batches{state="in_progress"} 0.0',
    ):
        assert counts in known
        assert counts.partition(b"{")[0] not in unknown


def test_with_a_share_of_nothing_a_job_stands_still_exactly_while_rows_run(serve_scripted: Starter) -> None:
    with serve_scripted("words", "--train-share", "0") as server, server.client() as http:
        client = openai_client(server)
        body = {"prompt": "one two", "max_tokens": 50_000, "stream": True}
        with http.stream("POST", "/generate", json=body) as answer:
            lines = answer.iter_lines()  # dropped, it would close the stream
            next(lines)
            job = make_job(client, "rows gated")
            wait_job(server, client, job.id, lambda job: "steps" in (job.progress or {}))
            time.sleep(1.0)  # fifty steps long
            assert client.fine_tuning.jobs.retrieve(job.id).progress["step"] == 0
        assert wait_job(server, client, job.id, ended).status == "succeeded"
