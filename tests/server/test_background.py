"""Calls in threads of their own: none is lost, and none takes a place for ever."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from onebase_edge.background import Backoff, Threads, TurnBudget, keep_running


def test_a_thread_that_cannot_be_started_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def run() -> int:
        threads = Threads("test", 1)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                await threads.run_blocking(lambda: 1)
        async with asyncio.timeout(30):
            return await threads.run_blocking(lambda: 2)

    assert asyncio.run(run()) == 2


def test_a_call_waits_for_another_one_while_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def run() -> tuple[set[int], set[int]]:
        threads = Threads("test", 2)
        await threads.run_blocking(threading.get_ident)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            first = {*await asyncio.gather(*(threads.run_blocking(threading.get_ident) for _ in range(4)))}
        barrier = threading.Barrier(2)

        def meet() -> int:
            barrier.wait(30)
            return threading.get_ident()

        return first, {*await asyncio.gather(*(threads.run_blocking(meet) for _ in range(2)))}

    few, more = asyncio.run(run())
    assert (len(few), len(more)) == (1, 2)


def test_a_waiting_call_gets_a_thread_once_the_machine_gives_one_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, refused, pauses = threading.Thread.start, 8, list[float]()

    def refuse(thread: threading.Thread) -> None:
        nonlocal refused
        if refused:
            refused -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    async def run() -> int:
        loop, threads = asyncio.get_running_loop(), Threads("test", 2)
        begun, ending = threading.Event(), threading.Event()

        def block() -> None:
            begun.set()
            ending.wait(60)

        blocked = loop.create_task(threads.run_blocking(block))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        real = loop.call_later

        def call_at_once(delay: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
            pauses.append(delay)
            return real(0, *args, **options)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        try:
            async with asyncio.timeout(30):
                monkeypatch.setattr(loop, "call_later", call_at_once)
                return await threads.run_blocking(lambda: 2)  # no other call comes or ends
        finally:
            ending.set()
            await blocked

    assert asyncio.run(run()) == 2
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_no_thread_is_tried_again_once_no_call_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = list[threading.Thread]()

    def refuse(thread: threading.Thread) -> None:
        tries.append(thread)
        raise RuntimeError("can't start new thread")

    async def run() -> None:
        loop, threads = asyncio.get_running_loop(), Threads("test", 2)
        await threads.run_blocking(threading.get_ident)
        later = list[Any]()
        real = loop.call_later

        def keep(delay: float, call: Any, *args: Any, **options: Any) -> asyncio.TimerHandle:
            later.append(call)
            return real(3600, call, *args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(loop, "call_later", keep)
            patched.setattr(threading.Thread, "start", refuse)
            await asyncio.gather(*(threads.run_blocking(threading.get_ident) for _ in range(2)))
            (again,) = later
            again()
        assert (len(tries), len(later)) == (1, 1)

    asyncio.run(run())


def test_calls_share_the_threads_that_are_there() -> None:
    def ident() -> int:
        barrier.wait(30)
        return threading.get_ident()

    async def run() -> list[set[int]]:
        threads = Threads("test", 4)
        return [set(await asyncio.gather(*map(threads.run_for, "ab", [ident] * 2))) for _ in range(10)]

    barrier = threading.Barrier(2)
    first, *later = asyncio.run(run())
    assert len(first) == 2
    assert later == [first] * 9, "a thread was started for a call, and the event loop waited for it"


def test_a_call_that_raises_leaves_its_thread_to_others() -> None:
    def fail() -> None:
        raise SystemExit

    async def run() -> int:
        threads = Threads("test", 1)
        for _ in range(2):
            with pytest.raises(SystemExit):
                await threads.run_blocking(fail)
        async with asyncio.timeout(30):
            return await threads.run_blocking(lambda: 2)

    assert asyncio.run(run()) == 2


def test_a_bounded_number_of_tries_pauses_after_each_but_the_last() -> None:
    assert list(Backoff(0.5, 2.0).tries(5)) == [0.5, 1.0, 2.0, 2.0, None]
    assert list(Backoff(0.5, 2.0).tries(1)) == [None]


class Calls:
    """Calls that block until they may end, and how many of each tenant run."""

    def __init__(self, threads: Threads) -> None:
        self.threads = threads
        self.may = threading.Event()
        self.begun: list[str] = []

    def start(self, tenant: str) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self.threads.run_for(tenant, self._block, tenant))

    async def until(self, count: int) -> None:
        while len(self.begun) < count:
            await asyncio.sleep(0.001)

    def _block(self, tenant: str) -> None:
        self.begun.append(tenant)
        self.may.wait(60)


def test_tenants_take_turns_however_many_calls_one_of_them_has_waiting() -> None:
    async def run() -> list[str]:
        calls = Calls(Threads("test", 1))
        tasks = [calls.start("flood") for _ in range(5)]
        await calls.until(1)
        tasks += [calls.start(tenant) for tenant in ("one", "two", "one")]
        await asyncio.sleep(0)
        calls.may.set()
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks)
        return calls.begun

    assert asyncio.run(run()) == ["flood", "one", "two", "flood", "one", "flood", "flood", "flood"]


def test_one_tenant_has_no_more_calls_running_than_it_may() -> None:
    async def run() -> None:
        calls = Calls(Threads("test", 4, each=2))
        tasks = [calls.start("flood") for _ in range(9)]
        await calls.until(2)
        tasks.append(calls.start("other"))
        await calls.until(3)
        assert calls.begun == ["flood", "flood", "other"]
        calls.may.set()
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_call_that_is_given_up_while_it_waits_takes_no_turn() -> None:
    async def run() -> None:
        calls = Calls(Threads("test", 1))
        first = calls.start("one")
        await calls.until(1)
        given_up = [calls.start("one"), calls.start("two")]
        await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        await asyncio.wait(given_up)
        calls.may.set()
        async with asyncio.timeout(30):
            await asyncio.gather(first, calls.start("three"))
        assert calls.begun == ["one", "three"]
        assert not calls.threads._permits._waiting

    asyncio.run(run())


def test_a_call_that_is_given_up_in_the_moment_of_its_turn_gives_it_on() -> None:
    async def run() -> None:
        calls = Calls(Threads("test", 1))
        first = calls.start("one")
        await calls.until(1)
        second = calls.start("two")
        await asyncio.sleep(0)
        calls.may.set()
        await first
        second.cancel()  # its turn has come, and it has not seen it
        async with asyncio.timeout(30):
            await asyncio.wait([second])
            await calls.start("three")

    asyncio.run(run())


def test_a_call_that_is_given_up_just_before_a_thread_is_free_takes_no_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        loop, ended = asyncio.get_running_loop(), threading.Event()
        report = loop.call_soon_threadsafe

        def report_end(*call: Any) -> None:
            report(*call)
            ended.set()

        monkeypatch.setattr(loop, "call_soon_threadsafe", report_end)
        calls = Calls(Threads("given-up", 1))
        first = calls.start("one")
        await calls.until(1)
        second, third = calls.start("two"), calls.start("three")
        await asyncio.sleep(0)
        calls.may.set()
        ended.wait(30)
        second.cancel()  # the loop hears that the thread is free before this task hears of its end
        async with asyncio.timeout(30):
            await asyncio.gather(first, third)
            await asyncio.wait([second])
            await calls.start("four")
        assert calls.begun == ["one", "three", "four"]

    asyncio.run(run())


def test_a_turn_of_the_event_loop_has_one_budget_and_the_next_turn_a_new_one() -> None:
    async def run() -> None:
        budget = TurnBudget(10)
        assert [budget.try_spend(size) for size in (6, 5, 4, 1, 11)] == [True, False, True, False, False]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [budget.try_spend(size) for size in (11, 10, 1)] == [False, True, False]

    asyncio.run(run())


def test_work_that_must_go_on_is_begun_again_where_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    begun: list[int] = []

    async def work() -> None:
        begun.append(len(begun))
        if len(begun) < 4:
            raise KeyError("surprise")

    with caplog.at_level(logging.ERROR):
        asyncio.run(asyncio.wait_for(keep_running("following it", work, Backoff(0.001, 0.002)), 30))

    assert begun == [0, 1, 2, 3]
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["following it failed"] * 3
    assert all(record.exc_info for record in caplog.records)
