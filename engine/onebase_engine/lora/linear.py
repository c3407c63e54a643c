"""Linear layers (plain, 4-bit or 8-bit) with one adapter per slot.

The kernels (`kernels/interface.py`) compute the base and plain LoRAs. Adapters that replace a row's output
are computed here by PyTorch, in PEFT's order:

    DoRA   y = (base(x) + (g - 1) * (base(x) - bias) + g * ((x32 @ A.T) @ B.T) * scale).to(dtype)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from onebase_engine.kernels.interface import TILE, JoinedLayers, Kernels
from onebase_engine.kernels.reference import added, scaled
from onebase_engine.kernels.weights import LoraWeights, ModuleWeights, SavedModule, TokenRows
from onebase_engine.lora.module import Replacement, SlotModule, StepRows, Terms, saved_twin

COLUMNS = 256
"""Replaced rows are padded to a multiple of this many: MKL sums narrower fp32 products in another order
than those as wide as a vocabulary."""

WIDTH = 64
"""Logits with the tokens of adapters have a multiple of this many columns."""


class SlotLinear(SlotModule):
    """A linear layer (plain, 4-bit or 8-bit) with one adapter per slot."""

    def __init__(
        self,
        base: nn.Module,
        step: StepRows,
        kernels: Kernels,
        *,
        slots: int,
        head: bool = False,
        unpacked: bool = False,
    ) -> None:
        """Wrap `base`. `unpacked`: a 4-bit weight is also stored in the form that the product uses."""
        super().__init__(base, step, kernels, head=head)
        self.quantized = type(base).__name__ in ("Linear4bit", "Linear8bitLt")
        self.narrows = kernels.narrows
        self.shared: SharedRows | None = None
        self.onto: torch.Tensor | None = None
        """Tensor [..., out] to which the next call's outputs are added."""
        self.kernel = kernels.linear(base, slots, unpacked=unpacked)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's own bias, for modelling code that takes it off again."""
        bias: torch.Tensor | None = self.base.bias
        return bias

    @property
    def by_groups(self) -> Collection[int]:
        return self.replacements

    @property
    def uncaptured(self) -> Collection[int]:
        return self.by_groups if self.kernel.captures else self.filled

    def exact(self, slot: int) -> bool:
        return self.kernel.exact(slot)

    def put_plain(self, slot: int, weights: LoraWeights | None) -> None:
        self.kernel.put(slot, weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        onto, self.onto = self.onto, None
        y = None if self.shared is None else self.shared.take_output(self, x)
        if onto is not None:
            y = self.kernel(flat, self.rows, onto.reshape(flat.shape[0], -1))
        elif y is None:
            y = self.kernel(flat, self.rows)
        if self.words:
            y = self._widened(y)
        self.on_groups(flat, y, self.by_groups, self._act_on)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _widened(self, y: torch.Tensor) -> torch.Tensor:
        """Return the logits with columns for the largest vocabulary of the step's adapters.

        Their number is a multiple of WIDTH, since PyTorch computes the last elements of a tensor in another
        way. What is in a row beyond its own vocabulary means nothing.
        """
        slots = {slot for group in self.rows.groups for slot, _ in group.terms}
        words = max((self.words.get(slot, 0) for slot in slots), default=0)
        if words <= y.shape[1]:
            return y
        return functional.pad(y, (0, -(-words // WIDTH) * WIDTH - y.shape[1]))

    def _act_on(self, x: torch.Tensor, y: torch.Tensor, terms: Terms) -> None:
        bare = y[:, : self.base.out_features].clone()
        for slot, _ in terms:
            if slot in self.replacements:
                own = self.replacements[slot](x, bare)
                y[:, : own.shape[1]] = own

    def replacement(self, weights: ModuleWeights) -> Replacement | None:
        if isinstance(weights, TokenRows) and not self.quantized:
            return TokenHead(self.base, weights, exact=self.tiled)
        if isinstance(weights, SavedModule) and not self.quantized:
            twin = saved_twin(self.base, weights)
            return lambda x, bare: twin(x)
        if not isinstance(weights, LoraWeights):
            raise self.unfit(weights)
        if weights.gain is not None:
            return partial(self._dora, weights, weights.gain)
        return None if weights.bias is None else partial(self._biased, weights)

    def _biased(self, weights: LoraWeights, x: torch.Tensor, bare: torch.Tensor) -> torch.Tensor:
        """Compute a LoRA whose B has a bias (`lora_bias`)."""
        hidden = functional.linear(x.float(), weights.a)
        delta = scaled(functional.linear(hidden, weights.b, weights.bias), weights.scale)
        return added(bare, delta, quantized=self.quantized and not weights.adds_wide)

    def _dora(
        self, weights: LoraWeights, gain: torch.Tensor, x: torch.Tensor, bare: torch.Tensor
    ) -> torch.Tensor:
        """Compute PEFT's `DoraLinearVariant`, in its order."""
        lora = functional.linear(functional.linear(x.float(), weights.a), weights.b)
        bias = self.base.bias
        unbiased = bare if bias is None else bare - bias
        return (bare + ((gain - 1) * unbiased + scaled(gain * lora, weights.scale))).to(bare.dtype)


class SharedRows:
    """Layers that a module calls one after the other with the same rows: the first call computes all."""

    def __init__(self, layers: Sequence[SlotLinear], joined: JoinedLayers) -> None:
        """Share the rows. `joined`: the kernels of `layers` as one."""
        self._layers = tuple(layers)
        self._run = joined
        self._x: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}

    def take_output(self, layer: SlotLinear, x: torch.Tensor) -> torch.Tensor | None:
        """Return the output of `layer` for `x`, [rows, out]; None if it has to compute by itself."""
        if self._x is not x or id(layer) not in self._left:
            if x.dtype != torch.bfloat16:
                return None
            flat = x.reshape(-1, x.shape[-1]).contiguous()
            self._x, found = x, self._run(flat, layer.rows)
            self._left = {id(one): y for one, y in zip(self._layers, found, strict=True)}
        y = self._left.pop(id(layer))
        if not self._left:
            self._x = None
        return y


class TokenHead:
    """Output head in which an adapter replaces the rows of some tokens (`trainable_token_indices`).

    PEFT copies the whole head and writes the rows into it. Here only the product with the replaced rows is
    made again, where a trial on the base's own rows shows it to be bit-equal; else, on the CPU, as PEFT does.
    """

    def __init__(self, base: Any, weights: TokenRows, *, exact: bool) -> None:
        """Prepare the replaced rows. `exact`: bits are guaranteed (the CPU)."""
        self._base = base
        self._indices = weights.indices
        self._rows = weights.rows.to(base.weight.dtype)
        self._more = (weights.words or len(base.weight)) - len(base.weight)
        """Number of rows that the head has more than the base's; below zero if it has fewer."""
        self._narrow = base.bias is None and (not exact or self._is_exact())
        self._padded = _padded(self._rows) if self._narrow else None

    def __call__(self, x: torch.Tensor, bare: torch.Tensor) -> torch.Tensor:
        if self._padded is None:
            return functional.linear(x, self._whole(self._rows))
        logits = functional.linear(x, self._padded)[:, : len(self._indices)]
        return functional.pad(bare, (0, self._more)).index_copy_(1, self._indices, logits)

    def _whole(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.pad(self._base.weight, (0, 0, 0, self._more)).index_copy_(0, self._indices, rows)

    def _is_exact(self) -> bool:
        """Return True if in a trial the narrow product, and the base's if the head has another size, are
        bit-equal to the product with the whole head."""
        weight = self._base.weight
        key = (*weight.shape, len(_padded(self._rows)), self._more, weight.dtype)
        if key not in _exact:
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(TILE, weight.shape[1], generator=draw).to(weight.dtype)
            rows = weight[self._indices.clamp(max=len(weight) - 1)]
            whole = functional.linear(x, self._whole(rows))
            narrow = functional.linear(x, _padded(rows))[:, : len(self._indices)]
            equal = torch.equal(whole[:, self._indices], narrow)
            if equal and self._more:
                both = min(len(weight), whole.shape[1])
                equal = torch.equal(whole[:, :both], functional.linear(x, weight)[:, :both])
            _exact[key] = equal
        return _exact[key]


_exact: dict[tuple[Any, ...], bool] = {}
"""Results of trials on this machine, by the head's shape, the number of replaced rows and the dtype."""


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return functional.pad(rows, (0, 0, 0, -len(rows) % COLUMNS))
