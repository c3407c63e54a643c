"""A full queue is closed to those who fill it, and open to everybody else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_edge.errors import QueueFullError
from onebase_engine.engine.messages import Sampling, SequenceOutput, Stats, StepResult, Submit, ToEngine
from onebase_server.processes.engine_client import EngineClient
from onebase_server.processes.inflight import Inflight
from onebase_server.tenancy.shares import QueueShares

STATS = Stats(
    sequences_running=0,
    sequences_waiting=0,
    kv_blocks_free=0,
    kv_blocks_cached=0,
    kv_blocks_total=0,
    slots_used=0,
    steps=1,
    preemptions=0,
    prompt_tokens=0,
    generated_tokens=0,
    cached_tokens=0,
    adapters_loaded=0,
)


def inflight(name: str, tenant: str, rows: int = 1) -> Inflight:
    submit = Submit(id=name, prompt=[1], sampling=Sampling(), n=rows, tenant=tenant)
    return Inflight([submit], 2**31)


def test_a_tenant_that_fills_the_queue_is_turned_away_and_another_is_not() -> None:
    sent: list[ToEngine] = []
    router = EngineClient(6, sent.append)
    for number in range(8):
        router.submit(inflight(f"flood-{number}", "flood"), 2)
    with pytest.raises(QueueFullError, match="--queue-limit"):
        router.submit(inflight("one more", "flood"), 2)
    for number in range(4):
        router.submit(inflight(f"guest-{number}", "guest"), 2)
    with pytest.raises(QueueFullError):
        router.submit(inflight("beyond its half", "guest"), 2)
    router.deliver(StepResult(outputs=[SequenceOutput(id="guest-0", finish="stop")], stats=STATS, at=0.0))
    router.submit(inflight("in its place", "guest"), 2)
    assert router.open_sequences == len(sent) - 1 == 12


def test_a_tenant_alone_may_use_the_whole_queue() -> None:
    router = EngineClient(3, lambda message: None)
    router.submit(inflight("large", "one", rows=4), 1)
    with pytest.raises(QueueFullError):
        router.submit(inflight("small", "one"), 1)
    router.forget_all()
    router.submit(inflight("large again", "one", rows=4), 1)


@given(
    limit=st.integers(5, 40),
    events=st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=300),
)
def test_whoever_has_nothing_in_a_queue_gets_in_and_the_queue_stays_bounded(
    limit: int, events: list[tuple[str, bool]]
) -> None:
    shares, own = QueueShares(), dict.fromkeys("abcde", 0)
    for tenant, enters in events:
        if not enters and own[tenant]:
            shares.leave(tenant)
            own[tenant] -= 1
        elif enters and shares.has_room(tenant, 1, limit):
            shares.enter(tenant)
            own[tenant] += 1
        assert shares.total == sum(own.values()) <= limit * sum(1 / n for n in range(1, 6))
        assert all(shares.has_room(one, 1, limit) for one, taken in own.items() if not taken)
