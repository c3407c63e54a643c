"""Training jobs in the registry: what is kept, in which order it is told, and what a state allows."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tests.adapters.registry.conftest import Open, add, blob

from onebase_adapters.registry import (
    Checkpoint,
    FileInUseError,
    FileRecord,
    JobEvent,
    JobStateError,
    JobStop,
    NewJob,
    OpenJob,
    Origin,
    Registry,
    TrainingJob,
    UnknownFileError,
    UnknownJobError,
    acting,
)
from onebase_protocol.training import TrainingFailure

TENANT = "default"


def add_file(registry: Registry, name: str, **changes: Any) -> FileRecord:
    facts = {
        "id": f"file-{name}", "tenant": TENANT, "server": "s1", "purpose": "fine-tune",
        "filename": f"{name}.jsonl", "bytes": 12, "created_at": time.time(),
        "sha256": blob(name).sha256,
    }  # fmt: skip
    return registry.training.add_file(FileRecord(**facts | changes))


def add_job(registry: Registry, name: str, **changes: Any) -> TrainingJob:
    facts = {
        "id": f"ftjob-{name}", "tenant": TENANT, "server": "s1", "name": name, "training_file": "file-a",
        "validation_file": None, "activate": "if_better", "settings": {"r": 8}, "labels": {},
    }  # fmt: skip
    return registry.training.add_job(NewJob(**facts | changes), event("created"))


def event(message: str, **data: Any) -> JobEvent:
    return JobEvent(time.time(), message, data=data or None)


@pytest.fixture
def jobs(registry: Registry) -> list[TrainingJob]:
    add_file(registry, "a")
    return [add_job(registry, name) for name in ("one", "two", "three")]


def test_a_job_that_is_to_stop_is_known_to_its_server_and_in_the_audit_log(
    registry: Registry, jobs: list[TrainingJob]
) -> None:
    records, stop = registry.training, JobStop(7, "key-1", 5.0)
    records.move("ftjob-one", "queued", ["validating_files"])
    records.move("ftjob-one", "running", ["queued"])
    assert records.open_jobs("s1")[0].last_step is None
    with acting(Origin("key-1")):
        moved = records.move("ftjob-one", "running", ["running"], stop=stop)
    assert moved.stop == records.job(TENANT, "ftjob-one").stop == stop
    assert records.open_jobs("s1")[0] == OpenJob("ftjob-one", TENANT, "running", 0, False, 7)
    told = [(one.action, one.key) for one in registry.audit.entries(target="ftjob-one", limit=9)]
    assert told == [("job.stopped", "key-1"), ("job.created", "")]


def test_a_job_that_two_stop_at_once_is_stopped_by_the_first(
    registry: Registry, jobs: list[TrainingJob]
) -> None:
    records, first, second = registry.training, JobStop(7, "key-1", 5.0), JobStop(8, "key-2", 6.0)
    records.move("ftjob-one", "queued", ["validating_files"])
    records.move("ftjob-one", "running", ["queued"])
    for stop in (first, second):
        event = JobEvent(stop.at, "The job is to stop.")
        assert records.move("ftjob-one", "running", ["running"], event, stop=stop).stop == first
    records.move("ftjob-one", "paused", ["running"])
    assert records.move("ftjob-one", "queued", ["paused"], stop=second).stop == first
    found = registry.audit.entries(target="ftjob-one", limit=9)
    assert [one.action for one in found] == ["job.stopped", "job.paused", "job.stopped", "job.created"]
    told = [one.message for one in records.events(jobs[0], limit=9)]
    assert told.count("The job is to stop.") == 1


def test_a_job_that_waits_after_its_check_is_paused_by_nobody(registry: Registry) -> None:
    add_file(registry, "a")
    assert add_job(registry, "held", hold=True).hold is True
    moved = registry.training.move("ftjob-held", "paused", ["validating_files"], plan={"steps": 1})
    assert (moved.state, moved.hold) == ("paused", True)
    assert registry.training.move("ftjob-held", "queued", ["paused"], hold=False).hold is False
    found = registry.audit.entries(target="ftjob-held", limit=9)
    assert [one.action for one in found] == ["job.resumed", "job.created"]
    assert {one.actor for one in found} == {""}  # no key was needed; the job did neither by itself
    assert found[-1].details["hold"] is True


def test_the_speed_of_finished_jobs_is_known_the_newest_first(
    registry: Registry, jobs: list[TrainingJob]
) -> None:
    plan = {"steps": 1, "estimate": {"flops_per_token": 1000}}
    for name, tokens, seconds in (("one", 400, 4.0), ("two", 400, 8.0), ("three", 400, 0.5)):
        registry.training.move(f"ftjob-{name}", "queued", ["validating_files"], plan=plan)
        registry.training.move(f"ftjob-{name}", "running", ["queued"])
        report = {"tokens": tokens, "seconds": seconds}
        registry.training.move(f"ftjob-{name}", "succeeded", ["running"], report=report)
    assert registry.training.training_rates(5) == [50_000.0, 100_000.0]  # the third was too short to tell
    assert registry.training.training_rates(2) == [50_000.0]


def test_what_was_added_is_what_another_server_reads(
    registry: Registry, open_registry: Open, jobs: list[TrainingJob]
) -> None:
    other = open_registry().training
    assert [job.id for job in other.jobs(TENANT, limit=10)] == ["ftjob-three", "ftjob-two", "ftjob-one"]
    assert other.job(TENANT, "ftjob-two") == jobs[1]
    assert [told.message for told in other.events(jobs[1], limit=10)] == ["created"]
    assert other.counts() == {"validating_files": 3}
    with pytest.raises(UnknownJobError):
        open_registry(base_id="base-2").training.job(TENANT, "ftjob-two")


def test_lists_are_paged_by_the_last_one_seen(registry: Registry, jobs: list[TrainingJob]) -> None:
    records = registry.training
    first = records.jobs(TENANT, limit=2)
    rest = records.jobs(TENANT, limit=2, after=first[-1].id)
    assert [job.id for job in (*first, *rest)] == ["ftjob-three", "ftjob-two", "ftjob-one"]
    for name in "bcd":
        add_file(registry, name)
    assert [file.id for file in records.files(TENANT, limit=2, after="file-c")] == ["file-b", "file-a"]
    oldest = records.files(TENANT, limit=2, after="file-b", oldest_first=True)
    assert [file.id for file in oldest] == ["file-c", "file-d"]


def test_jobs_are_found_by_their_labels(registry: Registry, jobs: list[TrainingJob]) -> None:
    add_job(registry, "four", labels={"team": "a", "x": "1"})
    add_job(registry, "five", labels={"team": "b"})
    found = registry.training.jobs(TENANT, limit=9, labels={"team": "a", "x": "1"})
    assert [job.name for job in found] == ["four"]
    assert registry.training.jobs(TENANT, limit=9, labels={"team": "a", "x": "2"}) == []


@pytest.mark.parametrize("key", ['a "quoted" key', "back\\slash", "Schlüssel", "a.b[0]", "$", "0", "'"])
def test_a_label_is_found_whatever_its_key_is(registry: Registry, jobs: list[TrainingJob], key: str) -> None:
    add_job(registry, "four", labels={key: key})
    add_job(registry, "five", labels={key: "other", "other": key})
    found = registry.training.jobs(TENANT, limit=9, labels={key: key})
    assert [job.name for job in found] == ["four"]


def test_events_are_read_forwards_and_backwards_without_a_gap(
    registry: Registry, jobs: list[TrainingJob]
) -> None:
    records, job = registry.training, jobs[0]
    for number in range(3):
        records.note(job.id, [event(f"{number}-{part}") for part in range(2)])
        records.note(jobs[1].id, [event("of another job")])
    forwards = []
    last = 0
    while page := records.events_since(job, last, 2):
        forwards += page
        last = page[-1].number
    backwards = []
    before: int | None = None
    while page := records.events(job, before=before, limit=2):
        backwards += page
        before = page[-1].number
    told = ["created", *(f"{number}-{part}" for number in range(3) for part in range(2))]
    assert [one.message for one in forwards] == told
    assert backwards == forwards[::-1]


def test_a_state_is_left_only_by_those_who_expect_it(registry: Registry, jobs: list[TrainingJob]) -> None:
    records, job = registry.training, jobs[0]
    moved = records.move(job.id, "queued", ("validating_files",), plan={"steps": 3})
    assert (moved.state, moved.plan, moved.finished_at) == ("queued", {"steps": 3}, None)
    with pytest.raises(JobStateError) as refused:
        records.move(job.id, "paused", ("running",), event("never told"))
    assert refused.value.state == "queued"
    failed = records.move(
        job.id, "failed", ("queued",), error=TrainingFailure("bad", "a bad file", "training_file")
    )
    assert failed.error == TrainingFailure("bad", "a bad file", "training_file")
    assert failed.finished_at is not None
    again = records.move(job.id, "queued", ("failed",))
    assert (again.error, again.finished_at) == (None, None)
    assert "never told" not in [told.message for told in records.events(job, limit=9)]


def test_a_job_whose_adapter_is_being_delivered_is_moved_only_by_those_who_deliver_it(
    registry: Registry, jobs: list[TrainingJob]
) -> None:
    records, job = registry.training, jobs[0]
    records.move(job.id, "running", ("validating_files",))
    records.move(job.id, "running", ("running",), report={"steps": 3})
    with pytest.raises(JobStateError):
        records.move(job.id, "cancelled", ("running",), while_delivered=False)
    assert records.move(job.id, "queued", ("running",)).report == {"steps": 3}
    assert records.move(job.id, "paused", ("queued",), while_delivered=False).state == "paused"


def test_a_server_has_to_do_what_is_its_own_and_not_at_an_end(
    registry: Registry, jobs: list[TrainingJob]
) -> None:
    records = registry.training
    records.move(jobs[0].id, "cancelled", ("validating_files",))
    add_job(registry, "elsewhere", server="s2")
    waits = [OpenJob(f"ftjob-{name}", "default", "validating_files", 0, False) for name in ("two", "three")]
    assert records.open_jobs("s1") == waits
    assert [job.id for job in records.open_jobs("s2")] == ["ftjob-elsewhere"]
    records.move("ftjob-two", "running", ("validating_files",), report={"steps": 3})
    assert records.open_jobs("s1")[0] == OpenJob("ftjob-two", "default", "running", 0, True)
    records.move(
        "ftjob-elsewhere", "failed", ("validating_files",), error=TrainingFailure("bad", "a bad file")
    )
    assert records.job_ends("s2") == {"ftjob-elsewhere": ("failed", "bad")}
    assert records.job_ends("s1")["ftjob-one"] == ("cancelled", None)


def test_a_checkpoint_written_again_takes_the_place_of_the_first(
    registry: Registry, jobs: list[TrainingJob]
) -> None:
    records, job = registry.training, jobs[0]
    records.note(job.id, checkpoints=[Checkpoint(5, "checkpoints/5", 1.0, 2.5, None)])
    again = [Checkpoint(step, f"checkpoints/{step}", 2.0, 2.25, 2.0) for step in (5, 10)]
    records.note(job.id, checkpoints=again)
    found = [(one.step, one.at) for one in records.checkpoints(job)]
    assert found == [(10, 2.0), (5, 2.0)]
    assert records.job(TENANT, job.id).saved_step == 10


def test_a_file_stays_while_a_job_needs_it(registry: Registry, jobs: list[TrainingJob]) -> None:
    records = registry.training
    with pytest.raises(FileInUseError) as refused:
        records.delete_file(TENANT, "file-a")
    assert refused.value.job in {job.id for job in jobs}
    for job in jobs:
        records.move(job.id, "cancelled", ("validating_files",))
    records.delete_file(TENANT, "file-a")
    with pytest.raises(UnknownFileError):
        add_job(registry, "late")
    assert records.files(TENANT, limit=9) == []


def test_a_file_stays_while_a_failed_job_may_go_on(registry: Registry, jobs: list[TrainingJob]) -> None:
    records = registry.training
    for job in jobs:
        records.move(
            job.id, "failed", ("validating_files",), error=TrainingFailure("disk_full", "it is full")
        )
    with pytest.raises(FileInUseError):
        records.delete_file(TENANT, "file-a", ("disk_full", "trainer_died"))
    records.delete_file(TENANT, "file-a", ("trainer_died",))
    assert records.files(TENANT, limit=9) == []


def test_a_files_blob_is_needed_whoever_has_the_file_and_given_up_with_the_last_that_needs_it(
    registry: Registry, open_registry: Open
) -> None:
    records, content = registry.training, blob("weights shared")
    for name, owner in (("a", {}), ("b", {"server": "s2"}), ("c", {"tenant": "acme"})):
        add_file(registry, name, sha256=content.sha256, **owner)
    other = open_registry(base_id="base-2")
    assert other.referenced_blobs() == {content.sha256}
    for tenant, file_id in ((TENANT, "file-a"), (TENANT, "file-b")):
        assert records.delete_file(tenant, file_id) == set()
    digest = add(registry, "of-the-same-content", "shared")
    assert records.delete_file("acme", "file-c") == set()
    add_file(registry, "d", sha256=content.sha256)
    assert content.sha256 not in registry.delete_version(TENANT, "of-the-same-content", digest)
    assert records.delete_file(TENANT, "file-d") == {content.sha256}


def test_a_curve_that_is_kept_again_has_its_new_content(registry: Registry) -> None:
    old, new = blob("old"), blob("newer")
    for content in (old, new):
        add_file(registry, "curve", sha256=content.sha256, bytes=content.size)
    kept = registry.training.file(TENANT, "file-curve")
    assert (kept.sha256, kept.bytes) == (new.sha256, new.size)
    assert registry.referenced_blobs() == {new.sha256}


def test_numbers_and_texts_that_no_database_takes_are_made_plain(
    registry: Registry, jobs: list[TrainingJob]
) -> None:
    records, job = registry.training, jobs[0]
    records.note(job.id, [event("a\0b\ud800", loss=float("nan"), text="\0")], progress={"loss": float("inf")})
    assert records.events(job, limit=1)[0].data == {"loss": None, "text": "\ufffd"}
    assert records.job(TENANT, job.id).progress == {"loss": None}


def test_what_jobs_tell_does_not_move_the_counter_that_catalogs_follow(
    registry: Registry, jobs: list[TrainingJob]
) -> None:
    before = registry.change_counter()
    registry.training.note(jobs[0].id, [event("something")])
    registry.training.move(jobs[0].id, "queued", ("validating_files",))
    assert registry.change_counter() == before
