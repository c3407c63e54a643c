"""Read an adapter's two files against an unquantized base, tensor by tensor."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from onebase_adapters.export.base_files import BaseFiles, ExportError
from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE, AdapterFormatError, canonicalize
from onebase_adapters.format.config import MAX_RANK
from onebase_adapters.format.names import BaseModules
from onebase_adapters.format.spec import AdapterSpec, ModuleSpec
from onebase_adapters.format.spellings import wrapper_of
from onebase_adapters.format.tensors import part_of


@dataclass(frozen=True)
class AdapterParts:
    """Validated adapter. `part` reads its tensors, in fp32 except those of saved modules."""

    spec: AdapterSpec
    modules: Mapping[str, ModuleSpec]
    _file: Path
    _names: Mapping[tuple[str, str], str]
    _mixtures: Mapping[str, tuple[str, ...]]
    """Parameters of each module of experts, in the order in which PEFT wraps them."""
    _experts: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def part(self, module: str, what: str) -> torch.Tensor:
        """Return one tensor of a module: `lora_A`, `lora_B`, `lora_B.bias`, `weight`, ..."""
        with safe_open(self._file, framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(self._names[module, what])
        return found

    def expert_matrices(self, parameter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [experts, rank, in] and B [experts, out, rank] of a parameter of experts, in fp32."""
        if parameter not in self._experts:
            owner = parameter.rpartition(".")[0]
            adapted = [one for one in self._mixtures[owner] if one in self.modules]
            a, b = (self.part(wrapper_of(parameter, adapted), what) for what in ("lora_A", "lora_B"))
            count = self.modules[parameter].experts
            self._experts.clear()  # they are asked for one parameter after the other
            self._experts[parameter] = (
                a.view(count, -1, a.shape[1]),
                b.view(len(b), -1, count).permute(2, 0, 1),
            )
        return self._experts[parameter]

    def scale(self, module: str) -> float:
        """Return the factor that PEFT applies to B @ A of a module."""
        spec = self.modules[module]
        return spec.alpha / (math.sqrt(spec.rank) if self.spec.rslora else spec.rank)


@contextmanager
def opened_adapter(folder: Path, base: BaseFiles) -> Iterator[AdapterParts]:
    """Yield the adapter in a PEFT folder, checked as a server checks it; valid inside the block.

    Raises:
        ExportError: it is no adapter of this base.
    """
    with tempfile.TemporaryDirectory(prefix="onebase-export-") as place:
        canonical = Path(place)
        try:
            spec = canonicalize(
                folder / CONFIG_FILE,
                folder / WEIGHTS_FILE,
                base.layers,
                MAX_RANK,
                canonical,
                base_tensor=base.parameter,
            )
        except AdapterFormatError as error:
            raise ExportError(f"the adapter does not fit the base {base.name}: {error}") from error
        finally:
            base.forget()
        if spec.task != "CAUSAL_LM":
            raise ExportError(
                f"the adapter generates no text (its task_type is {spec.task}): export it as peft"
            )
        if spec.words not in (0, base.layers[base.embedding].size_in):
            raise ExportError(
                f"the adapter has a vocabulary of its own ({spec.words} tokens), which the base's files have "
                "no rows for: export it as peft"
            )
        weights = canonical / WEIGHTS_FILE
        modules = {module.name: module for module in spec.modules}
        saved = {module.name for module in spec.modules if module.kind == "saved"}
        with safe_open(weights, framework="pt") as opened:
            names = {part_of(name, saved): name for name in opened.keys()}  # noqa: SIM118
        mixtures = BaseModules(base.layers, base.parameter).mixtures
        yield AdapterParts(spec, modules, weights, names, mixtures)
