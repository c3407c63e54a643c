"""Scheduler: chooses the running sequences and the tokens that the next step computes.

`fair_queue.py` determines the order: the tenant that has received least, in it the adapter that has received
least, and there the sequence that arrived first. Decodes come first in every step; prefill chunks share the
rest of the token budget, in that order. After a prompt of one tenant, a step has no prompt of a tenant with
twice the load, since it would take longer for the first. In a step that decodes for another tenant, prompts
are bounded: together they may add about BOUNDED_TIME of the time that the step takes without them. This does
not hold for a tenant that has received less than the other, or as much and runs less. Decodes of a tenant
with twice the load are bounded in the same way, and take turns.

When sequences of one tenant that begin alike arrive together, one of them computes the prefix. The others,
whose blocks would have the same keys, wait until those blocks can be reused.

A sequence that lacks something does not block the others. One whose adapter finds no slot claims one. One
that lacks blocks lets MAX_PASSED sequences pass; then free blocks are reserved for it, except for sequences
whose turn is earlier.

A sequence takes another one's place only if the other's tenant has received more and has at least twice the
load, the new sequence included: a tenant that floods yields at once, and tenants that are about even take
nothing from each other. The youngest sequence yields, and not again before it has generated as many tokens as
a block holds, and half as many as were computed again for it. A sequence whose last token is still drawn
while the next step is planned yields before all others, to any sequence: it needs nothing more.

When blocks run out, a sequence releases its blocks and is recomputed later: it never fails for it. It is the
youngest, or that of a tenant with twice the load of the youngest's. A sequence is admitted only if a few
blocks stay free: the next block of each sequence that may still need one. Otherwise the youngest would be
admitted and preempted again as soon as an older one grows. So no sequence is preempted for lack of blocks
before one has received `block_size` tokens after any admission.

Layers with a window have blocks of their own (`kv_cache.py`). What lies before the window is released while a
sequence goes on, and a long prompt takes no more blocks for them at once than the window and a step need: it
gets one for each that it releases. Another sequence may hold those too, as a prefix; should none be free
then, the youngest sequence yields, as when a decode needs a block.

A sequence whose prefix is restored from host memory over several steps has its place and its blocks from the
first of them on, and computes nothing before the last.

Background sequences fill what is left. Any other sequence takes its place, slot and blocks from the youngest
of them, and they take nothing from others. A step that computes another sequence's prompt has none of them,
and next to other sequences' decodes they compute little of their own prompts; the caller determines whether
they may be in such a step at all.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import zip_longest

from onebase_engine.engine.drafts import Drafts
from onebase_engine.engine.fair_queue import OUTPUT_WEIGHT, FairQueue, TenantQueue, Turns
from onebase_engine.engine.kv_cache import (
    ZERO_BLOCK,
    BlockGroup,
    BlockPool,
    Sight,
    activation_key,
    block_key,
    group_key,
    most_blocks,
    root_key,
)
from onebase_engine.engine.recurrence import StatePool
from onebase_engine.engine.sequence import AdapterMix, Segment, SequenceState, StepPlan
from onebase_engine.engine.slot_table import SlotTable

MAX_SCORED_TOKENS = 128
"""Largest number of prompt tokens scored in one step: each costs logits over the whole vocabulary."""
WATERMARK = 0.01
"""Smallest part of the KV blocks that an admission leaves free, unless the sequence would run alone."""
CREDIT_STEPS = 4
"""Credit of a tenant that sends requests now and then over those that always wait, in full steps."""
MAX_PASSED = 32
"""Largest number of sequences admitted before one that lacks blocks."""
BACKGROUND_SECONDS = 0.1
"""Target duration, in seconds, of a step with background sequences alone, whose end newcomers await."""
BACKGROUND_LEAST = 16
"""Smallest token budget of such a step."""
BACKGROUND_PART = 4
"""Divisor of the background's token budget in a step with other sequences."""
BACKGROUND_TIME = 0.1
"""Largest part of their time by which background sequences may delay the decoding of others."""
BACKGROUND_CREDIT = 0.05
"""Largest amount of that time that may be saved up, in seconds."""
BACKGROUND_FRESH = 32
"""Number of steps with background sequences after which one is measured without them."""
BOUNDED_PART = 32
"""Divisor of the step's token budget that gives the smallest budget of bounded tokens: a step with prompts
has fixed costs of its own, and with fewer tokens it would compute little else."""
BOUNDED_TIME = 0.4
"""Largest part of the time of a step for lighter tenants alone by which bounded tokens may make it longer. It
leaves room for what the heavy tenants' requests take of the processors outside of steps."""
BOUNDED_FRESH = 32
"""Number of steps of which one has no bounded tokens, so that its time is known."""
SNAPSHOT_TOKENS = 64
"""Length of the shortest prefix for which a prompt of a base with recurrent layers is cut, so that the state
behind it is kept."""
PREFIX_IN_FLIGHT = 32
"""Length of the shortest prefix, in tokens, for which a sequence waits while another one computes it."""
MAX_TRIES = 32
"""Limit of sequences lacking blocks, adapters lacking slots, and tenants lacking a place, in one walk."""


class NeverFitsError(ValueError):
    """A request that no state of the engine could serve; the message names the limit."""

    def __init__(self, code: str, param: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of the scheduler: sequences and tokens per step, tokens per sequence."""

    max_sequences: int
    step_tokens: int
    max_length: int
    draft_tokens: int = 0
    """Largest number of draft tokens of one sequence in one step."""
    draft_cost: float = 0.15
    """Cost that each further row adds to a step, as a part of a step of one row."""
    draft_rows: int = sys.maxsize
    """Number of rows of a step that drafts do not exceed, since a step of one more is much dearer."""


@dataclass
class _Draft:
    """A plan in the making.

    `budget`: remaining tokens of the step; `background`: how many of them background sequences may have;
    `bounded`: how many of them tenants may have that would make others' decodes wait.
    """

    budget: int
    background: int = 0
    bounded: int = 0
    decoding: list[TenantQueue] = field(default_factory=list)
    """The two tenants, of those with decodes in the step, that are served first."""
    heavy: set[SequenceState] = field(default_factory=set)
    """Sequences whose decodes are bounded."""
    contended: bool = False
    """Whether anything is bounded."""
    decodes: dict[SequenceState, Segment] = field(default_factory=dict)
    chunks: dict[SequenceState, Segment] = field(default_factory=dict)
    """Segments of sequences that prefill or have just been admitted."""
    preempted: set[SequenceState] = field(default_factory=set)
    late: set[SequenceState] = field(default_factory=set)
    """Sequences whose blocks are still in flight from host memory."""
    lacking: set[SequenceState] = field(default_factory=set)
    """Waiting sequences that had their turn and lacked blocks."""
    waiting_for_prefix: int = 0
    """Number of sequences that wait for a prefix which another one computes."""
    slotless: int = 0
    """Number of flows (a tenant's adapters) that found no slot."""
    refused: int = 0
    """Number of tenants that found every place occupied."""

    def is_over(self) -> bool:
        """Return True if the walk is over. Free blocks are reserved for a sequence that many have passed."""
        kept = any(sequence.passed >= MAX_PASSED for sequence in self.lacking)
        return self.budget <= 0 or kept or max(len(self.lacking), self.slotless, self.refused) >= MAX_TRIES

    def spend_tokens(self, sequence: SequenceState, tokens: int) -> None:
        self.budget -= tokens
        if sequence.background:
            self.background -= tokens

    def left(self, sequence: SequenceState) -> int:
        """Return the number of tokens that the sequence may still have."""
        return min(self.budget, self.background) if sequence.background else self.budget

    def leave_background(self) -> None:
        """Remove the background sequences from the plan."""
        for segments in (self.decodes, self.chunks):
            for sequence in [sequence for sequence in segments if sequence.background]:
                self.budget += segments.pop(sequence).length

    def plan(self) -> StepPlan:
        single = [segment for segment in self.chunks.values() if segment.length == 1]
        longer = [segment for segment in self.chunks.values() if segment.length > 1]
        heavy = sum(sequence in self.heavy for sequence in self.decodes) if self.contended else None
        return StepPlan([*self.decodes.values(), *single], longer, heavy)


class BackgroundPace:
    """Token budgets for background sequences.

    A step of them alone has as many tokens as are computed in a short time. A step with other sequences'
    decodes has a part of those, and now and then none, depending on the time that they add to it.

    Where more sequences cost next to nothing, as on most GPUs, they are in nearly every step, and steps are
    full. Times are seconds. step_tokens: of any step."""

    def __init__(self, step_tokens: int) -> None:
        self.alone = min(step_tokens, 4 * BACKGROUND_LEAST)
        """Largest number of tokens in a step with background sequences alone."""
        self._most = step_tokens
        self._without: float | None = None
        """Time, in seconds, of a step without them."""
        self._credit = 0.0
        self._steps = 0

    @property
    def joined(self) -> int:
        """Largest number of background tokens in the next step with other sequences' decodes."""
        may = self._without is not None and self._credit >= 0 and self._steps < BACKGROUND_FRESH
        return max(1, self.alone // BACKGROUND_PART) if may else 0

    def took(self, plan: StepPlan, seconds: float) -> None:
        """Update the budgets with the time in which a step was computed."""
        others = [segment for segment in plan.segments if not segment.sequence.background]
        if not others:
            self._fit(sum(segment.length for segment in plan.segments), seconds)
        if not others or any(not segment.sequence.background for segment in plan.prefills):
            return
        self._credit += BACKGROUND_TIME * seconds
        if len(others) == len(plan.segments):
            self._without = seconds if self._without is None else (self._without + seconds) / 2
            self._steps = 0
        else:
            self._credit -= max(0.0, seconds - (self._without or 0.0))
            self._steps += 1
        self._credit = min(self._credit, BACKGROUND_CREDIT)

    def _fit(self, tokens: int, seconds: float) -> None:
        """Update `alone` with the tokens and the time of a step of the background alone."""
        if seconds > BACKGROUND_SECONDS:
            fitting = int(min(tokens, self.alone) * BACKGROUND_SECONDS / seconds)
            self.alone = min(self._most, max(BACKGROUND_LEAST, fitting))
        elif 2 * tokens > self.alone and 2 * seconds < BACKGROUND_SECONDS:
            self.alone = min(self._most, 2 * self.alone)


class TenantPace:
    """Token budget for heavy tenants in steps that decode for lighter ones, by BOUNDED_TIME.

    A step with bounded tokens is compared with one that has none, which is computed when there are some for
    the first time, and now and then again. Times are seconds. step_tokens: of any step.
    """

    def __init__(self, step_tokens: int) -> None:
        self._most = step_tokens
        self._least = max(2, step_tokens // BOUNDED_PART)  # a decode and a token of a prompt
        self._bounded = self._least
        self._without: float | None = None
        """Time, in seconds, of a step without bounded tokens and prompts."""
        self._each: float | None = None
        """Time, in seconds, that one more token adds to it."""
        self._steps = 0
        """Number of steps since there was nothing to bound."""

    @property
    def bounded(self) -> int:
        """Largest number of bounded tokens in the next step."""
        return self._bounded if self._steps % BOUNDED_FRESH else 0

    def took(self, plan: StepPlan, seconds: float) -> None:
        """Update the budget with the time in which a step was computed."""
        if plan.bounded_decodes is None:
            self._steps, self._without = 0, None
            return
        self._steps += 1
        added = plan.bounded_decodes + sum(segment.length for segment in plan.prefills)
        if not added:
            mean = seconds if self._without is None else (self._without + seconds) / 2
            self._without = min(mean, seconds)  # Other work on the machine makes a step longer, not shorter.
        elif self._without is not None:
            each = max(0.0, seconds - self._without) / added
            self._each = each if self._each is None else (self._each + each) / 2
            fitting = BOUNDED_TIME * self._without / max(self._each, 1e-9)
            self._bounded = int(min(self._most, 2 * self._bounded, max(self._least, fitting)))


class Scheduler:
    """Waiting and running sequences. `plan` chooses what to compute, `computed` records it."""

    def __init__(
        self,
        base: str,
        pool: BlockPool,
        slots: SlotTable,
        limits: SchedulerLimits,
        groups: Sequence[BlockGroup] = (BlockGroup(()),),
        states: StatePool | None = None,
    ) -> None:
        """Create a scheduler without sequences.

        Args:
            groups: of the base's layers, each with blocks of its own.
            states: places for recurrent states, of a base that keeps some.
        """
        self._groups = tuple(groups)
        self._windows: dict[Sight, list[int]] = {}
        """Numbers of the groups with a window, by what they see."""
        for number, group in enumerate(self._groups):
            if group.sight.most is not None:
                self._windows.setdefault(group.sight, []).append(number)
        self._base = base
        self._pool = pool
        self._slots = slots
        self._states = states
        self.limits = limits
        self.waiting = FairQueue(CREDIT_STEPS * limits.step_tokens)
        self.running: list[SequenceState] = []
        """Running sequences, in order of arrival."""
        self.preemptions = 0
        self.yielded = 0
        """Number of preemptions for a waiting sequence of another tenant."""
        self.awaits: Callable[[SequenceState], bool] = lambda sequence: False
        """Whether a sequence has to skip steps that would give it a token, because its grammar's mask has not
        arrived."""
        self._uncharged: set[SequenceState] = set()
        """Sequences whose decodes are planned ahead and not charged yet."""
        self._end_places: list[int] = []
        """Places for recurrent states at ends of blocks within the last step's drafts."""
        slots.order = self.waiting.order

    def check_limits(self, prompt_length: int, max_tokens: int, adapters: int) -> None:
        """Raise NeverFitsError for a request that could not run even alone."""
        if prompt_length < 1:
            raise NeverFitsError("empty_prompt", "prompt", "the prompt has no tokens")
        total = prompt_length + max_tokens
        if total > self.limits.max_length:
            raise NeverFitsError(
                "context_length_exceeded",
                "max_tokens",
                f"{prompt_length} prompt tokens plus max_tokens {max_tokens} are over the server's limit of "
                f"{self.limits.max_length} tokens; shorten the prompt or lower max_tokens",
            )
        blocks = self.most_blocks(total)
        if blocks > self._pool.capacity:
            raise NeverFitsError(
                "kv_memory_exceeded",
                "max_tokens",
                f"{total} tokens need {blocks} KV blocks, the cache has {self._pool.capacity}; "
                "lower max_tokens or start the server with more --kv-memory",
            )
        if adapters > self._slots.capacity:
            raise NeverFitsError(
                "too_many_adapters",
                "adapter",
                f"{adapters} adapters in one request, the server has {self._slots.capacity} slots; "
                f"start it with --max-slots {adapters}",
            )

    def add(self, sequence: SequenceState) -> None:
        self.waiting.enter(sequence)

    @property
    def only_background(self) -> bool:
        """Whether all running sequences are in the background."""
        return all(sequence.background for sequence in self.running)

    def plan(
        self, background: int | None = None, bounded: int | None = None, *, ahead: bool = False
    ) -> StepPlan:
        """Plan the next step, admitting and preempting sequences as needed.

        Args:
            background: largest number of tokens of background sequences; None: all of the step's.
            bounded: largest number of tokens, in prompts and decodes, that make other tenants' decodes wait;
                None: all of the step's.
            ahead: True while the step before is still being computed. Its tokens, and which sequences end
                with them, are not known yet: nothing is drafted and no decode is charged before `settle`.
        """
        while self._states is not None and self._end_places:
            self._states.release(self._end_places.pop())
        tokens = self.limits.step_tokens
        draft = _Draft(tokens, tokens if background is None else background)
        draft.bounded = tokens if bounded is None else bounded
        self._decode(draft)
        prefilling = [sequence for sequence in self.running if sequence.pending > 1]
        self._walk(self.waiting.in_turn(prefilling, self._may_begin()), draft)
        if draft.slotless >= MAX_TRIES:
            # No slot is free now. Sequences whose adapters are in slots may still run.
            draft.slotless = 0
            unplanned = [
                sequence
                for sequence in prefilling
                if sequence in self.running and sequence not in draft.chunks
            ]
            placed = self._slots.unclaimed
            among = self.waiting.in_turn(
                unplanned, self._may_begin(), lambda mix: placed.issuperset(mix.digests)
            )
            self._walk(among, draft)
        for sequence in prefilling:
            done = (
                sequence not in self.running or sequence in draft.chunks or self._must_wait(sequence, draft)
            )
            if draft.budget > 0 and not done:
                self._advance(sequence, draft)
        if any(not sequence.background for sequence in draft.chunks):
            draft.leave_background()
        if ahead:
            self._uncharged = set(draft.decodes)
            return draft.plan()
        for segment in draft.decodes.values():
            self.waiting.charge(segment)
        if self.limits.draft_tokens:
            self._look_ahead(draft)
        return draft.plan()

    def holds_up(self, plan: StepPlan) -> bool:
        """Return True if a plan made ahead has only background sequences while others wait."""
        alone = all(segment.sequence.background for segment in plan.segments)
        return alone and len(self.waiting) > self.waiting.in_background

    def settle(self, plan: StepPlan, background: int) -> StepPlan:
        """Complete a plan made ahead, from which ended sequences have been removed.

        Its decodes are charged, and sequences whose guesses have mostly been right get drafts. `background`:
        as in `plan`.
        """
        for segment in plan.decodes:
            if segment.sequence in self._uncharged:
                self.waiting.charge(segment)
        self._uncharged = set()
        if not self.limits.draft_tokens:
            return plan
        draft = _Draft(self.limits.step_tokens, background)
        for segment in plan.segments:
            draft.spend_tokens(segment.sequence, segment.length)
        draft.decodes = {one.sequence: one for one in plan.decodes if one.samples}
        self._bound_decodes(draft.decodes, draft)
        self._look_ahead(draft, ahead=True)
        if not any(one.draft for one in draft.decodes.values()):
            return plan
        return replace(plan, decodes=[draft.decodes.get(one.sequence, one) for one in plan.decodes])

    def guess(self, plan: StepPlan) -> None:
        """Let sequences without a draft guess this step's token, to learn whether drafts are worth it."""
        for segment in plan.decodes:
            if segment.sequence.drafts is not None and not segment.draft:
                segment.sequence.drafts.propose(segment.sequence.tokens, 1)

    def computed(self, segment: Segment, right: int = 0) -> None:
        """Record that a step has written the KV of the segment and of the first `right` tokens of its draft.

        These tokens are the sequence's by now. Full blocks become a prefix that others may use.
        """
        sequence = segment.sequence
        sequence.computed = segment.stop + right
        if right:
            self.waiting.charge_output(sequence, right)
        self._extend_keys(sequence, sequence.computed)
        size = self._pool.block_size
        for index in range(segment.start // size, sequence.computed // size):
            for number, blocks in enumerate(sequence.blocks):
                self._pool.publish(blocks[index], group_key(sequence.block_keys[index], number))
        for sight, numbers in self._windows.items():
            count = sight.first_seen(sequence.computed) // size
            for number in numbers if sequence.blocks and count else ():
                if sequence.blocks[number][count - 1] == ZERO_BLOCK:
                    break  # Groups that see the same release it at once.
                self._release_unseen(sequence, sequence.blocks[number], count)
        if self._states is not None:
            self._advance_state(self._states, segment)

    def _release_unseen(self, sequence: SequenceState, blocks: array[int], count: int) -> None:
        """Release the first `count` of a group's blocks, which nothing that is computed from now on sees.

        The block of zeros takes their place. As prefixes they stay cached as long as other released blocks.
        The rest of a prompt gets as many, so that it does not lack them later.
        """
        first = count
        while first > 0 and blocks[first - 1] != ZERO_BLOCK:
            first -= 1
        if first < count:
            self._pool.release(blocks[first:count])
            blocks[first:count] = array("i", [ZERO_BLOCK] * (count - first))
            missing = self._pool.blocks_for(sequence.length) - len(blocks)
            blocks.extend(self._pool.allocate(max(min(count - first, missing), 0)) or ())

    def finish(self, sequence: SequenceState) -> None:
        """Remove a sequence, waiting or running, and release its resources."""
        self._slots.forget(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        self.waiting.leave(sequence)

    @property
    def sequences(self) -> list[SequenceState]:
        return [*self.running, *self.waiting]

    def _advance_state(self, states: StatePool, segment: Segment) -> None:
        """Let the state that the step has written be the sequence's, and keep the one where a block ends.

        Of states behind generated tokens only a sequence's newest is kept: a conversation goes on from there.
        """
        sequence, blocks = segment.sequence, segment.sequence.computed // self._pool.block_size
        end = blocks * self._pool.block_size
        before, now = sequence.states
        states.release(before)
        place = now if end == sequence.computed else segment.end_place
        if end > segment.start and place >= 0:
            key = sequence.block_keys[blocks - 1]
            states.publish(place, key)
            if end > sequence.prompt_length:
                if sequence.snapshot is not None:
                    states.forget(sequence.snapshot)
                sequence.snapshot = key
        sequence.states = now, states.allocate()

    # ---- what a step computes ----------------------------------------------------------------

    def _decode(self, draft: _Draft) -> None:
        sequences = [sequence for sequence in self.running if sequence.pending == 1 and not sequence.ends]
        sequences = [
            sequence for sequence in sequences if not self._is_late(sequence) and not self.awaits(sequence)
        ]
        behind = sum(sequence.background for sequence in sequences)
        if len(sequences) > draft.budget or 0 < draft.background < behind:
            sequences.sort(key=self.waiting.order)
        self._bound_decodes(sequences, draft)
        if draft.heavy:
            sequences.sort(key=lambda sequence: (sequence in draft.heavy, -sequence.skipped))
        prompts = len(self.waiting) > self.waiting.in_background or len(sequences) < len(self.running)
        bounded = draft.bounded // 2 if prompts else draft.bounded
        for sequence in sequences:
            if sequence in draft.heavy and bounded <= 0:
                sequence.skipped += 1
                continue
            ready = draft.left(sequence) > 0 and sequence not in draft.preempted
            if ready and self._grow(sequence, sequence.length, draft):
                draft.decodes[sequence] = Segment(sequence, sequence.computed, sequence.length)
                draft.spend_tokens(sequence, 1)
                sequence.skipped = 0
                if sequence in draft.heavy:
                    bounded -= 1
                    draft.bounded -= 1

    def _bound_decodes(self, sequences: Collection[SequenceState], draft: _Draft) -> None:
        """Note which tenants decode, and which of these sequences are of tenants with twice the load."""
        candidates = [
            (sequence, self.waiting.flow(sequence).tenant)
            for sequence in sequences
            if not sequence.background
        ]
        draft.decoding = nsmallest(2, {tenant for _, tenant in candidates}, key=self.waiting.standing)
        if len(draft.decoding) == 2:
            first = draft.decoding[0]
            draft.heavy = {sequence for sequence, tenant in candidates if self._is_heavier(tenant, first)}
            draft.contended = bool(draft.heavy)

    def _is_heavier(self, tenant: TenantQueue, other: TenantQueue) -> bool:
        return 2 * other.load <= tenant.load and self.waiting.standing(other) <= self.waiting.standing(tenant)

    def _walk(self, turns: Turns, draft: _Draft) -> None:
        """Plan prompts in turn: those of running sequences, and of waiting ones that can be admitted."""
        for sequence in turns:
            if draft.is_over():
                break
            if self._must_wait(sequence, draft):
                turns.pass_over(self.waiting.flow(sequence).tenant)
            elif sequence in self.running or self._admit(sequence, draft, turns):
                self._advance(sequence, draft)

    def _advance(self, sequence: SequenceState, draft: _Draft) -> None:
        """Plan as much of the sequence as the budget allows, once its blocks are restored."""
        if self._is_late(sequence):
            draft.late.add(sequence)
            return
        is_bounded = self._is_bounded(sequence, draft)
        draft.contended |= is_bounded
        length = min(
            sequence.pending, draft.left(sequence), draft.bounded if is_bounded else sequence.pending
        )
        length = self._to_snapshot(sequence, length)
        if sequence.scores_prompt:
            length = min(length, max(sequence.first_scored - sequence.computed, 0) + MAX_SCORED_TOKENS)
        segment = Segment(sequence, sequence.computed, sequence.computed + length)
        if segment.samples and self.awaits(sequence):
            return
        if not self._grow(sequence, segment.stop, draft):
            return
        draft.chunks[sequence] = segment
        draft.spend_tokens(sequence, length)
        draft.bounded -= length if is_bounded else 0
        self.waiting.charge(segment)

    def _to_snapshot(self, sequence: SequenceState, length: int) -> int:
        """Return a chunk's length, cut where what the bare base computes ends, and to where the recurrent
        state behind it can be kept for others.

        That is the end of a block: of the last whole one in the prompt, or in what the bare base computes of
        it, or of a prefix that others had too.
        """
        start, size = sequence.computed, self._pool.block_size
        shared = sequence.acts_from // size * size
        if start < shared < start + length:
            # Blocks that the base shares are never computed beside the adapter's rows: attention multiplies
            # what it must not see by 0, and an adapter that overflows would leave no numbers in them.
            length = shared - start
        if self._states is None:
            return length
        stop = start + length
        ends = [at // size * size for at in (sequence.length - 1, sequence.acts_from)]
        for end in (sequence.branch_at, *(end for end in ends if end >= SNAPSHOT_TOKENS)):
            if start < end < stop:
                stop = end
        if stop < sequence.length and stop - stop % size > start:
            stop -= stop % size
        return stop - start

    def _must_wait(self, sequence: SequenceState, draft: _Draft) -> bool:
        """Return True if the step has no time for this prompt.

        It must stay short for a prompt of a tenant with at most half the load, and for decodes of another
        tenant that is served first. For a background sequence: for another sequence's prompt.
        """
        if sequence.background and (
            draft.background <= 0 or any(not other.background for other in draft.chunks)
        ):
            return True
        if draft.bounded <= 0 and self._is_bounded(sequence, draft):
            draft.contended = True
            return True
        tenant = self.waiting.flow(sequence).tenant
        others = {self.waiting.flow(other).tenant for other in draft.chunks} - {tenant}
        return any(2 * other.load <= tenant.load for other in others)

    def _is_bounded(self, sequence: SequenceState, draft: _Draft) -> bool:
        """Return True if the step decodes for another tenant that is served before this sequence's."""
        if sequence.background:
            return False
        tenant, standing = self.waiting.flow(sequence).tenant, self.waiting.standing
        return any(other is not tenant and standing(other) <= standing(tenant) for other in draft.decoding)

    def _look_ahead(self, draft: _Draft, *, ahead: bool = False) -> None:
        """Add drafts that are likely right to decodes, from the step's remaining budget.

        `ahead`: nothing is computed meanwhile, so no sequence searches for a draft that would not be used.
        """
        rows = self.limits.step_tokens - draft.budget
        size, groups = self._pool.block_size, len(self._groups)
        spare = max(groups * len(self.running), int(self._pool.capacity * WATERMARK))
        for sequence, segment in draft.decodes.items():
            late = (sequence.background and not self.only_background) or sequence in draft.heavy
            if sequence.sampling.penalizes or not sequence.generates or late:
                continue  # Its text should not repeat itself, or there is none, or its time is bounded.
            sequence.drafts = sequence.drafts or Drafts()
            cost = self.limits.draft_cost
            if ahead and not sequence.forced and sequence.drafts.misses(rows, cost):
                continue
            limit = min(self.limits.draft_tokens, sequence.sampling.max_tokens - sequence.generated - 1)
            proposed = sequence.drafts.propose(
                sequence.tokens, limit, sequence.forced, drawing=sequence.drawing
            )
            room = min(map(len, sequence.blocks)) * size - sequence.length
            count = min(len(proposed), sequence.drafts.worth(rows, cost), draft.left(sequence))
            count = max(min(count, self.limits.draft_rows - rows), 0)
            if (
                count > room
                and self._pool.free > spare + groups
                and self._extend(sequence, sequence.length + room + 1)
            ):
                room += size
            count, end_place = self._past_block(segment, min(count, room))
            if count > 0:
                draft.decodes[sequence] = Segment(
                    sequence, segment.start, segment.stop, tuple(proposed[:count]), end_place
                )
                draft.spend_tokens(sequence, count)
                rows += count

    def _past_block(self, segment: Segment, count: int) -> tuple[int, int]:
        """Return a draft's length, and a place for the recurrent state at the end of a block within it (-1).

        The draft ends at the block's end if every place that is left may be needed by a running sequence.
        """
        to_end = -segment.stop % self._pool.block_size
        if self._states is None or count <= to_end:
            return count, -1
        if 2 * len(self.running) + len(self._end_places) >= self._states.capacity:
            return to_end, -1
        self._end_places.append(self._states.allocate())
        return count, self._end_places[-1]

    # ---- admission ---------------------------------------------------------------------------

    def _may_begin(self) -> Callable[[TenantQueue], bool]:
        """Return a predicate for tenants whose sequences may be admitted, at least by preempting others."""
        if not self._is_full or any(sequence.ends for sequence in self.running):
            return lambda tenant: True
        most = {False: 0.0, True: 0.0}
        for sequence in self.running:
            most[sequence.background] = max(
                most[sequence.background], self.waiting.flow(sequence).tenant.load
            )

        def might(tenant: TenantQueue) -> bool:
            takes = most[True] > 0 and not tenant.background
            return takes or 2 * (tenant.load + tenant.least_unit) <= most[tenant.background]

        return might

    def _admit(self, sequence: SequenceState, draft: _Draft, turns: Turns) -> bool:
        """Admit a waiting sequence if its resources are free or others yield them. Return True if it runs."""
        leader = sequence.leader
        waits_for_leader = leader is not None and not leader.prefilled and not leader.finish
        if waits_for_leader or sequence in draft.preempted or sequence in draft.lacking:
            return False
        flow = self.waiting.flow(sequence)
        if self._is_full and self._over_served(sequence, self.running, (), draft) is None:
            turns.pass_over(flow.tenant)
            draft.refused += 1
            return False
        if self._prefix_in_flight(sequence):
            draft.waiting_for_prefix += 1
            if draft.waiting_for_prefix >= MAX_TRIES:
                turns.pass_over(flow)
            return False
        if not self._acquire_slots(sequence, draft):
            turns.pass_over(flow)
            draft.slotless += 1
            return False
        if self._is_full or not self._allocate_blocks(sequence):
            yielding = self._yielding(sequence, draft)
            if not yielding:
                self._slots.release(sequence)
                draft.lacking.add(sequence)
                return False
            self._yield(yielding, draft)
            self._allocate_blocks(sequence)
        self.waiting.begin(sequence)
        insort(self.running, sequence, key=lambda other: other.arrival)
        for other in draft.lacking:
            other.passed += 1
        return True

    def _prefix_in_flight(self, sequence: SequenceState) -> bool:
        """Return True if a running sequence computes a prefix that this one lacks and could reuse.

        The other one has at least its priority, is not behind it in turn, and neither waits for a mask nor
        scores that prefix, which would make it slow.
        """
        others = [other for other in self.running if self._may_lead(other, sequence)]
        if not others:
            return False
        size = self._pool.block_size
        self._extend_keys(sequence, sequence.length - 1)
        keys = sequence.block_keys[: sequence.reusable // size]
        for other in others:
            count = _common_length(keys, other.block_keys)
            if count * size < PREFIX_IN_FLIGHT or count <= other.computed // size:
                continue
            scored = other.scores_prompt and count * size > other.first_scored
            if not scored and not self._has_prefix(keys[count - 1]):
                return True
        return False

    def _may_lead(self, other: SequenceState, sequence: SequenceState) -> bool:
        """Return True if a running sequence's prompt is computed no later than a waiting one's would be."""
        precedes = other.priority >= sequence.priority and other.background <= sequence.background
        if other.pending == 1 or not precedes or other.tenant != sequence.tenant or self.awaits(other):
            return False
        theirs, own = self.waiting.flow(other), self.waiting.flow(sequence)
        if theirs is own:
            return other.arrival < sequence.arrival
        band = own.tenant.flows.band
        return theirs.tenant is not own.tenant or band(theirs) <= band(own)

    def _has_prefix(self, key: bytes) -> bool:
        """Return True if the prefix that ends in a block with this key is cached, with the recurrent state
        behind it if it has one."""
        if self._states is not None and not self._states.holds(key):
            return False
        return self._pool.holds(group_key(key, 0), restore=True)

    @property
    def _is_full(self) -> bool:
        return len(self.running) >= self.limits.max_sequences

    def _acquire_slots(self, sequence: SequenceState, draft: _Draft) -> bool:
        if self._slots.acquire(sequence):
            return True
        users = self._slots.in_the_way(sequence)
        yielding: list[SequenceState] = []
        while users - set(yielding):
            victim = self._over_served(sequence, users - set(yielding), yielding, draft)
            if victim is None:
                return False
            yielding.append(victim)
        self._yield(yielding, draft)
        return bool(yielding) and self._slots.acquire(sequence)

    def _yielding(self, sequence: SequenceState, draft: _Draft) -> list[SequenceState]:
        """Return running sequences that yield a place and blocks to `sequence`; empty if those would not
        suffice."""
        needed = self.most_blocks(sequence.length) + self._watermark(sequence)
        free = self._pool.free
        yielding: list[SequenceState] = []
        while len(self.running) - len(yielding) >= self.limits.max_sequences or free < needed:
            victim = self._over_served(sequence, self.running, yielding, draft)
            if victim is None:
                return []
            yielding.append(victim)
            free += self._pool.unshared(_by_position(victim.blocks))
        return yielding

    def _over_served(
        self,
        sequence: SequenceState,
        among: Collection[SequenceState],
        yielding: Collection[SequenceState],
        draft: _Draft,
    ) -> SequenceState | None:
        """Return the next sequence to yield to `sequence`: the youngest of the tenant with the largest load.

        Sequences that end anyway come first; then, unless `sequence` is in the background, the youngest that
        are."""
        going = {*yielding, *draft.chunks, *draft.late}
        ending = next((other for other in among if other.ends and other not in going), None)
        if ending is not None:
            return ending
        behind = [other for other in among if other.background and other not in going]
        if not sequence.background and behind:
            return max(behind, key=lambda other: other.arrival)
        flow, own_tenant = self.waiting.flow(sequence), self.waiting.flow(sequence).tenant
        least = 2 * (own_tenant.load + (0 if sequence in self.running else 1 / flow.weight))
        loads: dict[SequenceState, float] = {}
        for other in behind if sequence.background else among:
            theirs = self.waiting.flow(other).tenant
            settled = other.generated < other.yields_at or other in going
            if (
                theirs is own_tenant
                or theirs.load < least
                or settled
                or self.waiting.was_given_less(theirs, own_tenant)
            ):
                continue
            yielded_flows = (self.waiting.flow(one) for one in yielding)
            load = theirs.load - sum(1 / one.weight for one in yielded_flows if one.tenant is theirs)
            if load >= least:
                loads[other] = load
        return max(loads, key=lambda other: (loads[other], other.arrival), default=None)

    def _yield(self, sequences: Collection[SequenceState], draft: _Draft) -> None:
        for sequence in sequences:
            self._preempt(sequence, draft)
        self.yielded += sum(not sequence.ends for sequence in sequences)

    # ---- blocks ------------------------------------------------------------------------------

    def _allocate_blocks(self, sequence: SequenceState) -> bool:
        """Allocate blocks for all tokens, a cached prefix first. At least one token stays to compute.

        Layers with a window get as many as they ever hold at once. Return False, and allocate none, if there
        are not enough, or if fewer than the watermark would stay free.
        """
        self._extend_keys(sequence, sequence.length - 1)
        size, watermark = self._pool.block_size, self._watermark(sequence)
        keys = sequence.block_keys[: sequence.reusable // size]
        count, shared = self._share(keys)
        states, fresh = (0, -1), None
        if sum(self._needed(sequence, count, shared)) + watermark <= self._pool.free:
            # What comes back from host memory takes blocks that the sequence would take anyway.
            while not self._restore(keys, count, shared):
                self._release_blocks(shared)
                count, shared = self._share(keys)
            if self._states is not None:
                states = self._share_state(self._states, sequence, shared[0])
                count = len(shared[0])
            # Of the blocks that were just released, others may hold some.
            needed = self._needed(sequence, count, shared)
            if sum(needed) + watermark <= self._pool.free:
                fresh = self._pool.allocate(sum(needed))
        if fresh is None:
            self._release_blocks(shared)
            self._release_states(states)
            return False
        sequence.states = states
        sequence.late = self._pool.late([block for blocks in shared for block in blocks])
        sequence.blocks = []
        for group, blocks, more in zip(self._groups, shared, needed, strict=True):
            unseen = [ZERO_BLOCK] * group.first_block(count * size, size)
            sequence.blocks.append(array("i", unseen + blocks + fresh[:more]))
            del fresh[:more]
        sequence.computed = count * size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.charged = min(sequence.computed, sequence.prompt_length)
        else:
            again = sequence.length - sequence.computed
            sequence.yields_at = sequence.generated + max(size, again // OUTPUT_WEIGHT)
        return True

    def _share(self, keys: Sequence[bytes]) -> tuple[int, list[list[int]]]:
        """Find the longest cached prefix, and acquire those of each group's blocks that need no restoring.

        Return its length, in blocks. Of a prefix, each group needs the blocks that the next row sees.
        """
        count, size = len(keys), self._pool.block_size
        for number, group in enumerate(self._groups):
            if group.sight.most is None:
                held = (self._pool.holds(group_key(key, number), restore=True) for key in keys[:count])
                count = next((index for index, one in enumerate(held) if not one), count)
        while count:
            missing = [
                index
                for sight, numbers in self._windows.items()
                for number in numbers
                for index in range(sight.first_seen(count * size) // size, count)
                if not self._pool.holds(group_key(keys[index], number), restore=True)
            ]
            if not missing:
                break
            count = max(missing)
        return count, [self._pool.share(own) for own in self._keys_of_groups(keys, count)]

    def _keys_of_groups(self, keys: Sequence[bytes], count: int) -> Iterator[list[bytes]]:
        """Yield the keys of the blocks that each group needs of a prefix of `count` blocks."""
        size = self._pool.block_size
        for number, group in enumerate(self._groups):
            yield [group_key(key, number) for key in keys[group.first_block(count * size, size) : count]]

    def _restore(self, keys: Sequence[bytes], count: int, shared: Sequence[list[int]]) -> bool:
        """Acquire the rest of a prefix, from host memory. Return False if a part of it was lost there."""
        for own, blocks in zip(self._keys_of_groups(keys, count), shared, strict=True):
            blocks += self._pool.share(own[len(blocks) :], restore=True)
            if len(blocks) < len(own):
                return False
        return True

    def _needed(self, sequence: SequenceState, count: int, shared: Sequence[list[int]]) -> list[int]:
        """Return how many blocks each group lacks for a sequence whose first `count` blocks are cached."""
        size, length = self._pool.block_size, sequence.length
        needed = []
        for group, blocks in zip(self._groups, shared, strict=True):
            left = self._pool.blocks_for(length) - group.first_block(count * size, size)
            most = group.most_blocks(length, size, self.limits.step_tokens)
            needed.append(min(left, most) - len(blocks))
        return needed

    def most_blocks(self, tokens: int) -> int:
        """Return the largest number of blocks that a sequence of `tokens` holds at once, alone."""
        return most_blocks(self._groups, tokens, self._pool.block_size, self.limits.step_tokens)

    def _share_state(self, states: StatePool, sequence: SequenceState, shared: list[int]) -> tuple[int, int]:
        """Return the places for a sequence's recurrent state, and one for the next.

        Shared blocks beyond the longest prefix whose state is kept are released.
        """
        count, place = states.longest(sequence.block_keys[: len(shared)])
        sequence.branch_at = len(shared) * self._pool.block_size
        self._pool.release(shared[count:])
        del shared[count:]
        return states.share(place), states.allocate()

    def _release_states(self, places: tuple[int, int]) -> None:
        if self._states is not None and places[1] >= 0:
            for place in places:
                self._states.release(place)

    def _is_late(self, sequence: SequenceState) -> bool:
        """Return True if blocks of a running sequence return from host memory only after the next step."""
        if sequence.late:
            sequence.late = self._pool.late(sequence.late)
        return bool(sequence.late)

    def _watermark(self, admitted: SequenceState) -> int:
        """Return the number of blocks that must stay free after `admitted` joins; alone it may take all."""
        if not self.running:
            return 0
        growing = sum(
            self._may_outgrow(sequence, max(map(len, sequence.blocks))) for sequence in self.running
        )
        growing += self._may_outgrow(admitted, self._pool.blocks_for(admitted.length))
        return max(growing * len(self._groups), int(self._pool.capacity * WATERMARK))

    def _may_outgrow(self, sequence: SequenceState, blocks: int) -> bool:
        """Return True if the sequence may need more than `blocks`; its last token needs no KV."""
        return self._pool.blocks_for(sequence.prompt_length + sequence.sampling.max_tokens - 1) > blocks

    def _grow(self, sequence: SequenceState, tokens: int, draft: _Draft) -> bool:
        """Allocate blocks for `tokens`, preempting sequences if needed, background ones first.

        Return False if this sequence was preempted.
        """
        while not self._extend(sequence, tokens):
            among = [other for other in self.running if other not in draft.chunks]
            youngest = ([other for other in among if other.background] or among)[-1]
            victim = self._over_served(youngest, among, (), draft) or youngest
            self._preempt(victim, draft)
            if victim is sequence:
                return False
        return True

    def _extend(self, sequence: SequenceState, tokens: int) -> bool:
        """Allocate blocks for `tokens` to each group. Return False, and allocate none, if too few are
        free."""
        count = self._pool.blocks_for(tokens)
        missing = [count - len(blocks) for blocks in sequence.blocks]
        if max(missing) <= 0:
            return True
        fresh = self._pool.allocate(sum(more for more in missing if more > 0))
        if fresh is None:
            return False
        for blocks, more in zip(sequence.blocks, missing, strict=True):
            if more > 0:
                blocks.extend(fresh[:more])
                del fresh[:more]
        return True

    def _preempt(self, sequence: SequenceState, draft: _Draft) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        self.waiting.back(sequence)
        self.preemptions += not sequence.ends
        draft.preempted.add(sequence)
        if draft.decodes.pop(sequence, None) is not None:
            draft.spend_tokens(sequence, -1)

    def _release(self, sequence: SequenceState) -> None:
        self._release_blocks(sequence.blocks)
        sequence.blocks, sequence.late = [], []
        self._release_states(sequence.states)
        sequence.states = 0, -1
        self._slots.release(sequence)

    def _release_blocks(self, of_groups: Sequence[Sequence[int]]) -> None:
        self._pool.release(_by_position(of_groups))

    def _extend_keys(self, sequence: SequenceState, tokens: int) -> None:
        """Extend the keys of the sequence's full blocks within its first `tokens` tokens."""
        size = self._pool.block_size
        while (len(sequence.block_keys) + 1) * size <= tokens:
            start = len(sequence.block_keys) * size
            parent = self._parent_key(sequence, start)
            sequence.block_keys.append(block_key(parent, sequence.tokens[start : start + size]))

    def _parent_key(self, sequence: SequenceState, start: int) -> bytes:
        """Return the key that precedes the block from token `start` on."""
        if not sequence.acts_from:
            return sequence.block_keys[-1] if start else self._root_key(sequence, sequence.mix)
        parent = sequence.block_keys[-1] if start else self._root_key(sequence, AdapterMix())
        if not start <= sequence.acts_from < start + self._pool.block_size:
            return parent
        return activation_key(parent, self._root_key(sequence, sequence.mix), sequence.acts_from)

    def _root_key(self, sequence: SequenceState, mix: AdapterMix) -> bytes:
        return root_key(self._base, sequence.tenant, mix)


def _common_length(keys: Sequence[bytes], others: Sequence[bytes]) -> int:
    """Return the number of equal keys at the beginning. Each key stands for all before it too."""
    return bisect_left(range(min(len(keys), len(others))), True, key=lambda n: keys[n] != others[n])


def _by_position(of_groups: Sequence[Sequence[int]]) -> list[int]:
    """Return the blocks of all groups in the order of a sequence's tokens, without the block of zeros."""
    together = zip_longest(*of_groups, fillvalue=ZERO_BLOCK)
    return [block for blocks in together for block in blocks if block != ZERO_BLOCK]
