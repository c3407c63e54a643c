"""Prove that each served module computes what PEFT's does, on the same input.

Logits alone prove little in NF4, where a product of 1e-5 moves them by more than 1. So each wrapped module
(adapted or not) is compared with PEFT's module of the same name. Where trials on this machine have shown that
the kernels sum as PyTorch does, its bits must be PEFT's. Elsewhere only the order of sums differs: then the
result in fp64 decides, and the module must be no farther from it than PEFT's own output is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from onebase_adapters.proof.mixtures import Inputs, Mixture, compare, compare_amplified
from onebase_adapters.proof.report import ProofError
from onebase_engine.base.view import view
from onebase_engine.engine.experts import attach_experts
from onebase_engine.kernels.cpu import find_kernels
from onebase_engine.kernels.interface import TILE, Kernels, RowGroup, RowMap
from onebase_engine.kernels.reference import ReferenceLinear
from onebase_engine.kernels.weights import (
    AdapterWeights,
    ExpertLora,
    LoraWeights,
    ModuleWeights,
    SavedModule,
    TokenRows,
    words_of,
)
from onebase_engine.lora.module import StepRows
from onebase_engine.lora.slots import AdapterSlots, SlotLinear, SlotModule, wrap_layers

TOLERANCE = 1e-2
"""Largest difference, relative to PEFT's largest output, of modules without PEFT's bits that have no result
in fp64 (norms, embeddings, 8-bit layers), which PyTorch computes on both sides."""
ERROR_RATIO = 1.05
"""Largest ratio of a module's error against fp64 to that of PEFT's output, in the root mean square. By
rounding alone two orders of summation differ by less than a hundredth."""
_VERSION, _OTHER = 0, 1
"""Slots of the version and of its neighbour."""
_OTHER_RANK = 8
_OVERFLOWS = 3e38
SUM_ERROR = 2.0**-20
"""Bound of the error of a sum in fp32, in any order, relative to the sum of its terms' sizes. The standard
deviation of that error is a 30th of it, measured on 64 to 14,336 random terms that are added one by one."""
_MOST_POWER = 120
"""Largest power of two by which an adapter's part is multiplied."""


@dataclass(frozen=True)
class ModuleProof:
    """Result of comparing modules. `rows`: input rows of each module, alone and in each mix, taken
    together."""

    compared: int
    rows: int
    exact: int
    """Number of modules that had PEFT's bits."""
    largest_difference: float
    """Largest difference of any output from PEFT's, relative to PEFT's largest of that module."""
    error_ratio: float
    """Largest ratio of the error against fp64 (root mean square) to that of PEFT's output, over the modules
    without PEFT's bits; 0 without any."""
    tolerated: int
    """Number of modules without PEFT's bits that have no result in fp64, and were within TOLERANCE."""
    kernels: str
    """Kernels that computed: `torch`, or the kernels in C by their set of instructions."""


@dataclass(frozen=True)
class _Distance:
    """Distance of a module from PEFT's: largest relative difference, ratio of errors (0: bit-equal, or not
    known), and whether it was accepted by TOLERANCE alone."""

    difference: float = 0.0
    ratio: float = 0.0
    tolerated: bool = False

    def or_more(self, other: _Distance) -> _Distance:
        return _Distance(
            max(self.difference, other.difference),
            max(self.ratio, other.ratio),
            self.tolerated or other.tolerated,
        )


@dataclass(frozen=True)
class _BatchMix:
    """Assignment of a batch's rows. `mine` [rows] bool: rows of the version; `seen`: rows that are
    compared."""

    title: str
    rows: RowMap
    mine: torch.Tensor
    seen: torch.Tensor


class ModuleProver:
    """Compares every wrapped module of a view of a base, with a version in a slot, with PEFT's.

    The view is kept from proof to proof: wrapping it takes a good part of the time of a comparison.
    """

    def __init__(self, base: nn.Module, kernels: Kernels | None = None) -> None:
        """`kernels`: those that will serve; None: those that serve on the base's device."""
        model: Any = base
        head: torch.Tensor = model.get_output_embeddings().weight
        self._base = base
        self._dtype, self._device = head.dtype, head.device
        self._step = StepRows()
        self._kernels = kernels if kernels is not None else find_kernels(self._device, self._dtype)
        self._view = view(base)
        self._modules = wrap_layers(self._view, self._step, self._kernels, slots=2)
        self._experts = attach_experts(self._view, self._kernels, self._step, 2)
        self._slots = AdapterSlots({**self._modules, **self._experts}, 2, self._device)
        self._mixes = list(_batch_mixes(self._device))
        self._random = torch.Generator()
        self._untouched: dict[str, _Distance] = {}
        """Distances of modules that a version left alone, which hold for all versions that do."""

    @torch.inference_mode()
    def prove(
        self,
        reference: nn.Module,
        weights: AdapterWeights,
        on_progress: Callable[[float], None] = lambda fraction: None,
    ) -> ModuleProof:
        """Compare the modules on 32 input rows each, in three mixes of rows.

        In the first mix all rows are the version's. In the second, every other row is of a neighbour whose
        products overflow. In the third, every other row has no adapter, and must get the base's own output.

        Args:
            reference: PEFT's model of the version, on a view of the same base.
            weights: as the engine puts them into a slot.
            on_progress: called with the part that is done, 0 to 1, after each module; what it raises ends
                the proof.

        Raises:
            ProofError: a module differs, or one that the version adapts is not served.
        """
        model: Any = reference
        tree: nn.Module = model.get_base_model()
        unserved = sorted(weights.keys() - self._modules.keys() - self._experts.keys())
        if unserved:
            raise ProofError(unserved[0], math.inf, f"{unserved[0]} is adapted, and no slot serves it")
        found: list[_Distance] = []
        mixtures = _mixtures(weights)
        count = len(self._modules) + len(mixtures)
        try:
            self._slots.load(_VERSION, weights)
            for name in self._modules:
                found.append(self._module(name, tree.get_submodule(name), weights.get(name)))
                on_progress(len(found) / count)
            for path, own in mixtures.items():
                found.append(self._mixture(path, tree, own))
                on_progress(len(found) / count)
        finally:
            self._slots.clear(_VERSION)
            self._slots.clear(_OTHER)
        return ModuleProof(
            compared=len(found),
            rows=TILE * len(self._mixes),
            exact=sum(one.ratio == 0 and not one.tolerated for one in found),
            largest_difference=max(one.difference for one in found),
            error_ratio=max(one.ratio for one in found),
            tolerated=sum(one.tolerated for one in found),
            kernels=self._kernels.name,
        )

    def _module(self, name: str, expected: nn.Module, own: ModuleWeights | None) -> _Distance:
        """Return the module's distance from PEFT's. Raises ProofError."""
        bare, served = self._base.get_submodule(name), self._modules[name]
        untouched = own is None and _is_copy(expected, bare)
        if untouched and name in self._untouched:
            return self._untouched[name]
        # Seeded by the name, so that a module's inputs do not depend on which modules came before.
        self._random.manual_seed(zlib.crc32(name.encode()))
        self._slots.load(_OTHER, {name: _neighbour(bare, own)})
        found = _Distance()
        words = words_of(own) if own is not None else 0
        known = len(bare.weight) - 1 if isinstance(bare, nn.Embedding) else 0
        for x in self._inputs(bare, _trained_tokens(expected, bare, own), words):
            # The base has no rows for the tokens that the version adds.
            base_x = x.clamp(max=known) if known else x
            wanted, unadapted = peft_output(expected, own, x)[0], bare(base_x)[0]
            own_columns = wanted.shape[1]
            wanted, unadapted = _alike(wanted, unadapted)
            truth = None
            if not served.exact(_VERSION) and _has_truth(served):
                truth = _Truth(bare, own, x[0])
            for mix in self._mixes:
                right = torch.where(mix.mine[:, None], wanted, unadapted)
                got = self._run(served, torch.where(mix.mine, x[0], base_x[0])[None] if known else x, mix)
                if got.shape != right.shape or own_columns < right.shape[1]:
                    got = _within(got, right, mix, own_columns)
                found = found.or_more(self._compare(served, name, mix, got[mix.seen], right[mix.seen], truth))
            if truth is not None and isinstance(own, LoraWeights):
                self._prove_amplified(served, name, own, x, truth)
        self._slots.clear(_OTHER)
        if untouched:
            self._untouched[name] = found
        return found

    def _mixture(self, path: str, tree: nn.Module, own: Mapping[str, ExpertLora]) -> _Distance:
        """Return the distance of a layer's experts from PEFT's. Raises ProofError.

        own: the version's matrices, by the parameter's full name.
        """
        mixture = Mixture(path, self._base.get_submodule(path), tree)
        self._random.manual_seed(zlib.crc32(path.encode()))
        inputs = mixture.inputs(self._random, self._dtype, self._device)
        self._slots.load(_OTHER, {name: _neighbour_of(one) for name, one in own.items()})
        alone, apart_of, lonely = self._mixes
        served = self._serve(path, inputs, alone.rows)
        found = compare(mixture, inputs, served)
        bare = self._serve(path, inputs, RowMap())
        for mix in (apart_of, lonely):
            got = self._serve(path, inputs, mix.rows)
            right = torch.where(mix.mine[:, None], served, bare)
            self._check_rows(path, mix, got[mix.seen], right[mix.seen])
        self._slots.clear(_OTHER)
        names = {name.rpartition(".")[2]: name for name in own}

        def serve(large: Mapping[str, ExpertLora]) -> torch.Tensor:
            for name, one in large.items():
                self._experts[names[name]].put(_VERSION, one.to(self._device))
            return self._serve(path, inputs, alone.rows)

        try:
            compare_amplified(mixture, inputs, serve)
        finally:
            for name, one in own.items():
                self._experts[name].put(_VERSION, one.to(self._device))
        return _Distance(found.difference, found.ratio)

    def _check_rows(self, path: str, mix: _BatchMix, got: torch.Tensor, right: torch.Tensor) -> None:
        """Raise ProofError unless rows are those that were served without neighbours.

        Bits agree where they do not depend on neighbours, as on the CPU.
        """
        largest = right.float().abs().max()
        difference = float((got.float() - right.float()).abs().max() / largest)
        allowed = 0.0 if self._kernels.tiled else TOLERANCE
        if not difference <= allowed:
            raise ProofError(
                path,
                difference,
                f"{path} gives a row another result {mix.title}: by {difference:.1e} of its largest output",
            )

    def _serve(self, path: str, inputs: Inputs, rows: RowMap) -> torch.Tensor:
        self._step.tokens = rows
        y: torch.Tensor = self._view.get_submodule(path)(*inputs)
        return y

    def _run(self, served: SlotModule, x: torch.Tensor, mix: _BatchMix) -> torch.Tensor:
        self._step.tokens = self._step.logits = mix.rows
        y: torch.Tensor = served(x)[0]
        return y

    def _compare(
        self,
        served: SlotModule,
        name: str,
        mix: _BatchMix,
        got: torch.Tensor,
        right: torch.Tensor,
        truth: _Truth | None,
    ) -> _Distance:
        if got.dtype != right.dtype:
            raise ProofError(name, math.inf, f"{name} gives {got.dtype} where PEFT's gives {right.dtype}")
        if torch.equal(got, right):
            return _Distance()
        if not torch.isfinite(right).all():
            raise ProofError(name, math.inf, f"{name} overflows: PEFT's own output is not finite either")
        difference = float((got.float() - right.float()).abs().max() / right.float().abs().max())
        if not math.isfinite(difference):
            difference = math.inf
        said = f"{name} differs from PEFT's {mix.title}: by {difference:.1e} of its largest output"
        if served.exact(_VERSION) or difference == math.inf or (truth is None and difference > TOLERANCE):
            raise ProofError(name, difference, said)
        if truth is None:
            return _Distance(difference, tolerated=True)
        noise, own, peft = truth.noise(mix), truth.error(got, mix), truth.error(right, mix)
        if not peft <= noise:
            raise ProofError(
                name,
                difference,
                f"{name}: PEFT's own output is not what the adapter's tensors say {mix.title}",
            )
        # In fp32 the order of sums is most of the error, else the last rounding.
        allowed = noise if got.dtype == torch.float32 else ERROR_RATIO * peft
        if not own <= allowed or truth.exceeds(got, mix) or truth.leans(got, right, mix):
            raise ProofError(
                name,
                difference,
                f"{said}, and farther from the result in fp64: {own:.2e}, not {peft:.2e}",
            )
        return _Distance(difference, own / peft if peft else 1.0)

    def _prove_amplified(
        self, served: SlotModule, name: str, own: LoraWeights, x: torch.Tensor, truth: _Truth
    ) -> None:
        """Compare again with the adapter's part so large that rounding of the base's part hides none of it.

        DoRA is left out, because its gain is no separate part.
        """
        factor = None if own.gain is not None else truth.amplifier()
        if factor is None:
            return
        bias = None if own.bias is None else own.bias * factor
        large = replace(own, b=own.b * factor, bias=bias)
        if not torch.isfinite(large.b).all():
            return
        exact = truth.times(factor)
        served.put(_VERSION, self._slots.narrowed({name: large})[name].to(self._device))
        try:
            for mix in (replace(mix, seen=mix.mine) for mix in self._mixes):
                got = self._run(served, x, mix)[mix.seen]
                error = exact.error(got, mix)
                within = error <= exact.noise(mix) and not exact.exceeds(got, mix)
                if not within or exact.leans(got, None, mix):
                    raise ProofError(
                        name,
                        error,
                        f"{name} differs from the result in fp64 {mix.title}, with the adapter made larger: "
                        f"by {error:.1e} in the root mean square",
                    )
        finally:
            served.put(_VERSION, self._slots.narrowed({name: own})[name].to(self._device))

    def _inputs(self, bare: Any, tokens: list[int], words: int) -> Iterator[torch.Tensor]:
        """Yield seeded rows [1, 32, in]; for an embedding ids [1, 32], `tokens` among them.

        Other ids are below `words`, unless it is 0.
        """
        if not isinstance(bare, nn.Embedding):
            size = bare.in_features if isinstance(bare, nn.Linear) else bare.weight.shape[0]
            x = torch.randn(1, TILE, size, generator=self._random)
            yield x.to(self._device, self._dtype)
            return
        padding = TILE - len(tokens) % TILE
        highest = min(words or bare.num_embeddings, bare.num_embeddings)
        others = torch.randint(highest, (padding,), generator=self._random)
        for ids in torch.split(torch.cat([torch.tensor(tokens, dtype=torch.int64), others]), TILE):
            yield ids[None].to(self._device)


def _mixtures(weights: AdapterWeights) -> dict[str, dict[str, ExpertLora]]:
    """Return the matrices on experts by module of experts and by the parameter's full name."""
    found: dict[str, dict[str, ExpertLora]] = {}
    for name, one in weights.items():
        if isinstance(one, ExpertLora):
            found.setdefault(name.rpartition(".")[0], {})[name] = one
    return found


def _neighbour_of(own: ExpertLora) -> ExpertLora:
    """Return another adapter's matrices, which overflow so that any leak is visible."""
    return ExpertLora(torch.full_like(own.a, _OVERFLOWS), torch.ones_like(own.b), 1.0)


def _is_copy(expected: nn.Module, bare: nn.Module) -> bool:
    """Return True if PEFT's module is the base's own: same class, same tensors, nothing wrapped."""
    if type(expected) is not type(bare) or any(expected.children()):
        return False
    if expected._forward_hooks or expected._forward_pre_hooks or "forward" in vars(expected):
        return False
    mine, theirs = ({**m._parameters, **m._buffers} for m in (expected, bare))
    return mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)


def peft_output(expected: nn.Module, own: ModuleWeights | None, x: torch.Tensor) -> torch.Tensor:
    """Return the output of PEFT's module, in which an activated LoRA acts on every row."""
    activated = isinstance(own, LoraWeights) and bool(own.invocation)
    y: torch.Tensor = expected(x, alora_offsets=[x.shape[1]]) if activated else expected(x)
    return y


def _alike(wanted: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [rows, out] with as many columns as the wider one has, zeros where one has none."""
    more = wanted.shape[1] - other.shape[1]
    if more > 0:
        return wanted, functional.pad(other, (0, more))
    return (functional.pad(wanted, (0, -more)) if more else wanted), other


def _within(got: torch.Tensor, right: torch.Tensor, mix: _BatchMix, own_columns: int) -> torch.Tensor:
    """Return logits with those of `right` where a row's own vocabulary does not reach."""
    size = right.shape[1]
    got = functional.pad(got, (0, max(size - got.shape[1], 0)))[:, :size]
    column = torch.arange(size, device=got.device)
    return torch.where(mix.mine[:, None] & (column >= own_columns), right, got)


def _trained_tokens(expected: nn.Module, bare: nn.Module, weights: ModuleWeights | None) -> list[int]:
    """Return the tokens that are new, or have rows of their own, in PEFT's module or in what is served."""
    peft: Any = getattr(expected, "token_adapter", None)
    found = set() if peft is None else {token for some in peft.token_indices.values() for token in some}
    if isinstance(weights, SavedModule) and isinstance(bare, nn.Embedding):
        found |= set(range(bare.num_embeddings, len(weights.weight)))
    return sorted(found | set(weights.indices.tolist() if isinstance(weights, TokenRows) else ()))


def _neighbour(bare: Any, weights: ModuleWeights | None) -> ModuleWeights:
    """Return another adapter's weights, of the version's rank, which overflow so that any leak is visible."""
    rank = weights.rank if isinstance(weights, LoraWeights) else _OTHER_RANK
    if isinstance(bare, nn.Embedding):
        a, size_out = torch.full((bare.num_embeddings, rank), _OVERFLOWS), bare.embedding_dim
    elif isinstance(bare, nn.Linear):
        a, size_out = torch.full((rank, bare.in_features), _OVERFLOWS), bare.out_features
    else:
        return SavedModule(torch.full_like(bare.weight, math.inf))
    return LoraWeights(a, torch.ones(size_out, rank), 1.0)


def _batch_mixes(device: torch.device) -> Iterator[_BatchMix]:
    """Yield the ways in which the engine's batches mix rows."""
    even, odd = tuple(range(0, TILE, 2)), tuple(range(1, TILE, 2))
    mine = torch.arange(TILE, device=device) % 2 == 0
    version, other = ((_VERSION, 1.0),), ((_OTHER, 1.0),)
    whole = RowMap((RowGroup(tuple(range(TILE)), version),))
    every = torch.ones_like(mine)
    yield _BatchMix("for a row alone", whole, every, every)
    mixed = RowMap((RowGroup(odd, other), RowGroup(even, version)))
    yield _BatchMix("next to another adapter's rows", mixed, mine, mine)
    lonely = RowMap((RowGroup(odd, version),))
    yield _BatchMix("next to rows without an adapter", lonely, ~mine, every)


# ---- the result in fp64 ------------------------------------------------------------------------


def _has_truth(served: SlotModule) -> bool:
    return isinstance(served, SlotLinear) and type(served.base).__name__ != "Linear8bitLt"


class _Truth:
    """Outputs in fp64 of a linear layer with an adapter for the rows `x` [rows, in], and bounds of rounding
    errors.

    Outputs `y` are those of a mix's rows that are seen.
    """

    _OUTPUTS = 1024
    """Number of outputs computed at once: a large head in fp64 takes many times its own memory."""

    def __init__(self, bare: Any, own: ModuleWeights | None, x: torch.Tensor) -> None:
        weight, bias = ReferenceLinear(bare, tiled=True).weight()
        self._dtype = x.dtype
        self._unit = float(torch.finfo(x.dtype).eps) / 2
        product, terms = _products(x, weight)
        more = (0 if own is None else words_of(own)) - len(weight)
        if more > 0:
            # Logits of tokens that the base does not have.
            product, terms = functional.pad(product, (0, more)), functional.pad(terms, (0, more))
        self._bias = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
        self.base = product + self._bias
        self._sums = SUM_ERROR * terms
        """Bound of the error of the base's sums, [rows, out]."""
        self._part = self._part_sums = torch.zeros_like(self.base)
        """Part that the adapter adds, and the bound of the error of its sums, [rows, out]."""
        self._stretch = torch.zeros((), dtype=torch.float64)
        """DoRA's gain less 1, by which the base's product is multiplied on top, [out]."""
        self._rounds_part = type(bare).__name__ == "Linear4bit" and not getattr(own, "adds_wide", False)
        """Whether the part is rounded to the base's dtype before it is added."""
        self._replaces = isinstance(own, SavedModule | TokenRows)
        """Whether the adapter has a product of its own in place of the base's."""
        if isinstance(own, LoraWeights):
            self._part, self._part_sums = _lora_part(own, x)
            if own.gain is not None:
                self._stretch = own.gain.to(x.device).double() - 1
                self._rounds_part = False
        elif isinstance(own, SavedModule):
            saved, terms = _products(x, own.weight.to(x))
            added = self._bias if own.bias is None else own.bias.to(x.device).double()
            count = saved.shape[1]
            self._part, self._part_sums = torch.zeros_like(self.base), self._sums.clone()
            self._part[:, :count] = saved + added - self.base[:, :count]
            self._part_sums[:, :count] = SUM_ERROR * terms
        elif isinstance(own, TokenRows):
            # PEFT multiplies with the whole head, and leaves its bias out.
            indices = own.indices.to(x.device)
            rows, own_terms = _products(x, own.rows.to(x))
            self._part = product.index_copy(1, indices, rows) - self.base
            self._part_sums = self._sums.index_copy(1, indices, SUM_ERROR * own_terms)
        self.delta = self._part + self._stretch * product
        self._lift = (self._stretch + 1).abs().clamp(min=1)
        """Factor by which the base's rounding is multiplied, [out]."""

    def times(self, factor: float) -> _Truth:
        """Return a copy with a LoRA's part multiplied by `factor`, a power of two."""
        other = object.__new__(_Truth)
        multiplied = ("delta", "_part", "_part_sums")
        other.__dict__ = {**self.__dict__, **{name: self.__dict__[name] * factor for name in multiplied}}
        return other

    def amplifier(self) -> float | None:
        """Return a power of two that makes the adapter's part several times the base's; None if it has no
        part."""
        part, whole = float(self.delta.square().mean().sqrt()), float(self.base.square().mean().sqrt())
        if not part or not math.isfinite(part):
            return None
        power = math.ceil(math.log2(8 * max(whole, 1e-15)) - math.log2(part))
        return None if power > _MOST_POWER else 2.0 ** max(0, power)

    def error(self, y: torch.Tensor, mix: _BatchMix) -> float:
        """Return the root mean square of the distance of outputs `y` from the result."""
        whole, _ = self._parts(mix)
        return float((y.double() - whole).square().mean().sqrt())

    def noise(self, mix: _BatchMix) -> float:
        """Return the bound of rounding, as root mean square: base, adapter's part and sum are each
        rounded."""
        return float(self._bound(mix).square().mean().sqrt())

    def exceeds(self, y: torch.Tensor, mix: _BatchMix) -> bool:
        """Return True if any output is farther off than two roundings of everything could bring it."""
        whole, _ = self._parts(mix)
        return not bool(((y.double() - whole).abs() <= 2 * self._bound(mix)).all())

    def leans(self, y: torch.Tensor, peft: torch.Tensor | None, mix: _BatchMix) -> bool:
        """Return True if `y` deviates in the direction of the result, or of the adapter's part, by more than
        the order of sums can bring about.

        The deviation is that from PEFT's output or, without one, from the exact sums rounded as PEFT rounds.
        Both have the same roundings in the same places, so an output differs only where the error of a sum
        carries it over a rounding boundary, and by no more than the gap between the outputs of the smallest
        and of the largest sums. Outputs of a sequence share these errors: in rank r all of them go through
        the same r intermediates, and where all |B| are equal they are rounded alike. So the gaps are added up
        as if all of them went one way, and six standard deviations are for what has no common cause.
        """
        whole, delta = self._parts(mix)
        error = y.double() - (self._rounded(mix, 0) if peft is None else peft.double())
        gaps = (self._rounded(mix, 1) - self._rounded(mix, -1)).abs()
        return any(_leans(error, part, gaps) for part in (whole, delta))

    def _rounded(self, mix: _BatchMix, error: float) -> torch.Tensor:
        """Return the outputs, rounded where PEFT rounds, if the error of each sum was `error` times its bound
        (-1: the smallest sums; 0: exact ones; 1: the largest)."""

        def rounded(wide: torch.Tensor) -> torch.Tensor:
            return wide.to(self._dtype).double()

        bare = rounded(self.base + error * self._sums)
        if self._replaces:
            own = rounded(self.base + self.delta + error * self._part_sums)
        else:
            part = self._part + error * self._part_sums
            if self._rounds_part:
                part = rounded(part)
            else:
                # PEFT adds in fp32.
                part = part + error * 2.0**-22 * (self._lift * self.base.abs() + self._part.abs())
            start = rounded(self.base + error * (self._stretch + 1).sign() * self._sums)
            own = rounded(start + self._stretch * rounded(start - self._bias) + part)
        return torch.where(mix.mine[:, None], own, bare)[mix.seen]

    def _bound(self, mix: _BatchMix) -> torch.Tensor:
        whole, delta = self._parts(mix)
        base = self._unit * self.base[mix.seen].abs() + self._sums[mix.seen]
        own = torch.where(mix.mine[mix.seen][:, None], self._part_sums[mix.seen], 0.0)
        return self._lift * base + own + self._unit * (delta.abs() + whole.abs())

    def _parts(self, mix: _BatchMix) -> tuple[torch.Tensor, torch.Tensor]:
        delta = torch.where(mix.mine[mix.seen][:, None], self.delta[mix.seen], 0.0)
        return self.base[mix.seen] + delta, delta


def _lora_part(own: LoraWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a LoRA adds to the rows, without what DoRA's gain does to the base's product, and the bound
    of the error of its sums in fp32; both [rows, out] fp64."""
    wide, a, b = x.double(), own.a.to(x.device).double(), own.b.to(x.device).double()
    low, terms = wide @ a.T @ b.T, wide.abs() @ a.abs().T @ b.abs().T
    if own.bias is not None:
        bias = own.bias.to(x.device).double()
        low, terms = low + bias, terms + bias.abs()
    if own.gain is not None:
        gain = own.gain.to(x.device).double()
        low, terms = gain * low, gain.abs() * terms
    return own.scale * low, SUM_ERROR * abs(own.scale) * terms


def _products(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x @ weight.T, and the same of their absolute values, [rows, out] fp64."""
    wide, sizes = x.double(), x.double().abs()
    exact: list[torch.Tensor] = []
    terms: list[torch.Tensor] = []
    for some in torch.split(weight, _Truth._OUTPUTS):
        block = some.double()
        exact.append(wide @ block.T)
        terms.append(sizes @ block.abs().T)
    return torch.cat(exact, dim=1), torch.cat(terms, dim=1)


def _leans(error: torch.Tensor, part: torch.Tensor, gaps: torch.Tensor) -> bool:
    """Return True if the error is a multiple of `part` beyond `gaps`, taken together, and beyond chance."""
    along = error * part
    allowed = (gaps * part.abs()).sum() + 6 * along.square().sum().sqrt()
    return not bool(along.sum().abs() <= allowed)
