"""Drive a real Scheduler with a model that only appends a token to every row that samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from onebase_engine.engine.kv_cache import ZERO_BLOCK, BlockGroup, BlockPool, Sight, group_key
from onebase_engine.engine.messages import AdapterRef, Sampling
from onebase_engine.engine.scheduler import Scheduler, SchedulerLimits, _Draft
from onebase_engine.engine.sequence import AdapterMix, SequenceState, StepPlan
from onebase_engine.engine.slot_table import SlotTable

BLOCK = 4


@dataclass(frozen=True)
class World:
    """A scheduler with its pool and slots."""

    scheduler: Scheduler
    pool: BlockPool
    slots: SlotTable
    blocks: dict[int, bytes | None] = field(default_factory=dict)
    """What each block would hold: a group's prefix with this key, or something else."""
    places: dict[int, bytes | None] = field(default_factory=dict)
    """The same of host memory."""
    came_back: list[int] = field(default_factory=list)
    """How many blocks came back in each step."""
    groups: Sequence[BlockGroup] = (BlockGroup(()),)

    @classmethod
    def create(
        cls,
        *,
        blocks: int = 40,
        slots: int = 2,
        max_sequences: int = 4,
        step_tokens: int = 16,
        max_length: int = 64,
        host_blocks: int = 0,
        restored: int = sys.maxsize,
        sights: Sequence[Sight] = (Sight(),),
    ) -> World:
        """`sights`: of each group of layers."""
        pool, table = BlockPool(blocks + 2, BLOCK, host_blocks, restored), SlotTable(slots)
        limits = SchedulerLimits(max_sequences, step_tokens, max_length)
        groups = [BlockGroup((), sight) for sight in sights]
        return cls(Scheduler("base", pool, table, limits, groups), pool, table, groups=groups)

    def step(self, background: int | None = None, bounded: int | None = None) -> StepPlan:
        """Plan, check what holds for every plan, and compute it; finished rows leave."""
        running = list(self.scheduler.running)
        plan = self.scheduler.plan(background, bounded)
        moves = self.pool.take_moves(plan.written(BLOCK), least=1)
        self.places.update({place: self.blocks.get(block) for block, place in moves.out})
        self.blocks.update({block: self.places[place] for block, place in moves.back})
        self.came_back.append(len(moves.back))
        self.check(plan, running)
        sampling = [segment.sequence for segment in plan.segments if segment.samples]
        for segment in plan.segments:
            if segment.sequence.scores_prompt:
                segment.sequence.prompt_scored = segment.stop >= segment.sequence.prompt_length
            row = segment.sequence
            written = range(segment.start // BLOCK, -(-segment.stop // BLOCK))
            own = [[blocks[index] for index in written] for blocks in row.blocks]
            self.scheduler.computed(segment)
            for number, blocks in enumerate(own):
                for index, block in zip(written, blocks, strict=True):
                    full = index < len(row.block_keys)
                    self.blocks[block] = group_key(row.block_keys[index], number) if full else None
        for row in sampling:
            row.tokens.append(1000 + row.generated)
            if row.generated >= row.sampling.max_tokens:
                self.end(row)
        return plan

    def end(self, row: SequenceState) -> None:
        row.finish = "length"
        self.scheduler.finish(row)

    def preempt(self, row: SequenceState) -> None:
        """As when blocks run out."""
        self.scheduler._preempt(row, _Draft(0))

    def finish_all(self, limit: int = 3000) -> int:
        """Step until no row is left; every step must compute something."""
        steps = 0
        while self.scheduler.sequences:
            assert self.step() or self.came_back[-1], "rows are left, but nothing was planned"
            steps += 1
            assert steps <= limit, "the rows do not finish"
        return steps

    def check(self, plan: StepPlan, before: Sequence[SequenceState]) -> None:
        limits, running = self.scheduler.limits, self.scheduler.running
        segments = plan.segments
        assert len(running) <= limits.max_sequences
        assert sum(segment.length for segment in segments) <= limits.step_tokens
        assert len({segment.sequence for segment in segments}) == len(segments)
        assert [row.arrival for row in running] == sorted(row.arrival for row in running)
        written: list[int] = []
        for segment in segments:
            assert segment.sequence in running
            assert segment.length >= 1
            assert segment.start == segment.sequence.computed
            for number, group in enumerate(self.groups):
                blocks = segment.sequence.blocks[number]
                first = group.first_block(segment.start, BLOCK)
                seen = slice(first, segment.start // BLOCK)
                keys = [group_key(key, number) for key in segment.sequence.block_keys[seen]]
                assert [self.blocks[block] for block in blocks[seen]] == keys
                assert set(blocks[:first]) <= {ZERO_BLOCK}, "what no row sees is released"
                assert ZERO_BLOCK not in blocks[first:]
                written += blocks[segment.start // BLOCK : -(-segment.stop // BLOCK)]
                assert len(blocks) * BLOCK >= segment.stop
            assert set(segment.sequence.mix.digests) <= self.slots.slot_of.keys()
        kept = [row.arrival for row in before if row in running]
        lost = [row.arrival for row in before if row not in running]
        alone = len({(row.tenant, row.background) for row in before}) == 1 and not self.scheduler.yielded
        assert not alone or not kept or not lost or max(kept) < min(lost), (
            "an older row was preempted before a younger one"
        )
        others = {segment.sequence for segment in plan.prefills if not segment.sequence.background}
        assert not others or not any(segment.sequence.background for segment in segments)
        assert len(set(written)) == len(written), "two sequences, or groups, write to one block"
        self.check_blocks()
        assert all(not row.blocks for row in self.scheduler.waiting)

    def check_blocks(self) -> None:
        """Every block is free or held, by one group at one place of any number of rows."""
        of_block: dict[int, tuple[int, int]] = {}
        for row in self.scheduler.running:
            for number, blocks in enumerate(row.blocks):
                for index, block in enumerate(blocks):
                    if block != ZERO_BLOCK:
                        assert of_block.setdefault(block, (number, index)) == (number, index)
        assert len(of_block) + self.pool.free == self.pool.capacity, "a block leaked"


def make_row(
    arrival: int,
    prompt: Sequence[int],
    max_tokens: int = 4,
    adapters: Sequence[str] = (),
    *,
    leader: SequenceState | None = None,
    scored: bool = False,
    tenant: str = "default",
    priority: int = 0,
    background: bool = False,
) -> SequenceState:
    return SequenceState(
        id=str(arrival),
        choice=0,
        tokens=list(prompt),
        sampling=Sampling(max_tokens=max_tokens, prompt_logprobs=0 if scored else None),
        mix=AdapterMix.of([AdapterRef(digest) for digest in adapters]),
        arrival=arrival,
        arrived_at=0.0,
        leader=leader,
        tenant=tenant,
        priority=priority,
        background=background,
    )
