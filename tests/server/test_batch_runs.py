"""One batch's run by itself, on a registry and a store of its own; the test is its route and its clock."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from onebase_adapters.registry import BatchRecord, FileRecord, NewBatch, Registry
from onebase_adapters.store.store import Store
from onebase_edge.background import Backoff, Threads
from onebase_server.batches import runner
from onebase_server.batches.rows import RowFile
from onebase_server.batches.runner import BatchFolders, BatchRun, BatchRunner, Parts
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders
from onebase_server.tenancy.access import LOCAL
from onebase_server.tenancy.peers import Peers
from onebase_server.tenancy.quotas import InnerAnswer

from .test_batch_files import line

_NOT_NOW = {"error": {"code": "adapter_unavailable", "message": "Not now."}}
BUSY = InnerAnswer(503, {}, msgspec.json.encode(_NOT_NOW))


async def post(*asked: object) -> InnerAnswer:
    return BUSY


def parts_in(registry: Registry, place: Path) -> Parts:
    """For a running event loop. Its engine is never ready."""
    store, jobs = Store(str(place / "store"), place / "cache"), JobFolders(place, "registry-1")
    threads, disk = Threads("records", 2), Threads("disk", 2)
    files = TrainingFiles(registry.training, store, jobs, threads, disk, limit=1 << 30)

    async def caller_of(key: str) -> Any:
        return LOCAL

    keys: Any = SimpleNamespace(caller_of=caller_of)
    limiter: Any = SimpleNamespace(enter=lambda caller: None)
    supervisor: Any = SimpleNamespace(base=None)
    folders = BatchFolders(place, "registry-1")
    return Parts(
        registry.batches, threads, files, folders, jobs, keys, limiter, supervisor,
        Peers(registry.servers, jobs.server, jobs.lock_id),
        max_body=1 << 21, most=0, post=post,
    )  # fmt: skip


def added(
    registry: Registry,
    parts: Parts,
    name: str,
    sizes: list[int],
    *,
    tenant: str = "default",
    server: str = "",
) -> BatchRecord:
    """A new batch whose rows have bodies of these sizes."""
    with parts.files.store.writer() as writer:
        for number, size in enumerate(sizes):
            writer.write(json.dumps(line(str(number), body={"prompt": "x" * size})).encode() + b"\n")
        blob = writer.commit()
    server = server or parts.jobs.server
    file = FileRecord(f"file-{name}", tenant, server, "batch", "a.jsonl", blob.size, 1.0, blob.sha256)
    registry.training.add_file(file)
    now = time.time()
    return registry.batches.add(
        NewBatch(
            id=f"batch_{name}", tenant=tenant, server=server, endpoint="/v1/chat/completions",
            input_file=file.id, window="24h", created_at=now, expires_at=now + 3600, labels=None,
        )
    )  # fmt: skip


def test_rows_of_a_batch_that_is_late_are_expired_though_the_clock_goes_back_meanwhile(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, back = time.time() + 7200, time.time()
    told = iter([late])
    clock = SimpleNamespace(time=lambda: next(told, back), monotonic=time.monotonic)
    monkeypatch.setattr(runner, "time", clock)

    async def whole() -> None:
        parts = parts_in(registry, tmp_path)
        await BatchRun(parts, added(registry, parts, "late", [1] * 3)).work()

    asyncio.run(whole())

    batch = registry.batches.batch("default", "batch_late")
    assert (batch.state, batch.completed, batch.failed) == ("expired", 0, 3)


@pytest.mark.parametrize(("rows", "size"), [(60, 1 << 19), (3000, 1)])
def test_a_batch_of_which_nothing_can_be_answered_holds_few_rows_in_memory(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, size: int
) -> None:
    held = [0]
    monkeypatch.setattr(runner, "_ROW_AGAIN", Backoff(3600.0, 3600.0))
    monkeypatch.setattr(runner, "_NOTE_SECONDS", 0.01)

    async def whole() -> None:
        parts = parts_in(registry, tmp_path)
        run = BatchRun(parts, added(registry, parts, "large", [size] * rows))
        read_ahead, idle = run._read_ahead, 0

        async def counted(file: RowFile) -> None:
            nonlocal idle
            await read_ahead(file)
            idle = 0 if run.has_turn else idle + 1
            held[:] = [len(bytes(turn.row.body)) for turn in (*run._ahead, *run._again)]

        monkeypatch.setattr(run, "_read_ahead", counted)
        work = asyncio.get_running_loop().create_task(run.work())
        while idle < 3:
            if run.has_turn:
                await run.begin_row()
            await asyncio.sleep(0)
        run.stop()
        await work

    asyncio.run(whole())

    assert 0 < len(held) <= runner.HELD_ROWS + 64
    assert sum(held) <= runner.HELD_BYTES + (2 << 20)


def test_a_row_whose_turn_fails_by_a_surprise_is_answered_so_and_the_batch_ends(
    registry: Registry, tmp_path: Path
) -> None:
    async def whole() -> None:
        parts = parts_in(registry, tmp_path)
        surprise = iter([RuntimeError("can't start new thread")])

        async def caller_of(key: str) -> Any:
            for error in surprise:
                raise error
            return LOCAL

        async def answered(*asked: object) -> InnerAnswer:
            return InnerAnswer(200, {}, b"{}")

        parts.keys.caller_of = caller_of  # type: ignore[method-assign]
        parts.post = answered
        run = BatchRun(parts, added(registry, parts, "surprised", [1] * 3))
        work = asyncio.get_running_loop().create_task(run.work())
        while not work.done():
            if run.has_turn:
                await run.begin_row()
            await asyncio.sleep(0)
        await work

    asyncio.run(asyncio.wait_for(whole(), 60))

    batch = registry.batches.batch("default", "batch_surprised")
    assert (batch.state, batch.completed, batch.failed) == ("completed", 2, 1)


@pytest.mark.parametrize("why", ["it ended", "another server took it over"])
def test_a_batch_of_which_a_late_look_says_that_it_runs_is_not_begun_again(
    registry: Registry, tmp_path: Path, why: str
) -> None:
    async def whole() -> None:
        parts = parts_in(registry, tmp_path)
        asked = added(registry, parts, "late", [1] * 3)
        stale = registry.batches.move(asked.id, "in_progress", ("validating",), total=3)
        if why == "it ended":
            registry.batches.move(asked.id, "completed", ("in_progress",), completed=3)
        else:
            registry.servers.renew("process", asked.server, runs=True, room=0, seconds=-1000.0)
            registry.batches.take_batch(asked.id, asked.server, "other")
        before = registry.batches.batch("default", asked.id)
        await BatchRun(parts, stale).work()
        assert registry.batches.batch("default", asked.id) == before
        assert not parts.folders.of(asked.id).exists()

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_a_process_whose_folder_s_copy_has_its_batches_begins_no_further_row(
    registry: Registry, tmp_path: Path
) -> None:
    async def whole() -> None:
        asked, enough = 0, asyncio.Event()

        async def answered(*_: object) -> InnerAnswer:
            nonlocal asked
            asked += 1
            if asked == 5:
                enough.set()
            await asyncio.sleep(0)
            return InnerAnswer(200, {}, b"{}")

        parts = parts_in(registry, tmp_path)
        ready = asyncio.Event()
        ready.set()
        client = SimpleNamespace(foreground_sequences=0)
        parts.supervisor.__dict__.update(
            base=SimpleNamespace(max_sequences=1), ready=ready, paused=False, client=client
        )
        batch = added(registry, parts, "x", [1] * 2000)
        parts.peers._lease = 0.0
        await parts.peers.claim(room=0)
        followed = BatchRunner(parts, look_seconds=0.01)
        follow = asyncio.get_running_loop().create_task(followed.follow(answered))
        await asyncio.wait_for(enough.wait(), 60)
        registry.servers.renew("copy.1", parts.jobs.server, runs=True, room=1, seconds=60.0)
        await parts.peers.renew(runs=True, room=0)
        asked_by_then, flying = asked, followed.flying
        while followed._runs:
            await asyncio.sleep(0.01)
        assert asked <= asked_by_then + flying
        assert registry.batches.batch("default", batch.id).state != "completed"
        await followed.stop()
        follow.cancel()

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_a_tenant_with_many_batches_keeps_no_other_s_from_its_turn(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MOST_RUNS", 3)

    async def until(reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not reached():
                await asyncio.sleep(0.01)

    async def whole() -> None:
        parts = parts_in(registry, tmp_path)
        for number in range(6):
            added(registry, parts, f"acme-{number}", [1], tenant="acme")
        await parts.peers.claim(room=0)
        followed = BatchRunner(parts, look_seconds=0.01)
        follow = asyncio.get_running_loop().create_task(followed.follow(post))
        await until(lambda: followed._runs.keys() == {f"batch_acme-{number}" for number in range(3)})

        added(registry, parts, "rival", [1], tenant="rival")
        await until(lambda: followed._runs.keys() == {"batch_acme-0", "batch_acme-1", "batch_rival"})

        registry.batches.move("batch_acme-5", "cancelling", ("validating",))
        await until(lambda: registry.batches.batch("acme", "batch_acme-5").state == "cancelled")
        await followed.stop()
        follow.cancel()

    asyncio.run(whole())


def test_batches_of_a_server_that_is_gone_go_on_or_end_here(registry: Registry, tmp_path: Path) -> None:
    async def whole() -> None:
        parts = parts_in(registry, tmp_path)
        for name in ("cut", "cancelled"):
            added(registry, parts, name, [1, 1], server="gone")
        registry.batches.move("batch_cut", "in_progress", ("validating",), total=2, completed=1)
        registry.batches.move("batch_cancelled", "cancelling", ("validating",))
        registry.servers.renew("process", "gone", runs=True, room=0, seconds=-1000.0)
        await parts.peers.renew(runs=True, room=0)
        followed = BatchRunner(parts, look_seconds=0.01)
        follow = asyncio.get_running_loop().create_task(followed.follow(post))

        def states() -> list[tuple[str, str, int]]:
            found = (registry.batches.batch("default", f"batch_{name}") for name in ("cut", "cancelled"))
            return [(batch.server, batch.state, batch.completed) for batch in found]

        here = parts.jobs.server
        async with asyncio.timeout(60):
            while states() != [(here, "in_progress", 0), (here, "cancelled", 0)]:
                await asyncio.sleep(0.01)
        await followed.stop()
        follow.cancel()

    asyncio.run(whole())
