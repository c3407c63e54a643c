"""The audit log, on SQLite and on PostgreSQL: an entry with each change, and none that is ever another."""

from __future__ import annotations

import inspect
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import exc, text
from tests.adapters.registry.conftest import Open, add, blob

from onebase_adapters.registry import (
    FileInUseError,
    FileRecord,
    JobEvent,
    NewJob,
    Origin,
    Registry,
    StaleActivationError,
    UnknownKeyError,
    acting,
)
from onebase_adapters.store.blobs import AdapterFiles
from onebase_protocol.access import audit_chain
from onebase_protocol.training import TrainingFailure

ADA = Origin("ob-0123456789abcdef", request="req-1")


def actions(registry: Registry, **filters: Any) -> list[str]:
    """Oldest first."""
    return [entry.action for entry in registry.audit.entries(limit=1000, oldest_first=True, **filters)]


def add_file(registry: Registry, name: str, tenant: str = "default") -> str:
    made = FileRecord(name, tenant, "server-1", "fine-tune", "rows.jsonl", 9, time.time(), blob(name).sha256)
    return registry.training.add_file(made).id


def add_job(registry: Registry, number: str, file: str) -> str:
    job = NewJob(f"ftjob-{number}", "default", "server-1", "acme", file, None, "always", {}, {})
    return registry.training.add_job(job, JobEvent(time.time(), "created")).id


def test_each_change_of_an_adapter_is_there_once_with_who_made_it(registry: Registry) -> None:
    registry.sign("server-1")
    with acting(ADA):
        one, two = add(registry, "acme", "1"), add(registry, "acme", "2")
        add(registry, "acme", "1")  # known already
        registry.activate("default", "acme", one)
        registry.activate("default", "acme", two[:8])
        registry.activate("default", "acme", two)  # active already
        registry.rollback("default", "acme")
        for value in (True, True, False):
            registry.pin("default", "acme", value)
            registry.share("default", "acme", value)
        registry.delete_version("default", "acme", one)
        registry.delete_adapter("default", "acme")
    found = registry.audit.entries(limit=100, oldest_first=True)
    assert [entry.action.removeprefix("adapter.") for entry in found] == [
        "uploaded", "uploaded", "activated", "activated", "rolled_back", "pinned", "shared", "unpinned",
        "unshared", "deactivated", "version_deleted", "deleted",
    ]  # fmt: skip
    assert {(entry.key, entry.request, entry.server) for entry in found} == {(ADA.key, "req-1", "server-1")}
    assert {(entry.tenant, entry.target, entry.base) for entry in found} == {("default", "acme", "base")}
    assert [entry.version for entry in found[:5]] == [one, two, one, two, one]
    assert [entry.details["previous"] for entry in found[2:5]] == [None, one, two]
    assert found[-1].details == {"count": 1, "versions": [two], "active": None}
    assert [entry.number for entry in found] == sorted(entry.number for entry in found)


def check_chain(registry: Registry) -> int:
    """Check the sums of all entries, and return how many there are."""
    before, found = "", registry.audit.entries(limit=1000, oldest_first=True)
    names = [name for name in inspect.signature(audit_chain).parameters if name != "before"]
    for entry in found:
        before = audit_chain(before, **{name: getattr(entry, name) for name in names})
        assert entry.chain == before
    return len(found)


def test_each_entry_is_chained_to_the_one_before_it(registry: Registry) -> None:
    for number in range(3):
        add(registry, f"acme-{number}", str(number))
    assert check_chain(registry) == 3


def test_the_chain_holds_where_several_threads_of_several_servers_write(
    registry: Registry, open_registry: Open
) -> None:
    servers = [registry, open_registry(base_id="base-2")]

    def write(place: int) -> None:
        for number in range(8):
            add_file(servers[place % 2], f"file-{place}-{number}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    assert check_chain(registry) == 48


def test_a_signature_that_comes_later_is_an_entry_and_a_worse_one_changes_nothing(
    registry: Registry,
) -> None:
    refused, verified = {"status": "refused", "code": "signature_missing"}, {"status": "verified"}
    files = AdapterFiles(blob("1-config"), blob("1-weights"))
    for signature in (refused, verified | {"bundle": "{}"}, verified | {"bundle": "{}"}, refused):
        version, _ = registry.add_version("acme", "1" * 64, files, {"signature": signature})
    assert version.source["signature"]["status"] == "verified"
    assert actions(registry) == ["adapter.uploaded", "adapter.signed"]
    (entry, *_) = registry.audit.entries(limit=1)
    assert entry.details == {"signature": verified}


def test_an_adapter_that_goes_with_its_last_version_has_an_entry_of_its_own(registry: Registry) -> None:
    digest = add(registry, "acme", "1")
    registry.delete_version("default", "acme", digest)
    assert actions(registry)[1:] == ["adapter.version_deleted", "adapter.deleted"]
    (gone, *_) = registry.audit.entries(limit=1)
    assert gone.details == {"count": 1, "versions": [digest], "active": None}


def test_files_keys_and_jobs_are_there_and_what_a_server_does_for_a_job_is_done_for_its_maker(
    registry: Registry,
) -> None:
    training = registry.training
    with acting(ADA):
        file = add_file(registry, "file-1")
        job, other = add_job(registry, "1", file), add_job(registry, "2", file)
        key, secret = registry.keys.create("acme", ["train"], name="ci")
    training.move(job, "queued", ("validating_files",))
    training.move(job, "running", ("queued",))
    training.move(job, "queued", ("running",))  # interrupted: nobody's doing
    training.move(other, "failed", ("validating_files",), error=TrainingFailure("disk_full", "full"))
    with acting(Origin("ob-fedcba9876543210")):
        training.move(job, "paused", ("queued",))
        training.move(job, "queued", ("paused",))
        training.move(other, "validating_files", ("failed",))
        training.move(other, "cancelled", ("validating_files",))
    training.move(job, "running", ("queued",))
    training.move(job, "succeeded", ("running",), version="f" * 64, activated=True)
    training.delete_file("default", file)
    registry.keys.change(key.id, {"sequences": 2}, 3)
    registry.tenants.set_quotas("acme", {"bytes": 1000})
    registry.keys.revoke(key.id)
    registry.keys.revoke(key.id)

    found = {entry.action: entry for entry in registry.audit.entries(limit=100)}
    assert actions(registry) == [
        "file.added", "job.created", "job.created", "key.created", "job.failed", "job.paused", "job.resumed",
        "job.resumed", "job.cancelled", "job.succeeded", "file.deleted", "key.changed",
        "tenant.changed", "key.revoked",
    ]  # fmt: skip
    done = found["job.succeeded"]
    assert (done.key, done.actor, done.version) == (ADA.key, f"job {job}", "f" * 64)
    assert done.details == {"adapter": "acme", "activated": True}
    assert (found["job.failed"].key, found["job.failed"].details["code"]) == (ADA.key, "disk_full")
    assert (found["job.paused"].key, found["job.paused"].actor) == ("ob-fedcba9876543210", "")
    assert (found["key.revoked"].tenant, found["key.revoked"].target) == ("acme", key.id)
    assert found["key.changed"].details == {"quotas": {"sequences": 2}, "priority": 3}
    assert (found["tenant.changed"].target, found["tenant.changed"].details) == (
        "acme",
        {"quotas": {"bytes": 1000}},
    )
    with registry._database.read() as session:
        rows = str(session.execute(text("SELECT * FROM audit")).all())
    assert secret.removeprefix(f"{key.id}-") not in rows
    assert key.sha256 not in rows


def test_a_change_that_fails_leaves_no_entry_and_an_entry_that_fails_no_change(registry: Registry) -> None:
    digest = add(registry, "acme", "1")
    file = add_file(registry, "file-1")
    add_job(registry, "1", file)
    before = actions(registry)
    for error, change in (
        (StaleActivationError, lambda: registry.activate("default", "acme", digest, expected="f" * 64)),
        (FileInUseError, lambda: registry.training.delete_file("default", file)),
        (UnknownKeyError, lambda: registry.keys.revoke("ob-none")),
    ):
        with pytest.raises(error):
            change()
    assert actions(registry) == before

    with registry._database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE audit RENAME TO hidden"))
    for call in (
        lambda: registry.activate("default", "acme", digest),
        lambda: registry.keys.create("acme", ["train"]),
        lambda: add_file(registry, "file-2"),
    ):
        with pytest.raises(Exception, match="audit"):
            call()
    with registry._database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE hidden RENAME TO audit"))
    assert registry.adapter("default", "acme").active is None
    assert registry.keys.all() == []
    assert [one.id for one in registry.training.files("default", limit=9)] == [file]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET tenant = 'other'",
        "DELETE FROM audit",
        "TRUNCATE audit",
        "INSERT OR REPLACE INTO audit (number, at, tenant, key, actor, action, target, server, request) "
        "SELECT number, at, 'other', key, actor, action, target, server, request FROM audit",
    ],
)
def test_the_database_refuses_to_change_or_delete_an_entry(registry: Registry, statement: str) -> None:
    add(registry, "acme", "1")
    with pytest.raises(exc.DBAPIError), registry._database.engine.begin() as connection:
        connection.execute(text(statement))
    (entry,) = registry.audit.entries(limit=9)
    assert (entry.tenant, entry.action) == ("default", "adapter.uploaded")


def test_entries_are_found_by_tenant_kind_target_and_time_page_by_page(registry: Registry) -> None:
    digest = add(registry, "acme", "1")
    middle = time.time()
    add(registry, "acme", "2", tenant="other")
    registry.activate("default", "acme", digest)
    add_file(registry, "file-1", tenant="other")
    registry.keys.create("other", ["train"])

    assert actions(registry, tenant="other") == ["adapter.uploaded", "file.added", "key.created"]
    assert actions(registry, action="adapter") == [
        "adapter.uploaded",
        "adapter.uploaded",
        "adapter.activated",
    ]
    assert actions(registry, action="adapter.activated") == ["adapter.activated"]
    assert actions(registry, action="adapter.act") == actions(registry, target="ac%") == []
    assert actions(registry, target="file-1") == ["file.added"]
    assert len(actions(registry, since=middle)) == 4
    assert actions(registry, target="\0", tenant="\ud800") == []
    whole = registry.audit.entries(limit=100)
    for oldest_first, expected in ((False, whole), (True, whole[::-1])):
        pages, after = [], None
        while page := registry.audit.entries(limit=2, after=after, oldest_first=oldest_first):
            pages += page
            after = page[-1].number
        assert pages == expected


def test_who_reads_on_from_the_last_entry_misses_none_that_several_servers_write(
    registry: Registry, open_registry: Open
) -> None:
    """Also of changes that do not wait for each other, as those of files."""
    servers = [open_registry(base_id=f"base-{number}") for number in range(4)]
    done, seen = threading.Event(), []

    def write(place: int) -> None:
        for number in range(15):
            add_file(servers[place], f"file-{place}-{number}")

    def follow() -> None:
        last = 0
        while True:
            over = done.is_set()
            for entry in registry.audit.entries(after=last, limit=1000, oldest_first=True):
                last = entry.number
                seen.append(entry.target)
            if over:
                return

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(follow)
        list(pool.map(write, range(4)))
        done.set()
        reader.result()
    assert sorted(seen) == sorted(f"file-{place}-{number}" for place in range(4) for number in range(15))


def test_what_nobody_can_type_is_kept_as_text_that_every_database_takes(registry: Registry) -> None:
    with acting(Origin("k" * 5000, request="\0", actor="\ud800")):
        add_file(registry, "file-1")
    (entry,) = registry.audit.entries(limit=9)
    assert (len(entry.key), entry.request) == (512, "\ufffd")
