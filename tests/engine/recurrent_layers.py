"""Recurrent layers for the tests of kernels: their inputs, runs of several sequences, and results in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from onebase_engine.engine.recurrence import Recurrence
from onebase_engine.kernels.interface import RecurrentKernels, StateRuns
from onebase_engine.kernels.reference import ReferenceRecurrence

EPS = 1e-6
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def runs_of(lengths: Sequence[int], read: Sequence[int], write: Sequence[int]) -> StateRuns:
    starts = np.cumsum([0, *lengths])
    return StateRuns(*(np.array(one, dtype=np.int32) for one in (starts, read, write)))


class Layer:
    """A recurrent layer with the inputs of so many rows."""

    rows: tuple[torch.Tensor, ...]
    """Inputs, [T, ...] each; `take` chooses some of their rows."""
    state: tuple[int, ...]
    dtype = torch.float32
    """Dtype of its states."""

    def compute(
        self, kernels: RecurrentKernels, rows: Sequence[torch.Tensor], states: torch.Tensor, runs: StateRuns
    ) -> torch.Tensor:
        raise NotImplementedError

    def token(self, rows: Sequence[torch.Tensor], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute one row in fp64: its output, and the state behind it."""
        raise NotImplementedError

    def take(self, chosen: Sequence[int]) -> list[torch.Tensor]:
        """Return rows of the inputs, as views of wider ones where these were views."""
        return [one[list(chosen)] for one in self.rows]

    def exact(self, rows: Sequence[int], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute some rows in fp64, one after the other, from a state."""
        outputs, state = [], state.double()
        for row in rows:
            y, state = self.token([one[row].double() for one in self.rows], state)
            outputs.append(y)
        return torch.stack(outputs), state


class Draw:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(*shape, generator=self._generator).to(dtype)


class Convolution(Layer):
    def __init__(
        self, rows: int, channels: int, taps: int, *, bias: bool, dtype: torch.dtype, weight: torch.dtype,
        seed: int = 0,
    ) -> None:  # fmt: skip
        draw = Draw(seed)
        self.rows = (draw.normal(rows, channels, dtype=dtype),)
        self.weight = draw.normal(channels, taps, dtype=weight)
        self.bias = draw.normal(channels, dtype=weight) if bias else None
        self.state, self.dtype = (taps - 1, channels), dtype

    def compute(self, kernels: Any, rows: Any, states: torch.Tensor, runs: StateRuns) -> torch.Tensor:
        # As a part of a wider projection is.
        (x,) = rows
        wide = torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]]
        return kernels.convolve(wide, self.weight, self.bias, states, runs)  # type: ignore[no-any-return]

    def token(self, rows: Any, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.cat([state, rows[0][None]])
        y = (seen * self.weight.double().T).sum(0)
        return y if self.bias is None else y + self.bias.double(), seen[1:]


class DeltaRule(Layer):
    def __init__(
        self, rows: int, heads: tuple[int, int], dims: tuple[int, int], *, by_key: bool, normalized: bool,
        dtype: torch.dtype, seed: int = 0,
    ) -> None:  # fmt: skip
        draw, (key_heads, each), (key_dim, value_dim) = Draw(seed), heads, dims
        size, heads_ = (key_dim,) if by_key else (), key_heads * each
        q, k = (draw.normal(rows, key_heads, key_dim, dtype=dtype) for _ in range(2))
        if not normalized:
            k = (k.float() / k.float().norm(dim=-1, keepdim=True)).to(dtype)
        self.rows = (
            q, k, draw.normal(rows, heads_, value_dim, dtype=dtype), -draw.uniform(rows, heads_, *size) * 2,
            draw.uniform(rows, heads_, dtype=dtype),
        )  # fmt: skip
        self.options: dict[str, Any] = {"scale": key_dim**-0.5, "eps": EPS if normalized else None}
        self.each, self.state = each, (heads_, key_dim, value_dim)

    def compute(self, kernels: Any, rows: Any, states: torch.Tensor, runs: StateRuns) -> torch.Tensor:
        return kernels.delta_rule(*rows, states, runs, **self.options)  # type: ignore[no-any-return]

    def token(self, rows: Any, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, decay, beta = rows
        if self.options["eps"] is not None:
            q, k = (one / ((one * one).sum(-1, keepdim=True) + EPS).sqrt() for one in (q, k))
        q, k = (one.repeat_interleave(self.each, 0) for one in (q * self.options["scale"], k))
        state = state * (decay if decay.dim() == 2 else decay[:, None]).exp()[..., None]
        change = beta[:, None] * (v - torch.einsum("hk,hkv->hv", k, state))
        state = state + torch.einsum("hk,hv->hkv", k, change)
        return torch.einsum("hk,hkv->hv", q, state), state


class StateSpace(Layer):
    def __init__(
        self, rows: int, heads: tuple[int, int], dim: int, size: int, *, by_size: bool, skip: bool,
        dtype: torch.dtype, seed: int = 0,
    ) -> None:  # fmt: skip
        draw, (groups, each) = Draw(seed), heads
        count = groups * each
        self.rows = (
            draw.normal(rows, count, dim, dtype=dtype), draw.uniform(rows, count),
            *(draw.normal(rows, groups, size, dtype=dtype) for _ in range(2)),
        )  # fmt: skip
        self.a = -draw.uniform(count, *((size,) if by_size else ())) * 4
        self.skip = draw.normal(count) if skip else None
        self.each, self.state = each, (count, dim, size)

    def compute(self, kernels: Any, rows: Any, states: torch.Tensor, runs: StateRuns) -> torch.Tensor:
        x, dt, b, c = rows
        return kernels.state_space(x, dt, self.a, b, c, states, runs, skip=self.skip)  # type: ignore[no-any-return]

    def token(self, rows: Any, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, dt, b, c = rows
        b, c = (one.repeat_interleave(self.each, 0) for one in (b, c))
        rates = self.a.double() if self.a.dim() == 2 else self.a.double()[:, None]
        into = torch.einsum("h,hd,hs->hds", dt, x, b)
        state = state * (dt[:, None] * rates).exp()[:, None] + into
        y = torch.einsum("hds,hs->hd", state, c)
        return y if self.skip is None else y + self.skip.double()[:, None] * x, state


@st.composite
def layers(draw: Any, rows: int = 40, *, small: bool = False) -> Layer:
    """Draw a layer of any kind; `small`: not of the sizes that models have."""
    sizes = st.sampled_from([1, 3, 16, 24] if small else [1, 5, 16, 33, 64, 128])
    heads = st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 4)])
    kind, dtype, flags = draw(st.integers(0, 2)), draw(DTYPES), draw(st.tuples(st.booleans(), st.booleans()))
    options: dict[str, Any] = {"dtype": dtype, "seed": draw(st.integers(0, 9))}
    if kind == 0:
        channels = draw(st.sampled_from([1, 24, 40] if small else [1, 24, 256, 600]))
        taps = draw(st.integers(1, 5))
        return Convolution(rows, channels, taps, bias=flags[0], weight=draw(DTYPES), **options)
    if kind == 1:
        dims = draw(sizes), draw(sizes)
        return DeltaRule(rows, draw(heads), dims, by_key=flags[0], normalized=flags[1], **options)
    return StateSpace(rows, draw(heads), draw(sizes), draw(sizes), by_size=flags[0], skip=flags[1], **options)


@dataclass(frozen=True)
class Step:
    """Sequences that run side by side, and the rows of padding behind them."""

    lengths: list[int]
    reads: list[bool]
    """Whether each continues a state, or begins with that of place 0."""
    writes: list[bool]
    padding: int

    def runs(self) -> StateRuns:
        count = len(self.lengths)
        read = [1 + i if reads else 0 for i, reads in enumerate(self.reads)]
        write = [1 + count + i if writes else -1 for i, writes in enumerate(self.writes)]
        return runs_of(self.lengths, read, write)


@st.composite
def steps(draw: Any) -> Step:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    flags = st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))
    return Step(lengths, draw(flags), draw(flags), draw(st.integers(0, 2)))


def states_of(layer: Layer, places: int) -> torch.Tensor:
    """States in places, of which the first is zeros."""
    states = Draw(99).normal(places, *layer.state, dtype=layer.dtype)
    states[0] = 0
    return states


def agrees(kernels: RecurrentKernels, layer: Layer, step: Step) -> None:
    """Compare a step with the reference's and with fp64: outputs and states, and that no other place is
    written."""
    used, runs = sum(step.lengths), step.runs()
    rows = layer.take(range(used + step.padding))
    before = states_of(layer, 1 + 2 * len(step.lengths))
    states, others = before.clone(), before.clone()
    y = layer.compute(kernels, rows, states, runs)
    expected = layer.compute(ReferenceRecurrence(), rows, others, runs)
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    assert torch.isfinite(y).all()
    fine = y.dtype == torch.float32
    close: dict[str, float] = {"rtol": 1e-4 if fine else 2.0**-7, "atol": 1e-3 if fine else 0.02}
    torch.testing.assert_close(y[:used], expected[:used], **close)
    torch.testing.assert_close(states, others, rtol=1e-4, atol=1e-3)
    for number, (first, stop) in enumerate(pairwise(runs.starts.tolist())):
        exact, behind = layer.exact(range(first, stop), before[runs.read[number]])
        torch.testing.assert_close(y[first:stop].double(), exact, **close)
        if runs.write[number] >= 0:
            torch.testing.assert_close(states[runs.write[number]].double(), behind, rtol=1e-4, atol=1e-3)
    untouched = [place for place in range(len(states)) if place not in runs.write]
    assert torch.equal(states[untouched], before[untouched])


def in_pieces(
    kernels: RecurrentKernels, layer: Layer, texts: Sequence[Sequence[int]], ends: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Compute sequences side by side, all up to the first of `ends`, then to the next: of each, its outputs
    and its last state. A sequence's state alternates between two places."""
    states = states_of(layer, 1 + 2 * len(texts))
    got: list[list[torch.Tensor]] = [[] for _ in texts]
    place = [0] * len(texts)
    for start, stop in pairwise([0, *ends]):
        active = [i for i, text in enumerate(texts) if start < len(text)]
        chosen = [text[start:stop] for i, text in enumerate(texts) if i in active]
        write = [2 * i + (1 if place[i] != 2 * i + 1 else 2) for i in active]
        runs = runs_of([len(one) for one in chosen], [place[i] for i in active], write)
        y = layer.compute(kernels, layer.take([row for one in chosen for row in one]), states, runs)
        for i, part, new in zip(active, y.split([len(one) for one in chosen]), write, strict=True):
            got[i].append(part)
            place[i] = new
    return [(torch.cat(parts), states[new]) for parts, new in zip(got, place, strict=True)]


def is_rewound(kernels: RecurrentKernels, layer: Layer, step: Step, wrong: Sequence[int]) -> bool:
    """Return True if a step of drafts leaves the same states as one of the right rows alone.

    `wrong`: number of wrong rows at each run's end, up to all but one of its rows.
    """
    runs, used, recurrence = step.runs(), sum(step.lengths), Recurrence(kernels)
    right = [max(length - one, 1) for length, one in zip(step.lengths, wrong, strict=False)]
    rows = [
        list(range(start, start + count)) for start, count in zip(runs.starts.tolist(), right, strict=False)
    ]
    states = states_of(layer, 1 + 2 * len(step.lengths))
    expected = states.clone()
    everything = runs_of(right, runs.read.tolist(), runs.write.tolist())
    layer.compute(kernels, layer.take([row for one in rows for row in one]), expected, everything)
    recurrence.begin_pass(replace(runs, drafted=used))
    recurrence._compute(
        layer.take(range(used + step.padding)),
        lambda inputs, again: layer.compute(kernels, inputs, states, again),
    )
    again = [number for number, length in enumerate(step.lengths) if right[number] < length]
    recurrence.rewind(
        torch.tensor([row for number in again for row in rows[number]], dtype=torch.int64),
        runs_of([right[number] for number in again], runs.read[again].tolist(), runs.write[again].tolist()),
    )
    return torch.equal(states, expected) and not recurrence._kept


@st.composite
def cuts(draw: Any, most: int = 12) -> tuple[list[list[int]], list[int]]:
    """Draw sequences of rows, and where they are cut."""
    lengths = draw(st.lists(st.integers(1, most), min_size=1, max_size=3))
    bounds = np.cumsum([0, *lengths]).tolist()
    texts = [list(range(first, stop)) for first, stop in pairwise(bounds)]
    ends = draw(st.sets(st.integers(1, max(lengths)), max_size=4))
    return texts, sorted({*ends, max(lengths)})
