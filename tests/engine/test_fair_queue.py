"""Whose turn it is: no tenant and no adapter gets more than its part for long, and nobody waits for ever."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterable, Iterator
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.harness import Lab, Request, run
from tests.engine.scheduling import BLOCK, World, make_row
from tests.tiny import save_base

from onebase_adapters.registry.keys import MAX_PRIORITY
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine.fair_queue import MOST_IDLE, MOST_PRIORITY, Accounts, TokenCounter
from onebase_engine.engine.scheduler import (
    BOUNDED_FRESH,
    BOUNDED_PART,
    BOUNDED_TIME,
    CREDIT_STEPS,
    MAX_PASSED,
    MAX_TRIES,
    TenantPace,
)
from onebase_engine.engine.sequence import Segment, SequenceState, StepPlan
from onebase_engine.engine.slot_table import SlotTable

STEP_TOKENS = 16
CREDIT = CREDIT_STEPS * STEP_TOKENS


class Given:
    """What each tenant was given, in weighted tokens, counted apart from the scheduler."""

    def __init__(self) -> None:
        self.by_tenant: dict[str, float] = {}
        self._prompts: dict[SequenceState, int] = {}

    def step(self, world: World, bounded: int | None = None) -> None:
        generated = {row: row.generated for row in world.scheduler.sequences}
        for segment in world.step(bounded=bounded).segments:
            row = segment.sequence
            known = self._prompts.get(row, 0)
            self._prompts[row] = max(known, min(segment.stop, row.prompt_length))
            new = self._prompts[row] - max(known, min(segment.start, row.prompt_length))
            tokens = max(0, new) + 2 * (row.generated - generated[row])
            self.by_tenant[row.tenant] = self.by_tenant.get(row.tenant, 0.0) + tokens / 2.0**row.priority


class Backlog:
    """Tenants of whose rows some always wait. `shapes`: tenant -> prompt and output tokens, and priority."""

    def __init__(self, world: World, shapes: dict[str, tuple[int, int, int]]) -> None:
        self._world, self._shapes = world, shapes
        self._arrivals: Iterator[int] = count()

    def fill(self, tenant: str, rows: int) -> None:
        prompt, tokens, priority = self._shapes[tenant]
        for arrival in (next(self._arrivals) for _ in range(rows)):
            # No two prompts begin alike, so that the prefix cache gives nothing.
            text = [arrival * 100 + position for position in range(prompt)]
            self._world.scheduler.add(make_row(arrival, text, tokens, tenant=tenant, priority=priority))

    def refill(self, rows: int, tenants: Iterable[str] = ()) -> None:
        """So many wait of each tenant, or of `tenants`."""
        waiting = [row.tenant for row in self._world.scheduler.waiting]
        for tenant in tenants or self._shapes:
            self.fill(tenant, max(0, rows - waiting.count(tenant)))


SHAPE = st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([0, 0, 1, -1]))


@settings(max_examples=40)
@given(
    shapes=st.tuples(SHAPE, SHAPE, SHAPE),
    late=st.integers(0, 60),
    steps=st.integers(200, 400),
    max_sequences=st.integers(1, 4),
    bounded=st.none() | st.integers(1, 16),
)
def test_what_tenants_that_always_wait_are_given_differs_by_no_more_than_the_bound(
    shapes: tuple[tuple[int, int, int], ...], late: int, steps: int, max_sequences: int, bounded: int | None
) -> None:
    # With room for all that runs: while blocks are lacking, shorter rows may pass longer ones.
    world = World.create(blocks=60, max_sequences=max_sequences, step_tokens=STEP_TOKENS)
    backlog = Backlog(world, dict(zip("abc", shapes, strict=True)))
    backlog.fill("a", 10)
    for _ in range(late):
        backlog.fill("a", 1)
        world.step()
    given_to = Given()
    for _ in range(steps):
        backlog.refill(5)
        given_to.step(world, bounded)
    longest = max((prompt + 2 * tokens) / 2.0**priority for prompt, tokens, priority in shapes)
    bound = 2 * (max_sequences * longest + CREDIT)
    amounts = [given_to.by_tenant.get(tenant, 0.0) for tenant in "abc"]
    assert max(amounts) - min(amounts) <= bound


@settings(max_examples=40)
@given(
    flood=SHAPE,
    guest=st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(-MOST_PRIORITY, MOST_PRIORITY)),
    adapters=st.sampled_from([(), ("a",), ("z",)]),
    own_flood=st.booleans(),
    blocks=st.integers(14, 30),
)
def test_a_row_beside_an_endless_flood_ends(
    flood: tuple[int, int, int],
    guest: tuple[int, int, int],
    adapters: tuple[str, ...],
    own_flood: bool,
    blocks: int,
) -> None:
    world = World.create(blocks=blocks, slots=2, max_sequences=3, step_tokens=STEP_TOKENS)
    arrivals = count()

    def pour(rows: int) -> None:
        prompt, tokens, priority = flood
        for arrival in (next(arrivals) for _ in range(rows)):
            text = [arrival * 100 + position for position in range(prompt)]
            row = make_row(arrival, text, tokens, "abc"[arrival % 3], tenant="flood", priority=priority)
            world.scheduler.add(row)

    pour(30)
    for _ in range(10):
        world.step()
    tenant = "flood" if own_flood else "guest"
    text = list(range(-guest[0], 0))
    row = make_row(
        next(arrivals), [-one for one in text], guest[1], adapters, tenant=tenant, priority=guest[2]
    )
    world.scheduler.add(row)
    steps = 0
    while row.finish is None:
        pour(max(0, 30 - len(world.scheduler.waiting)))
        world.step()
        steps += 1
        assert steps < 3000, "the row starves"


def flooded(
    world: World, rows: int, tokens: int, steps: int = 3, tenant: str = "flood"
) -> list[SequenceState]:
    """Rows of one tenant, of which as many run as may."""
    made = [make_row(i, [i * 10, i * 10 + 1], tokens, tenant=tenant) for i in range(rows)]
    for row in made:
        world.scheduler.add(row)
    for _ in range(steps):
        world.step()
    return made


def test_a_tenant_that_asks_now_and_then_runs_in_the_next_step_beside_a_flood() -> None:
    world = World.create(max_sequences=4)
    flood = flooded(world, 20, 12)
    guest = make_row(100, [7, 8, 9], 4, tenant="guest")
    world.scheduler.add(guest)
    assert guest in {segment.sequence for segment in world.step().segments}
    assert flood[3] in world.scheduler.waiting, "the youngest row gives way"
    assert flood[:3] == world.scheduler.running[:3]
    assert world.scheduler.yielded == 1
    world.finish_all()
    assert all(row.generated == 12 for row in flood)


def test_a_row_that_gave_way_makes_a_block_of_tokens_before_it_does_so_again() -> None:
    world = World.create(max_sequences=2, blocks=100)
    flood = flooded(world, 2, 40)
    made = []
    for arrival in range(10, 40):
        guest = make_row(arrival, [arrival], 1, tenant=f"guest{arrival}")
        world.scheduler.add(guest)
        for _ in range(3):
            before, running = flood[1].generated, flood[1] in world.scheduler.running
            world.step()
            if running and flood[1] in world.scheduler.waiting:
                made.append(before)
    assert len(made) > 2
    assert all(later - earlier >= BLOCK for earlier, later in pairwise(made))


def test_tenants_that_are_about_even_take_nothing_from_each_other() -> None:
    world = World.create(max_sequences=6, blocks=200, step_tokens=64)
    flooded(world, 30, 40, tenant="one")
    for arrival in range(100, 130):
        world.scheduler.add(make_row(arrival, [arrival], 40, tenant="two"))
    for _ in range(30):
        world.step()
    assert world.scheduler.yielded == 2, (
        "two rows of six; with a third they would have more than half of four"
    )


def test_time_in_which_nothing_waited_is_no_credit() -> None:
    world = World.create(max_sequences=2)
    backlog = Backlog(world, {"a": (4, 4, 0), "b": (4, 4, 0)})
    for _ in range(200):
        backlog.fill("a", 1)
        world.step()
    given_to = Given()
    for _ in range(100):
        backlog.refill(5)
        given_to.step(world)
    assert abs(given_to.by_tenant["a"] - given_to.by_tenant["b"]) <= 2 * (2 * 12 + CREDIT)


def test_a_tenant_of_a_higher_priority_is_given_twice_as_much_for_each_step() -> None:
    world = World.create(max_sequences=6, blocks=100)
    backlog = Backlog(world, {"a": (4, 4, 0), "b": (4, 4, 2)})
    given_to = Given()
    for _ in range(600):
        backlog.refill(8)
        given_to.step(world)
    tokens = {"a": given_to.by_tenant["a"], "b": given_to.by_tenant["b"] * 4}
    assert tokens["b"] / tokens["a"] == pytest.approx(4, rel=0.1)
    assert MAX_PRIORITY == MOST_PRIORITY


def test_in_a_tenant_the_adapter_that_was_given_least_is_next() -> None:
    world = World.create(max_sequences=1, slots=2)
    for arrival in range(6):
        world.scheduler.add(make_row(arrival, [arrival], 3, ["a"]))
    world.scheduler.add(make_row(6, [6], 3, ["b"]))
    world.scheduler.add(make_row(7, [7], 3))
    order: list[int] = []
    while world.scheduler.sequences:
        order += [
            row.arrival for row in (s.sequence for s in world.step().segments) if row.arrival not in order
        ]
    assert order == [0, 6, 7, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("own_tenants", [False, True], ids=["one-tenant", "tenant-each"])
@pytest.mark.parametrize("adapters", [10, 20, 100])
def test_adapters_at_random_over_few_slots_wait_about_as_long_as_each_other(
    adapters: int, own_tenants: bool
) -> None:
    """However often they were asked for, and although others that were given nothing come all the time."""
    world = World.create(slots=4, max_sequences=16, step_tokens=32, blocks=200)
    chosen = random.Random(adapters)
    waits: list[int] = []
    waiting: dict[SequenceState, int] = {}
    for step in range(4000):
        for arrival in range(len(world.scheduler.sequences), 8):
            name = str(chosen.randrange(adapters))
            row = make_row(
                step * 10 + arrival, [step, arrival, 1, 2], 12, [name], tenant=name if own_tenants else "one"
            )
            world.scheduler.add(row)
            waiting[row] = step
        world.step()
        begun = [row for row in waiting if row.generated]
        waits += [step - waiting.pop(row) for row in begun]
    waits.sort()
    assert len(waits) > 1000
    assert waits[-1] <= 60, "12 steps for each of 4 rows ahead of it"
    assert waits[len(waits) * 99 // 100] <= 32


@pytest.mark.parametrize(
    ("own_tenants", "waits"),
    [(False, False), (True, False), (True, True)],
    ids=["one-tenant", "tenant-each", "tenant-each-and-long-waits-too"],
)
def test_a_guest_does_not_pay_for_what_others_had_more_of_than_the_flood(
    own_tenants: bool, waits: bool
) -> None:
    """What runs long raises the mean of all by more than what the flood is given."""
    world = World.create(slots=4, max_sequences=8, step_tokens=16, blocks=4000, max_length=2000)
    arrivals = count()

    def ask(name: str, tokens: int) -> SequenceState:
        arrival = next(arrivals)
        tenant = name if own_tenants else "one"
        world.scheduler.add(row := make_row(arrival, [arrival], tokens, [name], tenant=tenant))
        return row

    def step() -> None:
        waiting = [row.mix.digests for row in world.scheduler.waiting]
        for name, least, tokens in (("flood", 4, 20), ("long", int(waits), 800)):
            for _ in range(least - waiting.count((name,))):
                ask(name, tokens)
        world.step()

    for _ in range(6):
        ask("long", 800)
    for _ in range(6):
        world.step()
    for _ in range(700):
        step()
    guest, steps = ask("guest", 4), 0
    while not guest.generated:
        step()
        steps += 1
    assert steps <= (3 if own_tenants else 21), "a row of the flood has ended, which has 20 tokens"


def test_a_guest_that_asks_again_and_again_is_next_each_time_beside_a_flood() -> None:
    world = World.create(max_sequences=4, step_tokens=16, blocks=400, max_length=200)
    backlog = Backlog(world, {"flood": (2, 12, 0), "guest": (64, 1, 0)})
    for visit in range(30):
        for _ in range(40):
            backlog.refill(6, ["flood"])
            world.step()
        backlog.fill("guest", 1)
        (guest,) = [row for row in world.scheduler.sequences if row.tenant == "guest"]
        steps = 0
        while guest.finish is None:
            backlog.refill(6, ["flood"])
            world.step()
            steps += 1
        assert steps <= 8, f"64 prompt tokens by 16 a step, visit {visit}"


def test_a_prompt_goes_before_the_rest_of_a_flooding_tenants_long_one() -> None:
    world = World.create(step_tokens=8, max_length=400, blocks=100)
    world.scheduler.add(make_row(0, list(range(100)), 1, tenant="flood"))
    for _ in range(6):
        world.step()
    world.scheduler.add(make_row(1, [7] * 5, 1, tenant="guest"))
    assert [(s.sequence.arrival, s.length) for s in world.step().segments] == [(1, 5), (0, 3)]


def test_a_step_with_a_guests_prompt_has_none_of_a_tenant_that_runs_twice_as_much() -> None:
    world = World.create(step_tokens=32, max_length=400, blocks=100, max_sequences=6)
    flooded(world, 3, 30)
    flood = [make_row(i, [i] * 5, 3, tenant="flood") for i in (10, 11)]
    guest = make_row(12, [1] * 5, 3, tenant="guest")
    for row in (*flood, guest):
        world.scheduler.add(row)
    assert {s.sequence.arrival for s in world.step().segments} == {0, 1, 2, 12}
    assert {s.sequence.arrival for s in world.step().segments} == {0, 1, 2, 12, 10, 11}
    world.finish_all()


@pytest.mark.parametrize("bounded", [0, 3])
def test_prompts_next_to_decodes_of_another_tenant_have_the_bounded_tokens(bounded: int) -> None:
    world = World.create(step_tokens=16, max_length=900, blocks=400)
    flood = make_row(0, list(range(300)), 4, tenant="flood")
    world.scheduler.add(flood)
    while flood.computed < 250:
        world.step(bounded=bounded)
    guest = make_row(1, [7] * 5, 40, tenant="guest")
    world.scheduler.add(guest)
    world.step(bounded=bounded)
    second = make_row(2, list(range(1000, 1100)), 1, tenant="flood")
    own = make_row(3, list(range(2000, 2050)), 1, tenant="guest")
    world.scheduler.add(second)

    before = flood.computed
    plan = world.step(bounded=bounded)

    assert [s.sequence for s in plan.decodes] == [guest]
    assert flood.computed - before + second.computed == bounded
    world.scheduler.add(own)
    world.step(bounded=bounded)
    assert own.computed == 16 - 1 - bounded, "the guest's own prompts have the rest"
    world.finish_all()


def test_decodes_of_a_tenant_with_twice_the_load_take_turns_next_to_a_guests() -> None:
    world = World.create(step_tokens=64, max_length=400, blocks=400, max_sequences=8)
    flood = flooded(world, 6, 60)
    guest = make_row(9, [7] * 5, 60, tenant="guest")
    world.scheduler.add(guest)
    world.step()
    before = [row.generated for row in flood]
    for _ in range(30):
        plan = world.step(bounded=2)
        assert plan.decodes[0].sequence is guest
        assert len(plan.decodes) == 3
        assert plan.bounded_decodes == 2
    assert [row.generated for row in flood] == [one + 10 for one in before]
    assert world.step(bounded=0).bounded_decodes == 0
    world.finish_all()


@pytest.mark.parametrize("flood", [2, 3])
def test_decodes_are_not_bounded_of_tenants_that_run_about_the_same(flood: int) -> None:
    world = World.create(step_tokens=64, max_length=400, blocks=400, max_sequences=8)
    flooded(world, flood, 60)
    for arrival in (8, 9):
        world.scheduler.add(make_row(arrival, [7] * 5, 60, tenant="guest"))
    world.step()
    plan = world.step(bounded=0)
    assert len(plan.decodes) == flood + 2
    assert plan.bounded_decodes is None


@pytest.mark.parametrize(("fixed", "each"), [(0.014, 0.0007), (0.010, 0.00005), (0.002, 0.01), (0.01, 0.0)])
def test_bounded_tokens_lengthen_steps_of_lighter_tenants_by_their_part(fixed: float, each: float) -> None:
    pace, guest = TenantPace(256), make_row(1, [7], 9)
    row, decode = make_row(0, list(range(300)), 1), Segment(guest, 0, 1)
    budgets = []
    for _ in range(10 * BOUNDED_FRESH):
        budgets.append(pace.bounded)
        prompts = [Segment(row, 0, pace.bounded // 2)] if pace.bounded > 2 else []
        decodes = pace.bounded - sum(one.length for one in prompts)
        pace.took(StepPlan([decode] * (1 + decodes), prompts, decodes), fixed + each * pace.bounded)
    assert budgets[::BOUNDED_FRESH] == [0] * 10, "steps without them are measured"
    fits = min(256, BOUNDED_TIME * fixed / each if each else 256)
    assert budgets[-1] == pytest.approx(max(fits, 256 // BOUNDED_PART), rel=0.1, abs=1)


def test_bounded_tokens_follow_the_processor_and_not_what_else_a_busy_machine_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is measured alone would look as long as a full one, and hundreds of tokens seem to fit."""
    base = load_base(BaseSettings(save_base("llama", tmp_path), quantization="none", dtype=torch.float32))
    worked, steps = count(), []
    monkeypatch.setattr(time, "thread_time", lambda: float(next(worked)))
    engine = Lab(base, [], [], []).engine()
    monkeypatch.setattr(engine._tenant_pace, "took", lambda plan, seconds: steps.append(seconds))
    run(engine, [Request((5, 6, 7), None, 3)])
    assert steps == [1.0] * 3


@pytest.mark.parametrize("step_tokens", [1, 16, 63])
def test_small_steps_leave_a_decode_and_a_prompts_token_of_a_bounded_tenant(step_tokens: int) -> None:
    world = World.create(step_tokens=16, max_length=400, blocks=400, max_sequences=8)
    flood = flooded(world, 4, 60)
    world.scheduler.add(make_row(9, [7], 60, tenant="guest"))
    world.step()
    world.scheduler.add(make_row(10, list(range(50)), 1, tenant="flood"))
    pace = TenantPace(step_tokens)
    pace.took(StepPlan([], [], 0), 0.01)
    before = sum(row.generated for row in flood)
    plan = world.step(bounded=pace.bounded)
    assert plan.bounded_decodes == 1
    assert sum(row.generated for row in flood) == before + 1
    assert sum(segment.length for segment in plan.segments) == 3


def test_prompts_that_are_not_bounded_starve_no_bounded_ones() -> None:
    pace, guest = TenantPace(256), make_row(1, [7], 9)
    prompt, decode = Segment(make_row(0, list(range(300)), 1), 0, 50), Segment(guest, 0, 1)
    for step in range(3 * BOUNDED_FRESH):
        assert (pace.bounded == 0) is (step % BOUNDED_FRESH == 0)
        pace.took(StepPlan([decode], [prompt], 0), 0.03)


@pytest.mark.parametrize(("flood", "computed"), [(1, 0), (2, 14)])
def test_a_guests_prompt_is_not_bounded_next_to_decodes_of_a_tenant_that_runs_more(
    flood: int, computed: int
) -> None:
    world = World.create(step_tokens=16, max_length=900, blocks=400)
    for arrival in range(flood):
        world.scheduler.add(make_row(arrival, [arrival] * 5, 40, tenant="flood"))
    world.step()
    guest = make_row(9, list(range(40)), 1, tenant="guest")
    world.scheduler.add(guest)
    world.step(bounded=0)
    assert guest.computed == computed


def test_a_guests_adapter_gets_a_slot_before_older_rows_of_a_flood_that_wait_for_one() -> None:
    world = World.create(slots=2, max_sequences=4, blocks=100)
    for arrival in range(12):
        row = make_row(arrival, [arrival], 20, "abc"[arrival % 3], tenant="flood")
        world.scheduler.add(row)
    for _ in range(3):
        world.step()
    guest = make_row(50, [1], 2, ["z"], tenant="guest")
    world.scheduler.add(guest)
    world.step()
    assert guest in world.scheduler.running
    world.finish_all()


def test_what_came_from_the_cache_or_is_computed_again_is_not_counted() -> None:
    world = World.create()
    queue = world.scheduler.waiting
    prompt = list(range(2 * BLOCK + 1))

    def cost(row: SequenceState, *, interrupted: bool = False) -> float:
        world.scheduler.add(row)
        tenant = queue.flow(row).tenant
        before = tenant.counter
        while row.finish is None:
            world.step()
            if interrupted and row.generated == 2:
                interrupted = False
                world.preempt(row)
        return tenant.counter - before

    stay = make_row(0, [1], 40, tenant="stays")
    world.scheduler.add(stay)
    assert cost(make_row(1, prompt, 3)) == len(prompt) + 2 * 3
    assert cost(make_row(2, prompt, 3)) == 1 + 2 * 3
    assert cost(make_row(3, [9, *prompt], 3, scored=True), interrupted=True) == len(prompt) + 1 + 2 * 3


def test_small_rows_pass_one_that_lacks_blocks_but_not_for_ever() -> None:
    world = World.create(blocks=12, max_sequences=8, max_length=64)
    arrivals = count()
    for _ in range(4):
        world.scheduler.add(make_row(next(arrivals), [1], 6))
    world.step()
    large = make_row(next(arrivals), list(range(9 * BLOCK)), 2)
    world.scheduler.add(large)
    while large in world.scheduler.waiting:
        arrival = next(arrivals)
        assert arrival < 1000, "the large row starves"
        world.scheduler.add(make_row(arrival, [2], 6))
        world.step()
    assert MAX_PASSED <= large.passed < MAX_PASSED + 8
    world.finish_all()


def test_a_guest_goes_before_a_row_for_which_blocks_are_kept() -> None:
    world = World.create(blocks=12, max_sequences=8, max_length=64)
    flood = [make_row(i, [i], 30, tenant="flood") for i in range(4)]
    for row in flood:
        world.scheduler.add(row)
    world.step()
    large = make_row(10, list(range(9 * BLOCK)), 2, tenant="flood")
    large.passed = MAX_PASSED
    world.scheduler.add(large)
    small = make_row(11, [3], 2, tenant="flood")
    world.scheduler.add(small)
    world.step()
    assert small in world.scheduler.waiting
    guest = make_row(12, [4], 2, tenant="guest")
    world.scheduler.add(guest)
    world.step()
    assert guest in world.scheduler.running


def test_when_blocks_run_out_the_tenant_that_runs_most_gives_way_not_the_guest() -> None:
    world = World.create(blocks=12, max_sequences=6, max_length=64)
    flood = flooded(world, 4, 16, steps=1)
    guest = make_row(50, [1], 16, tenant="guest")
    world.scheduler.add(guest)
    while guest.finish is None:
        world.step()
        assert guest.computed
    assert world.scheduler.preemptions
    world.finish_all()
    assert all(row.generated == 16 for row in flood)


def test_no_place_stays_free_while_a_row_could_run() -> None:
    world = World.create(max_sequences=4, blocks=400, step_tokens=64)
    backlog = Backlog(world, {"a": (3, 5, 0), "b": (9, 2, 1), "c": (1, 9, -1)})
    backlog.refill(40)
    while world.scheduler.waiting:
        plan = world.step()
        prompts = {s.sequence.tenant for s in plan.segments if s.start < s.sequence.prompt_length}
        assert prompts or len(plan.segments) == 4, (
            "but for one step, in which another's prompt has precedence"
        )


def test_a_walk_has_no_row_twice_when_one_goes_back_on_the_way() -> None:
    world = World.create(max_sequences=1)
    rows = [make_row(arrival, [arrival], 9) for arrival in range(4)]
    for row in rows:
        world.scheduler.add(row)
    world.step()
    queue = world.scheduler.waiting
    walk = iter(queue.in_turn([], lambda tenant: True))
    assert [next(walk), next(walk)] == rows[1:3]
    world.preempt(rows[0])
    queue.begin(rows[2])
    assert list(walk) == rows[3:]


def test_a_plan_tries_few_of_many_adapters_that_lack_slots_and_runs_those_that_are_in_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World.create(slots=2, max_sequences=8, blocks=200, step_tokens=64)
    tried: list[SequenceState] = []
    acquire = SlotTable.acquire

    def counted(slots: SlotTable, row: SequenceState) -> bool:
        tried.append(row)
        return acquire(slots, row)

    monkeypatch.setattr(SlotTable, "acquire", counted)
    for arrival in range(500):
        world.scheduler.add(make_row(arrival, [1], 9, [f"a{arrival}"], tenant=f"tenant{arrival}"))
    last = [
        make_row(500, [1], 9, tenant="base"),
        make_row(501, [1], 9, ["a1"], tenant="placed"),
        make_row(502, [1], 9, ["a1"], tenant="tenant499"),
    ]
    for row in last:
        world.scheduler.add(row)
    assert [segment.sequence.arrival for segment in world.step().segments] == [0, 1, 502, 500, 501]
    assert len(tried) <= 5 + MAX_TRIES
    world.finish_all()


def test_a_plan_leaves_the_garbage_collector_alone_however_many_tenants_wait() -> None:
    world = World.create(max_sequences=4, blocks=100, step_tokens=64)
    for arrival in range(5000):
        world.scheduler.add(make_row(arrival, [arrival], 9, tenant=f"tenant{arrival}"))
    world.step()
    world.end(world.scheduler.running[0])
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    try:
        before = gc.get_stats()[0]["collections"]
        world.scheduler.plan()
        assert gc.get_stats()[0]["collections"] - before <= 1
    finally:
        gc.set_threshold(*thresholds)


def test_no_more_than_some_idle_accounts_are_remembered() -> None:
    accounts: Accounts[TokenCounter] = Accounts(1.0)
    stays = accounts.enter("stays", lambda: TokenCounter("stays"))
    for key in range(10 * MOST_IDLE):
        account = accounts.enter(key, lambda key=key: TokenCounter(key))  # type: ignore[misc]
        accounts.wait(account, key)
        accounts.begin(account)
        accounts.leave(account)
    assert len(accounts) == MOST_IDLE + 1
    accounts.leave(stays)
    assert len(accounts) == 0, "nobody waits, so nobody can be behind"
