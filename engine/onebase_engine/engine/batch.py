"""Turn a plan into packed arrays: token ids, positions, KV slots, and the adapters of each packed row.

Packed order is decodes first, then one stretch per prefill segment, then padding.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from onebase_engine.engine.kv_cache import DUMP_BLOCK, BlockGroup
from onebase_engine.engine.sequence import AdapterMix, DraftedSequence, Segment, SequenceState, StepPlan
from onebase_engine.kernels.interface import Contexts, RowGroup, RowMap, StateRuns


@dataclass(frozen=True)
class StepBatch:
    """Packed arrays of one step. `logit_rows` are the packed rows whose logits are needed."""

    input_ids: np.ndarray
    """[T] int64"""
    positions: np.ndarray
    """[T] int64"""
    logit_rows: np.ndarray
    """[L] int64"""
    contexts: Contexts
    token_map: RowMap
    logit_map: RowMap
    sampled: list[SequenceState | DraftedSequence]
    """Sequences that get a token, each followed by itself with more and more of its draft; entry i reads
    logits i."""
    scored: list[tuple[Segment, slice]]
    """Segments whose prompt is scored, and the logits of their tokens."""
    hidden_rows: np.ndarray
    """Packed rows whose hidden states are needed, [H] int64."""
    pooled: list[tuple[Segment, slice]]
    """Segments that are pooled, and the hidden states of their tokens."""


class Packer:
    """Packs plans, with rows padded to a multiple of `row_multiple`."""

    def __init__(
        self, block_size: int, row_multiple: int, groups: Sequence[BlockGroup], *, recurrent: bool = False
    ) -> None:
        """Set the sizes. `groups`: of layers, with a table each; `recurrent`: the base keeps states."""
        self._block_size = block_size
        self._strides = np.array([group.stride for group in groups], dtype=np.int32)
        self._multiple = row_multiple
        self._recurrent = recurrent
        self._last: tuple[StepBatch, list[list[array[int]]]] | None = None
        """Newest batch, and the blocks of its segments' sequences by then."""

    @staticmethod
    def fill(batch: StepBatch, plan: StepPlan) -> None:
        """Fill in the last tokens of decoding sequences, which were being drawn when the plan was packed."""
        batch.input_ids[: len(plan.decodes)] = [one.sequence.tokens[one.start] for one in plan.decodes]

    def pack(self, plan: StepPlan, slot_of: Mapping[str, int]) -> StepBatch:
        """Pack a plan. `slot_of`: the slot of every adapter digest in the plan."""
        segments = plan.segments
        lengths = [segment.length for segment in segments]
        starts = [0, *accumulate(lengths)]
        count, total = starts[-1], self._padded(starts[-1])
        ids = np.zeros(total, dtype=np.int64)
        ids[:count] = [token for segment in segments for token in segment.tokens]
        table_row = np.zeros(total, dtype=np.int32)
        table_row[:count] = np.repeat(np.arange(len(segments), dtype=np.int32), lengths)
        behind = [segment.start - start for start, segment in zip(starts, segments, strict=False)]
        positions = np.full(total, -1, dtype=np.int32)
        positions[:count] = token_positions = np.arange(count, dtype=np.int32) + np.repeat(behind, lengths)
        tables = self._tables(segments)
        write = np.empty((len(tables), total), dtype=np.int32)
        write[:, count:] = DUMP_BLOCK * self._strides[:, None] * self._block_size
        block, place = np.divmod(token_positions, self._block_size)
        write[:, :count] = tables[:, table_row[:count], block] * self._block_size + place
        logit_rows, mixes, sampled, scored = self._logit_rows(plan, starts[:-1])
        hidden_rows, pooled = _hidden_rows(segments, starts)
        blocks = [[one[:] for one in segment.sequence.blocks] for segment in segments]
        rows = [
            (segment.sequence.mix, range(start + _bare_tokens(segment), start + segment.length))
            for start, segment in zip(starts, segments, strict=False)
        ]
        batch = StepBatch(
            input_ids=ids,
            positions=np.maximum(positions, 0).astype(np.int64),
            logit_rows=logit_rows,
            contexts=Contexts(positions, table_row, write, tables, runs=self._runs(segments, starts)),
            token_map=_grouped(rows, slot_of),
            logit_map=_grouped([(mix, (number,)) for number, mix in enumerate(mixes)], slot_of),
            sampled=sampled,
            scored=scored,
            hidden_rows=np.array(hidden_rows, dtype=np.int64),
            pooled=pooled,
        )
        self._last = batch, blocks
        return batch

    def advance(self, plan: StepPlan) -> StepBatch | None:
        """Return the newest batch, whose step has ended, as that of the plan; None if `pack` has to make one.

        It becomes so in place where each of its rows goes on by one token within its block, which is most
        steps of a few sequences: no array is made, nor what a back-end holds of it.
        """
        if self._last is None or plan.prefills or self._recurrent:
            return None
        batch, known = self._last
        if batch.scored:  # its logits are read in another way than those of a step that only draws
            return None
        rows = len(batch.input_ids)
        if not len(plan.decodes) == len(batch.sampled) == len(batch.logit_rows) == len(known) == rows:
            return None
        tokens = []
        for segment, before, position, blocks in zip(
            plan.decodes, batch.sampled, batch.positions.tolist(), known, strict=True
        ):
            sequence, start = segment.sequence, segment.start
            goes_on = sequence is before and start == position + 1 and start % self._block_size
            if not goes_on or segment.length != 1 or not segment.samples or sequence.scores_prompt:
                return None
            if sequence.acts_from > position or sequence.blocks != blocks:
                return None
            tokens.append(sequence.tokens[start])
        batch.input_ids[:] = tokens
        batch.positions[:] += 1
        batch.contexts.advance()
        return batch

    def forget(self) -> None:
        """Forget the newest batch, since slots have other adapters now."""
        self._last = None

    def _tables(self, segments: Sequence[Segment]) -> np.ndarray:
        """Return the blocks of each group of layers, [groups, segments, blocks], times its stride."""
        width = max(len(blocks) for segment in segments for blocks in segment.sequence.blocks)
        tables = np.zeros((len(self._strides), len(segments), width), dtype=np.int32)
        for number, segment in enumerate(segments):
            for table, blocks in zip(tables, segment.sequence.blocks, strict=True):
                table[number, : len(blocks)] = blocks
        if (self._strides > 1).any():
            tables *= self._strides[:, None, None]
        return tables

    def _runs(self, segments: Sequence[Segment], starts: Sequence[int]) -> StateRuns | None:
        if not self._recurrent:
            return None
        drafted = max(
            (stop for segment, stop in zip(segments, starts[1:], strict=True) if segment.draft), default=0
        )
        return _state_runs([segment.sequence.states for segment in segments], starts, drafted)

    def rewound(self, plan: StepPlan, right: Mapping[SequenceState, int]) -> tuple[np.ndarray, StateRuns]:
        """Return the runs that leave the recurrent states of a step whose drafts are partly right.

        Runs end behind the last right token of each draft that is wrong somewhere, and at ends of blocks that
        right tokens went past. `right`: number of right tokens of each sequence's draft.

        Returns:
            packed rows of the step, int64, and the runs over these rows
        """
        rows: list[int] = []
        bounds, places = [0], list[tuple[int, int]]()
        starts = accumulate((segment.length for segment in plan.decodes), initial=0)
        for first, segment in zip(starts, plan.decodes, strict=False):
            before, now = segment.sequence.states
            count = segment.length - len(segment.draft) + right.get(segment.sequence, 0)
            to_end = (segment.start + count) // self._block_size * self._block_size - segment.start
            runs = [(to_end, segment.end_place)] if segment.end_place >= 0 and 0 < to_end < count else []
            runs += [(count, now)] if count < segment.length else []
            for length, place in runs:
                rows.extend(range(first, first + length))
                bounds.append(len(rows))
                places.append((before, place))
        return np.array(rows, dtype=np.int64), _state_runs(places, bounds)

    def _padded(self, length: int) -> int:
        return -(-length // self._multiple) * self._multiple

    def _logit_rows(
        self, plan: StepPlan, starts: list[int]
    ) -> tuple[
        np.ndarray, list[AdapterMix], list[SequenceState | DraftedSequence], list[tuple[Segment, slice]]
    ]:
        rows: list[int] = []
        mixes: list[AdapterMix] = []
        sampled: list[SequenceState | DraftedSequence] = []
        for start, segment in zip(starts, plan.segments, strict=True):
            if segment.samples:
                draft, last = segment.draft, start + segment.length - 1
                rows.extend(range(last - len(draft), last + 1))
                mixes.extend([segment.sequence.mix] * (len(draft) + 1))
                sampled.append(segment.sequence)
                sampled.extend(
                    DraftedSequence(segment.sequence, draft[:count]) for count in range(1, len(draft) + 1)
                )
        scored = []
        for start, segment in zip(starts, plan.segments, strict=True):
            if segment.sequence.scores_prompt:
                scored_tokens = segment.scored
                scored.append((segment, slice(len(rows), len(rows) + len(scored_tokens))))
                rows.extend(start + number - segment.start for number in scored_tokens)
                bare, own = AdapterMix(), segment.sequence.mix
                mixes.extend(bare if number < segment.sequence.acts_from else own for number in scored_tokens)
        padding = self._padded(max(len(rows), 1)) - len(rows)
        return np.array(rows + [0] * padding, dtype=np.int64), mixes, sampled, scored


def _bare_tokens(segment: Segment) -> int:
    """Return the number of the segment's leading tokens on which its adapters do not act."""
    return min(max(segment.sequence.acts_from - segment.start, 0), segment.length)


def _state_runs(places: Sequence[tuple[int, int]], starts: Sequence[int], drafted: int = 0) -> StateRuns:
    read, write = np.array(places, dtype=np.int32).reshape(-1, 2).T.copy()
    return StateRuns(np.array(starts, dtype=np.int32), read, write, drafted=drafted)


def _hidden_rows(
    segments: Sequence[Segment], starts: Sequence[int]
) -> tuple[list[int], list[tuple[Segment, slice]]]:
    rows: list[int] = []
    pooled = []
    for start, segment in zip(starts, segments, strict=False):
        if pooled_tokens := segment.pooled:
            pooled.append((segment, slice(len(rows), len(rows) + len(pooled_tokens))))
            rows.extend(start + number - segment.start for number in pooled_tokens)
    return rows, pooled


def _grouped(rows: Iterable[tuple[AdapterMix, Sequence[int]]], slot_of: Mapping[str, int]) -> RowMap:
    """Group the packed rows by the adapters that act on them."""
    groups: dict[AdapterMix, list[int]] = {}
    for mix, numbers in rows:
        if mix.terms and numbers:
            groups.setdefault(mix, []).extend(numbers)
    return RowMap(
        groups=tuple(
            RowGroup(tuple(numbers), tuple((slot_of[digest], weight) for digest, weight in mix.terms))
            for mix, numbers in groups.items()
        )
    )
