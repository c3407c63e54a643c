"""Calls in threads of their own: none is lost, and none takes a place for ever."""

from __future__ import annotations

import asyncio
import threading

import pytest

from onebase_server.background import Backoff, Threads


def test_a_thread_that_cannot_be_started_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def run() -> int:
        threads = Threads("test", 1)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                await threads.run(lambda: 1)
        async with asyncio.timeout(30):
            return await threads.run(lambda: 2)

    assert asyncio.run(run()) == 2


def test_a_bounded_number_of_tries_pauses_after_each_but_the_last() -> None:
    assert list(Backoff(0.5, 2.0).tries(5)) == [0.5, 1.0, 2.0, 2.0, None]
    assert list(Backoff(0.5, 2.0).tries(1)) == [None]
