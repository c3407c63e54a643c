"""The process that trains live adapters, killed at any moment, does each operation once and loses none."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.server.support import live_trainers
from tests.training.live_support import SPECS, STEP, ask, lesson, text_row
from tests.training.runs import assert_equal, tiny_base

from onebase_edge.background import Backoff, Threads
from onebase_engine.base.attach import publish
from onebase_engine.engine.messages import EngineConfig
from onebase_server.processes import live_client
from onebase_server.processes.live_client import LIVE_COMMAND, LiveSettings, LiveTrainer
from onebase_server.processes.live_protocol import FromLive
from onebase_server.processes.time_share import BusyFlag
from onebase_training.live_operations import Computed, Refused, Result, Stepped, WeightsSaved
from onebase_training.live_store import LiveStore, UnknownLiveModelError

pytestmark = pytest.mark.usefixtures("forks")
KILLS = int(os.environ.get("ONEBASE_LIVE_KILLS", "4"))
"""Moments at which the trainer is killed; more of them take three seconds each."""


@dataclass(frozen=True)
class _Published:
    config: EngineConfig
    manifest: bytes
    fd: int


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Published]:
    folder = tmp_path_factory.mktemp("live-base")
    base, fd = tiny_base(folder), os.memfd_create("base")
    yield _Published(EngineConfig(base_folder=str(folder), threads=1), publish(base, fd), fd)
    os.close(fd)


def run(
    published: _Published,
    root: Path,
    work: Callable[[LiveTrainer], Awaitable[None]],
    command: tuple[str, ...] = LIVE_COMMAND,
) -> None:
    """Do `work` with a trainer of live adapters, as one life of a server."""

    async def serve() -> None:
        busy = BusyFlag.make()
        settings = LiveSettings("tiny", None, share=0.5, memory=0, busy_fd=busy.fd, command=command)
        live = LiveTrainer(LiveStore(root), Threads("disk", 4), settings)
        live.base_ready(published.config, published.manifest, published.fd)
        try:
            await work(live)
        finally:
            await live.stop()

    asyncio.run(serve())
    assert live_trainers(os.getpid()) == []


async def _result(live: LiveTrainer, model: str, seq_id: int) -> Result:
    found = await live.wait(model, seq_id, 60.0 + 20 * KILLS)
    assert found is not None
    return found


def test_a_trainer_killed_at_any_moment_ends_with_the_bits_of_one_that_never_was(
    published: _Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_client, "RESTARTS", Backoff(0.01, 0.01))
    monkeypatch.setattr(live_client, "MAX_DEATHS", KILLS + 1)
    draw = random.Random(7)
    kills = 0

    async def live_through(live: LiveTrainer, results: dict[tuple[str, int], Result]) -> None:
        for spec in SPECS:
            await live.create(spec)
            for seq_id, operation in reversed(lesson(live.store.root, spec.id).items()):
                await live.submit(spec.id, seq_id, operation)
        for spec in SPECS:
            for seq_id in lesson(live.store.root, spec.id):
                results[spec.id, seq_id] = await _result(live, spec.id, seq_id)

    async def broken(live: LiveTrainer, results: dict[tuple[str, int], Result]) -> None:
        take, left = live._take, draw.randrange(1, 6)

        def kill(pid: int | None) -> None:
            nonlocal kills
            if pid is not None and live.pid == pid and kills < KILLS:
                kills += 1
                os.kill(pid, signal.SIGKILL)

        def counted(message: FromLive) -> None:
            nonlocal left
            take(message)
            left -= 1
            if not left:
                left = draw.randrange(1, 6)
                asyncio.get_running_loop().call_later(draw.uniform(0.0, 0.04), kill, live.pid)

        live._take = counted  # type: ignore[method-assign]
        await live_through(live, results)

    expected: dict[tuple[str, int], Result] = {}
    found: dict[tuple[str, int], Result] = {}
    run(published, tmp_path / "whole", lambda live: live_through(live, expected))
    run(published, tmp_path / "broken", lambda live: broken(live, found))
    assert kills >= min(KILLS, 3)
    for key, result in expected.items():
        _assert_same(found[key], result)


def _assert_same(found: Result, expected: Result) -> None:
    """Bit for bit, but for times and folders."""
    assert type(found) is type(expected)
    if isinstance(expected, WeightsSaved) and isinstance(found, WeightsSaved):
        assert found.checkpoint.digest == expected.checkpoint.digest
        kept, whole = (Path(one.checkpoint.folder) / "optimizer.safetensors" for one in (found, expected))
        assert_equal(load_file(kept), load_file(whole))
    elif isinstance(expected, Computed) and isinstance(found, Computed):
        assert (found.outputs, found.metrics) == (expected.outputs, expected.metrics)
    elif isinstance(expected, Stepped):
        assert found == expected


def test_what_was_accepted_is_done_by_the_next_server(published: _Published, tmp_path: Path) -> None:
    async def accept(live: LiveTrainer) -> None:
        await live.engine_gone()
        await live.create(SPECS[0])
        await live.submit("small", 2, STEP)
        await live.submit("small", 1, ask(text_row(9)))
        assert live.queue_state() == "paused_capacity"
        assert await live.wait("small", 2, 0.0) is None

    async def go_on(live: LiveTrainer) -> None:
        assert isinstance(await _result(live, "small", 2), Stepped)
        assert live.queue_state() == "active"
        await live.unload("small")
        with pytest.raises(UnknownLiveModelError):
            await live.submit("small", 3, STEP)

    run(published, tmp_path, accept)
    run(published, tmp_path, go_on)


def test_a_server_that_stops_leaves_nothing_to_be_done_over(published: _Published, tmp_path: Path) -> None:
    async def work(live: LiveTrainer) -> None:
        await live.create(SPECS[0])
        await live.submit("small", 1, ask(text_row(9)))
        await _result(live, "small", 1)

    run(published, tmp_path, work)
    store = LiveStore(tmp_path)
    assert store.last_point("small") == 1
    assert store.operation("small", 1) is None
    assert store.result("small", 1) is not None


def test_an_operation_that_kills_the_trainer_is_refused_and_the_next_ones_are_done(
    published: _Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = """
import os, sys
from onebase_training.live import LiveModel
whole = LiveModel.forward_backward
def forward_backward(self, operation):
    if operation.config:
        os.kill(os.getpid(), 9)
    return whole(self, operation)
LiveModel.forward_backward = forward_backward
from onebase_server.processes.live import main
sys.exit(main())
"""
    monkeypatch.setattr(live_client, "RESTARTS", Backoff(0.01, 0.01))

    async def work(live: LiveTrainer) -> None:
        await live.create(SPECS[0])
        await live.submit("small", 1, ask(text_row(9)))
        await live.submit("small", 2, ask(text_row(9), config={"deadly": 1.0}))
        await live.submit("small", 3, STEP)
        refused = await _result(live, "small", 2)
        assert isinstance(refused, Refused)
        assert (refused.code, refused.category) == ("trainer_died", "server")
        assert isinstance(await _result(live, "small", 3), Stepped)

    run(published, tmp_path, work, (sys.executable, "-c", deadly))


def test_a_model_for_which_memory_was_short_is_made_by_a_trainer_that_hears_no_more_of_it(
    published: _Published, tmp_path: Path
) -> None:
    scarce = """
import itertools, sys
from onebase_server.processes import live as process
from onebase_training import live
read_whole, is_short = live.LiveModel.read_state, [True]
free = itertools.chain([1 << 30] * 4, itertools.repeat(8 << 30))
def read_state(self, folder):
    if is_short:
        raise MemoryError
    read_whole(self, folder)
live.LiveModel.read_state, live.RETRY_SECONDS, live.PAUSE_BY_TRY = read_state, 0.01, 0.0
process.memory_limit, process.free_memory = lambda *_: 1 << 30, lambda device: next(free)
bound = process.bound_memory
def bound_memory(limit, device, *uncounted):
    if limit > 2 << 30:
        is_short.clear()
    return bound(limit, device, *uncounted)
process.bound_memory = bound_memory
sys.exit(process.main())
"""

    async def train(live: LiveTrainer) -> None:
        await live.create(SPECS[0])
        await live.submit("small", 1, ask(text_row(9)))
        await _result(live, "small", 1)

    async def step(live: LiveTrainer) -> None:
        await live.submit("small", 2, STEP)
        assert isinstance(await _result(live, "small", 2), Stepped)

    run(published, tmp_path, train)
    run(published, tmp_path, step, (sys.executable, "-c", scarce))


def test_a_model_that_kills_the_trainer_is_broken_and_others_are_trained(
    published: _Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = """
import os, sys
from onebase_training.live import LiveModel
whole = LiveModel.__init__
def init(self, base, spec, *rest):
    if spec.id == "wide:0":
        os.kill(os.getpid(), 9)
    whole(self, base, spec, *rest)
LiveModel.__init__ = init
from onebase_server.processes.live import main
sys.exit(main())
"""
    monkeypatch.setattr(live_client, "RESTARTS", Backoff(0.01, 0.01))

    async def train_both(live: LiveTrainer) -> None:
        for spec in SPECS:
            await live.create(spec)
            await live.submit(spec.id, 1, ask(text_row(9)))
            await _result(live, spec.id, 1)

    async def outlive(live: LiveTrainer) -> None:
        for spec in SPECS:
            await live.submit(spec.id, 2, STEP)
        refused = await _result(live, "wide:0", 2)
        assert isinstance(refused, Refused)
        assert (refused.code, refused.category) == ("model_broken", "server")
        assert isinstance(await _result(live, "small", 2), Stepped)

    run(published, tmp_path, train_both)
    run(published, tmp_path, outlive, (sys.executable, "-c", deadly))


def test_all_who_wait_for_a_result_get_it_and_leave_nothing_behind(
    published: _Published, tmp_path: Path
) -> None:
    async def work(live: LiveTrainer) -> None:
        await live.create(SPECS[0])
        waits = [live.wait("small", 1, 60.0) for _ in range(3)] + [live.wait("small", 2, 0.01)]
        found = asyncio.gather(*waits, live.created("small", 60.0))
        await live.submit("small", 1, ask(text_row(9)))
        first, *same, none, made = await found
        assert isinstance(first, Computed)
        assert same == [first, first]
        assert (none, made) == (None, True)
        assert live._waiters == {}

    run(published, tmp_path, work)
