"""Linear layers (plain, 4-bit or 8-bit) with one adapter per slot.

Arithmetic is PEFT's own, in its order (fp32 products, then one addition), so that a row equals what
`PeftModel` gives for it alone:

    quantized layer   y = base(x) + (scale * (x32 @ A.T) @ B.T).to(base dtype)
    other layers      y = (base(x) + scale * (x32 @ A.T) @ B.T).to(base dtype)
    DoRA              y = (base(x) + (g - 1) * (base(x) - bias) + g * ((x32 @ A.T) @ B.T) * scale).to(dtype)

On the CPU each product has a fixed number of rows (`TILE`), because the libraries choose their blocking,
and with it the last bits, by the shape: a row must not depend on how many others there are. Decode rows go
through one stack of all slots (`StackedWeights`): on accelerators always, on the CPU where a trial shows that
it gives the very bits of each slot's own products.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from onebase_engine.base.layers import plain_absmax
from onebase_engine.kernels.cpu import CpuKernels, NativeLayers, NativeLinear
from onebase_engine.lora.module import Replacement, SlotModule, saved_twin
from onebase_engine.lora.rows import TILE, Stack, StepRows, Term
from onebase_engine.lora.stacked_weights import StackedWeights
from onebase_engine.lora.weights import LoraWeights, ModuleWeights, SavedModule, TokenRows

COLUMNS = 256
"""Replaced rows are padded to a multiple of this many: MKL sums narrower fp32 products in another order
than those as wide as a vocabulary."""


class SlotLinear(SlotModule):
    """A linear layer (plain, 4-bit or 8-bit) with one adapter per slot."""

    def __init__(
        self,
        base: nn.Module,
        step: StepRows,
        *,
        slots: int,
        tiled: bool,
        head: bool = False,
        kernels: CpuKernels | None = None,
        unpacked: bool = False,
    ) -> None:
        """`kernels`: by which the layer is computed as far as they give the same bits. `unpacked`: to keep a
        4-bit weight as the product has it, too."""
        super().__init__(base, step, slots=slots, tiled=tiled, head=head)
        self._kind = type(base).__name__
        self.quantized = self._kind in ("Linear4bit", "Linear8bitLt")
        self._absmax: torch.Tensor | None = None
        self._unpacked: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.stacked = StackedWeights(slots, keep=tiled)
        self._stacks: bool | None = None
        """Whether they may stand for each slot's own products; None until asked after a change."""
        self.shared: SharedRows | None = None
        self._unpacked = self._plain_weight() if unpacked and self._kind == "Linear4bit" else None
        weight = None if self._unpacked is None else self._unpacked[0]
        self._native = None if kernels is None else kernels.linear(base, slots, self._plain_weight, weight)

    @property
    def native(self) -> NativeLinear | None:
        """The layer by the kernels in C, if they give its bits and those of all plain LoRAs in its slots."""
        return None if self._native is None or self._native.foreign else self._native

    def put_plain(self, slot: int, weights: LoraWeights | None) -> None:
        self.stacked.put(slot, weights)
        if self._native is not None:
            self._native.put(slot, weights)
        self._stacks = None

    def plain(self, slot: int) -> LoraWeights | None:
        """The slot's plain LoRA, if it has one."""
        return self.stacked.own(slot)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        acting: Collection[int] = self.filled
        if self._native is None or x.dtype != torch.bfloat16:
            y = self._base_rows(flat)
        elif self._native.foreign:
            y = self._native(flat.contiguous(), None)
        else:
            shared = None if self.shared is None else self.shared.take(self, x)
            y = self._native(flat.contiguous(), self.rows.row_terms) if shared is None else shared
            acting = self.replacements
        if acting and self.rows.groups:
            self.on_groups(flat, y, acting, self._act_on)
        elif acting:
            self._act(flat, y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def replacement(self, weights: ModuleWeights) -> Replacement | None:
        if isinstance(weights, TokenRows) and not self.quantized:
            return TokenHead(self.base, weights, self.step.exact_stacks if self.tiled else None)
        if isinstance(weights, SavedModule) and not self.quantized:
            twin = saved_twin(self.base, weights)
            return lambda x, bare: twin(x)
        if not isinstance(weights, LoraWeights):
            raise self.unfit(weights)
        if weights.gain is not None:
            return partial(self._dora, weights, weights.gain)
        return None if weights.bias is None else partial(self._biased, weights)

    def _act(self, x: torch.Tensor, y: torch.Tensor) -> None:
        rows = self.rows
        for tile in rows.tiles:
            if tile.terms:
                some = slice(tile.start, tile.stop)
                stack = tile.stack if tile.stack is not None and self._may_stack() else None
                self._act_on(x[some], y[some], tile.terms, stack)
        if rows.stack is not None:
            some = slice(rows.stack.start, rows.stack.stop)
            self._act_on(x[some], y[some], self.stack_terms(rows.stack), rows.stack)

    def _act_on(
        self, x: torch.Tensor, y: torch.Tensor, terms: tuple[Term, ...], stack: Stack | None = None
    ) -> None:
        bare = y.clone() if self.replaces(terms) else y
        delta = self._delta(x, terms) if stack is None else self.stacked.delta(x.float(), stack)
        if delta is not None and self.quantized:
            y += delta.to(y.dtype)
        elif delta is not None:
            y.copy_(y.float() + delta)
        self.replace(x, bare, y, terms)

    def _delta(self, x: torch.Tensor, terms: tuple[Term, ...]) -> torch.Tensor | None:
        """Sum of the plain LoRAs' parts by their own products, [rows, out] fp32; None if there is none."""
        total: torch.Tensor | None = None
        x = x.float()
        for term in terms:
            weights = self.plain(term.slot)
            if weights is None:
                continue
            hidden = functional.linear(x, weights.a)
            if term.mask is not None:
                # `where`, not a product: 0 * inf of one adapter would poison its neighbours. B is finite,
                # so that a row of zeros stays zero.
                hidden = torch.where(term.mask, hidden, 0.0)
            delta = _scaled(functional.linear(hidden, weights.b), weights.scale)
            if term.weight is not None:
                delta = delta * term.weight
            total = delta if total is None else total + delta
        return total

    def _biased(self, weights: LoraWeights, x: torch.Tensor, bare: torch.Tensor) -> torch.Tensor:
        """A LoRA whose B has a bias (`lora_bias`)."""
        hidden = functional.linear(x.float(), weights.a)
        return self._sum(bare, _scaled(functional.linear(hidden, weights.b, weights.bias), weights.scale))

    def _dora(
        self, weights: LoraWeights, gain: torch.Tensor, x: torch.Tensor, bare: torch.Tensor
    ) -> torch.Tensor:
        """PEFT's `DoraLinearVariant`, in its order."""
        lora = functional.linear(functional.linear(x.float(), weights.a), weights.b)
        bias = self.base.bias
        unbiased = bare if bias is None else bare - bias
        return (bare + ((gain - 1) * unbiased + _scaled(gain * lora, weights.scale))).to(bare.dtype)

    def _sum(self, y: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """In the order of PEFT's class for this layer; [rows, out] of y's dtype or fp32."""
        return y + delta.to(y.dtype) if self.quantized else (y.float() + delta).to(y.dtype)

    def _may_stack(self) -> bool:
        if self._stacks is None:
            self._stacks = self.stacked.exact(self.step.exact_stacks)
        return self._stacks

    def _base_rows(self, x: torch.Tensor) -> torch.Tensor:
        """base(x) [rows, out]; on the CPU by tiles, with a 4-bit weight dequantized once for all of them."""
        if not self.tiled:
            y: torch.Tensor = self.base(x)
            return y
        padded = functional.pad(x, (0, 0, 0, -len(x) % TILE))
        if self._kind == "Linear8bitLt":
            y = self.base(padded)
            return y[: len(x)]
        weight, bias = self._plain_weight()
        tiles = [functional.linear(part, weight, bias) for part in torch.split(padded.to(weight.dtype), TILE)]
        return torch.cat(tiles)[: len(x)].to(x.dtype)

    def _plain_weight(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in the dtype of the product, as `Linear4bit.forward` has them on the CPU."""
        weight, bias = self.base.weight, self.base.bias
        if not self.quantized:
            return weight, bias
        if self._unpacked is not None:
            return self._unpacked
        dtype = self.base.compute_dtype
        state = weight.quant_state
        if self._absmax is None:
            self._absmax = plain_absmax(state)
        plain = torch.ops.bitsandbytes.dequantize_4bit.default(
            weight, self._absmax, state.blocksize, state.quant_type, state.shape, dtype
        )
        return plain, None if bias is None else bias.to(dtype)


class SharedRows:
    """Layers that a module calls one after the other with the same rows: the first call computes all."""

    def __init__(self, layers: Sequence[SlotLinear]) -> None:
        """Of `layers` each is computed by the kernels in C."""
        self._layers = tuple(layers)
        self._run = NativeLayers([layer._native for layer in layers if layer._native is not None])
        self._x: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}

    def take(self, layer: SlotLinear, x: torch.Tensor) -> torch.Tensor | None:
        """What `layer` gives for `x`, [rows, out]; None if it has to compute by itself."""
        if self._x is not x or id(layer) not in self._left:
            if x.dtype != torch.bfloat16 or any(one.native is None for one in self._layers):
                return None
            flat = x.reshape(-1, x.shape[-1]).contiguous()
            self._x, found = x, self._run(flat, layer.rows.row_terms)
            self._left = {id(one): y for one, y in zip(self._layers, found, strict=True)}
        y = self._left.pop(id(layer))
        if not self._left:
            self._x = None
        return y


def _scaled(delta: torch.Tensor, scale: float) -> torch.Tensor:
    return delta if scale == 1.0 else delta * scale


class TokenHead:
    """Logits of the tokens whose rows an adapter replaces (`trainable_token_indices`), the others as the base
    gave them.

    PEFT copies the whole head and writes the rows into it. Here only the product with the replaced rows is
    made again, where a trial on the base's own rows shows it to be bit-equal; else, on the CPU, as PEFT does.
    """

    def __init__(
        self, base: Any, weights: TokenRows, known: MutableMapping[tuple[int, ...], bool] | None
    ) -> None:
        """`known`: what trials have shown, to be kept; None where bits are not promised (accelerators)."""
        self._base = base
        self._indices = weights.indices
        self._rows = weights.rows.to(base.weight.dtype)
        self._narrow = base.bias is None and (known is None or self._is_exact(known))
        self._padded = _padded(self._rows) if self._narrow else None

    def __call__(self, x: torch.Tensor, bare: torch.Tensor) -> torch.Tensor:
        if self._padded is None:
            return functional.linear(x, self._base.weight.index_copy(0, self._indices, self._rows))
        logits = functional.linear(x, self._padded)[:, : len(self._indices)]
        return bare.index_copy(1, self._indices, logits)

    def _is_exact(self, known: MutableMapping[tuple[int, ...], bool]) -> bool:
        weight = self._base.weight
        count = -(-len(self._indices) // COLUMNS) * COLUMNS
        key = (*weight.shape, count, weight.dtype.itemsize, 0)
        if key not in known:
            x = torch.randn(TILE, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(
                weight.dtype
            )
            whole = functional.linear(x, weight)[:, self._indices]
            narrow = functional.linear(x, _padded(weight[self._indices]))[:, : len(self._indices)]
            known[key] = torch.equal(whole, narrow)
        return known[key]


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return functional.pad(rows, (0, 0, 0, -len(rows) % COLUMNS))
