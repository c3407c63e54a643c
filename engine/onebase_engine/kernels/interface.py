"""Interface between the engine and its back-ends, of which there is one for each kind of machine.

On the CPU a row's bits depend on nothing but the row, whatever the back-end: not on its neighbours, on where
its prompt was cut, or on what else lies in the slots. `reference` is plain PyTorch and runs everywhere; the
others are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from onebase_engine.kernels.weights import ExpertLora, LoraWeights

Positions = TypeVar("Positions", int, np.ndarray, torch.Tensor)

TILE = 32
"""Number of rows in every product of the reference on the CPU. oneDNN's bf16 kernels agree for any count up
to 32 (not from 33), MKL's fp32 kernels only for equal counts."""


@dataclass(frozen=True)
class RowGroup:
    """Packed rows, adjacent or not, that have the same slots and weights."""

    rows: tuple[int, ...]
    terms: tuple[tuple[int, float], ...]
    """Pairs of slot and weight, at least one, in the order of summation."""


@dataclass(frozen=True)
class RowMap:
    """Slots that act on the packed rows of one forward pass, by groups of rows. No row is in two groups."""

    groups: tuple[RowGroup, ...] = ()
    held: dict[str, Any] = field(default_factory=dict, compare=False)
    """Cache of the same data in a back-end's own form."""


@dataclass(frozen=True)
class StateRuns:
    """Runs of packed rows that each continue the recurrent state of a sequence, all int32.

    Run i has the rows from `starts[i]` to `starts[i + 1]`, and begins with the state in place `read[i]`.
    Behind it, its state is written to place `write[i]`, which no run reads; -1: it is not kept. Rows behind
    the last run are padding.
    """

    starts: np.ndarray
    """[runs + 1]"""
    read: np.ndarray
    write: np.ndarray
    drafted: int = 0
    """Number of packed rows, from the first on, that hold all rows of drafts; 0: there are none."""
    held: dict[str, Any] = field(default_factory=dict, compare=False)
    """Cache of the same data in a back-end's own form."""


IN_PLACE = "in place"
"""Key of what a back-end holds of arrays that reads them where they are, whatever they contain."""


@dataclass(frozen=True)
class Contexts:
    """Positions and KV blocks of one step, all int32 and contiguous.

    In packed order, each row has its position (-1 for padding), the context that it belongs to, and the KV
    slots to which its keys and values are written. Layers that share blocks share a table of them and these
    slots: `LayerCache.table` is its number. `runs` are the same rows by sequence, for recurrent layers.
    """

    position: np.ndarray
    """[rows]"""
    table_row: np.ndarray
    """Context of each row, [rows]."""
    write: np.ndarray
    """KV slots, [tables, rows]."""
    tables: np.ndarray
    """KV blocks, [tables, contexts, blocks]."""
    runs: StateRuns | None = field(default=None, kw_only=True)
    held: dict[str, Any] = field(default_factory=dict, compare=False)
    """Cache of the same data in a back-end's own form."""

    def advance(self) -> None:
        """Move each row on by one token, whose slot is the next one of its block."""
        np.add(self.position, 1, out=self.position)
        np.add(self.write, 1, out=self.write)
        for key in [key for key in self.held if key != IN_PLACE]:
            del self.held[key]


@dataclass(frozen=True)
class Draws:
    """Sampling settings, an array [rows] each: fp32 but for `top_k`, int64, and `uniform`, fp64.

    top_k (0: off), top_p and min_p apply in this order; a temperature of 0 takes the most likely token.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    uniform: np.ndarray
    """Random number of the draw, in [0, 1)."""


Drawing = Callable[[], list[int | None]]
"""Function that waits for a draw and returns each row's token: None if its largest logit is not finite, or
nothing is allowed."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the KV cache: keys and values [kv_heads, slots, dim].

    A slot is one token of one block: block b has the slots from b * block_size on. The keys of two heads are
    `head_slots` apart; slots of a head between its blocks may be other heads' or layers'. Numbers are in the
    model's dtype, or int8 with `scales`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    block_size: int
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    """Scales of int8 keys and values, [kv_heads, slots] bf16: a number is the int8 times its slot's scale.

    A scale is a 127th of the largest number of one token and head, in bf16, and no less than LEAST_SCALE;
    numbers are divided by it in fp32 and rounded to the nearest integer, ties to even, so that none is off by
    more than half a scale. Zeros with a scale of NaN stand for numbers of which one is not finite. Scores are
    multiplied with the scales of keys, weights with those of values, and rounded to the model's dtype.
    """
    table: int = 0
    """Number of the layer's table in `Contexts`."""

    @property
    def head_slots(self) -> int:
        """Distance of one head's slots from the next one's, the same for keys, values and scales."""
        return self.keys.stride(0) // self.keys.shape[2]


@dataclass(frozen=True)
class AttentionSettings:
    """Settings of one layer's attention."""

    scaling: float
    """Factor of the products of queries and keys."""
    softcap: float | None = None
    window: int | None = None
    """Number of positions that a row sees, its own included; None: all up to its own."""
    chunk: int | None = None
    """Size of the chunks of positions of which a row sees its own, up to itself; None: no chunks."""
    sinks: torch.Tensor | None = None
    """Learned logits, one a head, [heads] fp32, that take part in the softmax but have no value."""
    writes: bool = True
    """Whether the layer writes its keys and values. They must be those in the cache if it does not."""

    def first_seen(self, position: Positions) -> Positions:
        """Return the first position that a row at `position` sees; it may be negative."""
        if self.window is not None:
            return position - self.window + 1
        return position - position % self.chunk if self.chunk is not None else position * 0


LEAST_SCALE = 2.0**-100
"""Smallest scale, far from subnormal numbers, which some processors treat as zero."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [T, dim] by which queries and keys are rotated."""


class LinearKernel(Protocol):
    """A linear layer of the base, plus the plain LoRAs in its slots."""

    captures: bool
    """Whether a CUDA graph includes the LoRAs, even those loaded after it was captured."""
    adds: bool
    """Whether `onto` saves an operator."""

    def __call__(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None) -> torch.Tensor:
        """Compute x [rows, in] -> [rows, out], of the same dtype, in PEFT's order of products and roundings.

        The result is then added to `onto` [rows, out], contiguous, if given.

        quantized layer   y = base(x) + (scale * (x32 @ A.T) @ B.T).to(base dtype)
        other layers      y = (base(x) + scale * (x32 @ A.T) @ B.T).to(base dtype)

        An activated LoRA (`LoraWeights.adds_wide`) is added as on other layers, and acts alone on its rows.
        """
        ...

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        """Place a plain LoRA in a slot, or empty it with None."""
        ...

    def exact(self, slot: int) -> bool:
        """Return True if rows of this slot have PEFT's bits, according to trials on this machine."""
        ...


class ExpertsKernel(Protocol):
    """A mixture's experts, as transformers computes them one after the other (`MixtralExperts`), plus the
    LoRAs in their slots."""

    captures: bool
    """Whether a CUDA graph computes them, whichever are chosen, with the LoRAs, even those loaded later."""

    def __call__(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, rows: RowMap
    ) -> torch.Tensor:
        """Compute x [rows, hidden] -> the same: the weighted sum of what each row's experts give.

        Each product is rounded to the weights' dtype and then to that of x, and sums of a row are rounded one
        by one, by ascending number of the expert. LoRAs are added to an expert's product as to that of a
        linear layer (`LinearKernel`).

        Args:
            chosen: numbers of the experts, [rows, k] int64.
            weights: [rows, k].
        """
        ...

    def put(self, name: str, slot: int, weights: ExpertLora | None) -> None:
        """Place matrices on the parameter `name` in a slot, or empty it with None."""
        ...

    def exact(self, slot: int) -> bool:
        """Return True if products for rows of this slot have PyTorch's bits, according to trials on this
        machine."""
        ...


class JoinedLayers(Protocol):
    """Linear layers that multiply the same rows in one call."""

    def __call__(self, x: torch.Tensor, rows: RowMap) -> list[torch.Tensor]:
        """Compute x [rows, in] bf16, contiguous -> [rows, out] of each layer, with the bits that it gives
        alone."""
        ...


class AttentionKernel(Protocol):
    """Attention of one layer over its KV cache."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        contexts: Contexts,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Write k and v into the cache, and attend: a row sees the keys of its context up to its position.

        q [heads, T, dim], k and v [kv_heads, T, dim] -> [T, heads, dim of v]. `rotation` has yet to be
        applied to q and k; `engine/fusion.py` leaves that to back-ends that join layers.
        """
        ...


class RecurrentKernels(Protocol):
    """Layers that keep a state of constant size instead of keys and values.

    Tokens are computed one after the other, whatever the step: so a row's bits depend neither on where its
    prompt was cut nor on other rows. Inputs are bf16 or fp32, with the numbers of a row contiguous; all is
    computed in fp32. States are fp32, but for a convolution's, and place 0 holds zeros. Rows of padding give
    anything finite.
    """

    def convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        states: torch.Tensor,
        runs: StateRuns,
    ) -> torch.Tensor:
        """Compute a causal convolution of each channel: x [T, channels] -> the same, in the weight's dtype.

        weight [channels, taps], the last for the row itself, and bias [channels] are of one dtype; sums are
        in fp32. states [places, taps - 1, channels], in x's dtype, are the rows before.
        """
        ...

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
        """Compute the gated delta rule (Yang et al. 2024, arXiv:2412.06464).

            S = exp(decay) * S;  S = S + k ⊗ (beta * (v - k S));  y = scale * q S

        Each head of q and k [T, key heads, key dim] serves neighbouring ones of v [T, heads, value dim].
        decay [T, heads], or [T, heads, key dim] where each key has its own; beta [T, heads]; states [places,
        heads, key dim, value dim]. With `eps`, q and k are first divided by their length, the root of their
        squares' sum plus eps.

        Returns:
            y [T, heads, value dim], in v's dtype
        """
        ...

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
        """Compute a selective state space model (Dao and Gu 2024, arXiv:2405.21060).

            S = exp(dt * a) * S + (dt * x) ⊗ b;  y = S c + skip * x

        x [T, heads, dim]; dt [T, heads]; a [heads], or [heads, size] (Mamba-1); b and c [T, groups, size],
        each group for neighbouring heads; skip [heads]; states [places, heads, dim, size].

        Returns:
            y [T, heads, dim], fp32
        """
        ...


Router = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
"""Function from rows [..., rows, hidden] to numbers of experts, weights and whatever else modelling code
reads, [rows, ...] each."""


class Kernels(RecurrentKernels, Protocol):
    """A back-end."""

    name: str
    """Name for people: `torch`, or the set of instructions."""
    tiled: bool
    """Whether PyTorch's products need TILE rows, so that a row's bits do not depend on its neighbours."""
    row_multiple: int
    """Number to a multiple of which the packed rows of a step are padded."""
    joins: bool
    """Whether it can join several layers, and has attention that rotates queries and keys."""
    unfused: frozenset[str]
    """Titles of fusions (`engine/fusion.py`) that are left out."""
    drafts: bool
    """Whether a chunk of a few tokens costs little more than one token does."""
    draft_cost: float
    """Cost that each further row adds to a step, as a part of a step of one row."""
    draft_rows: int
    """Number of rows of a step that drafts do not exceed, since a step of one more is much dearer."""
    narrows: bool
    """Whether it also accepts A and B of a plain LoRA in bf16."""
    compiles: bool
    """Whether kernels are compiled when a launch first asks for them (`engine/forms.py`)."""
    captures: bool
    """Whether passes are captured as CUDA graphs (`engine/graphs.py`)."""
    step_rows: int
    """Largest number of rows of a step, as far as an engine has told it; 0: nothing is known of any."""

    @property
    def asynchronous(self) -> bool:
        """Whether the host can plan the next step while the device computes."""
        ...

    def linear(self, base: Any, slots: int, *, unpacked: bool = False) -> LinearKernel:
        """Return the kernel of a linear layer (plain, 4-bit or 8-bit) with `slots` adapters.

        `unpacked`: a 4-bit weight is also stored in the form that the product uses.
        """
        ...

    def join(self, layers: Sequence[LinearKernel], *, gated: bool = False) -> JoinedLayers | None:
        """Join up to three layers of this back-end into one call; return None if it cannot.

        `gated`: the layers are a gate and an up projection, whose one result is silu(gate) * up.
        """
        ...

    def experts(self, module: Any, slots: int) -> ExpertsKernel | None:
        """Return the kernel of a mixture's experts, plain or in NF4, with `slots` adapters; None if their
        matrices are multiplied one by one."""
        ...

    def route(self, choose: Router, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what a mixture's router gives for rows; calls that are recorded (`engine/fusion.py`) include
        the router."""
        ...

    def norm(self, base: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the kernel of a norm of the base, x [..., size] -> the same shape."""
        ...

    def attention(self, cache: LayerCache, settings: AttentionSettings) -> AttentionKernel:
        """Return the attention of one layer. A step reads its own keys and values from the cache, also in
        int8."""
        ...

    def draw(
        self, logits: Sequence[torch.Tensor], draws: Draws, allowed: Sequence[np.ndarray | None]
    ) -> Drawing:
        """Begin to draw the next token of each row of logits [vocab], bf16 or fp32.

        allowed: of each row the tokens that may be drawn, a bit each, the first in the lowest, int32
            [ceil(vocab / 32)]; None: all. If all of these are at minus infinity, they are equally likely.
        """
        ...
