"""Functions in processes of their own: what they answer, and what is said of those that do not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.processes import StartError
from bench.worker import call, started

HERE = "tests.benchmarks.test_worker"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def doubled(number: int) -> int:
    print("what a library prints is no answer")
    return 2 * number


def failing() -> None:
    raise ValueError("the base is not there")


def adding(number: int) -> Callable[[int], int]:
    def add(more: int) -> int:
        if more < 0:
            os._exit(1)
        print("nor is this")
        return number + more

    return add


def test_a_function_is_answered_once_whatever_it_prints(tmp_path: Path) -> None:
    assert call(f"{HERE}:doubled", {"number": 21}, tmp_path / "log", 60, env=ENVIRONMENT) == 42
    assert "no answer" in (tmp_path / "log").read_text()


def test_a_function_that_fails_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="the base is not there"):
        call(f"{HERE}:failing", {}, tmp_path / "log", 60, env=ENVIRONMENT)


def test_a_worker_answers_message_by_message_until_its_process_ends(tmp_path: Path) -> None:
    async def run() -> None:
        async with started(f"{HERE}:adding", {"number": 40}, tmp_path / "log", ENVIRONMENT) as worker:
            assert await worker.ask(2) == 42
            assert await worker.ask(3) == 43
            with pytest.raises(EOFError):
                await worker.ask(-1)

    asyncio.run(run())


def test_a_worker_that_does_not_come_up_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    async def run() -> None:
        async with started(f"{HERE}:failing", {}, tmp_path / "log", ENVIRONMENT):
            pytest.fail("it has nothing to answer with")

    with pytest.raises(StartError, match="the base is not there"):
        asyncio.run(run())
