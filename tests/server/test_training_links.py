"""The link to a trainer: whatever fails while one is started, no process is left."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import pytest

from onebase_engine.engine.messages import EngineConfig
from onebase_server.processes.trainer_client import TrainerClient
from onebase_server.processes.trainer_protocol import Check, TrainJob

from .support import children, command_of

COMMAND = (sys.executable, "-c", "import time; time.sleep(600)  # a trainer")


def check(**recipe: Any) -> Check:
    job = TrainJob(
        id="ftjob-1", name="orders", recipe=recipe, train="a.jsonl", train_name="a.jsonl", held_out=None,
        held_out_name=None, folder="/nowhere", base_name="base", memory_limit=0,
    )  # fmt: skip
    return Check(config=EngineConfig(base_folder="/nowhere"), job=job)


def trainers() -> list[int]:
    return [pid for pid in children(os.getpid()) if "trainer" in command_of(pid)]


def start(message: Check) -> None:
    async def run() -> None:
        await TrainerClient.start(COMMAND, message, {}, lambda event: None)

    asyncio.run(run())


def test_a_message_that_cannot_be_sent_starts_no_trainer() -> None:
    with pytest.raises(OverflowError):
        start(check(patience=10**30))
    assert trainers() == []


def test_a_trainer_that_cannot_be_talked_to_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*given: Any, **options: Any) -> Any:
        raise OSError("no descriptor left")

    monkeypatch.setattr(asyncio.SelectorEventLoop, "create_unix_connection", refuse)
    with pytest.raises(OSError, match="no descriptor left"):
        start(check())
    assert trainers() == []
