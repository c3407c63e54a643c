"""From a PEFT folder to matrices: PEFT itself loads the canonical folder on a view of the base.

So key mapping, scaling and dtypes are PEFT's own, and the loaded tree is at the same time the
reference against which each served module is compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebase_adapters.base import BaseChangedError, base_tensors, fingerprint
from onebase_adapters.format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFormatError,
    AdapterSpec,
    LayerShape,
    canonicalize,
)
from onebase_adapters.rows import LoraWeights
from onebase_adapters.slots import input_embedding
from onebase_adapters.view import view

_NAME = "version"


@dataclass(frozen=True)
class LoadedAdapter:
    """One version in host memory, ready for a slot."""

    spec: AdapterSpec
    weights: Mapping[str, LoraWeights]

    @property
    def bytes(self) -> int:
        return sum(w.a.nbytes + w.b.nbytes for w in self.weights.values())


def adaptable_layers(base: nn.Module) -> dict[str, LayerShape]:
    """Every linear layer and the input embedding of the base, by full name."""
    layers: dict[str, LayerShape] = {}
    embedding = input_embedding(base)
    for name, module in base.named_modules():
        if module is embedding:
            layers[name] = LayerShape(embedding.num_embeddings, embedding.embedding_dim, "embedding")
        elif isinstance(module, nn.Linear):
            layers[name] = LayerShape(module.in_features, module.out_features)
    return layers


def load_adapter(base: nn.Module, folder: Path, max_rank: int) -> LoadedAdapter:
    """Validate the folder and load it through `PeftModel.from_pretrained` on a view of `base`.

    Raises:
        AdapterFormatError: the folder is not servable, or changes nothing.
        BaseChangedError: loading wrote to the base.
    """
    before = fingerprint(base)
    with tempfile.TemporaryDirectory(prefix="onebase-adapter-") as temporary:
        spec = canonicalize(
            folder / CONFIG_FILE,
            folder / WEIGHTS_FILE,
            adaptable_layers(base),
            max_rank,
            Path(temporary),
            base_tensor=base_tensors(base).get,
        )
        weights = _matrices(peft_model(base, Path(temporary)))
    if fingerprint(base) != before:
        raise BaseChangedError(f"loading {folder.name} changed the base")
    missing = {module.name for module in spec.modules} ^ weights.keys()
    if missing:
        raise AdapterFormatError("unknown_module", f"PEFT does not apply {sorted(missing)[0]} on this base")
    if not all(torch.isfinite(w.b * w.scale).all() for w in weights.values()):
        raise AdapterFormatError("not_finite", "a lora_B times its scale overflows fp32")
    if not any(w.scale and torch.count_nonzero(w.a) and torch.count_nonzero(w.b) for w in weights.values()):
        raise AdapterFormatError(
            "no_effect", "every product scale * B @ A is zero: the adapter would serve the bare base"
        )
    return LoadedAdapter(spec, weights)


def peft_model(base: nn.Module, canonical: Path) -> nn.Module:
    """PEFT's own model of a canonical folder, over a view of the base: the reference for every row."""
    from peft import PeftModel

    model: nn.Module = PeftModel.from_pretrained(view(base), str(canonical), adapter_name=_NAME)
    return model.eval()


def _matrices(model: Any) -> dict[str, LoraWeights]:
    tree = model.get_base_model()
    matrices: dict[str, LoraWeights] = {}
    for name, module in tree.named_modules():
        scaling = getattr(module, "scaling", None)
        if not isinstance(scaling, dict) or _NAME not in scaling:
            continue
        if _NAME in module.lora_A:
            a, b = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
        else:
            a, b = module.lora_embedding_A[_NAME].T, module.lora_embedding_B[_NAME]
        matrices[name] = LoraWeights(_in_host_memory(a), _in_host_memory(b), float(scaling[_NAME]))
    return matrices


def _in_host_memory(matrix: torch.Tensor) -> torch.Tensor:
    """PEFT puts matrices beside the base; on an accelerator only those in slots may stay there."""
    return matrix.detach().float().cpu().contiguous()
