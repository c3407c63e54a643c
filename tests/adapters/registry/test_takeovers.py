"""Jobs that change their server: who may take one, what it goes on from, and who may write of it then."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.adapters.registry.conftest import Open, add, blob, files
from tests.adapters.registry.test_jobs import TENANT, add_file, add_job, event

from onebase_adapters.registry import (
    Checkpoint,
    JobElsewhereError,
    JobState,
    JobStateError,
    Origin,
    ParentVersion,
    Registry,
    TrainingJob,
    UnkeptJob,
    acting,
    takeovers,
)
from onebase_protocol.training import TrainingFailure

JOB = "ftjob-one"


@pytest.fixture
def job(registry: Registry) -> TrainingJob:
    add_file(registry, "a", sha256=blob("rows").sha256)
    return add_job(registry, "one")


def alive(registry: Registry, server: str, room: int = 1, seconds: float = 60.0) -> None:
    registry.servers.renew(f"process of {server}", server, runs=True, room=room, seconds=seconds)


def dead(registry: Registry, server: str) -> None:
    alive(registry, server, seconds=0.0)
    time.sleep(0.01)


def move(registry: Registry, state: Any, **facts: Any) -> None:
    registry.training.move(JOB, state, ("validating_files", "queued", "running", "paused"), **facts)


def saved(registry: Registry, step: int) -> None:
    registry.training.note(JOB, checkpoints=[Checkpoint(step, f"checkpoints/{step}", 1.0, None, None)])


def take(registry: Registry, server: str, before: str = "s1", room: int = 1) -> TrainingJob:
    return registry.takeovers.take_job(JOB, before, server, room, lambda job: event(f"from {job.saved_step}"))


def takeable(registry: Registry, server: str = "s2", room: int = 1) -> list[str]:
    return [job.id for job in registry.takeovers.takeable(server, room)]


def test_a_job_of_a_server_that_lives_or_has_no_lease_is_nobody_else_s(
    registry: Registry, job: TrainingJob
) -> None:
    move(registry, "running")
    assert takeable(registry) == []  # its server has no lease
    alive(registry, "s1", room=0)
    assert takeable(registry) == []
    with pytest.raises(JobElsewhereError):
        take(registry, "s2")
    assert registry.training.job(TENANT, JOB).server == "s1"


def test_a_job_of_a_dead_server_goes_on_from_what_the_store_has(registry: Registry, job: TrainingJob) -> None:
    move(registry, "running")
    for step in (5, 10):
        saved(registry, step)
        if step == 5:
            registry.takeovers.keep(JOB, "s1", 5, {"checkpoints/5/x": blob("x").sha256}, adapter=False)
    move(registry, "running", report={"steps": 10})
    dead(registry, "s1")
    assert takeable(registry, room=0) == []
    assert takeable(registry) == [JOB]
    taken = take(registry, "s2")
    assert (taken.server, taken.state, taken.saved_step, taken.report) == ("s2", "queued", 5, None)
    assert [one.step for one in registry.training.checkpoints(taken)] == [5]
    assert registry.training.events(taken, limit=1)[0].message == "from 5"
    assert [open_job.id for open_job in registry.training.open_jobs("s2")] == [JOB]
    assert registry.training.open_jobs("s1") == []
    with pytest.raises(JobElsewhereError):
        take(registry, "s3")


def test_a_trained_job_keeps_its_adapter_when_the_store_has_it(registry: Registry, job: TrainingJob) -> None:
    move(registry, "running", report={"steps": 10}, saved_step=10)
    registry.takeovers.keep(JOB, "s1", 10, {"adapter/x": blob("x").sha256}, adapter=True)
    dead(registry, "s1")
    assert take(registry, "s2").report == {"steps": 10}


def test_jobs_that_nobody_may_take_hide_none_of_a_server_that_is_gone(
    registry: Registry, job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeovers, "MOST_LOOKED_AT", 1)
    move(registry, "queued")
    saved(registry, 5)  # it would lose steps
    alive(registry, "s1", room=0)
    other = add_job(registry, "two", server="s3")
    dead(registry, "s3")
    assert takeable(registry, room=2) == [other.id]


def test_a_job_that_waits_goes_to_the_server_with_most_room(registry: Registry, job: TrainingJob) -> None:
    alive(registry, "s1", room=1)
    alive(registry, "s3", room=3)
    assert takeable(registry, room=3) == []  # its files are checked where it was made
    move(registry, "queued")
    assert takeable(registry, room=1) == []
    assert takeable(registry, room=2) == []
    assert takeable(registry, "s3", room=3) == takeable(registry, room=3) == [JOB]
    saved(registry, 5)
    assert takeable(registry, room=3) == []  # it would lose steps
    registry.takeovers.keep(JOB, "s1", 5, {}, adapter=False)
    assert takeable(registry, room=3) == [JOB]
    dead(registry, "s3")
    assert takeable(registry, room=2) == [JOB]


def test_what_a_server_writes_of_a_job_that_it_has_lost_is_refused(
    registry: Registry, job: TrainingJob
) -> None:
    move(registry, "running")
    dead(registry, "s1")
    with acting(Origin(actor="job", owned=(JOB, "s1"))):
        digest = add(registry, "mine", "1")
    take(registry, "s2")
    records, both = registry.training, files("2")
    refused: list[Callable[[], object]] = [
        lambda: records.move(JOB, "running", ("queued",), server="s1"),
        lambda: records.note(JOB, [event("still here")], server="s1"),
        lambda: registry.takeovers.keep(JOB, "s1", 5, {}, adapter=False),
        lambda: registry.add_version("mine", both.digest, both, {"kind": "training"}),
        lambda: registry.activate(TENANT, "mine", digest),
        lambda: add_file(registry, "curve"),
    ]
    with acting(Origin(actor="job", owned=(JOB, "s1"))):
        for write in refused:
            with pytest.raises(JobElsewhereError):
                write()
    records.move(JOB, "running", ("queued",), server="s2")
    with acting(Origin(actor="job", owned=(JOB, "s2"))):
        registry.activate(TENANT, "mine", digest)
    records.move(JOB, "cancelled", ("running",))  # whoever asks
    assert len(registry.versions(TENANT, "mine")) == 1


@pytest.mark.parametrize("state", ["cancelled", "paused"])
def test_a_job_that_was_stopped_a_moment_ago_activates_nothing(
    registry: Registry, job: TrainingJob, state: JobState
) -> None:
    move(registry, "running")
    with acting(Origin(actor="job", owned=(JOB, "s1"))):
        digest = add(registry, "mine", "1")
    move(registry, state)
    with acting(Origin(actor="job", owned=(JOB, "s1"))), pytest.raises(JobStateError, match=state):
        registry.activate(TENANT, "mine", digest)
    assert registry.adapter(TENANT, "mine").active is None
    registry.activate(TENANT, "mine", digest)  # a user may


def test_of_servers_that_want_one_job_one_gets_it(
    registry: Registry, job: TrainingJob, open_registry: Open
) -> None:
    dead(registry, "s1")
    servers = [open_registry() for _ in range(4)]

    def want(number: int) -> bool:
        try:
            take(servers[number], f"s{number + 2}")
        except JobElsewhereError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(want, range(4))) == 1


def test_a_job_that_takes_its_servers_with_it_is_counted_as_deadly(
    registry: Registry, job: TrainingJob
) -> None:
    for number in (1, 2):
        move(registry, "running")
        dead(registry, f"s{number}")
        assert take(registry, f"s{number + 1}", f"s{number}").deaths == number
    registry.takeovers.keep(JOB, "s3", 5, {}, adapter=False)
    dead(registry, "s3")
    assert take(registry, "s4", "s3").deaths == 2  # it was waiting
    move(registry, "running")
    dead(registry, "s4")
    assert take(registry, "s5", "s4").deaths == 1  # it came further


def test_what_a_job_goes_on_from_stays_in_the_store_as_long_as_it_may_go_on(
    registry: Registry, job: TrainingJob
) -> None:
    takeovers = registry.takeovers
    old, new, rows = (blob(text).sha256 for text in ("old", "new", "rows"))
    assert takeovers.unkept("s1", ["disk_full"]) == []
    saved(registry, 5)
    assert takeovers.unkept("s1", ["disk_full"]) == [UnkeptJob(JOB, 5, "checkpoints/5", False)]
    assert takeovers.keep(JOB, "s1", 5, {"a": old, "b": rows}, adapter=False) == {}
    assert takeovers.unkept("s1", ["disk_full"]) == []
    assert registry.referenced_blobs() == {old, rows}
    assert takeovers.keep(JOB, "s1", 10, {"a": new}, adapter=False) == {"a": old}
    assert takeovers.kept(JOB) == {"a": new}
    move(registry, "running", report={"steps": 10})
    saved(registry, 10)
    assert [one.trained for one in takeovers.unkept("s1", ["disk_full"])] == [True]
    move(registry, "failed", error=TrainingFailure("disk_full", "it is full"))
    takeovers.drop_ended(["disk_full"])
    assert takeovers.unkept("s1", []) == []
    assert registry.referenced_blobs() == {new, rows}
    takeovers.drop_ended([])
    assert registry.referenced_blobs() == {rows}
    assert takeovers.drop(JOB) == {}


def test_a_server_that_lost_a_job_drops_nothing_of_what_the_next_one_goes_on_from(
    registry: Registry, job: TrainingJob
) -> None:
    move(registry, "running")
    saved(registry, 5)
    registry.takeovers.keep(JOB, "s1", 5, {"a": blob("x").sha256}, adapter=False)
    dead(registry, "s1")
    take(registry, "s2")
    with pytest.raises(JobElsewhereError):
        registry.takeovers.drop(JOB, "s1")
    assert registry.takeovers.kept(JOB) == {"a": blob("x").sha256}
    assert registry.takeovers.drop(JOB, "s2") == {"a": blob("x").sha256}


def test_a_parent_s_files_outlive_its_version_while_a_job_goes_on_from_it(registry: Registry) -> None:
    digest = add(registry, "base", "1")
    parent = ParentVersion.of(registry.version(TENANT, "base", digest))
    file = add_file(registry, "a")
    add_job(registry, "one", parent=parent)
    registry.delete_version(TENANT, "base", digest)
    assert registry.referenced_blobs() == {file.sha256, parent.config, parent.weights}
    assert registry.takeovers.kept(JOB) == {"parent_config": parent.config, "parent_weights": parent.weights}
    registry.training.move(JOB, "cancelled", ("validating_files",))
    assert registry.takeovers.drop(JOB).keys() == {"parent_config", "parent_weights"}
    assert registry.referenced_blobs() == {file.sha256}
