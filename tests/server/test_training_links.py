"""The link to a trainer: whatever fails while one is started, no process is left."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from onebase_engine.engine.messages import EngineConfig, encode
from onebase_server.processes.time_share import BusyFlag
from onebase_server.processes.trainer_client import UNKNOWN, TrainerClient
from onebase_server.processes.trainer_protocol import (
    Active,
    Check,
    DrawnReplies,
    NotDrawn,
    Train,
    Trained,
    TrainJob,
)
from onebase_training.rollouts import RewardedReply, RolloutOrder

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


def test_a_trainer_whose_question_for_the_active_version_fails_still_ends_and_replaces_none(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows").write_text("not-comparable")
    job = msgspec.structs.replace(check().job, train=str(tmp_path / "rows"), folder=str(tmp_path))
    message = Train(config=EngineConfig(base_folder="/nowhere"), manifest=b"", job=job, share=1.0)
    command = (sys.executable, str(Path(__file__).with_name("scripted_trainer.py")))

    async def fails() -> Active:
        raise ValueError("out of order")

    async def run() -> Any:
        busy = BusyFlag.make()
        fds = {"--busy-fd": busy.fd}
        return await (await TrainerClient.start(command, message, fds, lambda event: None, fails)).outcome()

    trained = asyncio.run(run())
    assert isinstance(trained, Trained)
    assert (trained.report["active"], trained.report["better"]) == (UNKNOWN, None)


@pytest.mark.parametrize("text", ["\ud800", "x" * (70 << 20)])
def test_replies_that_cannot_be_sent_fail_the_job_instead_of_leaving_it_waiting(text: str) -> None:
    sent: list[bytes] = []
    process: Any = SimpleNamespace(send=sent.append)

    async def draw(rollout: RolloutOrder) -> DrawnReplies:
        return DrawnReplies([[RewardedReply(tokens=[1], logprobs=[0.0], text=text)]])

    rollout = RolloutOrder(prompts=[], n=1, temperature=1.0)
    asyncio.run(TrainerClient(process)._draw(draw, rollout))
    assert sent == [encode(NotDrawn("internal_error", "The server failed to sample; its log says why."))]
