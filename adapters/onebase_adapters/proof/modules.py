"""The proof that what is served is what PEFT computes: module by module, on the same input.

Logits alone prove little in NF4, where a product of 1e-5 moves them by more than 1. So each wrapped module
(adapted or not) is compared with PEFT's module of the same name: bit-equal on the CPU, and within 1e-2 of
PEFT's largest output on CUDA, where kernels choose their order of summation by the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onebase_engine.base.view import view
from onebase_engine.kernels.cpu import find_kernels
from onebase_engine.lora.rows import TILE, RowGroup, RowMap, Stack, StepRows, Term, Tile
from onebase_engine.lora.slots import AdapterSlots, wrap_layers
from onebase_engine.lora.weights import AdapterWeights, LoraWeights, ModuleWeights, SavedModule, TokenRows

CUDA_TOLERANCE = 1e-2
_VERSION, _OTHER = 0, 1
"""Slots of the version and of its neighbour."""
_OTHER_RANK = 8
_OVERFLOWS = 3e38


class ProofError(Exception):
    """A served module, or a text, is not PEFT's.

    `name` is that of the module or text; `difference` the largest of its outputs, relative to PEFT's largest.
    """

    def __init__(self, name: str, difference: float, message: str) -> None:
        super().__init__(message)
        self.name = name
        self.difference = difference


@dataclass(frozen=True)
class ModuleProof:
    """What was compared. `rows`: input rows of each module, alone and in each mix, taken together."""

    compared: int
    rows: int
    exact: bool
    """Compared bit by bit."""
    largest_difference: float
    """Of any output, relative to PEFT's largest of that module."""
    kernels: str = "torch"
    """What computed: `torch`, or the kernels in C by their set of instructions."""


@torch.inference_mode()
def prove_modules(
    base: nn.Module,
    reference: nn.Module,
    weights: AdapterWeights,
    on_progress: Callable[[float], None] = lambda fraction: None,
    *,
    exact: bool | None = None,
) -> ModuleProof:
    """Compare every wrapped module of a view of `base`, with `weights` in a slot, with PEFT's.

    On 32 input rows each: all of them the version's; every second one of another adapter, whose products
    overflow; every second one of nobody, which must be the base's own.

    Args:
        reference: PEFT's model of the version, on a view of the same base.
        weights: as the engine puts them into a slot.
        on_progress: called with the part that is done, 0 to 1, after each module; what it raises ends the
            proof.
        exact: compare the CPU's way of serving bit by bit, or the accelerators' within a tolerance; None
            chooses by the base's device.

    Raises:
        ProofError: a module differs, or one that the version adapts is not served.
    """
    bench = _Bench(base, weights, exact)
    model: Any = reference
    tree: nn.Module = model.get_base_model()
    largest = 0.0
    for done, name in enumerate(bench.names, start=1):
        largest = max(largest, bench.prove(name, tree.get_submodule(name)))
        on_progress(done / len(bench.names))
    return ModuleProof(len(bench.names), TILE * len(bench.mixes), bench.exact, largest, bench.kernels)


@dataclass(frozen=True)
class _BatchMix:
    """Who has which of the rows. `mine` [rows, 1] bool: the version's; the others may be nobody's."""

    title: str
    rows: RowMap
    mine: torch.Tensor
    others_bare: bool = False


class _Bench:
    """A wrapped view of the base with the version in one slot, and another for a neighbour."""

    def __init__(self, base: nn.Module, weights: AdapterWeights, exact: bool | None) -> None:
        model: Any = base
        head: torch.Tensor = model.get_output_embeddings().weight
        self.exact = head.device.type == "cpu" if exact is None else exact
        self._base = base
        self._weights = weights
        self._dtype, self._device = head.dtype, head.device
        self._step = StepRows()
        kernels = find_kernels(self._device, self._dtype) if self.exact else None
        self.kernels = "torch" if kernels is None else kernels.name
        self._modules = wrap_layers(view(base), self._step, slots=2, tiled=self.exact, kernels=kernels)
        self.names = list(self._modules)
        unserved = sorted(weights.keys() - self._modules.keys())
        if unserved:
            raise ProofError(unserved[0], math.inf, f"{unserved[0]} is adapted, and no slot serves it")
        self._slots = AdapterSlots(self._modules, 2, self._device)
        self._slots.load(_VERSION, weights)
        self._random = torch.Generator().manual_seed(0)
        self.mixes = list(
            _batch_mixes(self._device, tiled=self.exact) if kernels is None else _grouped_mixes()
        )

    def prove(self, name: str, expected: nn.Module) -> float:
        """The largest relative difference of any output. Raises ProofError."""
        bare, served = self._base.get_submodule(name), self._modules[name]
        self._slots.load(_OTHER, {name: _neighbour(bare, self._weights.get(name))})
        largest = 0.0
        for x in self._inputs(bare, _trained_tokens(expected, self._weights.get(name))):
            wanted, unadapted = expected(x)[0], bare(x)[0]
            for mix in self.mixes:
                self._step.tokens = self._step.logits = mix.rows
                got, mine = served(x)[0], mix.mine
                if mix.others_bare:
                    right = torch.where(mine, wanted, unadapted)
                else:
                    got, right = got[mine[:, 0]], wanted[mine[:, 0]]
                largest = max(largest, self._compare(name, mix.title, got, right))
        self._slots.clear(_OTHER)
        return largest

    def _compare(self, name: str, title: str, got: torch.Tensor, right: torch.Tensor) -> float:
        if got.dtype == right.dtype and torch.equal(got, right):
            return 0.0
        if not torch.isfinite(right).all():
            raise ProofError(name, math.inf, f"{name} overflows: PEFT's own output is not finite either")
        difference = float((got.float() - right.float()).abs().max() / right.float().abs().max())
        if math.isnan(difference):
            difference = math.inf
        if self.exact or difference > CUDA_TOLERANCE:
            raise ProofError(
                name,
                difference,
                f"{name} differs from PEFT's {title}: by {difference:.1e} of its largest output",
            )
        return difference

    def _inputs(self, bare: Any, tokens: list[int]) -> Iterator[torch.Tensor]:
        """Seeded rows [1, 32, in]; for an embedding ids [1, 32], `tokens` among them."""
        if not isinstance(bare, nn.Embedding):
            size = bare.in_features if isinstance(bare, nn.Linear) else bare.weight.shape[0]
            x = torch.randn(1, TILE, size, generator=self._random)
            yield x.to(self._device, self._dtype)
            return
        padding = TILE - len(tokens) % TILE
        others = torch.randint(bare.num_embeddings, (padding,), generator=self._random)
        for ids in torch.split(torch.cat([torch.tensor(tokens, dtype=torch.int64), others]), TILE):
            yield ids[None].to(self._device)


def _trained_tokens(expected: nn.Module, weights: ModuleWeights | None) -> list[int]:
    """Tokens that have rows of their own, in PEFT's module or in what is served."""
    peft: Any = getattr(expected, "token_adapter", None)
    found = set() if peft is None else {token for some in peft.token_indices.values() for token in some}
    return sorted(found | set(weights.indices.tolist() if isinstance(weights, TokenRows) else ()))


def _neighbour(bare: Any, weights: ModuleWeights | None) -> ModuleWeights:
    """Another adapter's weights, of the version's rank. They overflow, so that what leaks of them is seen."""
    rank = weights.rank if isinstance(weights, LoraWeights) else _OTHER_RANK
    if isinstance(bare, nn.Embedding):
        a, size_out = torch.full((bare.num_embeddings, rank), _OVERFLOWS), bare.embedding_dim
    elif isinstance(bare, nn.Linear):
        a, size_out = torch.full((rank, bare.in_features), _OVERFLOWS), bare.out_features
    else:
        return SavedModule(torch.full_like(bare.weight, math.inf))
    return LoraWeights(a, torch.ones(size_out, rank), 1.0)


def _grouped_mixes() -> Iterator[_BatchMix]:
    """The same for the kernels in C, which take rows by groups."""
    even, odd = tuple(range(0, TILE, 2)), tuple(range(1, TILE, 2))
    mine = torch.arange(TILE)[:, None] % 2 == 0
    version, other = ((_VERSION, 1.0),), ((_OTHER, 1.0),)
    whole = RowMap(groups=(RowGroup(tuple(range(TILE)), version),))
    yield _BatchMix("for a row alone", whole, torch.ones_like(mine))
    mixed = RowMap(groups=(RowGroup(odd, other), RowGroup(even, version)))
    yield _BatchMix("next to another adapter's rows", mixed, mine)
    lonely = RowMap(groups=(RowGroup(odd, version),))
    yield _BatchMix("next to rows without an adapter", lonely, ~mine, others_bare=True)


def _batch_mixes(device: torch.device, *, tiled: bool) -> Iterator[_BatchMix]:
    """The ways in which the engine's batches mix rows: a prefill, and decodes through the stack or not."""
    everyone = torch.ones(TILE, 1, dtype=torch.bool, device=device)
    even = torch.arange(TILE, device=device)[:, None] % 2 == 0
    yield _BatchMix("for a row alone", RowMap((Tile(0, TILE, (Term(_VERSION),)),)), everyone)
    weight = torch.cat([even, ~even], dim=1).float()
    stack = Stack(0, TILE, weight, plain=True)
    terms = (Term(_OTHER, mask=~even), Term(_VERSION, mask=even))
    rows = RowMap((Tile(0, TILE, terms, stack),)) if tiled else RowMap(stack=stack)
    yield _BatchMix("next to another adapter's rows", rows, even)
    if tiled:
        # Without the stack, which the engine uses only where it is exact.
        yield _BatchMix("next to another adapter's rows", RowMap((Tile(0, TILE, terms),)), even)
    lonely = Stack(0, TILE, torch.cat([~even, torch.zeros_like(even)], dim=1).float(), plain=True)
    rows = RowMap((Tile(0, TILE, (Term(_VERSION, mask=~even),)),)) if tiled else RowMap(stack=lonely)
    yield _BatchMix("next to rows without an adapter", rows, ~even, others_bare=True)
