"""Rotary embeddings whose frequencies depend on the longest position of a forward pass.

"longrope" (Phi-3 with 128k, Phi-4-mini) has two sets of frequencies. transformers chooses one for all
positions of a pass by the highest among them, and writes it into the module's buffer: a long row would
change its neighbours, a chunk the next one, and every pass the tensors of the shared base.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_BY_LENGTH = "longrope"


def exact_length(config: Any) -> int | None:
    """Longest row, in tokens, for which the frequencies are fixed; None if they always are."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    limits = [
        int(part["original_max_position_embeddings"]) for part in sets if part.get("rope_type") == _BY_LENGTH
    ]
    return min(limits, default=None)


def pin(model: nn.Module) -> None:
    """Keep a freshly loaded model on the frequencies it has, which are those up to `exact_length`."""
    module: Any
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind == _BY_LENGTH:
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = {
                layers: "default" if own == _BY_LENGTH else own for layers, own in kind.items()
            }
