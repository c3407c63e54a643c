"""Read a LoRA of single experts as one of the parameters that hold the matrices of all experts.

transformers 4 had each expert's matrices as layers of their own (`mlp.experts.3.gate_proj`, in Mixtral
`block_sparse_moe.experts.3.w1`), which PEFT adapted like any other; transformers 5 has one parameter for all.
The matrices of a gate and of what it gates become one pair: A above A, and B beside B in a block diagonal, of
twice the rank. That adds exactly what they added, as PEFT's own conversion does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from onebase_adapters.format.config import WEIGHTS_FILE, AdapterFormatError, ConfigFacts
from onebase_adapters.format.names import BaseModules
from onebase_adapters.format.patterns import NamePattern, PatternError
from onebase_adapters.format.safetensors_file import TensorEntry, TensorFile
from onebase_adapters.format.spellings import PREFIX, TensorName, wrapper_of

_SINGLE = re.compile(r"(.*\blayers\.\d{1,4}\.)(.+)\.(\d{1,5})\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
"""An expert's layer: what is before the name in a layer, the module of experts, the number and the layer."""
_PLACES = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w2": ("down_proj", 0),
}
"""Parameter of all experts, and place among the halves of its rows, by the name of the layer."""
_LONGEST = 300
"""Length of the longest name that is matched."""
_ENDS = {".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B"}


class _Layer(NamedTuple):
    """Matrices of one layer of one expert; `name`: in the file."""

    name: str
    a: TensorEntry
    b: TensorEntry


@dataclass(frozen=True)
class GatheredMatrix:
    """A or B of a parameter of experts, put together from the matrices of single experts."""

    entry: TensorEntry
    """Name and shape with which PEFT would have saved it. It is in no file."""
    layers: tuple[tuple[_Layer, ...], ...]
    """Layers of each expert whose rows are in `places`."""
    places: tuple[int, ...]
    """Places of the layers' rows among the equal parts of the parameter's rows."""
    size_out: int

    def tensor(self, file: TensorFile) -> torch.Tensor:
        """Return the matrix as PEFT lays it out: A [experts * rank, in] or B [out, rank * experts]."""
        if self.entry.name.endswith("lora_A.weight"):
            return torch.cat([file.tensor(one.a).float() for own in self.layers for one in own])
        rank = self.layers[0][0].b.shape[1]
        whole = torch.zeros(self.size_out, rank * len(self.places), len(self.layers))
        for number, own in enumerate(self.layers):
            for column, (place, one) in enumerate(zip(self.places, own, strict=True)):
                rows = one.b.shape[0]
                block = whole[place * rows : (place + 1) * rows, column * rank : (column + 1) * rank, number]
                block.copy_(file.tensor(one.b))
        return whole.view(self.size_out, -1)


class Gathered(NamedTuple):
    """A file's tensors with those of single experts put together."""

    entries: tuple[TensorEntry, ...]
    names: Mapping[str, TensorName]
    facts: ConfigFacts
    matrices: Mapping[str, GatheredMatrix]
    """Matrices that were put together, by the name of their entry."""
    layers: frozenset[str]
    """Names of the experts' layers in the file."""
    notes: tuple[str, ...]


def gather(
    entries: tuple[TensorEntry, ...], names: Mapping[str, TensorName], facts: ConfigFacts, base: BaseModules
) -> Gathered:
    """Put the matrices of single experts together, if the base has parameters for all of them.

    Args:
        names: names of the tensors, as `unwrapped` gives them.

    Raises:
        AdapterFormatError: one is missing or of another rank, or is of a kind that a parameter cannot have.
    """
    single = {
        entry.name: found
        for entry in entries
        if base.mixtures
        and len(entry.name) <= _LONGEST
        and names[entry.name].module not in base.layers
        and (found := _SINGLE.fullmatch(names[entry.name].module))
    }
    by_parameter: dict[tuple[str, str], dict[tuple[int, int], dict[str, TensorEntry]]] = {}
    for entry in entries:
        if (found := single.get(entry.name)) is None:
            continue
        before, mixture, number, layer = found.groups()
        what = _ENDS.get(names[entry.name].end)
        if what is None or facts.dora or facts.lora_bias or facts.invocation:
            raise AdapterFormatError(
                "unsupported_kind",
                f"{WEIGHTS_FILE}: {entry.name:.200} is of a single expert. Experts are one parameter here, "
                "which has neither DoRA nor lora_bias nor activated LoRA: train without it, or layers alone",
            )
        parameter, place = _PLACES[layer]
        owner = before + _mixture_of(before, mixture, base)
        own = by_parameter.setdefault((owner, parameter), {}).setdefault((int(number), place), {})
        if what in own:
            raise AdapterFormatError("bad_weights", f"{WEIGHTS_FILE}: {entry.name:.200} is there twice")
        own[what] = entry
    if not by_parameter:
        return Gathered(entries, names, facts, {}, frozenset(), ())
    matrices: dict[str, GatheredMatrix] = {}
    named = {name: one for name, one in names.items() if name not in single}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for (owner, parameter), by_layer in by_parameter.items():
        adapted = [f"{owner}.{one}" for one in ("gate_up_proj", "down_proj") if (owner, one) in by_parameter]
        path = f"{owner}.{parameter}"
        made, ranks[path], alphas[path] = _gathered(
            path, by_layer, names, facts, base, wrapper_of(path, adapted)
        )
        for one, name in made:
            if one.entry.name in names:
                raise AdapterFormatError(
                    "bad_weights", f"{WEIGHTS_FILE} has {one.entry.name:.200} and matrices of single experts"
                )
            matrices[one.entry.name], named[one.entry.name] = one, name
    first = min(single)
    note = (
        f"The matrices of single experts, such as {first:.150}, are read as those of the parameters that "
        "hold all experts, of as much more rank as layers share one."
    )
    kept = tuple(entry for entry in entries if entry.name not in single)
    facts = replace(
        facts,
        target_parameters=(*facts.target_parameters, *ranks),
        rank_pattern=_with(facts.rank_pattern, ranks),
        alpha_pattern=_with(facts.alpha_pattern, alphas),
    )
    layers = frozenset(names[name].module for name in single)
    return Gathered(
        (*kept, *(one.entry for one in matrices.values())), named, facts, matrices, layers, (note,)
    )


def _mixture_of(before: str, mixture: str, base: BaseModules) -> str:
    """Return the base's name, within its layer, of the module that holds a layer's experts.

    Raises:
        AdapterFormatError: the base has none there.
    """
    number = before.rpartition("layers.")[2]
    inside = {owner.rpartition("layers.")[2].partition(".")[2] for owner in base.mixtures}
    known = mixture if mixture in inside else min(inside) if len(inside) == 1 else ""
    if not any(owner.endswith(f"layers.{number}{known}") for owner in base.mixtures):
        raise AdapterFormatError(
            "unknown_module", f"{WEIGHTS_FILE}: the base has no experts {before:.100}{mixture:.50}"
        )
    return known


def _gathered(
    path: str,
    by_layer: Mapping[tuple[int, int], Mapping[str, TensorEntry]],
    names: Mapping[str, TensorName],
    facts: ConfigFacts,
    base: BaseModules,
    wrapper: str,
) -> tuple[list[tuple[GatheredMatrix, TensorName]], float, float]:
    """Return A and B of a parameter with their names, and its rank and alpha.

    path: name of the parameter in the file's words.
    """
    inside = path.rpartition("layers.")[2]
    shape = next(layer for name, layer in base.layers.items() if name.endswith(f"layers.{inside}"))
    parts = 2 if path.endswith("gate_up_proj") else 1
    if shape.transposed or (parts == 2 and not shape.gate_first):
        raise AdapterFormatError(
            "unsupported_kind",
            f"{WEIGHTS_FILE} has matrices of single experts, and this base lays out {path:.150} in another "
            "way than Mixtral. Train its parameters (target_parameters)",
        )
    places = tuple(sorted({place for _, place in by_layer}))
    settings: dict[tuple[int, float], str] = {}
    layers: list[tuple[_Layer, ...]] = []
    for number in range(shape.count):
        own = []
        for place in places:
            both = by_layer.get((number, place), {})
            if len(both) < 2:
                raise AdapterFormatError(
                    "incomplete",
                    f"{WEIGHTS_FILE} has matrices of some experts of {path:.150}, and not both of expert "
                    f"{number}",
                )
            name = names[both["lora_A"].name].module
            rank, alpha = _setting(name, facts)
            settings.setdefault((rank, alpha), name)
            expected = {"lora_A": (rank, shape.size_in), "lora_B": (shape.size_out // parts, rank)}
            for what, entry in both.items():
                if entry.shape != expected[what]:
                    raise AdapterFormatError(
                        "bad_shape",
                        f"{WEIGHTS_FILE}: {what} of {name:.150} is {list(entry.shape)}; rank {rank} on this "
                        f"base needs {list(expected[what])}",
                    )
            own.append(_Layer(name, both["lora_A"], both["lora_B"]))
        layers.append(tuple(own))
    if strange := [number for number, _ in by_layer if number >= shape.count]:
        raise AdapterFormatError(
            "unknown_module", f"{WEIGHTS_FILE}: {path:.150} has {shape.count} experts, and no {strange[0]}"
        )
    if len(settings) > 1:
        one, other = sorted(settings.values())[:2]
        raise AdapterFormatError(
            "unsupported_kind",
            f"{WEIGHTS_FILE}: {one:.100} and {other:.100} differ in rank or alpha. Experts are one parameter "
            "here, with one rank and one alpha: train them alike",
        )
    ((rank, alpha),) = settings
    count = len(places)
    shapes = {
        "lora_A": (shape.count * count * rank, shape.size_in),
        "lora_B": (shape.size_out, count * rank * shape.count),
    }
    made = []
    for what, end in (("lora_A", ".lora_A.weight"), ("lora_B", ".lora_B.weight")):
        entry = TensorEntry(f"{PREFIX}{wrapper}{end}", torch.float32, shapes[what], 0)
        made.append((GatheredMatrix(entry, tuple(layers), places, shape.size_out), TensorName(wrapper, end)))
    # So that alpha / rank, or with rsLoRA alpha / sqrt(rank), stays what it was.
    return made, count * rank, alpha * (math.sqrt(count) if facts.rslora else count)


def _setting(name: str, facts: ConfigFacts) -> tuple[int, float]:
    """Return the rank and the alpha of a layer."""
    try:
        return int(facts.rank_pattern.lookup(name, facts.rank)), facts.alpha_pattern.lookup(name, facts.alpha)
    except PatternError as error:
        raise AdapterFormatError("bad_config", f"rank_pattern and alpha_pattern: {error}") from None


def _with(pattern: NamePattern, values: Mapping[str, float]) -> NamePattern:
    """Return a pattern that has values for whole names, before all others."""
    try:
        return NamePattern(
            {**{f"^{re.escape(name)}": value for name, value in values.items()}, **pattern.values}
        )
    except PatternError as error:
        raise AdapterFormatError("bad_config", f"rank_pattern and alpha_pattern: {error}") from None
