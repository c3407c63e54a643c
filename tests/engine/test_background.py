"""Rows in the background: they fill what others leave, and nothing that others ask for waits for them."""

from __future__ import annotations

import pytest
from tests.engine.scheduling import BLOCK, World, make_row

from onebase_engine.engine.scheduler import (
    BACKGROUND_FRESH,
    BACKGROUND_LEAST,
    BACKGROUND_PART,
    BACKGROUND_SECONDS,
    BACKGROUND_TIME,
    BackgroundPace,
)
from onebase_engine.engine.sequence import Segment, SequenceState, StepPlan


def batch(
    world: World, count: int, *, first: int = 0, tokens: int = 30, tenant: str = "default"
) -> list[SequenceState]:
    """So many rows in the background, each with a prompt of its own."""
    rows = [
        make_row(
            first + n, [100 * (first + n) + i for i in range(BLOCK)], tokens, tenant=tenant, background=True
        )
        for n in range(count)
    ]
    for row in rows:
        world.scheduler.add(row)
    return rows


def live(
    world: World, arrival: int, prompt: int = BLOCK, tokens: int = 4, tenant: str = "default"
) -> SequenceState:
    row = make_row(arrival, [50_000 + 100 * arrival + i for i in range(prompt)], tokens, tenant=tenant)
    world.scheduler.add(row)
    return row


@pytest.mark.parametrize("tenant", ["default", "other"])
def test_a_row_gets_its_place_in_the_next_step_though_the_background_has_taken_all_of_them(
    tenant: str,
) -> None:
    world = World.create(max_sequences=4, step_tokens=32)
    rows = batch(world, 6)
    while len(world.scheduler.running) < 4:
        world.step()
    asked = live(world, 10, tenant=tenant)

    plan = world.step()

    assert [segment.sequence for segment in plan.segments] == [asked]
    assert world.scheduler.running == [*rows[:3], asked], "the youngest gave way, and only that one"
    world.finish_all()
    assert [row.generated for row in (*rows, asked)] == [30] * 6 + [4]


def test_a_row_gets_the_blocks_and_the_slot_that_the_background_holds() -> None:
    world = World.create(max_sequences=8, blocks=16, slots=1, step_tokens=64)
    held = make_row(0, [1, 2, 3], 20, ["a"], background=True)
    world.scheduler.add(held)
    batch(world, 3, first=1, tokens=12)
    world.step()
    asked = make_row(9, list(range(10 * BLOCK)), 4, ["b"])
    world.scheduler.add(asked)
    for _ in range(2):  # the slot is claimed, then taken
        plan = world.step()

    assert asked in world.scheduler.running
    assert held in world.scheduler.waiting
    assert asked in [segment.sequence for segment in plan.segments]
    world.finish_all()


def test_the_background_takes_no_place_from_a_row_whatever_was_given_to_whom() -> None:
    world = World.create(max_sequences=2, step_tokens=32, blocks=100, max_length=200)
    asked = [live(world, n, tokens=40, tenant="flood") for n in range(2)]
    world.step()
    waiting = batch(world, 3, first=5, tenant="patient")

    for _ in range(30):
        world.step()

    assert world.scheduler.running == asked
    assert not any(row.generated for row in waiting)
    assert world.scheduler.preemptions == 0


def test_what_a_tenants_batch_was_given_costs_its_other_requests_no_turn() -> None:
    world = World.create(max_sequences=3, step_tokens=64, blocks=100)
    batch(world, 3, tokens=30, tenant="night")
    for _ in range(20):
        world.step()
    for n in range(6):
        live(world, 10 + 2 * n, tenant="night")
        live(world, 11 + 2 * n, tenant="day")

    world.step()

    running = [row.tenant for row in world.scheduler.running]
    assert sorted(running) in (["day", "day", "night"], ["day", "night", "night"])


def test_a_step_with_a_prompt_has_none_of_the_background_and_one_with_decodes_as_much_as_is_said() -> None:
    world = World.create(max_sequences=4, step_tokens=16, blocks=100)
    asked = live(world, 0, prompt=24, tokens=20)
    rows = [make_row(1 + n, list(range(1000 * n, 1000 * n + 8)), 4, background=True) for n in range(2)]
    for row in rows:
        world.scheduler.add(row)
    assert [segment.sequence for segment in world.step().segments] == [asked]
    assert [segment.sequence for segment in world.step().segments] == [asked]

    plan = world.step(background=2)

    assert [segment.sequence for segment in plan.decodes[:1]] == [asked]
    behind = [segment for segment in plan.segments if segment.sequence.background]
    assert sum(segment.length for segment in behind) == 2
    assert [segment.sequence for segment in world.step(background=0).segments] == [asked]
    world.finish_all()


def test_tenants_share_the_background_as_they_share_the_rest() -> None:
    world = World.create(max_sequences=2, step_tokens=64, blocks=100, max_length=100)
    flood = batch(world, 8, tokens=12, tenant="flood")
    world.step()
    other = batch(world, 1, first=20, tokens=12, tenant="other")[0]
    while other.finish is None:
        world.step()
    assert sum(row.finish is not None for row in flood) <= 3


def step_of(*rows: SequenceState) -> StepPlan:
    return StepPlan([Segment(row, 1, 2) for row in rows], [])


ASKED = make_row(0, [1, 2], 9)
BEHIND = make_row(1, [1, 2], 9, background=True)


def test_the_background_makes_the_decoding_of_others_a_tenth_longer_at_most() -> None:
    pace, whole, extra = BackgroundPace(256), 0.0, 0.0
    assert not pace.joined, "what a step takes alone is not known yet"
    for _ in range(2000):
        joins = pace.joined > 0
        seconds = 0.070 if joins else 0.030
        pace.took(step_of(ASKED, BEHIND) if joins else step_of(ASKED), seconds)
        whole, extra = whole + seconds, extra + 0.040 * joins

    assert 0.8 * BACKGROUND_TIME < extra / whole <= BACKGROUND_TIME + 0.07 / whole


def test_where_more_rows_cost_nothing_the_background_is_in_nearly_every_step() -> None:
    pace, joined = BackgroundPace(256), 0
    for _ in range(1000):
        joins = pace.joined > 0
        joined += joins
        pace.took(step_of(ASKED, BEHIND) if joins else step_of(ASKED), 0.010)

    assert joined >= 1000 * BACKGROUND_FRESH / (BACKGROUND_FRESH + 1) - 1


def test_steps_of_prompts_and_of_the_background_alone_say_nothing_about_decodes() -> None:
    pace = BackgroundPace(256)
    pace.took(StepPlan([], [Segment(ASKED, 0, 2)]), 1.0)
    pace.took(step_of(BEHIND), 0.04)
    assert not pace.joined
    pace.took(step_of(ASKED), 0.03)
    assert pace.joined == pace.alone // BACKGROUND_PART


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("speed", [200, 1000, 100_000])
def test_a_step_of_the_background_alone_is_short_where_tokens_are_slow_and_full_where_they_are_fast(
    speed: int, decodes: bool
) -> None:
    pace, times = BackgroundPace(2048), []
    long = make_row(0, list(range(100_000)), 1, background=True)
    for _ in range(50):
        seconds = pace.alone / speed
        plan = step_of(*[BEHIND] * pace.alone) if decodes else StepPlan([], [Segment(long, 0, pace.alone)])
        pace.took(plan, seconds)
        times.append(seconds)

    fits = max(BACKGROUND_LEAST, min(2048, int(speed * BACKGROUND_SECONDS)))
    assert fits / 4 <= pace.alone <= fits
    assert max(times[5:]) <= 1.01 * max(BACKGROUND_SECONDS, BACKGROUND_LEAST / speed)


def test_a_step_of_the_background_alone_has_as_many_tokens_as_is_said_and_the_oldest_end_first() -> None:
    world = World.create(max_sequences=8, step_tokens=32, blocks=100)
    rows = [make_row(n, list(range(1000 * n, 1000 * n + 20)), 4, background=True) for n in range(8)]
    for row in rows:
        world.scheduler.add(row)
    ended: list[SequenceState] = []
    while len(ended) < len(rows):
        plan = world.step(background=3)
        assert sum(segment.length for segment in plan.segments) <= 3
        ended += [row for row in rows if row.finish and row not in ended]
    assert ended == rows
    assert all(row.generated == 4 for row in rows)
