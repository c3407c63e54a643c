"""What the engine asks of those that compute for it: one interface, and a back-end for each kind of machine.

On the CPU a row's bits depend on nothing but the row, whatever the back-end: not on its neighbours, on where
its prompt was cut, or on what else lies in the slots. `reference` is plain PyTorch and runs everywhere; the
others are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from onebase_engine.lora.weights import LoraWeights

TILE = 32
"""Rows of every product of the reference on the CPU. oneDNN's bf16 kernels agree for any count up to 32 (not
from 33), MKL's fp32 kernels only for equal counts."""


@dataclass(frozen=True)
class RowGroup:
    """Packed rows, one next to the other or not, that have the same slots and weights."""

    rows: tuple[int, ...]
    terms: tuple[tuple[int, float], ...]
    """(slot, weight), at least one, in the order in which they are summed."""


@dataclass(frozen=True)
class RowMap:
    """Which slots act on which packed rows of one forward pass. No row is in two groups."""

    groups: tuple[RowGroup, ...] = ()
    held: dict[str, Any] = field(default_factory=dict, compare=False)
    """The same in a back-end's own form, made once."""


@dataclass(frozen=True)
class Contexts:
    """Of one step, in packed order: each row's position (-1 for padding), its row of `table`, the KV slot
    that its key and value go to; `table` [contexts, blocks] are KV blocks. All int32."""

    position: np.ndarray
    table_row: np.ndarray
    write: np.ndarray
    table: np.ndarray
    held: dict[str, Any] = field(default_factory=dict, compare=False)
    """The same in a back-end's own form, made once."""


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn, an array [rows] each: fp32 but for `top_k`, int64, and `uniform`, fp64.

    top_k (0: off), top_p and min_p apply in this order; a temperature of 0 takes the most likely token.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    uniform: np.ndarray
    """The draw itself, in [0, 1)."""


Drawing = Callable[[], list[int | None]]
"""Waits for a draw that was begun, and gives each row's token: None if its largest logit is not finite, or
nothing is allowed."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the KV cache: keys and values [kv_heads, slots, dim], a slot being one token of one
    block. In the model's dtype, or int8 with `scales`."""

    keys: torch.Tensor
    values: torch.Tensor
    block_size: int
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of keys and of values in int8, [kv_heads, slots] bf16: a number is the int8 times its slot's scale.

    A scale is a 127th of the largest number of one token and head, in bf16, and no less than LEAST_SCALE;
    numbers are divided by it in fp32 and rounded to the nearest integer, ties to even, so that none is off by
    more than half a scale. Zeros with a scale of NaN stand for numbers of which one is not finite. Scores are
    multiplied with the scales of keys, weights with those of values, and rounded to the model's dtype.
    """


LEAST_SCALE = 2.0**-100
"""Far from what is a subnormal number, which some processors take for zero."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [T, dim] by which queries and keys are turned."""


class LinearKernel(Protocol):
    """A linear layer of the base, and what the plain LoRAs in its slots add."""

    captures: bool
    """Whether a graph of CUDA has what they add, also those that come after it was captured."""
    adds: bool
    """Whether `onto` spares an operator."""

    def __call__(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, in] -> [rows, out], of the same dtype. What it gives is then added to `onto` [rows, out],
        contiguous, if there is any. In PEFT's order of products and roundings:

        quantized layer   y = base(x) + (scale * (x32 @ A.T) @ B.T).to(base dtype)
        other layers      y = (base(x) + scale * (x32 @ A.T) @ B.T).to(base dtype)
        """
        ...

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        """Place a plain LoRA in a slot, or empty it with None."""
        ...

    def exact(self, slot: int) -> bool:
        """Whether rows of this slot have PEFT's bits, as far as trials on this machine tell."""
        ...


class JoinedLayers(Protocol):
    """Linear layers that multiply the same rows, as one."""

    def __call__(self, x: torch.Tensor, rows: RowMap) -> list[torch.Tensor]:
        """x [rows, in] bf16, contiguous -> [rows, out] of each layer, with the bits that it gives alone."""
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

        q [heads, T, dim], k and v [kv_heads, T, dim] -> [T, heads, dim of v]. `rotation`: by which q and k
        are still to be turned; `engine/fusion.py` leaves that to back-ends that join layers.
        """
        ...


class Kernels(Protocol):
    """A back-end."""

    name: str
    """As people read it: `torch`, or the set of instructions."""
    tiled: bool
    """Whether what PyTorch computes of a step must have TILE rows, for a row's bits to be its own."""
    row_multiple: int
    """The packed rows of a step are padded to a multiple of this many."""
    joins: bool
    """Whether it has several layers as one, and attention that turns queries and keys."""
    drafts: bool
    """Whether a chunk of a few tokens costs little more than one token does."""
    narrows: bool
    """Whether it takes A and B of a plain LoRA in bf16 as well."""
    captures: bool
    """Whether passes are captured as graphs of CUDA (`engine/graphs.py`)."""

    @property
    def asynchronous(self) -> bool:
        """Whether the host goes on while it computes, and can plan the next step."""
        ...

    def linear(self, base: Any, slots: int, *, unpacked: bool = False) -> LinearKernel:
        """A linear layer (plain, 4-bit or 8-bit) with `slots` adapters. `unpacked`: a 4-bit weight is kept as
        the product has it, too."""
        ...

    def join(self, layers: Sequence[LinearKernel], *, gated: bool = False) -> JoinedLayers | None:
        """Up to three layers of this back-end as one; None where it has no such thing.

        `gated`: a gate and what it lets through, whose one result is silu(gate) * up.
        """
        ...

    def norm(self, base: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """A norm of the base, x [..., size] -> the same shape."""
        ...

    def attention(
        self, cache: LayerCache, scaling: float, softcap: float | None, window: int | None
    ) -> AttentionKernel:
        """Attention of one layer. What a step writes to the cache it reads there, also in int8."""
        ...

    def draw(
        self, logits: Sequence[torch.Tensor], draws: Draws, allowed: Sequence[np.ndarray | None]
    ) -> Drawing:
        """Begin to draw the next token of each row of logits [vocab], bf16 or fp32.

        allowed: of each row the tokens that may be drawn, a bit each, the first in the lowest, int32
            [ceil(vocab / 32)]; None: all. If all of these are at minus infinity, they are equally likely.
        """
        ...
