"""Modules of the base that an adapter may target: linear layers, input embedding, head and norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class LayerShape:
    """Shape of a possible target: a linear layer, an embedding or a norm of the base.

    `size_in` of an embedding is its vocabulary; of a norm both sizes are the hidden size. `bias`: whether
    the module has one.
    """

    size_in: int
    size_out: int
    kind: Literal["linear", "embedding", "norm"] = "linear"
    bias: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the module's own weight, not quantized."""
        if self.kind == "norm":
            return (self.size_out,)
        return (self.size_in, self.size_out) if self.kind == "embedding" else (self.size_out, self.size_in)


def empty_base(config: Any, kind: Any = None, **how: Any) -> Any:
    """Build the modules that transformers makes of a config, with parameters on meta, which take no memory.

    `kind`: transformers' class, a causal language model by default; `how`: more of its `from_config`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Random numbers for nothing are most of the time that building takes.
    with init_empty_weights(include_buffers=False), no_init_weights():
        tree = (kind or AutoModelForCausalLM).from_config(config, **how)
    tree.tie_weights()
    return tree


def input_embedding(model: Any) -> nn.Embedding:
    embedding: nn.Embedding = model.get_input_embeddings()
    return embedding


def output_head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def hidden_norms(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the norms over the hidden size, which an adapter may replace by its own."""
    hidden = model.config.get_text_config().hidden_size
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        named = (
            "norm" in type(module).__name__.lower() and "weight" in own and own.keys() <= {"weight", "bias"}
        )
        if named and all(parameter.shape == (hidden,) for parameter in own.values()):
            yield name, module


def adaptable_layers(base: nn.Module) -> dict[str, LayerShape]:
    """Return every linear layer, the input embedding and the norms of hidden size, by full name."""
    layers: dict[str, LayerShape] = {}
    embedding = input_embedding(base)
    norms = {name for name, _ in hidden_norms(base)}
    module: Any
    for name, module in base.named_modules():
        bias = getattr(module, "bias", None) is not None
        if module is embedding:
            layers[name] = LayerShape(embedding.num_embeddings, embedding.embedding_dim, "embedding")
        elif isinstance(module, nn.Linear):
            layers[name] = LayerShape(module.in_features, module.out_features, bias=bias)
        elif name in norms:
            layers[name] = LayerShape(len(module.weight), len(module.weight), "norm", bias)
    return layers


def is_nf4(base: Any) -> bool:
    """Return True if a linear layer is in NF4 and computes in bf16."""
    if type(base).__name__ != "Linear4bit" or base.compute_dtype != torch.bfloat16:
        return False
    return bool(base.weight.quant_state.quant_type == "nf4" and base.weight.dtype == torch.uint8)


def plain_absmax(state: Any) -> torch.Tensor:
    """Return a 4-bit weight's absmax, fp32 [blocks], with double quantization undone.

    Unpacked once per layer on the CPU (1/16 byte a weight): bitsandbytes would do it on every call, a
    tenth of a decode step.
    """
    if not state.nested:
        plain: torch.Tensor = state.absmax
        return plain
    from bitsandbytes.functional import dequantize_blockwise

    unpacked: torch.Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return unpacked
