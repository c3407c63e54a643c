"""A request that kills every engine is refused, and those that ran with it are served."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from onebase_edge.background import Backoff
from onebase_edge.errors import CrashesEngineError, EngineRestartedError, UnavailableError
from onebase_engine.engine.messages import AdapterRef, EngineConfig, Sampling, Submit
from onebase_server.processes.crash_suspects import FORGIVEN_AFTER, MAX_SUSPECTS, Suspects, fingerprint
from onebase_server.processes.inflight import Inflight
from onebase_server.processes.link import EngineLink
from onebase_server.processes.supervisor import (
    EngineFailedError,
    EngineState,
    EngineSupervisor,
    RestartPolicy,
)

from .scripted_engine import POISON
from .support import HERE

PATIENCE = 120.0
IDS = itertools.count()


def inflight(*prompt: int, adapters: tuple[AdapterRef, ...] = (), **options: Any) -> Inflight:
    sampling = Sampling(**{"max_tokens": 10, **options})
    submit = Submit(id=f"r{next(IDS)}", prompt=list(prompt), sampling=sampling, adapters=list(adapters))
    return Inflight([submit], 2**31)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def supervised() -> AsyncIterator[EngineSupervisor]:
    """A supervisor of engines that poison kills."""
    supervisor = EngineSupervisor(
        EngineConfig(base_folder="none"),
        EngineLink(),
        queue_limit=100,
        stall_timeout=PATIENCE,
        command=[sys.executable, str(HERE / "scripted_engine.py"), "poison"],
        policy=RestartPolicy(backoff=Backoff(0.01, 0.01)),
    )
    running = asyncio.create_task(supervisor.run_engine())
    try:
        async with asyncio.timeout(PATIENCE):
            yield supervisor
    finally:
        await supervisor.stop()
        await running


async def ask(supervisor: EngineSupervisor, request: Inflight) -> int:
    """Run a request to its end; gives the number of its tokens."""
    await supervisor.ready.wait()
    supervisor.submit(request)
    count = 0
    while request.open_sequences:
        count += sum(len(output.tokens) for output in await request.next_outputs())
    return count


async def insist(supervisor: EngineSupervisor, prompt: int, max_tokens: int) -> int:
    """As a client that sends its request again whenever that may help."""
    while True:
        try:
            return await ask(supervisor, inflight(prompt, max_tokens=max_tokens))
        except (EngineRestartedError, UnavailableError):
            await asyncio.sleep(0.01)


def test_a_request_that_kills_two_engines_is_refused_and_others_are_served() -> None:
    async def scenario() -> None:
        async with supervised() as supervisor:
            with pytest.raises(EngineRestartedError):
                await ask(supervisor, inflight(7, max_tokens=POISON, seed=1))
            with pytest.raises(CrashesEngineError):
                await ask(supervisor, inflight(7, max_tokens=POISON, seed=2))
            for seed in range(8):
                with pytest.raises(CrashesEngineError):
                    await ask(supervisor, inflight(7, max_tokens=POISON, seed=seed))
            assert await ask(supervisor, inflight(7)) == 10
            assert supervisor.restarts == 2

    asyncio.run(scenario())


def test_requests_that_ran_with_the_culprit_both_times_are_served_and_it_is_found_at_the_third_death() -> (
    None
):
    async def scenario() -> None:
        async with supervised() as supervisor:
            await supervisor.ready.wait()
            innocent = [insist(supervisor, prompt, 10) for prompt in range(1, 6)]
            *counts, error = await asyncio.gather(
                *innocent, insist(supervisor, 7, POISON), return_exceptions=True
            )
            assert isinstance(error, CrashesEngineError)
            assert counts == [10] * 5
            assert await insist(supervisor, 8, 10) == 10
            assert supervisor.restarts == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_engine_that_cannot_be_started_again_is_tried_as_often_as_one_that_dies(
    monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    spawn = asyncio.create_subprocess_exec
    started = 0

    async def start(*command: str, **options: Any) -> asyncio.subprocess.Process:
        nonlocal started
        started += 1
        if 1 < started <= 3 or (started > 1 and not comes_back):
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        return await spawn(*command, **options)

    async def scenario() -> None:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        async with supervised() as supervisor:
            with pytest.raises(EngineRestartedError):
                await ask(supervisor, inflight(7, max_tokens=POISON))
            if comes_back:
                assert await insist(supervisor, 8, 10) == 10
                assert supervisor.restarts == 3
            else:
                while supervisor.state is not EngineState.FAILED:
                    await asyncio.sleep(0.01)
                assert supervisor.restarts == RestartPolicy().rapid_restarts

    said = "the system refuses more .*no more processes.*ulimit -u"
    with contextlib.nullcontext() if comes_back else pytest.raises(EngineFailedError, match=said):
        asyncio.run(scenario())


def test_suspects_run_one_at_a_time_among_all_others() -> None:
    suspects = Suspects()
    pair = [inflight(1), inflight(2)]
    for _ in range(2):
        suspects.engine_died(pair)
    suspects.admit(pair[0])
    suspects.admit(inflight(3))
    with pytest.raises(UnavailableError) as caught:
        suspects.admit(pair[1])
    assert caught.value.code == "crash_suspect"
    suspects.ended(pair[0])
    suspects.admit(pair[1])


def test_the_third_death_clears_the_suspect_that_was_not_running() -> None:
    suspects = Suspects()
    culprit, bystander = inflight(1), inflight(2)
    for _ in range(2):
        suspects.engine_died([culprit, bystander])
    suspects.admit(culprit)
    suspects.engine_died([culprit, inflight(3)])
    with pytest.raises(CrashesEngineError):
        suspects.admit(inflight(1))
    suspects.admit(bystander)
    suspects.admit(inflight(3))


@pytest.mark.parametrize("given_up", [False, True])
def test_a_request_is_cleared_by_its_end_unless_it_was_cancelled(given_up: bool) -> None:
    suspects = Suspects()
    suspects.engine_died([inflight(1)])
    again = inflight(1)
    suspects.admit(again)
    again.given_up = given_up
    suspects.ended(again)
    suspects.engine_died([inflight(1)])
    with pytest.raises(CrashesEngineError) if given_up else contextlib.nullcontext():
        suspects.admit(inflight(1))


def test_a_refused_request_may_be_tried_again_after_some_minutes() -> None:
    clock = Clock()
    suspects = Suspects(clock)
    for clock.now in (0.0, 100.0):
        suspects.engine_died([inflight(1)])
    clock.now += FORGIVEN_AFTER - 1
    with pytest.raises(CrashesEngineError, match="1 minutes"):
        suspects.admit(inflight(1))
    clock.now += 1
    suspects.admit(inflight(1))
    suspects.engine_died([inflight(1)])
    suspects.admit(inflight(1))


def test_memory_of_deaths_is_bounded() -> None:
    suspects = Suspects()
    for first in range(0, 4 * MAX_SUSPECTS, MAX_SUSPECTS // 2):
        suspects.engine_died([inflight(first + i) for i in range(MAX_SUSPECTS // 2)])
        assert len(suspects._records) <= MAX_SUSPECTS


def test_a_request_is_known_again_by_all_but_its_id_and_its_seed() -> None:
    one = inflight(1, 2, seed=1, logit_bias={3: 1.0, 4: 2.0})
    assert fingerprint(one) == fingerprint(inflight(1, 2, seed=2, logit_bias={4: 2.0, 3: 1.0}))
    others = [
        inflight(1, 3),
        inflight(1, 2),
        inflight(1, 2, temperature=0.5),
        inflight(1, 2, adapters=(AdapterRef("d"),)),
        inflight(1, 2, adapters=(AdapterRef("e"),)),
        inflight(1, 2, adapters=(AdapterRef("d", 0.5),)),
    ]
    assert len({fingerprint(request) for request in (one, *others)}) == len(others) + 1
