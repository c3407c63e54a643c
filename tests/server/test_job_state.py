"""The states of a job: what may follow each of them."""

from __future__ import annotations

from typing import Any

import pytest

from onebase_adapters.registry import JOB_STATES, JobState, TrainingJob
from onebase_protocol.training import TrainingFailure
from onebase_server.jobs import state as states
from onebase_server.jobs.state import (
    MAX_DEATHS,
    Death,
    Move,
    cancelled,
    is_resumable,
    resumed,
    steps_done,
    stopping,
)

MOVES = [move for move in vars(states).values() if isinstance(move, Move)]
FOLLOWING = {
    "validating_files": {"validating_files", "queued", "paused", "failed", "cancelled"},
    "queued": {"running", "paused", "failed", "cancelled"},
    "running": {"queued", "paused", "succeeded", "failed", "cancelled"},
    "paused": {"queued", "cancelled"},
    "succeeded": set(),
    "failed": set(),
    "cancelled": set(),
}


def made(state: JobState, error_code: str | None = None, **facts: Any) -> TrainingJob:
    error = TrainingFailure(error_code, "why") if error_code else None
    given = {
        "id": "ftjob-1", "tenant": "default", "server": "s", "name": "orders", "training_file": "file-1",
        "validation_file": None, "activate": "never", "settings": {}, "labels": {}, "number": 1,
        "state": state, "created_at": 1.0, "started_at": None, "finished_at": None, "plan": {"steps": 3},
        "progress": None, "report": None, "error": error, "saved_step": 0, "deaths": 0, "death_step": 0,
        "version": None, "activated": None, "result_file": None,
    }  # fmt: skip
    return TrainingJob(**given | facts)


def following(job: TrainingJob) -> set[str]:
    """The states that the server or a user may move a job to."""
    by_users = [cancelled(job)]
    if is_resumable(job.state, job.error_code):
        by_users.append(resumed(job))
    return {move.to for move in (*MOVES, *by_users) if job.state in move.among}


@pytest.mark.parametrize("state", JOB_STATES)
def test_only_these_states_follow(state: JobState) -> None:
    assert following(made(state, "invalid_file" if state == "failed" else None)) == FOLLOWING[state]


def test_a_job_that_failed_for_a_passing_reason_can_go_on_or_be_given_up() -> None:
    assert following(made("failed", "disk_full")) == {"queued", "cancelled"}
    assert following(made("failed", "disk_full", plan=None)) == {"validating_files", "cancelled"}


def test_a_job_that_never_ran_can_be_resumed_only_if_it_is_paused() -> None:
    assert [state for state in JOB_STATES if is_resumable(state, None)] == ["paused"]


@pytest.mark.parametrize(
    ("state", "to"),
    [("running", "running"), ("queued", "queued"), ("paused", "queued"), ("failed", "queued")],
)
def test_a_job_that_is_to_stop_goes_on_for_that_if_it_waits(state: JobState, to: str) -> None:
    move = stopping(made(state, "trainer_died" if state == "failed" else None))
    assert (move.among, move.to, move.while_delivered) == ((state,), to, False)


@pytest.mark.parametrize(
    ("state", "told", "saved", "done"),
    [
        ("running", 7, 5, 7),
        ("running", None, 5, 5),
        ("paused", 7, 7, 7),
        ("failed", 7, 5, 5),
        ("queued", 3, 0, 3),
    ],
)
def test_a_job_that_does_not_run_has_only_the_steps_that_are_saved(
    state: JobState, told: int | None, saved: int, done: int
) -> None:
    job = made(state, progress=None if told is None else {"step": told}, saved_step=saved)
    assert steps_done(job) == done


def test_the_next_trainer_is_started_later_after_each_death_until_the_job_fails() -> None:
    deaths = [Death.of(made("running", deaths=before), "signal SIGKILL") for before in range(MAX_DEATHS + 1)]
    assert [death.pause for death in deaths[:3]] == [0.5, 1.0, 2.0]
    assert [death.last for death in deaths] == [False] * MAX_DEATHS + [True]
