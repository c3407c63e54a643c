"""Quotas of keys and tenants, and what is counted, on SQLite and on PostgreSQL."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.registry.conftest import Open, add, blob

from onebase_adapters.registry import (
    JOB_STATES,
    FileRecord,
    JobEvent,
    JobState,
    NewJob,
    Purpose,
    QuotaError,
    Quotas,
    Registry,
    RegistryError,
    UnknownKeyError,
    UsageFigures,
    UsageKey,
)
from onebase_adapters.registry.quotas import KEY_QUOTAS, TENANT_QUOTAS
from onebase_protocol.training import TrainingFailure

NOW = time.strftime("%Y-%m-%d", time.gmtime())


def add_file(
    registry: Registry, name: str, size: int, *, tenant: str = "acme", purpose: Purpose = "fine-tune"
) -> FileRecord:
    made = FileRecord(name, tenant, "server-1", purpose, "a.jsonl", size, 1.0, blob(name).sha256)
    return registry.training.add_file(made)


def add_job(registry: Registry, job_id: str, name: str = "new", tenant: str = "acme") -> None:
    registry.training.add_job(
        NewJob(job_id, tenant, "server-1", name, "file-1", None, "never", {}, {}), JobEvent(1.0, "made")
    )


def refused(quota: str, limit: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(QuotaError) as error:
        call(*args, **kwargs)
    assert (error.value.quota, error.value.limit) == (quota, limit)
    assert "onebase tenants set" in str(error.value)
    return str(error.value)


# ---- quotas -------------------------------------------------------------------------------------


def test_a_change_of_quotas_changes_what_it_names_and_leaves_the_rest(registry: Registry) -> None:
    registry.tenants.set_quotas("acme", {"requests": 60, "bytes": 1000})
    record = registry.tenants.set_quotas("acme", {"requests": None, "sequences": 8})
    assert record.quotas == Quotas(bytes=1000, sequences=8)
    assert registry.tenants.one("acme") == record
    assert registry.tenants.one("nobody").quotas == Quotas()

    made, _ = registry.keys.create("acme", ["generate"], quotas={"tokens": 5}, priority=3)
    assert (made.quotas, made.priority) == (Quotas(tokens=5), 3)
    registry.keys.change(made.id, {"sequences": 2})
    changed = registry.keys.change(made.id, {"tokens": None}, priority=-4)
    assert (changed.quotas, changed.priority) == (Quotas(sequences=2), -4)
    assert registry.keys.all() == [changed]
    with pytest.raises(UnknownKeyError):
        registry.keys.change("ob-nobody", {})


@pytest.mark.parametrize(
    ("tenant", "changes", "field"),
    [
        ("a b", {"sequences": 1}, "tenant"),
        ("acme", {"sequences": -1}, "quotas.sequences"),
        ("acme", {"sequences": 10**16}, "quotas.sequences"),
        ("acme", {"wishes": 1}, "quotas.wishes"),
    ],
)
def test_what_no_tenant_can_have_is_refused_by_its_name(
    registry: Registry, tenant: str, changes: dict[str, int | None], field: str
) -> None:
    with pytest.raises(RegistryError, match=f"^{field}: "):
        registry.tenants.set_quotas(tenant, changes)
    assert registry.tenants.all() == []


def test_an_adapter_too_many_is_refused_on_every_base_and_a_deleted_one_makes_room(
    registry: Registry, open_registry: Open
) -> None:
    registry.tenants.set_quotas("acme", {"adapters": 2})
    add(registry, "one", "1", tenant="acme")
    add(open_registry(base_id="base-2"), "two", "2", tenant="acme")

    assert "'acme'" in refused("adapters", 2, add, registry, "three", "3", tenant="acme")

    add(registry, "one", "another version", tenant="acme")
    add(registry, "three", "3", tenant="other")
    registry.delete_adapter("acme", "one")
    add(registry, "three", "3", tenant="acme")


def test_versions_and_files_of_a_tenant_are_within_its_bytes(registry: Registry) -> None:
    size = blob("config").size + blob("weights 1").size
    registry.tenants.set_quotas("acme", {"bytes": size + 10})
    add(registry, "one", "1", tenant="acme")
    add_file(registry, "file-1", 10)

    assert f"it keeps {size + 10}" in refused("bytes", size + 10, add_file, registry, "file-2", 1)
    refused("bytes", size + 10, add, registry, "one", "2", tenant="acme")

    refused("bytes", size + 10, registry.tenants.check_bytes, "acme", 1)
    registry.tenants.check_bytes("other", 10**6)
    assert registry.tenants.one("acme").bytes == size + 10
    add(registry, "one", "1", tenant="acme")  # the same content again
    add_file(registry, "file-3", 5, purpose="fine-tune-results")  # the curve of a job is always kept
    add_file(registry, "file-4", 10**6, tenant="other")
    registry.training.delete_file("acme", "file-1")
    registry.training.delete_file("acme", "file-3")
    add_file(registry, "file-5", 10)


def test_of_servers_that_add_the_last_one_at_once_one_is_let_through(
    registry: Registry, open_registry: Open
) -> None:
    servers = [open_registry() for _ in range(4)]
    for round_ in range(3):
        kept = registry.tenants.one("acme")
        registry.tenants.set_quotas("acme", {"adapters": kept.adapters + 1, "bytes": kept.bytes + 30})

        def file(place: int, round_: int = round_) -> bool:
            try:
                add_file(servers[place], f"file-{round_}-{place}", 20)
            except QuotaError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(file, range(4))) == 1

        registry.tenants.set_quotas("acme", {"bytes": None})

        def adapter(place: int, round_: int = round_) -> bool:
            try:
                add(servers[place], f"adapter-{round_}-{place}", f"{round_} {place}", tenant="acme")
            except QuotaError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(adapter, range(4))) == 1


def test_a_tenant_that_has_trained_long_enough_this_month_gets_no_job(registry: Registry) -> None:
    add_file(registry, "file-1", 10)
    registry.tenants.set_quotas("acme", {"training_seconds": 100})
    long_ago = UsageFigures(training_seconds=500.0)
    registry.usage.write("w", 1, {UsageKey("acme", "2020-01-31", "base", "a"): long_ago})
    add_job(registry, "job-1")
    registry.tenants.check_training("acme")

    registry.usage.write("w", 2, {UsageKey("acme", NOW, "base", "a"): UsageFigures(training_seconds=100.0)})

    refused("training_seconds", 100, add_job, registry, "job-2")
    refused("training_seconds", 100, registry.tenants.check_training, "acme")
    assert registry.tenants.one("acme").training_seconds == 100.0
    registry.tenants.check_training("other")


def test_jobs_that_wait_count_until_they_are_over(registry: Registry) -> None:
    add_file(registry, "file-1", 10)
    registry.tenants.set_quotas("acme", {"jobs": 2})
    move = registry.training.move
    add_job(registry, "job-1")
    add_job(registry, "job-2")
    states: tuple[JobState, ...] = ("queued", "paused")
    for state in states:  # on hold, too, a job is paused
        move("job-1", state, JOB_STATES)
        said = refused("jobs", 2, add_job, registry, "job-3")
        assert "cancel one" in said
    move("job-1", "failed", JOB_STATES, error=TrainingFailure("disk_full", "it can be resumed"))
    refused("jobs", 2, add_job, registry, "job-3")
    move("job-1", "failed", JOB_STATES, error=TrainingFailure("invalid_file", "it cannot"))
    assert registry.tenants.one("acme").jobs == 1
    add_job(registry, "job-3")
    refused("jobs", 2, add_job, registry, "job-4")
    assert registry.tenants.one("acme").jobs == 2
    move("job-2", "cancelled", JOB_STATES)
    add_job(registry, "job-4")
    add_file(registry, "file-1b", 1, tenant="other")
    registry.training.add_job(
        NewJob("job-5", "other", "server-1", "new", "file-1b", None, "never", {}, {}), JobEvent(1.0, "made")
    )


def test_the_rows_that_a_job_keeps_count_as_large_as_its_files(registry: Registry) -> None:
    add_file(registry, "file-1", 10)
    add_file(registry, "file-2", 5)
    registry.tenants.set_quotas("acme", {"bytes": 44})
    for name, held_out in (("job-1", "file-2"), ("job-2", None)):
        made = NewJob(name, "acme", "server-1", "new", "file-1", held_out, "never", {}, {})
        registry.training.add_job(made, JobEvent(1.0, "made"))
    assert registry.tenants.one("acme").bytes == 15 + 15 + 10
    assert "cancel jobs" in refused("bytes", 44, add_job, registry, "job-3")
    refused("bytes", 44, add_file, registry, "file-3", 5)
    registry.training.move("job-1", "paused", JOB_STATES)
    refused("bytes", 44, add_file, registry, "file-3", 5)
    registry.training.move("job-1", "cancelled", JOB_STATES)
    assert registry.tenants.one("acme").bytes == 15 + 10
    add_job(registry, "job-3")


def test_a_job_whose_adapter_would_be_one_too_many_is_refused_before_it_trains(registry: Registry) -> None:
    add_file(registry, "file-1", 10)
    add(registry, "mine", "1", tenant="acme")
    registry.tenants.set_quotas("acme", {"adapters": 1})

    add_job(registry, "job-1", "mine")
    refused("adapters", 1, add_job, registry, "job-2", "new")


def test_tenants_are_all_that_have_anything(registry: Registry) -> None:
    registry.keys.create("with-key", ["generate"])
    add(registry, "one", "1", tenant="with-adapter")
    add_file(registry, "file-1", 10, tenant="with-file")
    registry.usage.write("w", 1, {UsageKey("with-use", NOW, "base", ""): UsageFigures(requests=1)})
    registry.tenants.set_quotas("with-quota", {"sequences": 1})

    found = {record.tenant: record for record in registry.tenants.all()}

    assert list(found) == ["with-adapter", "with-file", "with-key", "with-quota", "with-use"]
    assert found["with-adapter"].adapters == 1
    assert found["with-file"].bytes == 10


# ---- usage --------------------------------------------------------------------------------------


def test_use_adds_up_over_servers_and_a_batch_that_comes_twice_counts_once(
    registry: Registry, open_registry: Open
) -> None:
    other = open_registry(base_id="base-2")
    monday, tuesday = (UsageKey("acme", day, "base", "one") for day in ("2026-11-23", "2026-11-24"))
    figures = UsageFigures(2, 10, 4, 6, 0.5, 7)
    registry.usage.write("first", 1, {monday: figures, tuesday: figures})
    other.usage.write("second", 1, {monday: figures})
    registry.usage.write("first", 1, {monday: figures, tuesday: figures})
    registry.usage.write("first", 2, {monday: figures})

    found = registry.usage.find("2026-11-23", "2026-11-24", ("day",), limit=9)

    assert found == [
        ({"day": "2026-11-23"}, UsageFigures(6, 30, 12, 18, 1.5, 21)),
        ({"day": "2026-11-24"}, figures),
    ]


def test_use_is_told_by_what_was_asked_for_and_of_one_tenant(registry: Registry) -> None:
    one = UsageFigures(requests=1)
    rows = {
        UsageKey(tenant, day, "base", adapter): one
        for tenant in ("acme", "other")
        for day in ("2026-11-23", "2026-11-24", "2026-11-25")
        for adapter in ("", "=1+1", "\x00'")
    }
    registry.usage.write("w", 1, rows)

    def found(*by: str, **how: Any) -> list[tuple[dict[str, str], int]]:
        start, end = "2026-11-24", "2026-11-25"
        rows = registry.usage.find(start, end, by, **{"limit": 9, **how})
        return [(names, figures.requests) for names, figures in rows]

    assert found("tenant") == [({"tenant": "acme"}, 6), ({"tenant": "other"}, 6)]
    assert found("day", tenant="acme") == [({"day": "2026-11-24"}, 3), ({"day": "2026-11-25"}, 3)]
    assert {names["adapter"] for names, _ in found("tenant", "adapter")} == {"", "=1+1", "\ufffd'"}
    assert len(found("day", "adapter", limit=4)) == 4
    assert found("base", tenant="nobody") == []


def test_servers_that_write_the_same_rows_at_once_lose_nothing(
    registry: Registry, open_registry: Open
) -> None:
    servers = [open_registry() for _ in range(4)]
    keys = [UsageKey("acme", NOW, "base", f"adapter-{number}") for number in range(20)]

    def write(place: int) -> None:
        order = keys if place % 2 else keys[::-1]
        for batch in range(1, 11):
            servers[place].usage.write(
                f"server-{place}", batch, {key: UsageFigures(requests=1) for key in order}
            )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))

    found = registry.usage.find(NOW, NOW, ("adapter",), limit=99)
    assert [figures.requests for _, figures in found] == [40] * 20


def test_the_console_names_quotas_as_the_server_does() -> None:
    text = (Path(__file__).parents[3] / "clients/web/src/lib/machine.svelte.ts").read_text()
    begin, middle = text.index("KEY_QUOTAS = ["), text.index("TENANT_QUOTAS = [")
    names = re.compile(r"name: '(\w+)'")
    of_keys = names.findall(text[begin:middle])
    of_tenants = names.findall(text[middle : text.index("]", middle)])
    assert tuple(of_keys) == KEY_QUOTAS
    assert {*of_keys, *of_tenants} <= set(TENANT_QUOTAS)
