"""Turn a plan into packed tensors: token ids, positions, KV slots, row maps.

Packed order is decodes first, then one stretch per prefill segment. On the CPU each stretch is padded
to a multiple of the tile, so that no product ever has a ragged shape and no tile mixes two segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from onebase_engine.engine.attention import AttentionStep, Context
from onebase_engine.engine.kv_cache import DUMP_BLOCK, ZERO_BLOCK
from onebase_engine.engine.product_shapes import ProductShapes
from onebase_engine.engine.row import AdapterMix, Ahead, Plan, Row, Segment
from onebase_engine.kernels.cpu import Contexts
from onebase_engine.lora.rows import TILE, RowGroup, RowMap, Stack, Term, Tile

MAX_DECODE_CONTEXT = 1 << 17
"""Tokens of context, padding included, that decodes gather at once in each layer: with one long row among
many short ones, all would be padded to its length and memory run out (Llama-3.1-8B: 4 KB a token)."""


@dataclass(frozen=True)
class Batch:
    """Tensors of one step. `logit_rows` are the packed rows whose logits are wanted."""

    input_ids: torch.Tensor
    """[1, T] int64"""
    positions: torch.Tensor
    """[1, T] int64"""
    logit_rows: torch.Tensor
    """[L] int64"""
    attention: AttentionStep
    token_map: RowMap
    logit_map: RowMap
    sampled: list[Row | Ahead]
    """Rows that get a token, and after each the same row with more and more of its draft; entry i reads
    logits i."""
    scored: list[tuple[Segment, slice]]
    """Segments whose prompt is scored, and the logits of their tokens."""


class Packer:
    """Packs plans for one device. `tiled` pads to TILE and maps rows tile by tile (the CPU).

    `products` says how long contexts may be that are computed together.
    """

    def __init__(
        self,
        block_size: int,
        slots: int,
        device: torch.device,
        *,
        tiled: bool,
        products: ProductShapes,
        row_multiple: int | None = None,
    ) -> None:
        """`row_multiple`: to pack for the kernels in C, which take rows as they are, padded to this many."""
        self._row_multiple = row_multiple
        self._block_size = block_size
        self._slots = slots
        self._device = device
        self._tiled = tiled
        self._products = products

    def pack(self, plan: Plan, slot_of: Mapping[str, int]) -> Batch:
        """`slot_of`: the slot of every adapter digest in the plan."""
        if self._row_multiple is not None:
            return self._pack_rows(plan, slot_of, self._row_multiple)
        plan = Plan(sorted(plan.decodes, key=lambda s: self._products.side(s.stop)), plan.prefills)
        starts, total = self._layout(plan)
        ids = np.zeros(total, dtype=np.int64)
        positions = np.zeros(total, dtype=np.int64)
        write = np.full(total, DUMP_BLOCK * self._block_size, dtype=np.int64)
        tables = {}
        for start, segment in zip(starts, plan.segments, strict=True):
            stop = start + segment.length
            ids[start:stop] = segment.row.tokens[segment.start : segment.stop]
            positions[start:stop] = np.arange(segment.start, segment.stop)
            tables[id(segment.row)] = table = self._slot_table(segment)
            write[start:stop] = table[segment.start :]
        attention = AttentionStep(
            write_slots=self._tensor(write),
            decodes=self._decode_contexts(plan.decodes, tables),
            prefills=[
                context
                for start, segment in zip(starts[len(plan.decodes) :], plan.prefills, strict=True)
                for context in self._prefill_contexts(start, segment, tables[id(segment.row)])
            ],
        )
        logit_rows, mixes, sampled, scored = self._logit_rows(plan, starts)
        return Batch(
            input_ids=self._tensor(ids)[None],
            positions=self._tensor(positions)[None],
            logit_rows=self._tensor(logit_rows),
            attention=attention,
            token_map=self._token_map(plan, starts, slot_of),
            logit_map=self._rows_map(mixes, 0, slot_of),
            sampled=sampled,
            scored=scored,
        )

    def _pack_rows(self, plan: Plan, slot_of: Mapping[str, int], multiple: int) -> Batch:
        """For the kernels in C: one segment after the other, decodes first."""
        segments = plan.segments
        starts = [0, *accumulate(segment.length for segment in segments)]
        total = -(-starts[-1] // multiple) * multiple
        ids = np.zeros(total, dtype=np.int64)
        positions = np.full(total, -1, dtype=np.int32)
        table_row = np.zeros(total, dtype=np.int32)
        write = np.full(total, DUMP_BLOCK * self._block_size, dtype=np.int32)
        width = max(len(segment.row.blocks) for segment in segments)
        table = np.zeros((len(segments), width), dtype=np.int32)
        for number, (start, segment) in enumerate(zip(starts, segments, strict=False)):
            some, row = slice(start, start + segment.length), segment.row
            table[number, : len(row.blocks)] = row.blocks
            ids[some] = segment.tokens
            positions[some] = own = np.arange(segment.start, segment.start + segment.length, dtype=np.int32)
            table_row[some] = number
            write[some] = table[number, own // self._block_size] * self._block_size + own % self._block_size
        logit_rows, mixes, sampled, scored = self._logit_rows(plan, starts[:-1])
        rows = [
            (segment.row.mix, range(start, start + segment.length))
            for start, segment in zip(starts, segments, strict=False)
        ]
        return Batch(
            input_ids=torch.from_numpy(ids)[None],
            positions=torch.from_numpy(np.maximum(positions, 0).astype(np.int64))[None],
            logit_rows=torch.from_numpy(logit_rows),
            attention=AttentionStep(native=Contexts(positions, table_row, write, table)),
            token_map=_grouped(rows, slot_of),
            logit_map=_grouped([(mix, (number,)) for number, mix in enumerate(mixes)], slot_of),
            sampled=sampled,
            scored=scored,
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _padded(self, length: int) -> int:
        if self._row_multiple is not None:
            return -(-length // self._row_multiple) * self._row_multiple
        return -(-length // TILE) * TILE if self._tiled else length

    def _layout(self, plan: Plan) -> tuple[list[int], int]:
        """Packed start of each segment, decodes first, and the packed length."""
        starts = list(range(len(plan.decodes)))
        total = self._padded(len(plan.decodes))
        for segment in plan.prefills:
            starts.append(total)
            total += self._padded(segment.length)
        return starts, total

    def _slot_table(self, segment: Segment) -> np.ndarray:
        """KV slot of each of the row's tokens up to the segment's end."""
        blocks = np.asarray(segment.row.blocks[: -(-segment.stop // self._block_size)], dtype=np.int64)
        slots = blocks[:, None] * self._block_size + np.arange(self._block_size)
        return slots.reshape(-1)[: segment.stop]

    def _padded_slots(self, tables: Sequence[np.ndarray], rows: int) -> np.ndarray:
        """KV slots [rows, length]; what no table fills points at zeros."""
        length = self._products.padded(max(len(table) for table in tables))
        slots = np.full((rows, length), ZERO_BLOCK, dtype=np.int64)
        for row, table in enumerate(tables):
            slots[row, : len(table)] = table
        return slots

    def _decode_contexts(self, decodes: list[Segment], tables: Mapping[int, np.ndarray]) -> list[Context]:
        contexts: list[Context] = []
        for first, last in _decode_groups([segment.stop for segment in decodes], self._products):
            some = decodes[first:last]
            rows = _decode_rows(len(some)) if self._tiled else len(some)
            slots = self._padded_slots([tables[id(segment.row)] for segment in some], rows)
            positions = np.zeros(rows, dtype=np.int64)
            positions[: len(some)] = [segment.start for segment in some]
            contexts.append(Context(first, last, self._tensor(slots), self._tensor(positions)))
        return contexts

    def _prefill_contexts(self, start: int, segment: Segment, table: np.ndarray) -> list[Context]:
        """The segment's context, cut where the order of sums changes: which part a token is in, and so
        its bits, depend on its position alone."""
        contexts = []
        for first, stop in self._products.parts(segment.start, segment.stop):
            positions = self._tensor(np.arange(first, stop, dtype=np.int64))
            slots = self._tensor(self._padded_slots([table[:stop]], 1)[0])
            offset = start - segment.start
            contexts.append(Context(offset + first, offset + stop, slots, positions))
        return contexts

    def _logit_rows(
        self, plan: Plan, starts: list[int]
    ) -> tuple[np.ndarray, list[AdapterMix], list[Row | Ahead], list[tuple[Segment, slice]]]:
        rows: list[int] = []
        mixes: list[AdapterMix] = []
        sampled: list[Row | Ahead] = []
        for start, segment in zip(starts, plan.segments, strict=True):
            if segment.samples:
                draft, last = segment.draft, start + segment.length - 1
                rows.extend(range(last - len(draft), last + 1))
                mixes.extend([segment.row.mix] * (len(draft) + 1))
                sampled.append(segment.row)
                sampled.extend(Ahead(segment.row, draft[:count]) for count in range(1, len(draft) + 1))
        scored = []
        for start, segment in zip(starts, plan.segments, strict=True):
            if segment.row.scores_prompt:
                count = min(segment.stop, segment.row.prompt_length - 1) - segment.start
                scored.append((segment, slice(len(rows), len(rows) + count)))
                rows.extend(range(start, start + count))
                mixes.extend([segment.row.mix] * count)
        padding = self._padded(max(len(rows), 1)) - len(rows)
        return np.array(rows + [0] * padding, dtype=np.int64), mixes, sampled, scored

    def _token_map(self, plan: Plan, starts: list[int], slot_of: Mapping[str, int]) -> RowMap:
        decodes = self._rows_map([segment.row.mix for segment in plan.decodes], 0, slot_of)
        tiles = list(decodes.tiles)
        for start, segment in zip(starts[len(plan.decodes) :], plan.prefills, strict=True):
            if segment.row.mix.terms:
                tiles.extend(self._segment_tiles(start, segment, slot_of))
        return RowMap(tuple(tiles), decodes.stack)

    def _segment_tiles(self, start: int, segment: Segment, slot_of: Mapping[str, int]) -> list[Tile]:
        stop = start + self._padded(segment.length)
        step = TILE if self._tiled else segment.length
        tiles = []
        for first in range(start, stop, step):
            rows = min(step, stop - first)
            terms = tuple(
                Term(slot_of[digest], weight=None if weight == 1.0 else self._column([weight] * rows))
                for digest, weight in segment.row.mix.terms
            )
            tiles.append(Tile(first, first + rows, terms))
        return tiles

    def _rows_map(self, mixes: list[AdapterMix], start: int, slot_of: Mapping[str, int]) -> RowMap:
        """Rows of unlike adapters, one after the other from packed row `start`."""
        if not any(mix.terms for mix in mixes):
            return RowMap()
        if not self._tiled:
            return RowMap(stack=self._stack(mixes, start, start + len(mixes), slot_of))
        tiles = []
        for first in range(0, len(mixes), TILE):
            some, stop = mixes[first : first + TILE], start + first + TILE
            terms = self._mixed_terms(some, slot_of)
            plain = len(terms) > 1 and all(len(mix.terms) < 2 for mix in some)
            plain = plain and all(term.weight is None for term in terms)
            stack = self._stack(some, start + first, stop, slot_of) if plain else None
            tiles.append(Tile(start + first, stop, terms, stack))
        return RowMap(tuple(tiles))

    def _stack(self, mixes: list[AdapterMix], start: int, stop: int, slot_of: Mapping[str, int]) -> Stack:
        weight = np.zeros((stop - start, self._slots), dtype=np.float32)
        for row, mix in enumerate(mixes):
            for digest, value in mix.terms:
                weight[row, slot_of[digest]] = value
        used = frozenset(slot_of[digest] for mix in mixes for digest in mix.digests)
        plain = bool(np.isin(weight, (0.0, 1.0)).all())
        return Stack(start, stop, self._tensor(weight), plain, used)

    def _mixed_terms(self, mixes: list[AdapterMix], slot_of: Mapping[str, int]) -> tuple[Term, ...]:
        """A term for each adapter in the tile, in the order of digests, which no neighbour changes."""
        columns: dict[str, list[float]] = {}
        for row, mix in enumerate(mixes):
            for digest, weight in mix.terms:
                columns.setdefault(digest, [0.0] * TILE)[row] = weight
        terms = []
        for digest in sorted(columns):
            column = self._column(columns[digest])
            plain = all(value in (0.0, 1.0) for value in columns[digest])
            terms.append(Term(slot_of[digest], mask=column != 0, weight=None if plain else column))
        return tuple(terms)

    def _column(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]


def _grouped(rows: Iterable[tuple[AdapterMix, Iterable[int]]], slot_of: Mapping[str, int]) -> RowMap:
    """The packed rows by what acts on them."""
    groups: dict[AdapterMix, list[int]] = {}
    for mix, some in rows:
        if mix.terms:
            groups.setdefault(mix, []).extend(some)
    return RowMap(
        groups=tuple(
            RowGroup(tuple(some), tuple((slot_of[digest], weight) for digest, weight in mix.terms))
            for mix, some in groups.items()
        )
    )


def _decode_rows(count: int) -> int:
    """Rows of a decode context on the CPU, with padding: few numbers, so that few kernels are compiled."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def _decode_groups(lengths: Sequence[int], products: ProductShapes) -> list[tuple[int, int]]:
    """Rows `first:last` that attend together: of one side, MAX_DECODE_CONTEXT tokens or one longer row."""
    groups: list[tuple[int, int]] = []
    first, longest = 0, 0
    for row, length in enumerate(lengths):
        too_long = max(longest, length) * (row + 1 - first) > MAX_DECODE_CONTEXT
        apart = products.side(length) != products.side(lengths[first])
        if row > first and (too_long or apart):
            groups.append((first, row))
            first, longest = row, 0
        longest = max(longest, length)
    return [*groups, (first, len(lengths))] if lengths else []
