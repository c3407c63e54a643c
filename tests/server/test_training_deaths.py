"""Trainers that die: another one goes on, until nothing comes of that."""

from __future__ import annotations

import re

from .support import Server
from .training_support import ended, messages, openai_client, run_job, step_of, wait_job


def test_a_trainer_that_is_killed_is_followed_by_one_that_goes_on(scripted: Server) -> None:
    client, before = openai_client(scripted), deaths(scripted)
    job = run_job(scripted, client, "dies-at-7-once")
    assert job.status == "succeeded"
    told = "\n".join(messages(client, job.id))
    assert "ended by signal SIGKILL" in told
    assert "continues after step 5" in told
    assert "Continuing after step 5 of 10." in told
    assert deaths(scripted) == before + 1


def deaths(server: Server) -> float:
    """Of trainers, as the metrics say."""
    with server.client() as http:
        (count,) = re.findall(r"^onebase_trainer_deaths_total (.+)$", http.get("/metrics").text, re.MULTILINE)
    return float(count)


def test_a_trainer_that_dies_each_time_ends_in_a_failed_job_that_can_be_resumed(
    scripted: Server,
) -> None:
    client = openai_client(scripted)
    job = run_job(scripted, client, "dies-at-7")
    assert (job.status, job.error.code, job.resumable) == ("failed", "trainer_died", True)
    assert "signal SIGKILL" in job.error.message
    told = [message for message in messages(client, job.id) if "The trainer's process ended by" in message]
    assert len(told) == 3
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    again = wait_job(scripted, client, job.id, ended)
    assert again.error.code == "trainer_died"
    assert client.completions.create(model=job.model, prompt="one two", max_tokens=2).choices[0].text


def test_a_check_that_dies_is_tried_again_and_then_given_up(scripted: Server) -> None:
    client = openai_client(scripted)
    job = run_job(scripted, client, "dies-checking")
    assert (job.status, job.error.code) == ("failed", "trainer_died")
    assert job.progress is None or step_of(job) == 0


def test_deaths_in_the_check_do_not_count_against_the_training(scripted: Server) -> None:
    client = openai_client(scripted)
    job = run_job(scripted, client, "dies-checking-twice dies-at-3")
    assert (job.status, job.error.code) == ("failed", "trainer_died")
    told = messages(client, job.id)
    assert sum("The job continues from its beginning." in message for message in told) == 2 + 3
