"""Which rows run, and which tokens the next step computes.

Rows are admitted in order of arrival; a row whose adapter finds no slot waits without holding up the
others. Decodes come first in every step, prefill chunks share what is left of the token budget. When
blocks run out, the youngest row gives its blocks back and is recomputed later: it never fails for it.

A row is admitted only if a few blocks stay free: the next block of each row that may still need one.
Else the youngest row would be admitted and preempted again as soon as an older one grows. So no row is
preempted within `block_size` steps after any admission.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from onebase_engine.engine.kv_cache import BlockPool, block_key, root_key
from onebase_engine.engine.row import Plan, Row, Segment
from onebase_engine.engine.slot_table import SlotTable

MAX_SCORED_TOKENS = 128
"""Prompt tokens scored in one step: each costs a row of logits over the whole vocabulary."""
WATERMARK = 0.01
"""Part of the KV blocks that an admission leaves free at least, unless the row would run alone."""


class NeverFitsError(ValueError):
    """A request that no state of the engine could serve; names the limit."""

    def __init__(self, code: str, param: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True)
class Limits:
    """What the scheduler may use: rows and tokens per step, tokens per row."""

    max_rows: int
    step_tokens: int
    max_length: int


class Scheduler:
    """Waiting and running rows. `plan` says what to compute, `computed` what has been."""

    def __init__(self, base: str, pool: BlockPool, slots: SlotTable, limits: Limits) -> None:
        self._base = base
        self._pool = pool
        self._slots = slots
        self.limits = limits
        self.waiting: list[Row] = []
        """In order of arrival."""
        self.running: list[Row] = []
        """In order of arrival."""
        self.preemptions = 0

    def check(self, prompt_length: int, max_tokens: int, adapters: int) -> None:
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
        blocks = self._pool.blocks_for(total)
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

    def add(self, row: Row) -> None:
        self._insert(self.waiting, row)

    def plan(self) -> Plan:
        """The next step. Rows may be admitted and preempted on the way."""
        budget = self.limits.step_tokens
        decodes: list[Segment] = []
        for row in list(self.running):
            if row in self.running and row.pending == 1 and budget > 0 and self._grow(row, len(row.tokens)):
                decodes.append(Segment(row, row.computed, len(row.tokens)))
                budget -= 1
        decodes = [segment for segment in decodes if segment.row in self.running]
        prefills: list[Segment] = []
        for row in self.running:
            if row.pending > 1 and budget > 0:
                segment = self._chunk(row, budget)
                prefills.append(segment)
                budget -= segment.length
        for row in self._admissible():
            if budget <= 0 or len(self.running) >= self.limits.max_rows:
                break
            if not self._slots.acquire(row):
                continue
            if not self._take_blocks(row):
                self._slots.release(row)
                break
            self.waiting.remove(row)
            self._insert(self.running, row)
            segment = self._chunk(row, budget)
            (decodes if segment.length == 1 else prefills).append(segment)
            budget -= segment.length
        return Plan(decodes, prefills)

    def computed(self, segment: Segment) -> None:
        """The step has written the segment's KV: full blocks become a prefix that others may use."""
        row = segment.row
        row.computed = segment.stop
        self._extend_keys(row, row.computed)
        size = self._pool.block_size
        for index in range(segment.start // size, row.computed // size):
            self._pool.publish(row.blocks[index], row.block_keys[index])

    def finish(self, row: Row) -> None:
        """Take a row out, wherever it is, and give back what it holds."""
        if row in self.running:
            self.running.remove(row)
            self._release(row)
        elif row in self.waiting:
            self.waiting.remove(row)
        self._slots.forget(row)

    @property
    def rows(self) -> list[Row]:
        return [*self.running, *self.waiting]

    def _chunk(self, row: Row, budget: int) -> Segment:
        length = min(row.pending, budget)
        if row.scores_prompt:
            length = min(length, MAX_SCORED_TOKENS)
        return Segment(row, row.computed, row.computed + length)

    def _admissible(self) -> list[Row]:
        """Waiting rows in order of arrival; a choice waits for the one that prefills its prompt."""
        return [
            row for row in self.waiting if row.leader is None or row.leader.prefilled or row.leader.finish
        ]

    def _take_blocks(self, row: Row) -> bool:
        """Blocks for all of the row's tokens, a cached prefix first. At least one token stays to compute.

        False, and nothing taken, if there are not enough, or if fewer than the watermark would stay free.
        """
        self._extend_keys(row, len(row.tokens) - 1)
        reusable = 0 if row.scores_prompt else (len(row.tokens) - 1) // self._pool.block_size
        shared = self._pool.share(row.block_keys[:reusable])
        missing = self._pool.blocks_for(len(row.tokens)) - len(shared)
        fresh = self._pool.allocate(missing) if missing + self._watermark(row) <= self._pool.free else None
        if fresh is None:
            self._pool.release(shared)
            return False
        row.blocks = shared + fresh
        row.computed = len(shared) * self._pool.block_size
        if row.cached_tokens is None:
            row.cached_tokens = row.computed
        return True

    def _watermark(self, admitted: Row) -> int:
        """Blocks that stay free when `admitted` joins the running rows; a row alone may take all."""
        if not self.running:
            return 0
        growing = sum(self._may_outgrow(row, len(row.blocks)) for row in self.running)
        growing += self._may_outgrow(admitted, self._pool.blocks_for(len(admitted.tokens)))
        return max(growing, int(self._pool.capacity * WATERMARK))

    def _may_outgrow(self, row: Row, blocks: int) -> bool:
        """Whether the row may need more than `blocks`; nothing is computed from its last token."""
        return self._pool.blocks_for(row.prompt_length + row.sampling.max_tokens - 1) > blocks

    def _grow(self, row: Row, tokens: int) -> bool:
        """Blocks for `tokens`; preempts the youngest rows until there are. False if that was this row."""
        while len(row.blocks) * self._pool.block_size < tokens:
            more = self._pool.allocate(1)
            if more is not None:
                row.blocks += more
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is row:
                return False
        return True

    def _preempt(self, row: Row) -> None:
        self.running.remove(row)
        self._release(row)
        row.computed = 0
        self._insert(self.waiting, row)
        self.preemptions += 1

    def _release(self, row: Row) -> None:
        self._pool.release(row.blocks)
        row.blocks = []
        self._slots.release(row)

    def _extend_keys(self, row: Row, tokens: int) -> None:
        """Keys of the row's full blocks within its first `tokens` tokens."""
        size = self._pool.block_size
        while (len(row.block_keys) + 1) * size <= tokens:
            start = len(row.block_keys) * size
            parent = row.block_keys[-1] if row.block_keys else root_key(self._base, row.tenant, row.mix)
            row.block_keys.append(block_key(parent, row.tokens[start : start + size]))

    @staticmethod
    def _insert(rows: list[Row], row: Row) -> None:
        insort(rows, row, key=lambda other: other.arrival)
