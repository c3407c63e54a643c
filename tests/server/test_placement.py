"""Where requests for adapters go: to few replicas, never where they would harm while another is free."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from onebase_route.placement import (
    LEAST_HOMES,
    NoReplicaError,
    Placement,
    ReplicaReport,
    order_of,
)

EMPTY = ReplicaReport(sequences=16, slots=8)
NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=12, unique=True)


def placement(replicas: int, report: ReplicaReport = EMPTY) -> Placement:
    made = Placement(seed=0)
    for number in range(replicas):
        made.record_report(f"r{number}", report)
    return made


def busy(*adapters: str, slots: int = 8, rows: int = 16) -> ReplicaReport:
    """Of a replica all of whose slots, or these of them, are used by rows."""
    return ReplicaReport(sequences=rows, slots=slots, in_slots=dict.fromkeys(adapters, True))


@given(names=NAMES, key=st.text(max_size=20), weights=st.data())
def test_a_replica_that_is_gone_moves_only_what_was_on_it(
    names: list[str], key: str, weights: st.DataObject
) -> None:
    weighed = {name: weights.draw(st.integers(1, 64)) for name in names}
    order = order_of(key, weighed)

    for gone in names:
        left = {name: weight for name, weight in weighed.items() if name != gone}
        assert list(order_of(key, left)) == [name for name in order if name != gone]


def test_homes_are_spread_by_slots() -> None:
    weights = {"small": 8, "large": 24}

    first = Counter(order_of(f"adapter-{number}", weights)[0] for number in range(4000))

    assert first["large"] / first["small"] == pytest.approx(3, rel=0.15)


def test_an_adapter_stays_at_its_homes_while_they_have_room() -> None:
    made = placement(20)
    homes = set(made.homes("shop"))
    assert len(homes) == LEAST_HOMES

    now = 0.0
    for _ in range(200):
        chosen = made.place("shop", 50, now)
        assert chosen in homes
        made.ended(chosen, "shop", 50, now + 0.1, seconds=0.1)
        now += 1.0


def test_of_two_homes_the_one_with_less_to_do_answers() -> None:
    made = placement(2, ReplicaReport(sequences=16, slots=8, in_slots={"shop": False}))
    for _ in range(10):
        made.place("shop", 50, 0.0)
    homes = Counter(made.place("shop", 50, 0.0) for _ in range(10))

    assert max(homes.values()) <= 6


def test_an_adapter_that_is_asked_for_much_gets_more_homes_and_loses_them_slowly() -> None:
    made = placement(20)
    now = 0.0
    running: list[tuple[float, str]] = []
    for _ in range(4000):  # 100 a second of a second each: 100 rows at once, more than six replicas' worth
        now += 0.01
        while running and running[0][0] <= now:
            end, where = running.pop(0)
            made.ended(where, "shop", 50, end, seconds=1.0)
        running.append((now + 1.0, made.place("shop", 50, now)))
    most = len(made.homes("shop"))
    assert 100 / 16 < most <= 12

    counts = []
    for _ in range(30):
        now += 5.0
        where = made.place("shop", 50, now)
        made.ended(where, "shop", 50, now + 1.0, seconds=1.0)
        counts.append(len(made.homes("shop")))
    assert counts[-1] == LEAST_HOMES
    assert all(before - after <= 1 for before, after in pairwise(counts))


def test_a_full_home_sends_on_to_where_the_adapter_is_in_memory() -> None:
    made = placement(10)
    order = order_of("shop", dict.fromkeys(made.replicas, 8))
    for home in order[:LEAST_HOMES]:
        made.record_report(home, ReplicaReport(sequences=16, slots=8, running=16))
    made.record_report(order[5], ReplicaReport(sequences=16, slots=8, in_host={"shop"}))

    assert made.place("shop", 50, 0.0) == order[5]
    made.ended(order[5], "shop", 50, 0.0, seconds=0.1)

    made.record_report(order[4], ReplicaReport(sequences=16, slots=8, in_slots={"shop": False}))
    assert made.place("shop", 50, 0.0) == order[4]


def test_a_request_waits_a_little_for_a_home_rather_than_to_begin_cold() -> None:
    made = placement(3)
    homes = set(made.homes("shop"))
    for _ in range(2 * 16):
        assert made.place("shop", 50, 0.0) in homes

    assert made.place("shop", 50, 0.0) in homes
    assert not {made.place("shop", 50, 0.0) for _ in range(2 * 16)} <= homes


@given(data=st.data())
@settings(max_examples=200)
def test_no_version_in_use_is_put_out_while_a_replica_has_a_slot_for_it(data: st.DataObject) -> None:
    made = Placement(seed=data.draw(st.integers(0, 9)))
    reports = {}
    for number in range(data.draw(st.integers(1, 8))):
        slots = data.draw(st.integers(1, 4))
        in_slots = data.draw(
            st.dictionaries(st.sampled_from("abcdef"), st.booleans(), max_size=slots), label="slots"
        )
        reports[f"r{number}"] = ReplicaReport(16, slots, in_slots, running=data.draw(st.integers(0, 20)))
        made.record_report(f"r{number}", reports[f"r{number}"])

    chosen = reports[made.place("a", 50, 0.0)]

    def evicts(one: ReplicaReport) -> bool:
        return "a" not in one.in_slots and sum(one.in_slots.values()) >= one.slots

    if not all(map(evicts, reports.values())):
        assert not evicts(chosen)
    if any(not evicts(one) and one.running < one.sequences for one in reports.values()):
        assert chosen.running < chosen.sequences or "a" in chosen.in_slots  # where it waits a little


@given(data=st.data())
def test_what_was_sent_counts_until_it_has_ended(data: st.DataObject) -> None:
    made = placement(4)
    open_requests = []
    for _ in range(data.draw(st.integers(1, 60))):
        if open_requests and data.draw(st.booleans()):
            where, adapter = open_requests.pop(data.draw(st.integers(0, len(open_requests) - 1)))
            made.ended(where, adapter, 10, 1.0, seconds=0.5)
        else:
            adapter = data.draw(st.sampled_from(["a", "b", None]))
            open_requests.append((made.place(adapter, 10, 1.0), adapter))
    if len(open_requests) < 4 * 16:
        # While another replica has a free row, none waits for longer than it takes to begin cold.
        assert max(Counter(where for where, _ in open_requests).values(), default=0) <= 16 + 12


def test_the_base_is_at_home_everywhere() -> None:
    made = placement(4)

    assert len({made.place(None, 50, 0.0) for _ in range(40)}) == 4


def test_requests_with_the_same_beginning_go_to_the_same_home_unless_it_has_more_to_do() -> None:
    made = placement(6, ReplicaReport(sequences=16, slots=8, in_slots={"shop": False}))
    where = set()
    for _ in range(20):
        chosen = made.place("shop", 50, 0.0, prefix="system prompt")
        made.ended(chosen, "shop", 50, 0.0, seconds=0.1)
        where.add(chosen)

    assert len(where) == 1
    for _ in range(12):
        where.add(made.place("shop", 50, 0.0, prefix="system prompt"))
    assert len(where) == LEAST_HOMES


def test_a_replica_that_fails_again_and_again_gets_nothing_for_a_while() -> None:
    made = placement(3)
    bad = made.homes("shop")[0]
    now = 0.0
    failed = 0
    while failed < 3:
        chosen = made.place("shop", 50, now)
        seconds = None if chosen == bad else 0.1
        made.ended(chosen, "shop", 50, now, seconds=seconds)
        failed += chosen == bad

    assert bad not in {made.place("shop", 50, now) for _ in range(20)}
    assert bad in {made.place(None, 50, now + 60) for _ in range(40)}


def test_one_slow_replica_is_left_out_and_not_all_of_them() -> None:
    made = placement(6)
    for number in range(6):
        for _ in range(5):
            made.answered(f"r{number}", 2.0 if number == 3 else 0.1, 1.0)
    assert "r3" not in {made.place(None, 50, 1.0) for _ in range(60)}

    for number in (0, 1, 2):
        for _ in range(50):
            made.answered(f"r{number}", 9.0, 1.0)
    assert len({made.place(None, 50, 1.0) for _ in range(300)}) >= 4


def test_when_all_are_ejected_they_are_asked_all_the_same() -> None:
    made = placement(2)
    for _ in range(20):
        made.ended(made.place("shop", 50, 0.0), "shop", 50, 0.0)

    assert made.place("shop", 50, 0.0) in made.replicas


def test_a_lost_replica_gets_nothing_and_none_is_told_where_there_is_none() -> None:
    made = placement(2)
    made.lost("r0")
    assert {made.place(name, 50, 0.0) for name in "abcdef"} == {"r1"}
    with pytest.raises(NoReplicaError):
        made.place("a", 50, 0.0, but=["r1"])
    made.lost("r1")
    with pytest.raises(NoReplicaError):
        made.place(None, 50, 0.0)


def test_what_is_refused_says_nothing_of_how_long_answers_take_or_of_the_replica() -> None:
    made = placement(8)
    now = 0.0
    for _ in range(600):  # each takes ten seconds, and nine of ten are refused at once
        now += 0.1
        for number in range(10):
            where = made.place("shop", 50, now)
            made.ended(where, "shop", 50, now, seconds=None if number else 10.0, refused=bool(number))
    assert len(made.homes("shop")) == 8


def test_a_replica_that_failed_long_ago_is_left_out_for_as_short_as_the_first_time() -> None:
    made = placement(2)
    now = 0.0

    def fails(times: int) -> None:
        for _ in range(times):
            made.ended("r0", None, 50, now)

    for _ in range(10):
        fails(3)
    now = 10_000.0
    made.ended("r0", None, 50, now, seconds=0.1)
    fails(3)
    assert "r0" not in {made.place(None, 50, now + 1) for _ in range(20)}
    assert "r0" in {made.place(None, 50, now + 3) for _ in range(20)}


def test_a_replica_that_comes_back_still_has_what_it_had() -> None:
    made = placement(2)
    here = [name for name in (made.place(None, 50, 0.0) for _ in range(20)) if name == "r0"]
    assert here
    made.lost("r0")
    made.record_report("r0", EMPTY)
    more = 0
    for _ in here:  # what ends now began before
        more += made.place(None, 50, 0.0) == "r0"
        made.ended("r0", None, 50, 0.0, seconds=0.1)
    assert made._replicas["r0"].sequences == more


NAMED = st.sampled_from(["a", "b", "\ud800", "", "x\0y", "+", "c" * 600]) | st.text(max_size=3) | st.none()
PLACES = st.sampled_from(["r0", "r1", "http://[::1]:1", "", "\0"])
REPORTS = st.builds(
    ReplicaReport,
    sequences=st.integers(1, 40),
    slots=st.integers(-1, 5),
    in_slots=st.dictionaries(st.sampled_from("abc"), st.booleans(), max_size=3),
    in_host=st.frozensets(st.sampled_from("abc")),
    waiting=st.integers(0, 50),
    running=st.integers(0, 50),
)


class Life(RuleBasedStateMachine):
    """Replicas come, change, go and come back while requests run. The clock may stand still."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Placement(seed=0)
        self.there: set[str] = set()
        self.open: list[tuple[str, str | None, float]] = []
        self.now = 0.0

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.5, 3.0, 70.0]))
    def passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=PLACES, report=REPORTS)
    def told(self, name: str, report: ReplicaReport) -> None:
        self.made.record_report(name, report)
        self.there.add(name)

    @rule(name=PLACES)
    def lost(self, name: str) -> None:
        self.made.lost(name)
        self.there.discard(name)

    @rule(adapter=NAMED, tokens=st.floats(0, 1e6), but=st.sets(PLACES, max_size=2), prefix=NAMED)
    def placed(self, adapter: str | None, tokens: float, but: set[str], prefix: str | None) -> None:
        if self.there <= but:
            with pytest.raises(NoReplicaError):
                self.made.place(adapter, tokens, self.now, prefix=prefix, but=but)
            return
        where = self.made.place(adapter, tokens, self.now, prefix=prefix, but=but)
        assert where in self.there - but
        self.open.append((where, adapter, tokens))

    @rule(data=st.data(), seconds=st.none() | st.floats(0, 1e4), refused=st.booleans())
    def ended(self, data: st.DataObject, seconds: float | None, refused: bool) -> None:
        if self.open:
            where, adapter, tokens = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            self.made.ended(where, adapter, tokens, self.now, seconds=seconds, refused=refused)

    @rule(name=PLACES, seconds=st.floats(0, 1e4), times=st.integers(1, 5))
    def answered(self, name: str, seconds: float, times: int) -> None:
        for _ in range(times):
            self.made.answered(name, seconds, self.now)

    @invariant()
    def each_replica_has_what_was_sent_to_it(self) -> None:
        rows = Counter(where for where, _, _ in self.open)
        sent = Counter((where, adapter) for where, adapter, _ in self.open if adapter is not None)
        for name, one in self.made._replicas.items():
            assert one.sequences == rows[name]
            assert one.sent == {adapter: count for (where, adapter), count in sent.items() if where == name}
            assert one.tokens >= 0
        assert set(self.made._gone) == set(rows) - self.there
        assert set(self.made.replicas) == self.there

    @invariant()
    def homes_are_replicas_that_are_there(self) -> None:
        homes = self.made.homes("a")
        assert len(set(homes)) == len(homes) >= min(LEAST_HOMES, len(self.there))
        assert set(homes) <= self.there


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40)
