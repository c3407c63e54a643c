"""Which versions are in the engine's memory: on demand, in order, within the limit, and without deadlocks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_adapters.store.blobs import Blob
from onebase_edge.errors import (
    AdapterDeletedError,
    EngineRestartedError,
    InvalidRequestError,
    LoadingQueueFullError,
    UnavailableError,
    status_of,
)
from onebase_engine.engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterUnloaded,
    LoadAdapter,
    SlotsChanged,
    UnloadAdapter,
)
from onebase_server.adapters.catalog import VersionRef
from onebase_server.adapters.residency import PackedAdapterFile, PackedAdapterFiles, Residency

SIZES = {"a": 10, "b": 10, "c": 10, "d": 10, "large": 30, "huge": 31}


class Engine:
    """Takes messages; answers them when told to, or at once. `held` is what its memory holds."""

    def __init__(self, limit: int = 30, *, slow: bool = False, queue_limit: int = 10) -> None:
        self.log: list[str] = []
        self.held: dict[str, int] = {}
        self.most = 0
        self.slow = slow
        self.orders: list[Any] = []
        self.fails: dict[str, str] = {}
        self.files = dict(SIZES)
        self.damaged: list[PackedAdapterFile] = []
        self.residency = Residency(limit, self.find, self.fetch, self.send, queue_limit)
        self.residency.subscribe(self.damaged.append)
        self.residency.engine_ready()

    def find(self, digest: str) -> PackedAdapterFile:
        return PackedAdapterFile(Blob(f"file of {digest}", self.files[digest]), ())

    async def fetch(self, prepared: PackedAdapterFile) -> Path:
        await asyncio.sleep(0)
        return Path(prepared.blob.sha256)

    def send(self, message: Any) -> None:
        self.orders.append(message)
        if not self.slow:
            asyncio.get_running_loop().call_soon(self.answer)

    def answer(self) -> None:
        """Do what was ordered first."""
        message = self.orders.pop(0)
        if isinstance(message, UnloadAdapter):
            self.log.append(f"-{message.digest}")
            del self.held[message.digest]
            self.residency.receive(AdapterUnloaded(message.digest))
        elif isinstance(message, LoadAdapter) and message.digest in self.fails:
            failed = AdapterFailed(digest=message.digest, code=self.fails[message.digest], message="no")
            self.residency.receive(failed)
        else:
            assert isinstance(message, LoadAdapter)
            self.log.append(f"+{message.digest}")
            self.held[message.digest] = SIZES[message.digest]
            self.most = max(self.most, sum(self.held.values()))
            loaded = AdapterLoaded(digest=message.digest, bytes=SIZES[message.digest], load_seconds=0)
            self.residency.receive(loaded)

    def lease(self, *digests: str, **how: Any) -> Any:
        return self.residency.lease([VersionRef("default", "name", digest) for digest in digests], **how)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def settle() -> None:
    """Let everything that can go on do so."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_one_load_serves_however_many_wait() -> None:
    async def test() -> None:
        engine = Engine()
        leases = [engine.lease("a") for _ in range(20)]
        await asyncio.gather(*(lease.ready() for lease in leases))
        assert engine.log == ["+a"]

    run(test())


def test_the_least_recently_used_goes_first_and_nothing_goes_before_it_must() -> None:
    async def test() -> None:
        engine = Engine()
        for digest in ("a", "b", "c", "a", "d"):
            async with engine.lease(digest):
                pass
        assert engine.log == ["+a", "+b", "+c", "-b", "+d"]
        async with engine.lease("large"):
            assert engine.held == {"large": 30}
        assert engine.most <= 30
        assert engine.residency.memory.evictions == 4

    run(test())


def test_what_is_leased_or_pinned_stays_and_who_needs_its_place_waits_for_it() -> None:
    async def test() -> None:
        engine = Engine()
        engine.residency.pin(["a"])
        await engine.residency.load_pinned()
        held = engine.lease("b")
        await held.ready()
        waiting = asyncio.create_task(engine.lease("c", "d").ready())
        await settle()
        assert not waiting.done()
        async with engine.lease("b"):
            pass  # who needs no room waits for nobody
        held.release()
        await waiting
        assert set(engine.held) == {"a", "c", "d"}
        with pytest.raises(InvalidRequestError, match="30 bytes of host memory, pinned adapters take 10"):
            await engine.lease("large").ready()

    run(test())


def test_two_that_need_several_never_wait_for_each_other() -> None:
    async def test() -> None:
        engine = Engine(limit=20, queue_limit=100)
        pairs = [("a", "b"), ("c", "d"), ("b", "c"), ("d", "a")] * 5

        async def use(pair: tuple[str, str]) -> None:
            async with engine.lease(*pair):
                assert set(pair) <= set(engine.held)
                await asyncio.sleep(0)

        await asyncio.gather(*(use(pair) for pair in pairs))
        assert engine.most <= 20

    run(test())


def test_what_can_never_fit_is_refused_with_the_limit() -> None:
    async def test() -> None:
        engine = Engine()
        with pytest.raises(InvalidRequestError, match=r"31 bytes.*30.*--host-memory") as caught:
            await engine.lease("huge").ready()
        assert caught.value.code == "host_memory_exceeded"
        with pytest.raises(InvalidRequestError, match="--host-memory"):
            engine.residency.check_pins(["a", "b", "c", "d"])

    run(test())


def test_a_failed_load_fails_those_who_wait_and_takes_no_memory() -> None:
    async def test() -> None:
        engine = Engine()
        engine.fails["a"] = "damaged"
        results = await asyncio.gather(*(engine.lease("a").ready() for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [UnavailableError] * 3
        assert engine.damaged == [engine.find("a")]
        assert engine.residency.memory.used == 0
        engine.fails.clear()
        await engine.lease("a").ready()
        assert engine.log == ["+a"]

    run(test())


def test_a_version_that_no_slot_can_hold_is_refused_for_good_and_is_not_damaged() -> None:
    async def test() -> None:
        engine = Engine()
        engine.fails["a"] = "slot_memory_exceeded"
        with pytest.raises(InvalidRequestError, match="adapter: no") as refused:
            await engine.lease("a").ready()
        assert refused.value.code == "slot_memory_exceeded"
        assert engine.damaged == []
        assert engine.residency.memory.used == 0

    run(test())


def test_damage_is_reported_of_the_file_that_was_loaded_not_of_the_one_that_came_since() -> None:
    async def test() -> None:
        engine = Engine(slow=True)
        engine.fails["a"] = "damaged"
        old = engine.find("a")
        waiting = asyncio.create_task(engine.lease("a").ready())
        await settle()
        engine.files["a"] = 11
        engine.answer()
        with pytest.raises(UnavailableError):
            await waiting
        assert engine.damaged == [old] != [engine.find("a")]

    run(test())


def test_when_the_engine_is_gone_those_who_wait_are_told_and_old_leases_harm_nothing() -> None:
    async def test() -> None:
        engine = Engine(slow=True)
        old = asyncio.create_task(engine.lease("a").ready())
        await settle()
        engine.residency.engine_gone()
        with pytest.raises(EngineRestartedError):
            await old
        with pytest.raises(EngineRestartedError):
            await engine.lease("b").ready()
        engine.slow, engine.orders = False, []
        engine.residency.engine_ready()
        async with engine.lease("a"):
            pass
        assert engine.held == {"a": 10}
        assert engine.residency.tier("a") == "host"
        engine.residency.receive(SlotsChanged(["a"]))
        assert engine.residency.tier("a") == "slot"
        engine.residency.engine_gone()
        assert engine.residency.tier("a") == "disk"

    run(test())


def test_a_version_that_is_asked_for_while_it_leaves_is_loaded_again_afterwards() -> None:
    async def test() -> None:
        engine = Engine(limit=10)
        async with engine.lease("a"):
            pass
        engine.slow = True
        other = asyncio.create_task(engine.lease("b").ready())
        again = asyncio.create_task(engine.lease("a").ready())
        await settle()
        engine.slow = False
        engine.answer()
        await settle()
        assert engine.held == {"b": 10}
        await other
        assert not again.done()
        again.cancel()

    run(test())


def test_deleting_by_force_ends_the_wait_and_tells_the_one_who_runs() -> None:
    async def test() -> None:
        engine = Engine(slow=True)
        waiting = asyncio.create_task(engine.lease("a").ready())
        told: list[Any] = []
        running = engine.lease("b", on_revoked=told.append)
        ready = asyncio.create_task(running.ready())
        await settle()
        while engine.orders and engine.orders[0].digest != "b":
            engine.orders.append(engine.orders.pop(0))
        engine.answer()
        await ready
        assert engine.residency.is_used(VersionRef("default", "name", "a"))
        engine.residency.revoke("default", "other name", "a")
        await settle()
        assert not waiting.done()

        for digest in ("a", "a", "b", "b"):  # a version, and then its adapter
            engine.residency.revoke("default", "name", digest)

        with pytest.raises(AdapterDeletedError):
            await waiting
        assert [type(error) for error in told] == [AdapterDeletedError]
        assert not engine.residency.is_used(VersionRef("default", "name", "a"))

    run(test())


def test_what_nobody_can_ask_for_any_more_leaves_when_its_last_lease_ends() -> None:
    async def test() -> None:
        engine = Engine()
        lease = engine.lease("a")
        await lease.ready()
        async with engine.lease("b"):
            pass
        engine.residency.keep_only(lambda digest: False)
        await settle()
        assert engine.held == {"a": 10}
        lease.release()
        await settle()
        assert engine.held == {}

    run(test())


@pytest.mark.parametrize("ends", ["while it is loaded", "later, after a change of the catalog"])
def test_live_weights_that_are_dropped_leave_when_their_last_request_ends(ends: str) -> None:
    async def test() -> None:
        engine = Engine(slow=True)
        engine.find = lambda digest: PackedAdapterFile(Blob(digest, 10), (), path=Path("live"))  # type: ignore
        engine.residency = Residency(30, engine.find, engine.fetch, engine.send, 10)
        engine.residency.engine_ready()
        lease = engine.lease("a")
        waiting = asyncio.create_task(lease.ready())
        await settle()
        if ends == "while it is loaded":
            engine.residency.forget(["a"])
            waiting.cancel()
            await settle()
            engine.answer()
        else:
            engine.answer()
            await waiting
            engine.residency.forget(["a"])
            engine.residency.keep_only(lambda digest: True)
            lease.release()
        await settle()
        engine.answer()
        assert engine.held == {}
        assert engine.residency.memory.used == 0

    run(test())


def test_more_who_wait_for_room_than_the_queue_holds_are_turned_away() -> None:
    async def test() -> None:
        engine = Engine(limit=10, queue_limit=2)
        holder = engine.lease("a")
        await holder.ready()
        waiting = [asyncio.create_task(engine.lease(digest).ready()) for digest in "bcd"]
        await settle()
        with pytest.raises(LoadingQueueFullError, match="2 requests wait already") as refused:
            await engine.lease("b").ready()
        assert status_of(refused.value) == (429, "rate_limit_error")
        async with engine.lease("a"):
            pass
        for task in waiting:
            task.cancel()

    run(test())


def test_a_version_is_loaded_from_what_was_proved_with_this_servers_kernels() -> None:
    async def test() -> None:
        engine = Engine()
        asked: list[PackedAdapterFile] = []

        async def prove(packed: PackedAdapterFile) -> PackedAdapterFile:
            asked.append(packed)
            if len(asked) == 1:
                raise UnavailableError("it differs", code="adapter_unavailable", retry_after=1)
            return PackedAdapterFile(Blob("file of these kernels", 10), ())

        sent: list[Any] = []

        def send(message: Any) -> None:
            sent.append(message)
            engine.residency.receive(AdapterLoaded(digest="a", bytes=10, load_seconds=0))

        engine.residency = Residency(30, engine.find, engine.fetch, send, prove=prove)
        engine.residency.engine_ready()
        with pytest.raises(UnavailableError, match="it differs"):
            await engine.lease("a").ready()
        assert not sent
        await engine.lease("a").ready()
        assert [one.blob.sha256 for one in asked] == ["file of a", "file of a"]
        assert sent == [LoadAdapter("a", "file of these kernels", "file of these kernels")]

    run(test())


def test_live_weights_stay_until_the_last_of_the_files_that_are_equal_is_dropped() -> None:
    """Two jobs with one seed and one rank begin with the same weights."""
    catalog: Any = SimpleNamespace(of_digest=lambda digest: [])
    parts: Any = None
    files = PackedAdapterFiles(catalog, parts, parts, lambda: "")
    one, two = Path("/jobs/a/live/x"), Path("/jobs/b/live/x")
    for folder in (one, two, one):
        files.add_live(folder / "packed", "x", 1)
    assert files.drop_live(two) == set()
    assert files.find("x").path == one / "packed"
    assert files.drop_live(two) == set()
    assert files.drop_live(one) == {"x"}
    assert not files.is_live("x")
