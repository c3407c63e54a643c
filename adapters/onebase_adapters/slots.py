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
Decode rows go through one stack of all slots (`Bank`), two products a layer: on accelerators always,
on the CPU where a trial shows that it gives the very bits of each slot's own products.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from onebase_adapters.bank import MAX_TILED_BANK, Bank
from onebase_adapters.rows import TILE, LoraWeights, RowMap, StepRows, Term, Tile


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
        self._kind = type(base).__name__
        self.quantized = self._kind in ("Linear4bit", "Linear8bitLt")
        self._absmax: torch.Tensor | None = None
        self.bank: Bank | None = None
        self._stacks: bool | None = None
        """Whether the bank may stand for each slot's own products; None until asked after a change."""

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        super().put(slot, weights)
        self._stacks = None
        if self.bank is not None and (weights is None or weights.rank <= self.bank.rank):
            self.bank.put(slot, weights)
        elif weights is not None:
            self.bank = None if self.tiled else Bank(self.slots)

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
            if not tile.terms:
                continue
            part = x[tile.start : tile.stop].float()
            bank = self._exact_bank() if tile.stack is not None else None
            if bank is not None and tile.stack is not None:
                self._add(y[tile.start : tile.stop], bank.delta(part, tile.stack))
                continue
            delta = self.tile_delta(part, tile)
            if delta is not None:
                self._add(y[tile.start : tile.stop], delta)
        if rows.stack is not None and self.bank is not None:
            some = slice(rows.stack.start, rows.stack.stop)
            self._add(y[some], self.bank.delta(x[some].float(), rows.stack))

    def _exact_bank(self) -> Bank | None:
        """The bank, where two products of all slots give the very bits of each slot's own products."""
        if self._stacks is None:
            self.bank = self.bank or Bank(self.slots)
            self._stacks = self._bank_is_exact(self.bank)
        return self.bank if self._stacks else None

    def _bank_is_exact(self, bank: Bank) -> bool:
        present = [weights for weights in self.slots if weights is not None]
        if bank.width > MAX_TILED_BANK or any(weights.scale != 1.0 for weights in present):
            return False
        return all(bank.is_exact(rank, self.step.exact_banks) for rank in {w.rank for w in present})

    def _add(self, y: torch.Tensor, delta: torch.Tensor) -> None:
        if self.quantized:
            y += delta.to(y.dtype)
        else:
            y.copy_(y.float() + delta)

    def _base_rows(self, x: torch.Tensor) -> torch.Tensor:
        """base(x) [rows, out]; on the CPU by tiles, with a 4-bit weight dequantized once for all of them."""
        if not self.tiled or self._kind == "Linear8bitLt" or (len(x) <= TILE and not self.quantized):
            y: torch.Tensor = self.base(x)
            return y
        weight, bias, dtype = self._plain_weight()
        if len(x) <= TILE:
            return functional.linear(x.to(dtype), weight, bias).to(x.dtype)
        tiles = [functional.linear(part, weight, bias) for part in torch.split(x.to(dtype), TILE)]
        return torch.cat(tiles).to(x.dtype)

    def _plain_weight(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.dtype]:
        """Weight, bias and the dtype of the product, as `Linear4bit.forward` has them on the CPU."""
        weight, bias = self.base.weight, self.base.bias
        if not self.quantized:
            return weight, bias, weight.dtype
        dtype = self.base.compute_dtype
        state = weight.quant_state
        if self._absmax is None:
            self._absmax = plain_absmax(state)
        plain = torch.ops.bitsandbytes.dequantize_4bit.default(
            weight, self._absmax, state.blocksize, state.quant_type, state.shape, dtype
        )
        return plain, None if bias is None else bias.to(dtype), dtype


def plain_absmax(state: Any) -> torch.Tensor:
    """A 4-bit weight's fp32 absmax, [blocks], out of double quantization.

    Unpacked once per layer on the CPU (1/16 byte a weight): bitsandbytes would do it on every call, a
    tenth of a decode step.
    """
    if not state.nested:
        plain: torch.Tensor = state.absmax
        return plain
    from bitsandbytes.functional import dequantize_blockwise

    unpacked: torch.Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return unpacked


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

    @torch.inference_mode()
    def load(self, slot: int, weights: Mapping[str, LoraWeights]) -> None:
        """Put a version's matrices into an empty slot."""
        for name, matrices in weights.items():
            self._modules[name].put(slot, matrices.to(self._device))
        self._touched[slot] = tuple(weights)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Empty a slot. No running row may still point at it."""
        for name in self._touched[slot]:
            self._modules[name].put(slot, None)
        self._touched[slot] = ()
