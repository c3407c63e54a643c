"""Different LoRA adapters for different rows of one forward pass.

Every linear layer of the served view is wrapped in a `SlotLinear`, the input embedding in a
`SlotEmbedding`. Which slot acts on which packed row is a fact of the step: a `RowMap`, set on the
shared `StepRows` before the forward pass.

Arithmetic is PEFT's own, in its order (fp32 products, then one addition), so that a row equals what
`PeftModel` gives for it alone:

    quantized layer   y = base(x) + (scale * (x32 @ A.T) @ B.T).to(base dtype)
    other layers      y = (base(x) + scale * (x32 @ A.T) @ B.T).to(base dtype)

On the CPU each product has a fixed number of rows (`TILE`), because the libraries choose their
blocking, and with it the last bits, by the shape: a row must not depend on how many others there are.
On accelerators decode rows go through one stack of all slots instead, two products a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

TILE = 32
"""Rows of every product on the CPU. oneDNN's bf16 kernels agree for any count up to 32 (not from 33),
MKL's fp32 kernels only for equal counts."""


@dataclass(frozen=True)
class LoraWeights:
    """One module's matrices, fp32: `a` [rank, in], `b` [out, rank]. For an embedding `a` is [vocab, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    def to(self, device: torch.device) -> LoraWeights:
        return LoraWeights(self.a.to(device), self.b.to(device), self.scale)

    def folded(self) -> LoraWeights:
        """The same with the scale in B where that changes no bit: when it is a power of two (most are)."""
        scaled = self.b * self.scale
        exact = math.frexp(self.scale)[0] == 0.5 and bool(torch.isfinite(scaled).all())
        return LoraWeights(self.a, scaled, 1.0) if exact else self


@dataclass(frozen=True)
class Term:
    """One slot acting on the rows of a tile. None stands for "every row" and "weight 1"."""

    slot: int
    mask: torch.Tensor | None = None
    """[rows, 1] bool"""
    weight: torch.Tensor | None = None
    """[rows, 1] fp32"""


@dataclass(frozen=True)
class Tile:
    """Packed rows `start:stop` and the slots acting on them, in an order that no neighbour changes."""

    start: int
    stop: int
    terms: tuple[Term, ...]


@dataclass
class Stack:
    """Decode rows `start:stop` against all slots at once: `weight` [rows, slots] fp32, 0 where idle."""

    start: int
    stop: int
    weight: torch.Tensor
    _expanded: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def expanded(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask and weight, [rows, slots * rank], made once a step for each bank width."""
        if rank not in self._expanded:
            weight = self.weight.repeat_interleave(rank, dim=1)
            self._expanded[rank] = (weight != 0, weight)
        return self._expanded[rank]


@dataclass(frozen=True)
class RowMap:
    """Which slots act on which packed rows of one forward pass."""

    tiles: tuple[Tile, ...] = ()
    stack: Stack | None = None

    @property
    def acts(self) -> bool:
        return self.stack is not None or any(tile.terms for tile in self.tiles)


@dataclass
class StepRows:
    """The row map of the running step; every wrapped layer of a view holds the same object.

    `tokens` is for layers that see all packed rows, `logits` for the output head, which sees only
    the rows whose logits are wanted.
    """

    tokens: RowMap = RowMap()
    logits: RowMap = RowMap()


class SlotModule(nn.Module):
    """What the wrapped linear layers and embeddings share: the base layer and its slots' matrices."""

    def __init__(
        self, base: nn.Module, step: StepRows, *, slots: int, tiled: bool, head: bool = False
    ) -> None:
        super().__init__()
        self.base: Any = base
        self.step = step
        self.tiled = tiled
        self.head = head
        self.slots: list[LoraWeights | None] = [None] * slots
        self.occupied = 0

    @property
    def rows(self) -> RowMap:
        return self.step.logits if self.head else self.step.tokens

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        """Place matrices in a slot, or empty it with None."""
        self.occupied += (weights is not None) - (self.slots[slot] is not None)
        self.slots[slot] = weights

    def hidden(self, x: torch.Tensor, weights: LoraWeights) -> torch.Tensor:
        """The product of the rows `x` with A: [rows, rank] fp32."""
        raise NotImplementedError

    def tile_delta(self, x: torch.Tensor, tile: Tile) -> torch.Tensor | None:
        """Sum of the tile's terms for its own rows `x`, [rows, out] fp32; None if no slot has this module."""
        total: torch.Tensor | None = None
        for term in tile.terms:
            weights = self.slots[term.slot]
            if weights is None:
                continue
            hidden = self.hidden(x, weights)
            if term.mask is not None:
                # `where`, not a product: 0 * inf of one adapter would poison its neighbours. B is finite,
                # so that a row of zeros stays zero.
                hidden = torch.where(term.mask, hidden, 0.0)
            delta = functional.linear(hidden, weights.b)
            if weights.scale != 1.0:
                delta = delta * weights.scale
            if term.weight is not None:
                delta = delta * term.weight
            total = delta if total is None else total + delta
        return total


class SlotLinear(SlotModule):
    """A linear layer (plain, 4-bit or 8-bit) with one LoRA per slot."""

    def __init__(
        self, base: nn.Module, step: StepRows, *, slots: int, tiled: bool, head: bool = False
    ) -> None:
        super().__init__(base, step, slots=slots, tiled=tiled, head=head)
        self.quantized = type(base).__name__ in ("Linear4bit", "Linear8bitLt")
        self.bank: _Bank | None = None

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        super().put(slot, weights)
        if self.tiled:
            return
        if weights is not None and (self.bank is None or self.bank.rank < weights.rank):
            self.bank = _Bank(self.slots, weights)
        elif self.bank is not None:
            self.bank.put(slot, weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = self._base_rows(flat)
        if self.occupied:
            self._add_deltas(flat, y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def hidden(self, x: torch.Tensor, weights: LoraWeights) -> torch.Tensor:
        return functional.linear(x, weights.a)

    def _add_deltas(self, x: torch.Tensor, y: torch.Tensor) -> None:
        rows = self.rows
        for tile in rows.tiles:
            if tile.terms:
                delta = self.tile_delta(x[tile.start : tile.stop].float(), tile)
                if delta is not None:
                    self._add(y[tile.start : tile.stop], delta)
        if rows.stack is not None and self.bank is not None:
            part = slice(rows.stack.start, rows.stack.stop)
            self._add(y[part], self.bank.delta(x[part].float(), rows.stack))

    def _add(self, y: torch.Tensor, delta: torch.Tensor) -> None:
        if self.quantized:
            y += delta.to(y.dtype)
        else:
            y.copy_(y.float() + delta)

    def _base_rows(self, x: torch.Tensor) -> torch.Tensor:
        """base(x) [rows, out]; on the CPU by tiles, with a 4-bit weight dequantized once for all of them."""
        if not self.tiled or len(x) <= TILE or type(self.base).__name__ == "Linear8bitLt":
            y: torch.Tensor = self.base(x)
            return y
        weight, bias, dtype = self._plain_weight()
        tiles = [functional.linear(part, weight, bias) for part in torch.split(x.to(dtype), TILE)]
        return torch.cat(tiles).to(x.dtype)

    def _plain_weight(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.dtype]:
        weight, bias = self.base.weight, self.base.bias
        if not self.quantized:
            return weight, bias, weight.dtype
        from bitsandbytes.functional import dequantize_4bit

        dtype = self.base.compute_dtype
        plain = dequantize_4bit(weight, weight.quant_state).to(dtype)
        return plain, None if bias is None else bias.to(dtype), dtype


class _Bank:
    """All slots of one layer as two matrices: `a` [slots * rank, in], `b` [out, slots * rank] with the scale.

    Its rank is that of the largest adapter so far, rounded up to a multiple of 8; smaller ones are padded
    by zeros. Its `b` holds finite numbers only (`load_adapter` refuses others): a row's idle slots give
    0 * b there.
    """

    def __init__(self, slots: Sequence[LoraWeights | None], like: LoraWeights) -> None:
        self.rank = -(-like.rank // 8) * 8
        self.a = like.a.new_zeros(len(slots) * self.rank, like.a.shape[1])
        self.b = like.b.new_zeros(like.b.shape[0], len(slots) * self.rank)
        for slot, weights in enumerate(slots):
            self.put(slot, weights)

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        start = slot * self.rank
        self.a[start : start + self.rank].zero_()
        self.b[:, start : start + self.rank].zero_()
        if weights is not None:
            self.a[start : start + weights.rank] = weights.a
            self.b[:, start : start + weights.rank] = weights.b * weights.scale

    def delta(self, x: torch.Tensor, stack: Stack) -> torch.Tensor:
        mask, weight = stack.expanded(self.rank)
        hidden = torch.where(mask, functional.linear(x, self.a), 0.0) * weight
        return functional.linear(hidden, self.b)


class SlotEmbedding(SlotModule):
    """An embedding with one LoRA per slot: each token's row of `a`, times `b`."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(ids)
        if not self.occupied:
            return y
        flat, out = ids.reshape(-1), y.view(-1, y.shape[-1])
        for tile in self._tiles(self.rows):
            delta = self.tile_delta(flat[tile.start : tile.stop], tile) if tile.terms else None
            if delta is not None:
                part = out[tile.start : tile.stop]
                part.copy_(part.float() + delta)
        return y

    def hidden(self, x: torch.Tensor, weights: LoraWeights) -> torch.Tensor:
        return weights.a[x]

    def tile_delta(self, x: torch.Tensor, tile: Tile) -> torch.Tensor | None:
        delta = super().tile_delta(x, tile)
        scale = getattr(self.base, "embed_scale", None)
        # Scaled embeddings (Gemma 3) scale the delta as well, as PEFT does.
        return delta if delta is None or scale is None else delta * torch.as_tensor(scale).to(delta.dtype)

    def _tiles(self, rows: RowMap) -> tuple[Tile, ...]:
        stack = rows.stack
        if stack is None:
            return rows.tiles
        terms = tuple(
            Term(slot, mask=stack.weight[:, slot, None] != 0, weight=stack.weight[:, slot, None])
            for slot, weights in enumerate(self.slots)
            if weights is not None
        )
        return (*rows.tiles, Tile(stack.start, stack.stop, terms))


def input_embedding(model: Any) -> nn.Embedding:
    embedding: nn.Embedding = model.get_input_embeddings()
    return embedding


def output_head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def wrap_layers(model: nn.Module, step: StepRows, *, slots: int, tiled: bool) -> dict[str, SlotModule]:
    """Replace every linear layer and the input embedding of a view by slot modules; returns them by name.

    The view's own base layers stay inside the wrappers: the loaded base is untouched.
    """
    head, embedding = output_head(model), input_embedding(model)
    wrapped: dict[str, SlotModule] = {}
    for name, module in list(model.named_modules()):
        if module is embedding:
            slot_module: SlotModule = SlotEmbedding(module, step, slots=slots, tiled=tiled)
        elif isinstance(module, nn.Linear):
            slot_module = SlotLinear(module, step, slots=slots, tiled=tiled, head=module is head)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, slot_module)
        wrapped[name] = slot_module
    return wrapped


class SlotBank:
    """Which adapter version sits in which slot, over all wrapped layers of a view."""

    def __init__(self, modules: Mapping[str, SlotModule], slots: int, device: torch.device) -> None:
        self._modules = modules
        self._device = device
        self._touched: list[tuple[str, ...]] = [()] * slots

    def load(self, slot: int, weights: Mapping[str, LoraWeights]) -> None:
        """Put a version's matrices into an empty slot."""
        for name, matrices in weights.items():
            self._modules[name].put(slot, matrices.to(self._device))
        self._touched[slot] = tuple(weights)

    def clear(self, slot: int) -> None:
        """Empty a slot. No running row may still point at it."""
        for name in self._touched[slot]:
            self._modules[name].put(slot, None)
        self._touched[slot] = ()
