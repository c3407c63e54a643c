"""Adapter slots: everyone gets one within bounded time, and nobody loses one that is in use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.engine.scheduling import World, make_row

from onebase_engine.engine.sequence import SequenceState
from onebase_engine.engine.slot_table import SlotTable


def row(arrival: int, *adapters: str) -> SequenceState:
    return make_row(arrival, [1], 4, adapters)


def test_a_third_adapter_gets_a_slot_under_endless_traffic_on_two() -> None:
    world = World.create(slots=2, max_sequences=6, step_tokens=64, blocks=200)
    third: SequenceState | None = None
    for step in range(40):
        # There are always rows of both a and b, so that neither slot falls idle by itself.
        for digest in "ab":
            world.scheduler.add(make_row(3 * step + "ab".index(digest), [step], 5, [digest]))
        if step == 6:
            third = make_row(3 * step + 2, [step], 2, ["c"])
            world.scheduler.add(third)
        plan = world.step()
        others = {digest for segment in plan.segments for digest in segment.sequence.mix.digests} & {"a", "b"}
        assert others, "the slot that is not claimed goes on"
        if third is not None and third.finish:
            break
    assert third is not None
    assert third.finish == "length"
    assert step < 6 + 20


def test_only_the_claimed_slot_closes_to_later_rows() -> None:
    table = SlotTable(2)
    first, second = row(0, "a"), row(1, "b")
    assert table.acquire(first)
    assert table.acquire(second)
    claimant = row(2, "c")
    assert not table.acquire(claimant)
    late = {digest: table.acquire(row(3 + i, digest)) for i, digest in enumerate("ab")}
    assert sorted(late.values()) == [False, True]


def test_a_claimed_slot_goes_to_its_claimant_when_it_falls_idle() -> None:
    table = SlotTable(1)
    user, claimant = row(0, "a"), row(1, "b")
    table.acquire(user)
    assert not table.acquire(claimant)
    table.release(user)
    assert not table.acquire(row(2, "a"))
    assert table.acquire(claimant)
    assert table.slot_of == {"b": 0}


def test_the_claim_of_a_row_that_is_gone_is_lifted() -> None:
    table = SlotTable(1)
    user, claimant = row(0, "a"), row(1, "b")
    table.acquire(user)
    table.acquire(claimant)
    table.forget(claimant)
    assert table.acquire(row(2, "a"))


def test_an_older_row_takes_over_the_claim_of_a_younger_one() -> None:
    """A preempted row that needs two slots must not wait for every younger one that needs only one."""
    table = SlotTable(2)
    users = [row(0, "a"), row(1, "b")]
    for user in users:
        table.acquire(user)
    younger, older = row(9, "c"), row(5, "d", "e")
    assert not table.acquire(younger)
    assert not table.acquire(older)
    table.release(users[0])
    assert not table.acquire(older)
    assert not table.acquire(younger)
    table.release(users[1])
    assert table.acquire(older)
    assert set(table.slot_of) == {"d", "e"}


def test_a_sum_takes_all_its_slots_or_none() -> None:
    table = SlotTable(3)
    single = row(0, "x")
    table.acquire(single)
    table.acquire(pair := row(1, "a", "b"))
    assert set(table.slot_of) == {"x", "a", "b"}
    table.release(pair)
    triple = row(2, "a", "c", "d")
    assert not table.acquire(triple)
    assert table.used == 1
    assert set(table.slot_of) == {"x", "a", "b"}
    table.release(single)
    assert table.acquire(triple)
    assert set(table.slot_of) == {"a", "c", "d"}


def test_rows_share_the_slot_of_a_version_that_is_in_place() -> None:
    table = SlotTable(2)
    table.acquire(row(0, "a"))
    table.moves.clear()
    assert table.acquire(row(1, "a"))
    assert table.moves == {}
    assert table.used == 1


def test_the_idle_version_used_longest_ago_is_evicted() -> None:
    table = SlotTable(3)
    for arrival, digest in enumerate("abca"):
        user = row(arrival, digest)
        table.acquire(user)
        table.release(user)
    place = table.slot_of["b"]
    table.moves.clear()
    table.acquire(row(9, "d"))
    assert set(table.slot_of) == {"a", "c", "d"}
    assert table.moves == {place: "d"}


def test_a_version_in_use_is_not_evicted() -> None:
    table = SlotTable(1)
    user = row(0, "a")
    table.acquire(user)
    assert not table.evict("a")
    assert set(table.slot_of) == {"a"}
    table.release(user)
    assert table.evict("a")
    assert table.slot_of == {}
    assert table.moves == {0: None}
    assert table.evict("a")


SIZES = {"a": 10, "b": 20, "c": 30, "d": 60, "e": 90}


def held(table: SlotTable) -> int:
    return sum(SIZES[digest] for digest in table.slot_of)


def test_idle_versions_leave_until_the_new_one_fits_in_the_memory_of_the_slots() -> None:
    table = SlotTable(8, 100, SIZES.__getitem__)
    for arrival, digest in enumerate("abd"):
        user = row(arrival, digest)
        assert table.acquire(user)
        table.release(user)
    assert table.acquire(row(9, "c"))
    assert set(table.slot_of) == {"d", "c"}, "a and b, used longest ago, made room"


def test_only_slots_that_cover_the_missing_bytes_are_closed_for_a_version_that_waits() -> None:
    table = SlotTable(8, 100, SIZES.__getitem__)
    users = {digest: row(arrival, digest) for arrival, digest in enumerate("abd")}
    for user in users.values():
        assert table.acquire(user)
    waiting = row(10, "c")
    assert not table.acquire(waiting)
    late = {digest: table.acquire(row(20 + i, digest)) for i, digest in enumerate("abd")}
    assert late == {"a": False, "b": False, "d": True}
    for digest in "ab":
        table.release(users[digest])
    assert table.acquire(waiting)
    assert set(table.slot_of) >= {"c", "d"}
    assert held(table) <= 100


@given(st.lists(st.tuples(st.sampled_from(sorted(SIZES)), st.booleans()), max_size=60), st.integers(1, 4))
def test_slots_never_hold_more_bytes_than_they_may(events: list[tuple[str, bool]], slots: int) -> None:
    table = SlotTable(slots, 100, SIZES.__getitem__)
    running: list[SequenceState] = []
    for arrival, (digest, release) in enumerate(events):
        if release and running:
            table.forget(running.pop(0))
        new = row(arrival, digest)
        if table.acquire(new):
            running.append(new)
            assert digest in table.slot_of
        else:
            table.forget(new)
        assert held(table) <= 100
        assert all(set(user.mix.digests) <= set(table.slot_of) for user in running)
