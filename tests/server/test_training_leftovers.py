"""What jobs leave on the disk, and what a server does with that and with them when it starts."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import openai
import pytest

from .support import Server, Starter
from .training_support import (
    add_file,
    blobs,
    ended,
    job_folder,
    make_job,
    messages,
    openai_client,
    run_job,
    step_of,
    wait_job,
)


def test_a_job_that_ended_while_its_server_was_away_leaves_nothing_after_the_start(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        job = make_job(client, "slow")
        wait_job(server, client, job.id, lambda job: step_of(job) > 6)
        server.process.kill()
        server.exit_status()
    assert (job_folder(tmp_path, job.id) / "checkpoints").is_dir()
    with closing(sqlite3.connect(tmp_path / "registry.db")) as database, database:
        database.execute("UPDATE training_jobs SET state = 'cancelled'")
    with serve_scripted("words", data_dir=tmp_path) as server:
        server.wait_for(lambda: not job_folder(tmp_path, job.id).exists())


def test_a_failed_job_that_could_go_on_can_be_given_up_and_leaves_nothing(scripted: Server) -> None:
    client = openai_client(scripted)
    job = run_job(scripted, client, "full")
    folder = job_folder(scripted.data_dir, job.id)
    assert folder.is_dir()
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    scripted.wait_for(lambda: not folder.exists())
    assert client.files.delete(job.training_file).deleted
    bad = run_job(scripted, client, "broken")
    with pytest.raises(openai.ConflictError, match="nothing left to cancel"):
        client.fine_tuning.jobs.cancel(bad.id)


def test_a_job_that_is_cancelled_while_its_next_trainer_is_awaited_leaves_nothing(
    scripted: Server,
) -> None:
    client = openai_client(scripted)
    job = make_job(client, "dies-at-7")
    scripted.wait_for(lambda: any("ended by" in told for told in messages(client, job.id)))
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    scripted.wait_for(lambda: not job_folder(scripted.data_dir, job.id).exists())


def test_a_server_without_jobs_says_so(serve_scripted: Starter, tmp_path: Path) -> None:
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        running, waiting = make_job(client, "slow"), make_job(client, "rows")
        wait_job(server, client, running.id, lambda job: job.status == "running")
        wait_job(server, client, waiting.id, lambda job: job.status == "queued")
    with closing(sqlite3.connect(tmp_path / "registry.db")) as database, database:
        database.execute("UPDATE training_jobs SET state = 'validating_files' WHERE id = ?", (waiting.id,))
    with serve_scripted("words", "--train-jobs", "0", data_dir=tmp_path) as server:
        client = openai_client(server)
        with pytest.raises(openai.ConflictError, match="--train-jobs"):
            make_job(client, "rows")
        for job, state in ((running, "queued"), (waiting, "validating_files")):
            server.wait_for(lambda job=job: "--train-jobs 0" in messages(client, job.id)[-1])
            assert client.fine_tuning.jobs.retrieve(job.id).status == state
        assert client.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"


def test_a_data_folder_that_training_cannot_use_is_named(serve_scripted: Starter, tmp_path: Path) -> None:
    (tmp_path / "training").write_text("no folder")
    with serve_scripted("words", ready=False, data_dir=tmp_path) as server:
        assert server.exit_status() != 0
        assert "--data-dir" in server.log
        assert "tokenizer" not in server.log


def test_a_start_with_another_registry_deletes_nothing_that_the_first_one_knows(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    other = ("--registry", f"sqlite:///{tmp_path / 'other.db'}")
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        job = make_job(client, "long")
        wait_job(server, client, job.id, lambda job: step_of(job) > 6)
        client.fine_tuning.jobs.pause(job.id)
        server.wait_for(lambda: not server.trainer_pids())
    kept = _age(tmp_path)
    assert len(kept) == 2
    with serve_scripted("words", *other, data_dir=tmp_path) as server:
        client = openai_client(server)
        theirs = add_file(client, "theirs")
        run_job(server, client, "rows")  # begun once the jobs' folders are swept
        server.wait_for(lambda: "several registries" in server.log)
        assert all(path.exists() for path in kept)
    _age(tmp_path)
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        client.fine_tuning.jobs.resume(job.id)
        assert wait_job(server, client, job.id, ended).status == "succeeded"
        server.wait_for(lambda: "several registries" in server.log)
        (curve,) = client.files.list(purpose="fine-tune-results").data
        assert curve.filename == f"{job.id}-metrics.csv"
    with serve_scripted("words", *other, data_dir=tmp_path) as server:
        assert openai_client(server).files.content(theirs).text == "theirs"


def _age(data_dir: Path) -> list[Path]:
    """Make all blobs and all folders of jobs old; returns them."""
    found = [*blobs(data_dir).values(), *(data_dir / "training").glob("registry-*/*")]
    for path in found:
        os.utime(path, (1e9, 1e9))
    return found


def test_a_lock_that_cannot_be_opened_is_named_and_jobs_begin_once_it_can(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    lock = tmp_path / "training/lock"
    lock.mkdir(parents=True)
    with serve_scripted("words", "--sync-seconds", "0.1", data_dir=tmp_path) as server:
        client = openai_client(server)
        job = make_job(client, "rows")
        server.wait_for(lambda: "(--data-dir); waiting" in server.log)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
        lock.rmdir()
        assert wait_job(server, client, job.id, ended).status == "succeeded"
