"""What becomes of jobs when a trainer, the engine, the server or a disk gives up: nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.disks import fill, small_disk
from tests.training.runs import write_chats

from .support import CONFIG, HERE, Server, Starter, alive, serving
from .training_support import (
    add_file,
    blobs,
    ended,
    job_folder,
    make_job,
    messages,
    openai_client,
    run_job,
    sha256,
    step_of,
    wait_job,
)


def test_a_full_disk_fails_the_job_and_not_more_and_it_goes_on_when_resumed(scripted: Server) -> None:
    client = openai_client(scripted)
    job = run_job(scripted, client, "full")
    assert (job.status, job.error.code, job.resumable) == ("failed", "disk_full", True)
    client.fine_tuning.jobs.resume(job.id)
    assert wait_job(scripted, client, job.id, ended).status == "succeeded"


def test_a_job_whose_disk_filled_up_fails_once_there_is_space_and_is_resumed_to_its_end(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 8_000_000) as disk, serve_scripted("words", data_dir=disk) as server:
        fill_the_disk_and_resume(server, make_job(openai_client(server), "until-full"), steps=10)


@pytest.mark.full
def test_a_real_trainer_whose_disk_filled_up_is_resumed_to_its_end_too(
    serve_real: Starter, small_base: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 200, "save_every": 20, "batch_size": 2, "r": 4, "targets": ["q_proj"]}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": settings}}
    rows = write_chats(tmp_path / "rows.jsonl", 400).read_text()
    options = ("--base", str(small_base), "--kv-memory", "50MB", "--threads", "1")
    with (
        small_disk(tmp_path / "disk", 24_000_000) as disk,
        serve_real(*options, data_dir=disk) as server,
    ):
        fill_the_disk_and_resume(server, make_job(openai_client(server), rows, method=method), steps=200)


def fill_the_disk_and_resume(server: Server, job: Any, steps: int) -> None:
    """Once there is a checkpoint. The registry is on the full disk too."""
    client = openai_client(server)
    checkpoints = job_folder(server.data_dir, job.id) / "checkpoints"
    # The best adapter so far is written before the checkpoint of its step.
    server.wait_for(lambda: any(checkpoints.glob("[!.b]*")))
    (trainer,) = server.trainer_pids()
    os.kill(trainer, signal.SIGSTOP)  # it gets no farther until the disk is full
    try:
        filler = fill(server.data_dir)
    finally:
        os.kill(trainer, signal.SIGCONT)
    server.wait_for(lambda: not server.trainer_pids())
    filler.unlink()
    failed = wait_job(server, client, job.id, ended)
    assert (failed.status, failed.error.code, failed.resumable) == ("failed", "disk_full", True)
    client.fine_tuning.jobs.resume(job.id)
    done = wait_job(server, client, job.id, ended)
    assert (done.status, step_of(done)) == ("succeeded", steps)
    assert "Continuing after" in "\n".join(messages(client, job.id))


def test_an_adapter_whose_proof_crashed_is_proved_when_its_job_is_resumed(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words,dies", data_dir=tmp_path) as server:
        job = run_job(server, openai_client(server), "rows")
        assert (job.status, job.error.code, job.resumable) == ("failed", "proof_crashed", True)
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        client.fine_tuning.jobs.resume(job.id)
        assert wait_job(server, client, job.id, ended).status == "succeeded"
        assert sum(message.startswith("Step 1/10") for message in messages(client, job.id)) == 1


@pytest.mark.parametrize("content", ["full", "dies-checking"])
def test_a_resumed_job_whose_file_is_gone_fails_and_says_which(scripted: Server, content: str) -> None:
    client = openai_client(scripted)
    job = run_job(scripted, client, f"{content} of-a-file-that-goes")
    assert job.resumable
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(job.training_file)
    blobs(scripted.data_dir)[sha256(f"{content} of-a-file-that-goes")].unlink()
    client.fine_tuning.jobs.resume(job.id)
    again = wait_job(scripted, client, job.id, ended)
    assert (again.error.code, again.error.param, again.resumable) == (
        "file_not_found",
        "training_file",
        False,
    )
    assert job.training_file in again.error.message


def test_jobs_outlive_a_server_that_is_killed(serve_scripted: Starter, tmp_path: Path) -> None:
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        first = make_job(client, "slow")
        second = make_job(client, "rows")
        paused = make_job(client, "slow")
        wait_job(server, client, paused.id, lambda job: job.status == "queued")
        client.fine_tuning.jobs.pause(paused.id)
        running = wait_job(server, client, first.id, lambda job: step_of(job) > 12)
        trainers = server.trainer_pids()
        server.process.kill()
        server.exit_status()
    assert trainers
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        again = wait_job(server, client, first.id, lambda job: step_of(job) > step_of(running))
        assert again.status == "running"
        server.wait_for(lambda: not any(map(alive, trainers)))
        told = "\n".join(messages(client, first.id))
        assert "The server was started again; the job continues after step" in told
        assert client.fine_tuning.jobs.retrieve(paused.id).status == "paused"
        assert client.fine_tuning.jobs.retrieve(second.id).status == "queued"
        client.fine_tuning.jobs.cancel(first.id)
        assert wait_job(server, client, second.id, ended).status == "succeeded"


def test_a_server_that_stops_lets_jobs_save_and_says_that_they_go_on(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        job = make_job(client, "slow")
        wait_job(server, client, job.id, lambda job: step_of(job) > 6)
        server.process.terminate()
        assert server.exit_status() == 0
    saved = max(int(path.name) for path in (job_folder(tmp_path, job.id) / "checkpoints").iterdir())
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        wait_job(server, client, job.id, lambda job: step_of(job) > saved)
        told = "\n".join(messages(client, job.id))
        assert f"Interrupted: the server stops. The job continues after step {saved}." in told
        assert f"Continuing after step {saved} of 3000." in told


def test_a_job_whose_adapter_is_being_proved_is_delivered_after_a_restart(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words,hangs", data_dir=tmp_path) as server:
        client = openai_client(server)
        job = make_job(client, "rows")
        server.wait_for(lambda: "The adapter is being proved." in messages(client, job.id))
        with pytest.raises(openai.ConflictError, match="being proved"):
            client.fine_tuning.jobs.cancel(job.id)
        server.process.kill()
        server.exit_status()
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        done = wait_job(server, client, job.id, ended)
        assert (done.status, done.activated) == ("succeeded", True)
        told = messages(client, job.id)
        assert sum(message.startswith("Step 1/10") for message in told) == 1
        assert len(client.files.list(purpose="fine-tune-results").data) == 1


@pytest.mark.full
def test_a_job_that_is_trained_while_the_server_stops_is_only_delivered_after_its_restart(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        job = make_job(client, "slow finishes")
        last = step_of(wait_job(server, client, job.id, lambda job: step_of(job) > 2))
        server.process.terminate()
        assert server.exit_status() == 0
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        done = wait_job(server, client, job.id, ended)
        assert (done.status, done.activated) == ("succeeded", True)
        assert last <= step_of(done) < 3000
        assert "Continuing after" not in "\n".join(messages(client, job.id))


def test_a_ready_version_that_cannot_be_activated_is_told_and_its_job_succeeds_each_time(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    job: Any = None
    for delivery in range(2):
        with serve_scripted("words", "--host-memory", "10B", data_dir=tmp_path) as server:
            client = openai_client(server)
            job = wait_job(server, client, job.id, ended) if job else run_job(server, client, "rows")
            assert (job.status, job.activated) == ("succeeded", False)
            told = [message for message in messages(client, job.id) if "could not be activated" in message]
            assert len(told) == 1 + delivery
        with closing(sqlite3.connect(tmp_path / "registry.db")) as database, database:
            database.execute("UPDATE training_jobs SET state = 'running'")
        folder = job_folder(tmp_path, job.id) / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(CONFIG)
        (folder / "adapter_model.safetensors").write_bytes(job.id.encode())


def test_a_job_whose_adapter_is_lost_trains_on_when_it_is_resumed(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words,hangs", data_dir=tmp_path) as server:
        client = openai_client(server)
        job = make_job(client, "rows")
        server.wait_for(lambda: "The adapter is being proved." in messages(client, job.id))
        server.process.kill()
        server.exit_status()
    shutil.rmtree(job_folder(tmp_path, job.id) / "adapter")
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        lost = wait_job(server, client, job.id, ended)
        assert (lost.error.code, lost.resumable, lost.report) == ("adapter_lost", True, None)
        client.fine_tuning.jobs.resume(job.id)
        assert wait_job(server, client, job.id, ended).status == "succeeded"
        assert "Continuing after step 10 of 10." in messages(client, job.id)


def test_an_engine_that_dies_ends_the_trainer_and_the_job_goes_on_beside_the_next(
    scripted: Server,
) -> None:
    client = openai_client(scripted)
    job = make_job(client, "slow")
    wait_job(scripted, client, job.id, lambda job: step_of(job) > 6)
    (trainer,) = scripted.trainer_pids()
    os.kill(scripted.engine_pid(), signal.SIGKILL)
    scripted.wait_for(lambda: not Path(f"/proc/{trainer}").exists())
    # The steps before it may be written down after the trainer has ended.
    scripted.wait_for(lambda: "Interrupted: the engine ended." in "\n".join(messages(client, job.id)))
    reached = step_of(client.fine_tuning.jobs.retrieve(job.id))
    wait_job(scripted, client, job.id, lambda job: step_of(job) > reached)
    client.fine_tuning.jobs.cancel(job.id)


def test_a_trainer_that_does_not_stop_is_killed_when_its_job_is_cancelled(scripted: Server) -> None:
    client = openai_client(scripted)
    job = make_job(client, "slow deaf")
    wait_job(scripted, client, job.id, lambda job: step_of(job) > 0)
    client.fine_tuning.jobs.cancel(job.id)
    scripted.wait_for(lambda: not scripted.trainer_pids())


def test_an_upload_onto_a_full_disk_is_refused_and_leaves_nothing(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 8_000_000) as disk, serve_scripted("words", data_dir=disk) as server:
        client = openai_client(server)
        filler = fill(disk)
        with pytest.raises(openai.APIStatusError, match="no space left") as refused:
            add_file(client, "x" * 3_000_000)
        assert refused.value.status_code == 507
        filler.unlink()
        assert not blobs(disk)
        assert run_job(server, client, "rows").status == "succeeded"


def test_of_two_servers_on_one_registry_each_runs_its_own_jobs_and_either_may_stop_them(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    registry = ("--registry", f"sqlite:///{tmp_path / 'shared.db'}", "--sync-seconds", "0.1")
    with serve_scripted("words", *registry) as one, serve_scripted("words", *registry) as other:
        here, there = openai_client(one), openai_client(other)
        job = make_job(here, "slow")
        wait_job(one, here, job.id, lambda job: step_of(job) > 0)
        assert len(one.trainer_pids()) == 1
        assert not other.trainer_pids()
        with pytest.raises(openai.BadRequestError, match="another server"):
            there.fine_tuning.jobs.create(model=job.model, training_file=job.training_file)
        assert there.fine_tuning.jobs.pause(job.id).status == "paused"
        one.wait_for(lambda: not one.trainer_pids())
        there.fine_tuning.jobs.resume(job.id)
        one.wait_for(lambda: len(one.trainer_pids()) == 1)
        there.fine_tuning.jobs.cancel(job.id)
        one.wait_for(lambda: not one.trainer_pids())


def test_a_job_that_is_trained_while_a_pause_is_on_its_way_is_not_delivered_before_it_is_resumed(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    goes_on = tmp_path / "go-on"
    registry = ("--registry", f"sqlite:///{tmp_path / 'shared.db'}", "--sync-seconds", "3600")
    with serve_scripted("words", *registry) as one, serve_scripted("words", *registry) as other:
        here, there = openai_client(one), openai_client(other)
        job = make_job(here, f"until={goes_on}")
        wait_job(one, here, job.id, lambda job: step_of(job) == 5)
        assert there.fine_tuning.jobs.pause(job.id).status == "paused"
        goes_on.touch()
        one.wait_for(lambda: any(told.startswith("Paused.") for told in messages(here, job.id)))
        paused = here.fine_tuning.jobs.retrieve(job.id)
        assert (paused.status, step_of(paused), paused.version) == ("paused", 10, None)
        here.fine_tuning.jobs.resume(job.id)
        assert wait_job(one, here, job.id, ended).status == "succeeded"
        assert "Continuing after" not in "\n".join(messages(here, job.id))


@pytest.mark.full
def test_of_two_processes_on_one_registry_one_runs_the_jobs(serve_scripted: Starter, tmp_path: Path) -> None:
    quick = ("--sync-seconds", "0.1", "--registry", f"sqlite:///{tmp_path / 'registry.db'}")
    quick += ("--store", str(tmp_path / "store"))
    with serve_scripted("words", *quick, data_dir=tmp_path / "first") as first:
        command = [sys.executable, str(HERE / "serve_scripted.py"), "words"]
        with serving(command, *quick, data_dir=tmp_path / "second") as second:
            client = openai_client(second)
            job = make_job(client, "slow")
            wait_job(second, client, job.id, lambda job: step_of(job) > 0)
            running = len(first.trainer_pids()), len(second.trainer_pids())
            assert sorted(running) == [0, 1]
            first.process.kill()
            first.exit_status()
            second.wait_for(lambda: len(second.trainer_pids()) == 1)
            client.fine_tuning.jobs.cancel(job.id)
