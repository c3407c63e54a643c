"""Back-end that runs everywhere: PyTorch's own operators, in fixed shapes on the CPU.

A library chooses by a product's shape in which order it sums, and the order decides the last bits. So on the
CPU each product has one shape: linear layers TILE rows, attention ATTENTION_ROWS queries and ATTENTION_KEYS
keys, in fp32. On an accelerator they have the shape that the step has, and rows agree up to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from onebase_engine.base.experts import Int8Matrix
from onebase_engine.base.layers import plain_absmax
from onebase_engine.kernels.interface import (
    LEAST_SCALE,
    TILE,
    AttentionSettings,
    Contexts,
    Drawing,
    Draws,
    LayerCache,
    LinearKernel,
    Rotation,
    Router,
    RowGroup,
    RowMap,
    StateRuns,
)
from onebase_engine.kernels.weights import LoraWeights

ATTENTION_ROWS = 16
ATTENTION_KEYS = 128
"""Numbers of queries and keys in attention's products on the CPU."""
QUERY_CHUNK = 64
"""Number of tokens whose scores are held at once; bounds the memory of a long prefill."""
MAX_DECODE_CONTEXT = 1 << 17
"""Largest number of context tokens, padding included, that decodes gather at once in each layer. With one
long row among many short ones, all would be padded to its length and memory would run out (Llama-3.1-8B: 4 KB
a token)."""
LENGTH_MULTIPLE = 64
"""Number of tokens to a multiple of which contexts on accelerators are padded."""
AT_ONCE = 1 << 23
"""Number of outputs that PyTorch adds to or replaces at once on accelerators. DoRA holds 20 bytes for each: 5
GB for 2,048 rows of logits of 128,256 tokens."""
DRAWN_AT_ONCE = 64
"""Number of rows, drafts included, drawn at once: each takes ten times its logits in fp32."""
NUCLEUS_CANDIDATES = 1024
"""Number of the most likely tokens tried for top_p before a row's whole vocabulary is sorted."""


class ReferenceRecurrence:
    """Recurrent layers, computed token by token in shapes that do not depend on the step."""

    def convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        states: torch.Tensor,
        runs: StateRuns,
    ) -> torch.Tensor:
        before, device = weight.shape[1] - 1, x.device
        starts, read = sent(runs.starts, device).long(), sent(runs.read, device).long()
        rows = torch.cat([x, states[read].flatten(0, 1).to(x.dtype)])
        # Of each row and each tap, the place among `rows` of what it multiplies.
        row = torch.arange(len(x), device=device)
        run = (torch.bucketize(row, starts, right=True) - 1).clamp(max=len(read) - 1)
        tap = torch.arange(before, -1, -1, device=device)
        source, first = row[:, None] - tap, starts[run][:, None]
        kept = len(x) + run[:, None] * before + before + source - first
        places = torch.where(source >= first, source, kept)
        y = torch.zeros(x.shape, device=device)
        for number in range(before + 1):
            y = y + rows[places[:, number]].float() * weight[:, number].float()
        y = y if bias is None else y + bias.float()
        written = np.flatnonzero(runs.write >= 0)
        last, target = sent(runs.starts[written + 1] - 1, device).long(), sent(runs.write[written], device)
        states[target.long()] = rows[places[last, 1:]].to(states.dtype)
        return y.to(weight.dtype)

    def delta_rule(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        states: torch.Tensor,
        runs: StateRuns,
        *,
        scale: float = 1.0,
        eps: float | None = None,
    ) -> torch.Tensor:
        dtype, each = v.dtype, v.shape[1] // q.shape[1]
        q, k, v, decay, beta = (one.float() for one in (q, k, v, decay, beta))
        if eps is not None:
            q, k = (one * torch.rsqrt((one * one).sum(-1, keepdim=True) + eps) for one in (q, k))
        q, y = q * scale, torch.zeros(v.shape, device=v.device)
        kept = (decay if decay.dim() == 3 else decay[..., None]).exp()
        for rows, state, write in _runs(runs, states):
            for row in rows:
                query, key = (one[row].repeat_interleave(each, 0)[..., None] for one in (q, k))
                state = state * kept[row][..., None]
                wrong = v[row] - (state * key).sum(-2)
                state = state + key * (beta[row][:, None] * wrong)[:, None]
                y[row] = (state * query).sum(-2)
            if write >= 0:
                states[write] = state
        return y.to(dtype)

    def state_space(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        states: torch.Tensor,
        runs: StateRuns,
        *,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x, dt, a, b, c = (one.float() for one in (x, dt, a, b, c))
        y, each = torch.zeros(x.shape, device=x.device), x.shape[1] // b.shape[1]
        rates = a if a.dim() == 2 else a[:, None]
        for rows, state, write in _runs(runs, states):
            for row in rows:
                into, out = (one[row].repeat_interleave(each, 0)[:, None] for one in (b, c))
                kept = (dt[row][:, None] * rates).exp()[:, None]
                state = state * kept + (dt[row][:, None] * x[row])[..., None] * into
                y[row] = (state * out).sum(-1)
            if write >= 0:
                states[write] = state
        return y if skip is None else y + skip[:, None] * x


def _runs(runs: StateRuns, states: torch.Tensor) -> Iterator[tuple[range, torch.Tensor, int]]:
    """Yield each run's rows, the state with which it begins, and the place for the one behind it."""
    bounds = runs.starts.tolist()
    for first, stop, read, write in zip(
        bounds, bounds[1:], runs.read.tolist(), runs.write.tolist(), strict=False
    ):
        yield range(first, stop), states[read], write


class ReferenceKernels(ReferenceRecurrence):
    """Back-end of PyTorch's operators."""

    name = "torch"
    joins = False
    unfused: frozenset[str] = frozenset()
    drafts = False
    draft_cost = 0.15
    draft_rows = sys.maxsize
    compiles = False
    narrows = False
    captures = False
    step_rows = 0

    def __init__(self, *, tiled: bool = True) -> None:
        """Choose the shapes. `tiled`: fixed ones (the CPU)."""
        self.tiled = tiled
        self.row_multiple = TILE if tiled else 1

    @property
    def asynchronous(self) -> bool:
        return not self.tiled

    def linear(self, base: Any, slots: int, *, unpacked: bool = False) -> ReferenceLinear:
        return ReferenceLinear(base, tiled=self.tiled, unpacked=unpacked)

    def join(self, layers: Sequence[LinearKernel], *, gated: bool = False) -> None:
        return None

    def experts(self, module: Any, slots: int) -> None:
        return None

    def route(self, choose: Router, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return choose(x)

    def norm(self, base: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        norm: Callable[[torch.Tensor], torch.Tensor] = base
        return norm

    def attention(self, cache: LayerCache, settings: AttentionSettings) -> ReferenceAttention:
        return ReferenceAttention(cache, settings, tiled=self.tiled)

    def draw(
        self, logits: Sequence[torch.Tensor], draws: Draws, allowed: Sequence[np.ndarray | None]
    ) -> Drawing:
        """Begin a draw. Reading it waits for an accelerator once, and again if a nucleus exceeds
        NUCLEUS_CANDIDATES."""
        rows = range(len(logits))
        drawn = self._drawn(logits, draws, allowed, rows, NUCLEUS_CANDIDATES)

        def read() -> list[int | None]:
            found, failed, again = drawn.tolist()
            if wide := [row for row in rows if again[row] and not failed[row]]:
                more = self._drawn(logits, draws, allowed, wide, logits[0].shape[-1])[0]
                for row, token in zip(wide, more.tolist(), strict=True):
                    found[row] = token
            return [None if failed[row] else found[row] for row in rows]

        return read

    def _drawn(
        self,
        logits: Sequence[torch.Tensor],
        draws: Draws,
        allowed: Sequence[np.ndarray | None],
        rows: Sequence[int],
        candidates: int,
    ) -> torch.Tensor:
        """Draw tokens for `rows`: int64 [3, rows].

        These are the token, whether the row has none, and whether the draw is wrong because the
        `candidates` most likely tokens do not contain the nucleus.
        """
        found: list[torch.Tensor] = []
        for first in range(0, len(rows), DRAWN_AT_ONCE):
            some = np.array(rows[first : first + DRAWN_AT_ONCE])
            raw = torch.stack([logits[row] for row in some]).float()
            fails = ~torch.isfinite(raw.amax(dim=-1))
            masks = {place: mask for place, row in enumerate(some) if (mask := allowed[row]) is not None}
            fails |= _forbid(raw, masks)
            tokens, unsure = raw.argmax(dim=-1), torch.zeros_like(fails)
            random = np.flatnonzero(draws.temperature[some] > 0)
            if len(random):
                own = sent(random, raw.device)
                tokens[own], unsure[own] = self.take_samples(
                    _weights(raw[own], draws, some[random]), draws, some[random], candidates
                )
            found.append(torch.stack([tokens, fails, unsure]))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def take_samples(
        self, weights: torch.Tensor, draws: Draws, rows: np.ndarray, candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw by inverse CDF from `weights` [len(rows), vocab] fp32, after top_p and min_p.

        Returns tokens, int64, and whether each draw is wrong because the `candidates` most likely tokens do
        not contain the nucleus. Weights are relative to the largest, which is 1, and are summed as whole
        numbers, so that the library's order of addition, which depends on the number of rows, changes
        nothing.
        """
        nucleus, unsure = _nucleus_floor(weights, draws.top_p[rows], candidates)
        floor = torch.maximum(nucleus, sent(draws.min_p[rows, None], weights.device))
        kept = torch.where(weights >= floor, _whole(weights, weights.shape[-1]), 0)
        cumulative = kept.cumsum(dim=-1)
        target = (sent(draws.uniform[rows, None], weights.device) * cumulative[:, -1:].double()).long()
        index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
        # Rounding may put the target on the very end: the last token that was kept.
        last = kept.shape[-1] - 1 - kept.flip(-1).ne(0).to(torch.int8).argmax(dim=-1)
        return torch.minimum(index, last), unsure


# ---- linear layers -----------------------------------------------------------------------------


def parts(
    rows: RowMap, tiled: bool, width: int, device: torch.device
) -> list[tuple[torch.Tensor, int, RowGroup]]:
    """Cut the groups into parts, computed once a step.

    If `tiled`, parts have TILE rows, and the last row of a group is repeated to fill its last part. Otherwise
    they have up to AT_ONCE numbers, `width` in each row.

    Returns:
        The rows' numbers, int64 on `device`, how many of them are the group's, and the group.
    """
    most = TILE if tiled else max(AT_ONCE // width, 1)
    key = f"parts {tiled} {most}"
    if key not in rows.held:
        found: list[tuple[torch.Tensor, int, RowGroup]] = []
        for group in rows.groups:
            for first in range(0, len(group.rows), most):
                some = group.rows[first : first + most]
                missing = most - len(some) if tiled else 0
                index = torch.tensor(some + some[-1:] * missing, device=device)
                found.append((index, len(some), group))
        rows.held[key] = found
    made: list[tuple[torch.Tensor, int, RowGroup]] = rows.held[key]
    return made


def rows_among(rows: RowMap, chosen: Sequence[int]) -> RowMap:
    """Return the groups of some packed rows, numbered by their places in `chosen`."""
    if "group of row" not in rows.held:
        rows.held["group of row"] = {
            row: number for number, group in enumerate(rows.groups) for row in group.rows
        }
    group_of = rows.held["group of row"]
    places: dict[int, list[int]] = {}
    for place, row in enumerate(chosen):
        if row in group_of:
            places.setdefault(group_of[row], []).append(place)
    groups = (RowGroup(tuple(own), rows.groups[number].terms) for number, own in places.items())
    return RowMap(tuple(groups))


class ReferenceLinear:
    """One linear layer (plain, 4-bit or 8-bit), or an expert's matrix, plus the plain LoRAs in its slots."""

    captures = False
    adds = False

    def __init__(self, base: Any, *, tiled: bool, unpacked: bool = False) -> None:
        self._base = base
        self._kind = type(base).__name__
        self._quantized = self._kind in ("Linear4bit", "Linear8bitLt", "Int8Matrix")
        self._tiled = tiled
        self._absmax: torch.Tensor | None = None
        self._unpacked: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if unpacked and self._kind == "Linear4bit":
            self._unpacked = self.weight()
        self.plain: dict[int, LoraWeights] = {}
        """Plain LoRA of each slot that has one."""

    def __call__(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None) -> torch.Tensor:
        y = self._rows(x)
        self.add(x, y, rows)
        return y if onto is None else onto + y

    def exact(self, slot: int) -> bool:
        return self._tiled

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        self.plain.pop(slot, None)
        if weights is not None:
            self.plain[slot] = weights

    def add(self, x: torch.Tensor, y: torch.Tensor, rows: RowMap) -> None:
        """Add the output of the plain LoRAs for `x` [rows, in] to `y` [rows, out]."""
        if not self.plain:
            return
        for index, count, group in parts(rows, self._tiled, y.shape[1], x.device):
            delta = self._delta(x[index], group.terms) if self._acts(group) else None
            if delta is not None:
                own = y[index[:count]]
                narrows = self._quantized and not self._adds_wide(group)
                y[index[:count]] = added(own, delta[:count], quantized=narrows)

    def _acts(self, group: RowGroup) -> bool:
        return any(slot in self.plain for slot, _ in group.terms)

    def _adds_wide(self, group: RowGroup) -> bool:
        return any(self.plain[slot].adds_wide for slot, _ in group.terms if slot in self.plain)

    def _delta(self, x: torch.Tensor, terms: Sequence[tuple[int, float]]) -> torch.Tensor | None:
        """Return the sum of the LoRAs' parts, [rows, out] fp32; None if there is none."""
        total: torch.Tensor | None = None
        x = x.float()
        for slot, weight in terms:
            lora = self.plain.get(slot)
            if lora is None:
                continue
            delta = scaled(
                functional.linear(functional.linear(x, lora.a.float()), lora.b.float()), lora.scale
            )
            delta = scaled(delta, weight)
            total = delta if total is None else total + delta
        return total

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """Compute base(x) [rows, out]; with tiles, a 4-bit weight is dequantized once for all of them."""
        if not self._tiled:
            y: torch.Tensor = self._base(x)
            return y
        padded = functional.pad(x, (0, 0, 0, -len(x) % TILE))
        if self._kind == "Linear8bitLt":
            y = self._base(padded)
            return y[: len(x)]
        weight, bias = self.weight()
        tiles = [functional.linear(part, weight, bias) for part in torch.split(padded.to(weight.dtype), TILE)]
        return torch.cat(tiles)[: len(x)].to(x.dtype)

    def weight(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias in the dtype of the product, like `Linear4bit.forward` on the CPU."""
        if isinstance(self._base, Int8Matrix):
            return self._base.plain(), None
        weight, bias = self._base.weight, self._base.bias
        if not self._quantized:
            return weight, bias
        if self._unpacked is not None:
            return self._unpacked
        dtype = self._base.compute_dtype
        state = weight.quant_state
        if self._absmax is None:
            self._absmax = plain_absmax(state)
        plain = torch.ops.bitsandbytes.dequantize_4bit.default(
            weight, self._absmax, state.blocksize, state.quant_type, state.shape, dtype
        )
        return plain, None if bias is None else bias.to(dtype)


def added(y: torch.Tensor, delta: torch.Tensor, *, quantized: bool) -> torch.Tensor:
    """Return y + delta in the order of PEFT's class for the layer; [rows, out], `delta` fp32."""
    return y + delta.to(y.dtype) if quantized else (y.float() + delta).to(y.dtype)


def scaled(delta: torch.Tensor, scale: float) -> torch.Tensor:
    return delta if scale == 1.0 else delta * scale


# ---- attention ---------------------------------------------------------------------------------


def attention_weights(
    raw: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax weights of raw q.k products [..., m, length], in eager attention's order of rounding.

    Args:
        hidden: True where a query must not look.
        sinks: the sink of each query, fp32, as wide as [..., m, 1].
    """
    scores = raw * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(raw.dtype)
    with_sinks = torch.cat([scores.float(), sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.softmax(with_sinks, dim=-1)[..., :-1].to(raw.dtype)


@dataclass(frozen=True)
class _Part:
    """Packed rows that attend together: one row of each of several contexts, or many of one context."""

    rows: torch.Tensor
    """[n] int64"""
    places: np.ndarray
    """Positions of the rows, [n]: a row sees keys at positions up to its own."""
    slots: torch.Tensor
    """KV slots: [n, length], or [length] of one context; the slot of zeros after a context's end."""
    masks: dict[tuple[int | None, int | None], torch.Tensor] = field(default_factory=dict)

    def hidden(self, settings: AttentionSettings) -> torch.Tensor:
        """Return a mask [n, length], True where a query must not look; built once per step, window and
        chunk."""
        key = settings.window, settings.chunk
        if key not in self.masks:
            keys = torch.arange(self.slots.shape[-1], device=self.slots.device)
            positions = torch.from_numpy(self.places.astype(np.int64)).to(keys.device)[:, None]
            self.masks[key] = (keys > positions) | (keys < settings.first_seen(positions))
        return self.masks[key]


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize numbers [..., dim] to int8, with a scale of each [...] bf16, as `LayerCache` describes."""
    wide = x.float()
    most = wide.abs().amax(-1)
    finite = most.isfinite()
    scale = (most / 127).clamp_min(LEAST_SCALE).to(torch.bfloat16)
    numbers = torch.round(wide / scale.float().unsqueeze(-1))
    numbers = torch.where(finite.unsqueeze(-1), numbers, 0.0).to(torch.int8)
    return numbers, torch.where(finite, scale, torch.nan)


_Cached = tuple[torch.Tensor, torch.Tensor | None]
"""Keys or values [..., length, dim], and their scales [..., length] fp32, if they are int8."""


class ReferenceAttention:
    """Attention of one layer over its KV cache, like transformers' eager attention.

    Scores are in the model's dtype, the softmax is in fp32, and weights are rounded back.
    """

    def __init__(self, cache: LayerCache, settings: AttentionSettings, *, tiled: bool) -> None:
        self._keys, self._values = cache.keys, cache.values
        scales: tuple[torch.Tensor | None, torch.Tensor | None] = cache.scales or (None, None)
        self._key_scales, self._value_scales = scales
        self._block_size = cache.block_size
        self._table = cache.table
        self._settings = settings
        self._tiled = tiled

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        contexts: Contexts,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        if rotation is not None:
            raise TypeError("the reference turns no queries and keys")
        write, some = self._gathered(contexts, q.device)
        if self._settings.writes:
            _write(self._keys, self._key_scales, write, k)
            _write(self._values, self._value_scales, write, v)
        out = v.new_zeros(q.shape[1], q.shape[0], v.shape[2])
        for part in some:
            attend = self._decode if part.slots.dim() == 2 else self._prefill
            attend(q, part, out)
        return out

    def _gathered(self, contexts: Contexts, device: torch.device) -> tuple[torch.Tensor, list[_Part]]:
        """Return the slots for the step's keys, and its parts; computed once a step, for all layers of a
        table."""
        key = f"parts {self._tiled} {self._block_size} {self._table}"
        if key not in contexts.held:
            some = list(self._parts(contexts, device))
            write = contexts.write[self._table].astype(np.int64)
            contexts.held[key] = torch.from_numpy(write).to(device), some
        made: tuple[torch.Tensor, list[_Part]] = contexts.held[key]
        return made

    def _parts(self, contexts: Contexts, device: torch.device) -> Iterator[_Part]:
        real, table = np.flatnonzero(contexts.position >= 0), contexts.tables[self._table]
        owners, counts = np.unique(contexts.table_row[real], return_counts=True)
        last = np.zeros(len(table), dtype=np.int64)
        np.maximum.at(last, contexts.table_row[real], contexts.position[real])
        alone = real[np.isin(contexts.table_row[real], owners[counts == 1])]
        for first, stop in _decode_groups((contexts.position[alone] + 1).tolist()):
            rows = alone[first:stop]
            owner = contexts.table_row[rows]
            yield self._part(contexts, rows, self._slots(table[owner], last[owner]), device)
        for owner in owners[counts > 1]:
            rows = real[contexts.table_row[real] == owner]
            slots = self._slots(table[owner : owner + 1], last[owner : owner + 1])[0]
            yield self._part(contexts, rows, slots, device)

    def _part(self, contexts: Contexts, rows: np.ndarray, slots: np.ndarray, device: torch.device) -> _Part:
        own, where = (torch.from_numpy(array).to(device) for array in (rows, slots))
        return _Part(own, contexts.position[rows], where)

    def _slots(self, table: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Return slots [rows, length] of blocks [rows, blocks]; slot 0, whose key is zero, after position
        `last`."""
        multiple = ATTENTION_KEYS if self._tiled else LENGTH_MULTIPLE
        place = np.arange(-(-(int(last.max()) + 1) // multiple) * multiple)
        block = np.minimum(place // self._block_size, table.shape[1] - 1)
        slots = table[:, block].astype(np.int64) * self._block_size + place % self._block_size
        return np.where(place <= last[:, None], slots, 0)

    def _decode(self, q: torch.Tensor, part: _Part, out: torch.Tensor) -> None:
        rows, kv_heads = len(part.slots), self._keys.shape[0]
        k, v = self._read(part.slots, q.dtype)
        own = q[:, part.rows].reshape(kv_heads, -1, rows, q.shape[-1]).transpose(1, 2)
        sinks = self._sinks(1)
        mixed = self._attend(
            own, k, v, part.hidden(self._settings)[:, None], None if sinks is None else sinks[:, None]
        )
        out[part.rows] = mixed.permute(1, 0, 2, 3).reshape(rows, q.shape[0], -1)

    def _prefill(self, q: torch.Tensor, part: _Part, out: torch.Tensor) -> None:
        kv_heads = self._keys.shape[0]
        k, v = self._read(part.slots, q.dtype)
        hidden = part.hidden(self._settings)
        groups = q.shape[0] // kv_heads
        for start in range(0, len(part.places), QUERY_CHUNK):
            rows = part.rows[start : start + QUERY_CHUNK]
            count, stop = len(rows), start + len(rows)
            # A whole number of blocks, and none that all of the chunk's rows hide.
            length = -(-(int(part.places[stop - 1]) + 1) // ATTENTION_KEYS) * ATTENTION_KEYS
            length = min(length, len(part.slots))
            own = q[:, rows].reshape(kv_heads, groups * count, q.shape[-1])
            mask = hidden[start:stop, :length].repeat(groups, 1)
            mixed = self._attend(own, _first(k, length), _first(v, length), mask, self._sinks(count))
            out[rows] = mixed.reshape(q.shape[0], count, -1).transpose(0, 1)

    def _sinks(self, rows: int) -> torch.Tensor | None:
        """Return the sinks of the queries of so many rows, head by head, [kv_heads, queries, 1]."""
        sinks = self._settings.sinks
        return None if sinks is None else sinks.repeat_interleave(rows).view(len(self._keys), -1, 1)

    def _read(self, slots: torch.Tensor, dtype: torch.dtype) -> tuple[_Cached, _Cached]:
        """Read keys and values of slots [..., length].

        Tiles are multiplied in fp32, and by the scales afterwards; others in `dtype`, in which a sum of int8s
        might overflow.
        """
        k, v = _read(self._keys, self._key_scales, slots), _read(self._values, self._value_scales, slots)
        if self._tiled:
            return (k[0].float(), k[1]), (v[0].float(), v[1])
        return _plain(k, dtype), _plain(v, dtype)

    def _attend(
        self,
        q: torch.Tensor,
        keys: _Cached,
        values: _Cached,
        hidden: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend: q [..., m, d], `hidden` as wide as [..., m, length], `sinks` [..., m, 1] -> [..., m, d of
        v]."""
        (k, key_scales), (v, value_scales) = keys, values
        scoring = self._settings.scaling, self._settings.softcap, sinks
        if not self._tiled:
            return torch.matmul(attention_weights(torch.matmul(q, k.transpose(-1, -2)), hidden, *scoring), v)
        count, dtype = q.shape[-2], q.dtype
        padding = -count % ATTENTION_ROWS
        tiles = _tiles(functional.pad(q.float(), (0, 0, 0, padding)))
        key_parts, value_parts = (torch.split(one, ATTENTION_KEYS, dim=-2) for one in (k, v))
        raw = torch.cat([torch.matmul(tiles, some.mT.unsqueeze(-3)) for some in key_parts], dim=-1)
        raw = _times(raw.flatten(-3, -2)[..., :count, :], key_scales).to(dtype)
        weights = _times(attention_weights(raw, hidden, *scoring), value_scales).float()
        weights = _tiles(functional.pad(weights, (0, 0, 0, padding)))
        mixed: torch.Tensor | None = None
        for piece, some in zip(torch.split(weights, ATTENTION_KEYS, dim=-1), value_parts, strict=True):
            product = torch.matmul(piece, some.unsqueeze(-3))
            mixed = product if mixed is None else mixed + product
        if mixed is None:
            raise ValueError("attention over no keys")
        return mixed.flatten(-3, -2)[..., :count, :].to(dtype)


def _write(cache: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, new: torch.Tensor) -> None:
    """Write keys or values [kv_heads, rows, dim] to their slots [rows]."""
    if scales is not None:
        new, own = quantized(new)
        scales.index_copy_(1, slots, own)
    cache.index_copy_(1, slots, new)


def _read(cache: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor) -> _Cached:
    """Read keys or values of slots [..., length]."""
    flat = slots.reshape(-1)
    found = cache.index_select(1, flat).view(len(cache), *slots.shape, -1)
    if scales is None:
        return found, None
    return found, scales.index_select(1, flat).view(len(scales), *slots.shape).float()


def _plain(cached: _Cached, dtype: torch.dtype) -> _Cached:
    numbers, scales = cached
    return (numbers if scales is None else numbers * scales.unsqueeze(-1)).to(dtype), None


def _first(cached: _Cached, length: int) -> _Cached:
    """Return the first `length` tokens of one context, with their scales."""
    numbers, scales = cached
    return numbers[:, :length], None if scales is None else scales[:, :length]


def _times(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Return x [..., m, length] with each column multiplied by its scale, in the dtype of x."""
    return x if scales is None else (x.float() * scales.unsqueeze(-2)).to(x.dtype)


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """Reshape [..., tiles * ATTENTION_ROWS, n] to [..., tiles, ATTENTION_ROWS, n]."""
    return x.reshape(*x.shape[:-2], -1, ATTENTION_ROWS, x.shape[-1])


def _decode_groups(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return ranges `first:last` of rows that attend together: MAX_DECODE_CONTEXT tokens or a longer row."""
    groups: list[tuple[int, int]] = []
    first, longest = 0, 0
    for row, length in enumerate(lengths):
        if row > first and max(longest, length) * (row + 1 - first) > MAX_DECODE_CONTEXT:
            groups.append((first, row))
            first, longest = row, 0
        longest = max(longest, length)
    return [*groups, (first, len(lengths))] if lengths else []


# ---- draws -------------------------------------------------------------------------------------


def sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return a tensor on the device, without waiting for the copy."""
    here = torch.from_numpy(array)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)


def _forbid(logits: torch.Tensor, masks: dict[int, np.ndarray]) -> torch.Tensor:
    """Remove the tokens that masks do not allow from these rows of `logits` [rows, vocab] fp32.

    Returns [rows] bool: True if the row's mask allows nothing.
    """
    fails = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if not masks:
        return fails
    words = np.stack(list(masks.values()))
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=logits.shape[1])
    allowed, rows = sent(bits, logits.device).bool(), sent(np.array(list(masks)), logits.device)
    made = logits[rows].masked_fill_(~allowed, -torch.inf)
    nothing = made.amax(-1, keepdim=True) == -torch.inf
    logits[rows] = made.masked_fill_(allowed & nothing, 0)
    fails[rows] = ~allowed.any(-1)
    return fails


def _weights(logits: torch.Tensor, draws: Draws, rows: np.ndarray) -> torch.Tensor:
    """Return the weights of the tokens of `logits` [len(rows), vocab] fp32, after top_k: the largest is 1."""
    # Relative to the highest logit, so that no temperature, however low, overflows.
    temperature = sent(draws.temperature[rows, None], logits.device)
    relative = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return _kept_by_top_k(relative, draws.top_k[rows]).exp()


def whole_factor(vocabulary: int) -> float:
    """Return the factor that makes whole numbers of weights from 0 to 1: a vocabulary's sum is below 2^63.

    A 2^43rd of the largest is still one, with 262,144 tokens.
    """
    return 2.0 ** (62 - vocabulary.bit_length())


def _whole(weights: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return (weights * whole_factor(vocabulary)).long()


def _kept_by_top_k(logits: torch.Tensor, ks: np.ndarray) -> torch.Tensor:
    vocabulary = logits.shape[-1]
    limited = np.flatnonzero(ks > 0)
    if not len(limited):
        return logits
    own, last = sent(limited, logits.device), sent(np.minimum(ks[limited], vocabulary) - 1, logits.device)
    best = logits[own].topk(min(int(ks.max()), vocabulary), dim=-1).values
    floor = logits.new_full((len(ks), 1), -torch.inf)
    floor[own] = best.gather(1, last[:, None])
    return logits.masked_fill(logits < floor, -torch.inf)


def _nucleus_floor(
    weights: torch.Tensor, ps: np.ndarray, candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest weight inside each row's nucleus, [rows, 1], or 0 where top_p is off.

    Also returns [rows], whether that weight is not among the `candidates` largest.
    """
    floor = weights.new_zeros(len(ps), 1)
    unsure = torch.zeros(len(ps), dtype=torch.bool, device=weights.device)
    limited = np.flatnonzero(ps < 1.0)
    if not len(limited):
        return floor, unsure
    own, part = (sent(array, weights.device) for array in (limited, ps[limited, None]))
    some, vocabulary = weights[own], weights.shape[-1]
    count = min(candidates, vocabulary)
    values = some.topk(count, dim=-1).values
    cumulative = _whole(values, vocabulary).cumsum(dim=-1).double()
    wanted = part.double() * _whole(some, vocabulary).sum(-1, keepdim=True).double()
    inside = (cumulative < wanted).sum(-1, keepdim=True)
    floor[own] = values.gather(1, inside.clamp_(max=count - 1))
    if count < vocabulary:
        unsure[own] = cumulative[:, -1] < wanted[:, 0]
    return floor, unsure
