"""Fair queue: orders waiting sequences by virtual token counters over tenants, and in each over adapters.

It follows the VTC of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024). A counter is the
service that its owner has received, in weighted tokens: 1 for each computed prompt token, 2 for each
generated token, divided by the weight of the sequence's priority. Tokens from the prefix cache are free, and
tokens that are computed again after a preemption are not counted twice. The smallest counter is served next:
of the tenants, then of that tenant's flows (a flow is one mix of adapters at one priority), and in a flow the
first sequence. Counters that differ by about `credit` or less are even. Among even ones the smallest load is
next, and then the one that has waited longest since it arrived or was served.

Idle time earns no credit, except a little: an account that begins to wait is lifted to `credit` below the
floor. It is lifted no higher than the smallest counter of the accounts that both wait and run or, if there
are none, the largest of those that wait. The floor rises by an equal part of all service, and to the smallest
counter of the waiting accounts. So a tenant that sends requests now and then precedes one that floods. The
service that an adapter received is balanced over time, even if others that received none keep arriving. Two
tenants of equal weight that both have sequences waiting all the time receive the same, up to

    2 * (max_sequences * (longest prompt + 2 * most max_tokens) + credit)

weighted tokens, if neither lacks slots or blocks: while a tenant's counter exceeds the other's by more than a
credit, it gets no place. It therefore gains at most what its running sequences still lack, and those are at
most `max_sequences`.

Sequences in the background (batches) come after all others. Among themselves the same rules hold, with
separate accounts: a tenant's batch does not delay its other requests.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heapreplace
from itertools import chain, count
from math import inf
from typing import Generic, TypeVar

from onebase_engine.engine.sequence import AdapterMix, Segment, SequenceState

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""Weights of one token. A generated token shares its pass over the base with few others, a prompt's with
hundreds."""
MOST_PRIORITY = 4
"""Largest priority; the smallest is its negative. Priority p has the weight 2**p, so that no sequence
starves."""
MOST_IDLE = 256
"""Largest number of idle tenants whose counters are remembered, and of each tenant's idle flows."""


_BAND, _LOAD = 80, 48
"""Positions, in bits, of the band and of the load within a turn."""
_LOADS = 2**MOST_PRIORITY
"""Resolution of a load: it is a multiple of one part in this many."""


class TokenCounter:
    """Weighted tokens (`counter`) that one tenant, or one flow of a tenant, has received."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.counter = -inf
        self.load = 0.0
        """Running sequences, each divided by its weight: the speed at which the counter grows."""
        self.since = 0
        """Number that grows over accounts that begin to wait or are served."""
        self.waiting = 0
        """Number of waiting sequences."""
        self.sequences = 0
        """Number of sequences that wait or run."""


class TenantQueue(TokenCounter):
    """A tenant with its flows and its load."""

    def __init__(self, key: Hashable, credit: float, background: bool = False) -> None:
        super().__init__(key)
        self.background = background
        self.flows: Accounts[Flow] = Accounts(credit)
        self.least_unit = 2.0**MOST_PRIORITY
        """Smallest part of `load` that one of its sequences may have."""

    def waiting_flows(self, among: Callable[[AdapterMix], bool] | None) -> list[Flow]:
        """Return its flows with waiting sequences; with `among`, only those whose adapters satisfy it."""
        return [flow for flow in self.flows.waiting.values() if among is None or among(flow.mix)]


class Flow(TokenCounter):
    """A tenant's sequences with one mix of adapters and one priority. The base alone is a mix like any
    other."""

    def __init__(self, tenant: TenantQueue, mix: AdapterMix, priority: int) -> None:
        super().__init__((mix, priority))
        self.tenant = tenant
        self.mix = mix
        self.weight = 2.0**priority
        self.queue: list[SequenceState] = []
        """Waiting sequences, by arrival."""
        tenant.least_unit = min(tenant.least_unit, 1 / self.weight)


_A = TypeVar("_A", bound=TokenCounter)


class Accounts(Generic[_A]):
    """Accounts by key. Idle ones are forgotten when all are idle, and beyond the last MOST_IDLE."""

    def __init__(self, credit: float) -> None:
        self.waiting: dict[Hashable, _A] = {}
        """Accounts with waiting sequences."""
        self._credit = credit
        self._busy: dict[Hashable, _A] = {}
        self._idle: dict[Hashable, _A] = {}
        self._floor = 0.0
        self._floor_of = -1
        """Number of the plan before which the floor was last computed."""
        self._most = 0.0
        """Upper limit, computed at the same time, to which an account that begins to wait is lifted."""
        self._since = count(1)

    def __len__(self) -> int:
        return len(self._busy) + len(self._idle)

    def enter(self, key: Hashable, make: Callable[[], _A]) -> _A:
        """Return the account of a sequence that has arrived."""
        account = self._busy.get(key) or self._idle.pop(key, None) or make()
        self._busy[key] = account
        account.sequences += 1
        return account

    def leave(self, account: _A) -> None:
        """Remove one of the account's sequences for good."""
        account.sequences -= 1
        if account.sequences:
            return
        del self._busy[account.key]
        self._idle[account.key] = account
        if not self._busy:
            self._idle.clear()
        elif len(self._idle) > MOST_IDLE:
            del self._idle[next(iter(self._idle))]

    def wait(self, account: _A, plan: int) -> None:
        """Count one more waiting sequence. `plan`: number of plans so far, between which counters rest."""
        if account.waiting == 0:
            if self._floor_of != plan:
                self._floor_of = plan
                least, self._most = self._range(account)
                self._floor = max(self._floor, least)
            account.counter = max(account.counter, min(self._floor - self._credit, self._most))
            account.since = next(self._since)
            self.waiting[account.key] = account
        account.waiting += 1

    def begin(self, account: _A) -> None:
        """Count one waiting sequence less."""
        account.waiting -= 1
        if account.waiting == 0:
            del self.waiting[account.key]

    def charge(self, account: _A, tokens: float, *, served: bool) -> None:
        """Count weighted tokens of an account that has sequences. `served`: it was its turn."""
        account.counter += tokens
        self._floor += tokens / len(self._busy)
        if served:
            account.since = next(self._since)

    def turns(self, accounts: Iterable[_A]) -> list[int]:
        """Return each account's turn: a smaller one is served earlier, and no two are equal.

        Its band (by how many credits its counter is above the floor), then its load, then `since`.
        """
        # One number each, since walks sort by it: tuples would keep Python's garbage collector busy.
        base, credit = self._floor - self._credit / 2, self._credit
        return [
            (int((one.counter - base) // credit) << _BAND) + (int(one.load * _LOADS) << _LOAD) + one.since
            for one in accounts
        ]

    def band(self, account: _A) -> int:
        """Return the account's band. Accounts of one band are even."""
        return self.turns((account,))[0] >> _BAND

    def _range(self, account: _A) -> tuple[float, float]:
        """Return the smallest counter of the waiting accounts (or running ones) and the limit of a lift.

        An account that begins to wait is lifted at most to the smallest counter of those that both wait and
        run, or to the largest if none does.
        """
        those: Iterable[_A] = self.waiting.values()
        if not self.waiting:
            those = [other for other in self._busy.values() if other is not account or account.sequences > 1]
        counters = [other.counter for other in those] or [self._floor]
        served = [other.counter for other in those if other.load]
        return min(counters), min(served) if served else max(counters)


class Turns:
    """One walk over the waiting sequences and those in prefill. Charges made meanwhile count at once."""

    def __init__(
        self,
        accounts: Mapping[bool, Accounts[TenantQueue]],
        tenants: Collection[TenantQueue],
        prefilling: dict[TenantQueue, dict[Flow, list[SequenceState]]],
        among: Callable[[AdapterMix], bool] | None,
    ) -> None:
        self._accounts = accounts
        self._tenants = tenants
        self._prefilling = prefilling
        self._among = among
        self._passed: set[TokenCounter] = set()

    def pass_over(self, account: TokenCounter) -> None:
        """Skip the account's waiting sequences, because none of them can be admitted now."""
        self._passed.add(account)

    def __iter__(self) -> Iterator[SequenceState]:
        classes = {each: [one for one in self._tenants if one.background is each] for each in (False, True)}
        return chain.from_iterable(
            _merged(tenants, self._accounts[each].turns, self._of_tenant) for each, tenants in classes.items()
        )

    def _of_tenant(self, tenant: TenantQueue) -> Iterator[SequenceState]:
        prefilling = dict.fromkeys(self._prefilling.get(tenant, ()))
        flows = prefilling | dict.fromkeys(tenant.waiting_flows(self._among))
        return _merged(flows, tenant.flows.turns, self._of_flow)

    def _of_flow(self, flow: Flow) -> Iterator[SequenceState]:
        yield from self._prefilling.get(flow.tenant, {}).get(flow, ())
        last = -1  # sequences leave the queue meanwhile and return to it: none is visited twice
        while not self._passed & {flow, flow.tenant}:
            place = bisect_right(flow.queue, last, key=_arrival)
            if place == len(flow.queue):
                return
            last = flow.queue[place].arrival
            yield flow.queue[place]


def _merged(
    accounts: Iterable[_A],
    turns_of: Callable[[Iterable[_A]], list[int]],
    sequences_of: Callable[[_A], Iterator[SequenceState]],
) -> Iterator[SequenceState]:
    """Yield the sequences of all accounts, each time one of the account whose turn it is then."""
    by_turn = dict(zip(turns_of(accounts), accounts, strict=True))
    heap = list(by_turn)
    heapify(heap)
    iterators: dict[_A, Iterator[SequenceState]] = {}
    while heap:
        account = by_turn[heap[0]]
        (now,) = turns_of((account,))
        if heap[0] < now:
            by_turn[now] = account
            heapreplace(heap, now)
            continue
        sequences = iterators.get(account) or iterators.setdefault(account, sequences_of(account))
        if (sequence := next(sequences, None)) is None:
            heappop(heap)
        else:
            yield sequence


class FairQueue:
    """The waiting sequences, and the accounts of all. A sequence enters, begins, may go back, and leaves."""

    def __init__(self, credit: float) -> None:
        """Create an empty queue. `credit`: weighted tokens by which an account may start ahead of others."""
        self._credit = credit
        self._tenants: dict[bool, Accounts[TenantQueue]] = {each: Accounts(credit) for each in (False, True)}
        """Tenants' accounts, for sequences in the background (True) and others (False)."""
        self._flow_of: dict[SequenceState, Flow] = {}
        self._count = 0
        self._plan = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SequenceState]:
        return (sequence for flow in self._flows() for sequence in flow.queue)

    def __contains__(self, sequence: SequenceState) -> bool:
        flow = self._flow_of.get(sequence)
        return flow is not None and flow.queue[_place(flow, sequence) :][:1] == [sequence]

    @property
    def in_background(self) -> int:
        """Number of waiting sequences in the background."""
        return sum(tenant.waiting for tenant in self._tenants[True].waiting.values())

    @property
    def mixes(self) -> Iterator[AdapterMix]:
        """Adapters of the waiting sequences."""
        return (flow.mix for flow in self._flows())

    def flow(self, sequence: SequenceState) -> Flow:
        """Return the flow in which the sequence is counted while it waits or runs."""
        return self._flow_of[sequence]

    def order(self, sequence: SequenceState) -> tuple[bool, int, int, int]:
        """Return the sort key of a sequence's turn; a smaller one is served earlier."""
        flow = self._flow_of[sequence]
        (tenant,) = self._tenants[sequence.background].turns((flow.tenant,))
        (own,) = flow.tenant.flows.turns((flow,))
        return sequence.background, tenant, own, sequence.arrival

    def was_given_less(self, tenant: TenantQueue, other: TenantQueue) -> bool:
        """Return True if `tenant` received less than `other` by a band. Both are in the background, or
        none."""
        return self.standing(tenant)[0] < self.standing(other)[0]

    def standing(self, tenant: TenantQueue) -> tuple[int, float]:
        """Return the tenant's band and load; the tenant with the smaller ones is served first."""
        return self._tenants[tenant.background].band(tenant), tenant.load

    def enter(self, sequence: SequenceState) -> None:
        """Add a sequence that has arrived and waits."""
        priority = max(-MOST_PRIORITY, min(MOST_PRIORITY, sequence.priority))
        tenants = self._tenants[sequence.background]
        tenant = tenants.enter(
            sequence.tenant, lambda: TenantQueue(sequence.tenant, self._credit, sequence.background)
        )
        flow = tenant.flows.enter((sequence.mix, priority), lambda: Flow(tenant, sequence.mix, priority))
        self._flow_of[sequence] = flow
        self._wait(flow, sequence)

    def begin(self, sequence: SequenceState) -> None:
        """Count a waiting sequence as running."""
        flow = self._flow_of[sequence]
        self._load(flow, 1)
        self._unqueue(flow, sequence)

    def back(self, sequence: SequenceState) -> None:
        """Put a running sequence back to its old place in the queue."""
        flow = self._flow_of[sequence]
        self._load(flow, -1)
        self._wait(flow, sequence)

    def leave(self, sequence: SequenceState) -> None:
        """Remove a sequence for good."""
        if sequence in self:
            self._unqueue(self._flow_of[sequence], sequence)
        else:
            self._load(self._flow_of[sequence], -1)
        flow = self._flow_of.pop(sequence)
        flow.tenant.flows.leave(flow)
        self._tenants[sequence.background].leave(flow.tenant)

    def charge(self, segment: Segment) -> None:
        """Charge what a step computes of a sequence: each prompt token once, and a generated token."""
        sequence = segment.sequence
        stop = min(segment.stop, sequence.prompt_length)
        prompt = max(0, stop - max(segment.start, sequence.charged))
        sequence.charged = max(sequence.charged, stop)
        self._charge(sequence, PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * segment.samples, served=prompt > 0)

    def charge_output(self, sequence: SequenceState, tokens: int) -> None:
        """Charge tokens that a step generated beyond the one that was charged."""
        self._charge(sequence, OUTPUT_WEIGHT * tokens, served=False)

    def in_turn(
        self,
        prefilling: Collection[SequenceState],
        wanted: Callable[[TenantQueue], bool],
        among: Callable[[AdapterMix], bool] | None = None,
    ) -> Turns:
        """Return a walk over the waiting sequences of the `wanted` tenants and the running `prefilling`.

        among: if given, only waiting sequences whose adapters satisfy it are visited.
        """
        self._plan += 1
        started: dict[TenantQueue, dict[Flow, list[SequenceState]]] = {}
        for sequence in prefilling:
            flow = self._flow_of[sequence]
            started.setdefault(flow.tenant, {}).setdefault(flow, []).append(sequence)
        waiting = [tenant for tenant in self._waiting() if wanted(tenant)]
        if among is not None:
            waiting = [tenant for tenant in waiting if tenant.waiting_flows(among)]
        return Turns(self._tenants, dict.fromkeys(started) | dict.fromkeys(waiting), started, among)

    def _waiting(self) -> Iterator[TenantQueue]:
        return chain.from_iterable(tenants.waiting.values() for tenants in self._tenants.values())

    def _flows(self) -> Iterator[Flow]:
        return (flow for tenant in self._waiting() for flow in tenant.flows.waiting.values())

    def _load(self, flow: Flow, count: int) -> None:
        """Add `count` running sequences to the flow."""
        flow.load += count / flow.weight
        flow.tenant.load += count / flow.weight

    def _charge(self, sequence: SequenceState, tokens: int, *, served: bool) -> None:
        flow = self._flow_of[sequence]
        flow.tenant.flows.charge(flow, tokens / flow.weight, served=served)
        self._tenants[sequence.background].charge(flow.tenant, tokens / flow.weight, served=served)

    def _wait(self, flow: Flow, sequence: SequenceState) -> None:
        self._tenants[sequence.background].wait(flow.tenant, self._plan)
        flow.tenant.flows.wait(flow, self._plan)
        insort(flow.queue, sequence, key=_arrival)
        self._count += 1

    def _unqueue(self, flow: Flow, sequence: SequenceState) -> None:
        del flow.queue[_place(flow, sequence)]
        flow.tenant.flows.begin(flow)
        self._tenants[sequence.background].begin(flow.tenant)
        self._count -= 1


def _arrival(sequence: SequenceState) -> int:
    return sequence.arrival


def _place(flow: Flow, sequence: SequenceState) -> int:
    return bisect_left(flow.queue, sequence.arrival, key=_arrival)
