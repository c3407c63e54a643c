"""Batches in the registry: of one tenant and one base, in states that only go forward."""

from __future__ import annotations

from typing import Any

import pytest

from onebase_adapters.registry import (
    BatchElsewhereError,
    BatchStateError,
    FileInUseError,
    FileRecord,
    NewBatch,
    Origin,
    QuotaError,
    Registry,
    RegistryError,
    UnknownBatchError,
    UnknownFileError,
    acting,
)
from onebase_adapters.registry import batches as module
from onebase_protocol.batches import BatchError

SHA = "ab" * 32
HERE = "server-1"


def add_file(registry: Registry, name: str = "file-1", tenant: str = "acme") -> None:
    file = FileRecord(name, tenant, HERE, "batch", "rows.jsonl", 10, 1.0, SHA)
    registry.training.add_file(file)


def new(number: int = 1, tenant: str = "acme", **changes: Any) -> NewBatch:
    made: dict[str, Any] = {"id": f"batch_{number}", "tenant": tenant, "server": HERE, "endpoint": "/v1/x"}
    made |= {"input_file": "file-1", "window": "24h", "created_at": 8.0, "expires_at": 9.0}
    made["labels"] = {"team": "night"}
    return NewBatch(**made | changes)


def test_a_batch_is_found_by_its_tenant_and_its_server_alone(registry: Registry) -> None:
    add_file(registry)
    with acting(Origin("ob-1")):
        made = registry.batches.add(new())

    assert (made.state, made.key, made.labels, made.total) == ("validating", "ob-1", {"team": "night"}, 0)
    assert registry.batches.batch("acme", "batch_1") == made
    assert registry.batches.open_batches(HERE) == [made]
    assert registry.batches.open_ids(HERE) == {"batch_1"}
    assert registry.batches.open_batches("server-2") == []
    assert registry.batches.counts() == {"validating": 1}
    for look in (
        registry.batches.batch,
        lambda tenant, one: registry.batches.batches(tenant, after=one, limit=1),
    ):
        with pytest.raises(UnknownBatchError):
            look("rival", "batch_1")
    with pytest.raises(UnknownFileError):
        registry.batches.add(new(2, "rival"))


def test_pages_are_the_newest_first(registry: Registry) -> None:
    add_file(registry)
    for number in range(4):
        registry.batches.add(new(number))
    first = registry.batches.batches("acme", limit=3)
    rest = registry.batches.batches("acme", after=first[-1].id, limit=3)
    assert [batch.id for batch in (*first, *rest)] == ["batch_3", "batch_2", "batch_1", "batch_0"]


def test_it_moves_from_the_states_that_are_named_and_keeps_when_and_why(registry: Registry) -> None:
    add_file(registry)
    registry.batches.add(new())
    batch = registry.batches.move("batch_1", "in_progress", ("validating",), total=5)
    registry.batches.note("batch_1", completed=3, failed=1, usage={"prompt": 9})
    with pytest.raises(FileInUseError, match="batch batch_1 needs it"):
        registry.training.delete_file("acme", "file-1")
    with pytest.raises(BatchStateError) as raised:
        registry.batches.move("batch_1", "cancelling", ("validating",))
    assert raised.value.state == "in_progress"
    for wrong in ({"state": "x"}, {"nothing": 1}):
        with pytest.raises(RegistryError):
            registry.batches.note("batch_1", **wrong)
    with pytest.raises(UnknownBatchError):
        registry.batches.move("batch_1", "cancelling", ("in_progress",), tenant="rival")

    revoked = BatchError(code="invalid_api_key", message="It was revoked.")
    errors = [revoked, BatchError(code="x", message="nul \0", line=3, param="body")]
    ended = registry.batches.move("batch_1", "failed", ("in_progress",), errors=errors, output_file="file-2")
    with pytest.raises(BatchStateError):
        registry.batches.note("batch_1", completed=1)

    assert ended.ended
    assert ended.times["in_progress"] == batch.times["in_progress"] <= ended.times["failed"]
    assert ended.errors == (revoked, BatchError(code="x", message="nul \ufffd", line=3, param="body"))
    assert (ended.total, ended.completed, ended.failed, ended.usage) == (5, 3, 1, {"prompt": 9})
    assert registry.batches.batch("acme", "batch_1") == ended
    assert registry.batches.open_ids(HERE) == set()
    registry.training.delete_file("acme", "file-1")
    noted = registry.audit.entries(target="batch_1", limit=9, oldest_first=True)
    assert [(entry.action, entry.actor) for entry in noted] == [
        ("batch.created", ""), ("batch.failed", "batch batch_1"),
    ]  # fmt: skip


def test_a_tenant_has_so_many_open_ones_and_no_more(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_OPEN", 2)
    add_file(registry)
    add_file(registry, "file-2", "rival")
    for number in range(2):
        registry.batches.add(new(number))
    with pytest.raises(QuotaError, match="has 2 batches that have not ended"):
        registry.batches.add(new(2))
    registry.batches.add(new(3, "rival", input_file="file-2"))
    registry.batches.add(new(5, server="server-2"))
    module.BatchRecords(registry.batches._database, "another base").add(new(6))
    registry.batches.move("batch_0", "cancelling", ("validating",))
    registry.batches.move("batch_0", "cancelled", ("cancelling",))
    registry.batches.add(new(4))


def test_content_that_has_several_ids_counts_once(registry: Registry) -> None:
    for name in ("file-1", "file-2"):
        add_file(registry, name)
    assert registry.tenants.one("acme").bytes == 10
    found = registry.training.files("acme", purposes=["batch"], sha256=SHA, limit=9, oldest_first=True)
    assert [file.id for file in found] == ["file-1", "file-2"]
    assert registry.training.files("acme", purposes=["fine-tune"], limit=9) == []
    assert registry.training.files("acme", sha256="cd" * 32, limit=9) == []


def lease(registry: Registry, server: str, seconds: float) -> None:
    registry.servers.renew(f"process of {server}", server, runs=True, room=0, seconds=seconds)


def test_a_batch_is_taken_over_when_its_server_is_gone_for_long_or_it_is_only_to_end(
    registry: Registry,
) -> None:
    add_file(registry)
    for number in (1, 2):
        registry.batches.add(new(number))
    registry.batches.move("batch_1", "in_progress", ("validating",), total=5, completed=3, failed=1)
    registry.batches.move("batch_2", "cancelling", ("validating",))
    assert registry.batches.lost("server-2") == []  # its server has no lease
    lease(registry, HERE, 60.0)
    assert registry.batches.lost("server-2") == []
    lease(registry, HERE, -100.0)
    assert [batch.id for batch in registry.batches.lost("server-2")] == ["batch_2"]
    with pytest.raises(BatchElsewhereError):
        registry.batches.take_batch("batch_1", HERE, "server-2")
    lease(registry, HERE, -1000.0)
    assert registry.batches.lost(HERE) == []
    assert [batch.id for batch in registry.batches.lost("server-2")] == ["batch_1", "batch_2"]
    again = registry.batches.take_batch("batch_1", HERE, "server-2")
    assert (again.server, again.state, again.completed, again.failed) == ("server-2", "validating", 0, 0)
    assert registry.batches.take_batch("batch_2", HERE, "server-2").state == "cancelling"
    assert registry.batches.open_batches(HERE) == []
    with pytest.raises(BatchElsewhereError):
        registry.batches.take_batch("batch_1", HERE, "server-3")
    with pytest.raises(BatchElsewhereError):
        registry.batches.note("batch_1", server=HERE, completed=4)
    with pytest.raises(BatchElsewhereError):
        registry.batches.move("batch_1", "in_progress", ("validating",), server=HERE)
    with acting(Origin(owned=("batch_1", HERE))), pytest.raises(BatchElsewhereError):
        add_file(registry, "output")
    registry.batches.move("batch_1", "in_progress", ("validating",), server="server-2")


def test_batches_of_servers_that_live_hide_none_of_a_server_that_is_gone(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_file(registry)
    monkeypatch.setattr(module, "MOST_OPEN", 2)
    for number, server in enumerate((HERE, HERE, "server-2")):
        registry.batches.add(new(number, server=server))
    lease(registry, HERE, 60.0)
    lease(registry, "server-2", -1000.0)
    assert [batch.id for batch in registry.batches.lost("server-3")] == ["batch_2"]
