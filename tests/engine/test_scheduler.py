"""Which rows run: everyone finishes, whatever the limits, and nothing is left behind."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scheduling import BLOCK, World, make_row

from onebase_engine.engine import scheduler
from onebase_engine.engine.kv_cache import ZERO_BLOCK, Sight
from onebase_engine.engine.scheduler import CREDIT_STEPS, MAX_SCORED_TOKENS, NeverFitsError
from onebase_engine.engine.sequence import Segment, SequenceState, StepPlan


@dataclass(frozen=True)
class Traffic:
    """One row to come: when, how long, whose, with which adapters, and when it is cancelled (never: None)."""

    at: int
    prompt: int
    start: int
    max_tokens: int
    adapters: tuple[str, ...]
    tenant: str
    priority: int
    background: bool
    scored: bool
    follows: bool
    cancel_at: int | None


TRAFFIC = st.lists(
    st.builds(
        Traffic,
        at=st.integers(0, 20),
        prompt=st.integers(1, 20),
        start=st.integers(0, 2),
        max_tokens=st.integers(1, 12),
        adapters=st.lists(st.sampled_from("abcd"), max_size=2, unique=True).map(tuple),
        tenant=st.sampled_from("xyz"),
        priority=st.sampled_from([0, 0, 0, -4, 2]),
        background=st.booleans(),
        scored=st.booleans(),
        follows=st.booleans(),
        cancel_at=st.none() | st.integers(0, 40),
    ),
    min_size=1,
    max_size=16,
)


def _row(arrival: int, item: Traffic, previous: SequenceState | None) -> SequenceState:
    if item.follows and previous is not None:
        prompt = previous.tokens[: previous.prompt_length]
        leader = previous.leader or previous
        tenant, priority = previous.tenant, previous.priority
        return make_row(
            arrival,
            prompt,
            item.max_tokens,
            previous.mix.digests,
            leader=leader,
            tenant=tenant,
            priority=priority,
            background=previous.background,
        )
    prompt = list(range(item.start, item.start + item.prompt))
    return make_row(
        arrival,
        prompt,
        item.max_tokens,
        item.adapters,
        scored=item.scored,
        tenant=item.tenant,
        priority=item.priority,
        background=item.background,
    )


SIGHTS = st.sampled_from([Sight(), Sight(), Sight(1), Sight(6), Sight(17), Sight(chunk=8)])


@settings(max_examples=120)
@given(
    traffic=TRAFFIC,
    blocks=st.integers(8, 20),
    slots=st.integers(2, 3),
    max_sequences=st.integers(1, 5),
    step_tokens=st.integers(1, 24),
    joins=st.integers(0, 3),
    most=st.integers(1, 16),
    bounded=st.integers(1, 24),
    host_blocks=st.sampled_from([0, 0, 3, 12, 100]),
    restored=st.sampled_from([1, 2, 100]),
    sights=st.lists(SIGHTS, min_size=1, max_size=3),
    in_flight=st.sampled_from([1, 4, 32]),
)
def test_every_row_finishes_and_everything_comes_back(
    traffic: list[Traffic],
    blocks: int,
    slots: int,
    max_sequences: int,
    step_tokens: int,
    joins: int,
    most: int,
    bounded: int,
    host_blocks: int,
    restored: int,
    sights: list[Sight],
    in_flight: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "PREFIX_IN_FLIGHT", in_flight)
        _finish_everything(
            traffic,
            blocks,
            slots,
            max_sequences,
            step_tokens,
            joins,
            most,
            bounded,
            host_blocks,
            restored,
            sights,
        )


def _finish_everything(
    traffic: list[Traffic],
    blocks: int,
    slots: int,
    max_sequences: int,
    step_tokens: int,
    joins: int,
    most: int,
    bounded: int,
    host_blocks: int,
    restored: int,
    sights: list[Sight],
) -> None:
    world = World.create(
        sights=sights,
        blocks=blocks * len(sights),
        slots=slots,
        max_sequences=max_sequences,
        step_tokens=step_tokens,
        host_blocks=host_blocks,
        restored=restored,
    )
    coming = sorted(traffic, key=lambda item: item.at)
    rows: list[tuple[SequenceState, Traffic]] = []
    work = sum(item.prompt + item.max_tokens for item in traffic)
    # Each preemption throws away at most one row's work. An older row's growth preempts; rows of others do so
    # at most once, and once more for each block of tokens that is made in between.
    limit = 60 + work * (len(traffic) + 1) * 2
    last_admission = -limit
    for step in range(limit + 1):
        while coming and coming[0].at <= step:
            item = coming.pop(0)
            row = _row(len(rows), item, rows[-1][0] if rows else None)
            world.scheduler.check_limits(row.prompt_length, item.max_tokens, len(row.mix.terms))
            world.scheduler.add(row)
            rows.append((row, item))
        for row, item in rows:
            if item.cancel_at == step and row.finish is None:
                row.finish = "cancelled"
                world.scheduler.finish(row)
        if not coming and not world.scheduler.sequences:
            break
        assert step < limit, "the rows do not finish"
        before, preemptions = set(world.scheduler.running), for_blocks(world)
        may = world.scheduler.only_background or step % 4 <= joins
        plan = world.step(background=most if may else 0, bounded=bounded)
        assert plan or not world.scheduler.sequences or world.came_back[-1], "rows wait for nothing"
        assert world.came_back[-1] <= restored
        if for_blocks(world) > preemptions:
            assert step - last_admission > BLOCK, "a row was preempted right after an admission"
        if any(segment.sequence not in before for segment in plan.segments):
            last_admission = step
    for row, item in rows:
        assert row.finish is not None
        assert row.finish == "cancelled" or row.generated == item.max_tokens
        assert not row.blocks
    if not any(row.background for row, _ in rows):
        assert world.scheduler.yielded <= sum(1 + row.generated // BLOCK for row, _ in rows)
    assert world.pool.free == world.pool.capacity
    assert world.slots.used == 0


def for_blocks(world: World) -> int:
    """Preemptions because blocks ran out."""
    return world.scheduler.preemptions - world.scheduler.yielded


@pytest.mark.parametrize(("window", "most"), [(None, 15), (8, 3), (9, 3), (1, 1)])
def test_a_row_holds_the_blocks_of_its_window_alone(window: int | None, most: int) -> None:
    world = World.create(sights=[Sight(window)], step_tokens=8)
    row = make_row(0, range(10), 50)
    world.scheduler.add(row)
    held = []
    while world.scheduler.sequences:
        world.step()
        held.append(world.pool.capacity - world.pool.free)
    assert max(held[2:-1]) == most
    assert row.generated == 50
    assert world.pool.free == world.pool.capacity


def test_a_preempted_row_that_has_released_blocks_begins_again_from_its_prefix() -> None:
    world = World.create(sights=[Sight(6)], blocks=20)
    row, other = make_row(0, range(20), 30), make_row(1, range(20), 4)
    world.scheduler.add(row)
    for _ in range(12):
        world.step()
    assert ZERO_BLOCK in row.blocks[0]
    world.preempt(row)
    assert world.pool.free == world.pool.capacity
    world.scheduler.add(other)
    world.step()
    assert other.cached_tokens == 16, "what was released is still a prefix"
    world.finish_all()
    assert (row.generated, other.generated) == (30, 4)


def test_the_youngest_row_is_preempted_and_still_finishes() -> None:
    world = World.create(blocks=6, max_sequences=3)
    rows = [make_row(i, [i * 10 + j for j in range(4)], 12) for i in range(3)]
    for row in rows:
        world.scheduler.add(row)
    order = []
    while world.scheduler.sequences:
        before = list(world.scheduler.running)
        world.step()
        order += [row.arrival for row in before if row in world.scheduler.waiting]
    assert order[0] == 2
    assert world.scheduler.preemptions == len(order)
    assert [row.generated for row in rows] == [12, 12, 12]


def test_rows_that_outgrow_the_pool_are_not_admitted_only_to_be_preempted() -> None:
    world = World.create(blocks=20, max_sequences=8)
    rows = [make_row(i, [i * 10 + j for j in range(6)], 20) for i in range(24)]
    for row in rows:
        world.scheduler.add(row)
    world.finish_all()
    assert all(row.generated == 20 for row in rows)
    assert 0 < world.scheduler.preemptions <= len(rows) // 4


def test_a_row_that_needs_every_block_lets_others_pass_and_then_runs_alone() -> None:
    world = World.create(blocks=200, max_sequences=4, max_length=1000, step_tokens=1000)
    rows = [make_row(0, [1], 2), make_row(1, list(range(200 * BLOCK)), 1), make_row(2, [2], 2)]
    for row in rows:
        world.scheduler.add(row)
    assert [segment.sequence for segment in world.step().segments] == [rows[0], rows[2]]
    last = world.step()
    while rows[1] in world.scheduler.waiting:
        last = world.step()
    assert [segment.sequence for segment in last.segments] == [rows[1]]
    world.finish_all()
    assert [row.generated for row in rows] == [2, 1, 2]


def test_a_preempted_row_goes_on_where_it_was() -> None:
    world = World.create(blocks=6, max_sequences=2, step_tokens=32)
    rows = [make_row(i, [i * 10 + j for j in range(8)], 9) for i in range(2)]
    for row in rows:
        world.scheduler.add(row)
    while not world.scheduler.preemptions:
        world.step()
    generated = list(rows[1].tokens)
    assert rows[1] in world.scheduler.waiting
    assert rows[1].generated > 1
    world.finish_all()
    assert rows[1].tokens[: len(generated)] == generated
    assert rows[1].generated == 9


def test_decodes_come_before_prefills_of_older_and_younger_rows() -> None:
    world = World.create(step_tokens=5, max_sequences=4)
    world.scheduler.add(make_row(0, [1, 2], 20))
    world.step()
    world.scheduler.add(make_row(1, list(range(20)), 4))
    plan = world.step()
    assert [(s.sequence.arrival, s.length) for s in plan.decodes] == [(0, 1)]
    assert [(s.sequence.arrival, s.length) for s in plan.prefills] == [(1, 4)]
    world.scheduler.add(make_row(2, [7], 4))
    plan = world.step()
    assert [(s.sequence.arrival, s.length) for s in plan.segments] == [(0, 1), (1, 4)]


def test_a_long_prefill_holds_no_decode_up() -> None:
    world = World.create(step_tokens=4)
    decoding = make_row(0, [1], 12)
    world.scheduler.add(decoding)
    world.step()
    world.scheduler.add(make_row(1, list(range(40)), 1))
    for expected in range(2, 12):
        world.step()
        assert decoding.generated == expected


def test_followers_wait_for_their_leader_and_take_its_prompt_from_the_cache() -> None:
    world = World.create(step_tokens=6)
    prompt = list(range(13))
    leader = make_row(0, prompt, 6)
    followers = [make_row(i, prompt, 6, leader=leader) for i in (1, 2)]
    for row in (leader, *followers):
        world.scheduler.add(row)
    for _ in range(3):
        assert {segment.sequence for segment in world.step().segments} == {leader}
    assert {segment.sequence for segment in world.step().segments} == {leader, *followers}
    assert [row.cached_tokens for row in (leader, *followers)] == [0, 12, 12]
    world.finish_all()


def test_followers_of_a_cancelled_leader_prefill_themselves() -> None:
    world = World.create(step_tokens=4)
    leader = make_row(0, list(range(13)), 6)
    follower = make_row(1, list(range(13)), 6, leader=leader)
    world.scheduler.add(leader)
    world.scheduler.add(follower)
    world.step()
    leader.finish = "cancelled"
    world.scheduler.finish(leader)
    world.finish_all()
    assert follower.generated == 6
    assert follower.cached_tokens == 4


def _ending_apart(number: int, shared: int = 40, **options: Any) -> SequenceState:
    """A row whose prompt begins as that of the others, and ends otherwise."""
    return make_row(number, [*range(shared), 100 + number, 200 + number], 3, **options)


def test_a_prefix_that_arrives_several_times_at_once_is_computed_once() -> None:
    world = World.create(blocks=80, max_sequences=6, step_tokens=16)
    rows = [_ending_apart(number) for number in range(6)]
    for row in rows:
        world.scheduler.add(row)

    computed = 0
    while world.scheduler.sequences:
        computed += sum(segment.length for segment in world.step().prefills)

    assert [row.cached_tokens for row in rows] == [0, *[40] * 5]
    assert computed == 42 + 5 * 2


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "another"},
        {"adapters": ("a",)},
        {"priority": 1},
        {"shared": 28},
        {"background": False},
    ],
)
def test_a_row_does_not_wait_for_what_it_could_not_reuse_or_who_comes_behind_it(other: Any) -> None:
    world = World.create(blocks=80, step_tokens=48)
    first = _ending_apart(0, background="background" in other)
    world.scheduler.add(first)
    world.step(background=16)  # leaves a part of the prompt
    second = _ending_apart(1, **other)
    world.scheduler.add(second)

    assert second in {segment.sequence for segment in world.step().segments}


@pytest.mark.parametrize("why", ["scored", "awaits"])
def test_a_row_does_not_wait_for_a_row_that_is_slow_with_the_prefix_they_share(why: str) -> None:
    """Its prompt is scored, or its grammar's mask has not arrived."""
    world = World.create(blocks=80, step_tokens=128)
    first, second = _ending_apart(0, scored=why == "scored"), _ending_apart(1)
    world.scheduler.awaits = lambda row: why == "awaits" and row is first
    world.scheduler.add(first)
    world.scheduler.add(second)

    assert second in {segment.sequence for segment in world.step().segments}


def test_a_row_stops_waiting_for_its_prefix_once_the_flow_that_computes_it_is_behind_its_own() -> None:
    """Activated LoRAs reuse what the bare base computes, which may have received far more."""
    world = World.create(blocks=8000, slots=8, max_sequences=64, step_tokens=16, max_length=400)

    def add_others(numbers: range, *adapters: str) -> None:
        for number in numbers:
            world.scheduler.add(make_row(number, range(1000 * number, 1000 * number + 200), 2, adapters))

    add_others(range(1, 21))
    world.finish_all()
    add_others(range(21, 24))
    world.scheduler.add(first := _ending_apart(30, 200))
    while first not in world.scheduler.running:
        world.step()
    add_others(range(40, 48), "c")
    second = _ending_apart(50, 200, adapters=("a",))
    second.acts_from = 200
    world.scheduler.add(second)

    begins = next(step for step in range(1, 100) if second in {one.sequence for one in world.step().segments})
    assert begins <= 1 + 2 * CREDIT_STEPS
    assert (second.cached_tokens or 0) < 200


def test_rows_go_on_without_the_row_that_computed_their_prefix_if_it_is_cancelled() -> None:
    world = World.create(blocks=80, step_tokens=16)
    first, second = _ending_apart(0), _ending_apart(1)
    world.scheduler.add(first)
    world.scheduler.add(second)
    world.step()
    first.finish = "cancelled"
    world.scheduler.finish(first)

    assert {segment.sequence for segment in world.step().segments} == {second}
    assert second.cached_tokens == 16
    world.finish_all()


def test_a_repeated_prompt_comes_from_the_cache_but_one_token_is_always_computed() -> None:
    world = World.create()
    prompt = list(range(2 * BLOCK))
    world.scheduler.add(make_row(0, prompt, 1))
    world.finish_all()
    again = make_row(1, prompt, 1)
    world.scheduler.add(again)
    (segment,) = world.step().segments
    assert again.cached_tokens == BLOCK
    assert segment.length == BLOCK


@pytest.mark.parametrize("change", ["adapter", "scored"])
@pytest.mark.parametrize("left", [False, True])
def test_a_prompt_is_not_taken_from_the_cache(change: str, left: bool) -> None:
    """Nor from host memory, where it has `left` the cache."""
    world = World.create(host_blocks=40)
    prompt = list(range(2 * BLOCK + 1))
    world.scheduler.add(make_row(0, prompt, 1))
    world.finish_all()
    if left:
        world.pool.release(world.pool.allocate(world.pool.capacity) or [])
        assert (world.pool.cached, world.pool.on_host) == (0, 2)
    adapters = ["a"] if change == "adapter" else []
    row = make_row(1, prompt, 1, adapters, scored=change == "scored")
    world.scheduler.add(row)
    (segment,) = world.step().segments
    assert row.cached_tokens == 0
    assert segment.start == 0


def test_a_long_prefix_comes_back_over_several_steps_in_which_other_rows_go_on() -> None:
    world = World.create(host_blocks=40, restored=2, blocks=20)
    prompt = list(range(6 * BLOCK + 1))
    world.scheduler.add(make_row(0, prompt, 1))
    world.finish_all()
    world.pool.release(world.pool.allocate(world.pool.capacity) or [])
    other, first, second = make_row(1, [50], 9), make_row(2, prompt, 1), make_row(3, [*prompt, 7, 8], 1)
    world.scheduler.add(other)
    world.step()
    world.scheduler.add(first)
    world.scheduler.add(second)
    steps = [[segment.sequence for segment in world.step().segments] for _ in range(3)]
    assert steps == [[other], [other], [other, first, second]], "who shares it waits for it too"
    assert world.came_back[-4:] == [0, 2, 2, 2]
    assert (first.cached_tokens, second.cached_tokens) == (6 * BLOCK, 6 * BLOCK)


@pytest.mark.parametrize("ends", [True, False])
def test_a_row_that_ends_or_is_preempted_before_its_prefix_has_come_back_leaves_it_whole(ends: bool) -> None:
    world = World.create(host_blocks=40, restored=1, blocks=8)
    prompt = list(range(3 * BLOCK + 2))
    world.scheduler.add(make_row(0, prompt, 1))
    world.finish_all()
    world.pool.release(world.pool.allocate(world.pool.capacity) or [])
    row = make_row(1, prompt, 1)
    world.scheduler.add(row)
    assert not world.step()
    world.end(row) if ends else world.preempt(row)
    assert world.pool.free == world.pool.capacity
    if ends:
        world.scheduler.add(make_row(2, prompt, 1))
    world.finish_all()
    assert sum(world.came_back) == 3


@pytest.mark.parametrize(
    ("start", "stop", "draft", "blocks"),
    [(0, 1, (), {3}), (3, 4, (), {3}), (4, 8, (), {7}), (2, 9, (), {3, 7, 5}), (6, 7, (1, 2), {7, 5})],
)
def test_a_plan_knows_the_blocks_that_it_writes_to(
    start: int, stop: int, draft: tuple[int, ...], blocks: set[int]
) -> None:
    row, other = make_row(0, list(range(12)), 1), make_row(1, [1], 1)
    row.blocks.append(array("i", [3, 7, 5]))
    other.blocks.append(array("i", [9]))
    plan = StepPlan([Segment(other, 0, 1)], [Segment(row, start, stop, draft)])
    assert plan.written(4) == {*blocks, 9}


def test_a_scored_prompt_is_cut_into_bounded_pieces() -> None:
    world = World.create(blocks=100, step_tokens=1000, max_length=400)
    world.scheduler.add(make_row(0, list(range(MAX_SCORED_TOKENS + 5)), 1, scored=True))
    assert [s.length for s in world.step().segments] == [MAX_SCORED_TOKENS]
    assert [s.length for s in world.step().segments] == [5]


def test_a_row_that_waits_for_a_slot_lets_younger_ones_pass() -> None:
    world = World.create(slots=1)
    rows = [make_row(0, [1], 3, ["a"]), make_row(1, [1], 3, ["b"]), make_row(2, [1], 3)]
    for row in rows:
        world.scheduler.add(row)
    assert [segment.sequence for segment in world.step().segments] == [rows[0], rows[2]]
    world.finish_all()
    assert rows[1].generated == 3


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "adapters", "code", "words"),
    [
        (0, 4, 0, "empty_prompt", "no tokens"),
        (30, 35, 0, "context_length_exceeded", "64 tokens"),
        (30, 20, 0, "kv_memory_exceeded", "--kv-memory"),
        (4, 4, 3, "too_many_adapters", "--max-slots 3"),
    ],
)
def test_what_can_never_fit_is_refused_with_its_limit(
    prompt: int, max_tokens: int, adapters: int, code: str, words: str
) -> None:
    world = World.create(blocks=10, slots=2, max_length=64)
    with pytest.raises(NeverFitsError, match=words) as caught:
        world.scheduler.check_limits(prompt, max_tokens, adapters)
    assert caught.value.code == code
    assert caught.value.param in ("prompt", "max_tokens", "adapter")


def test_what_just_fits_is_accepted_and_runs_beside_others() -> None:
    world = World.create(blocks=10, slots=2, max_length=40)
    world.scheduler.check_limits(30, 10, 2)
    rows = [make_row(0, [9] * 8, 8, ["c"]), make_row(1, list(range(30)), 10, ["a", "b"])]
    for row in rows:
        world.scheduler.add(row)
    world.finish_all()
    assert rows[1].generated == 10
