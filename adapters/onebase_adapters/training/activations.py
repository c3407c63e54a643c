"""What a training step keeps in memory beside weights, from the shapes of the base's layers.

Counted are the tensors that autograd saves for the backward pass over frozen quantized weights; a frozen
product keeps nothing. docs/training-plans.md has how well this fits what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onebase_adapters.training.attention import SHORT
from onebase_adapters.training.loss import CHUNK
from onebase_adapters.training.recipe import Recipe

_FP32 = 4
_CHUNK_COPIES = 3
"""The chunk's logits, their exponentials, and the temporary between."""
_WORK_COPIES = 6
"""fp32 copies of a layer's widest states while its gradient is computed, as measured on the CPU."""


@dataclass(frozen=True)
class Activations:
    """Bytes by cause. A micro-batch has T tokens, n of them supervised.

    layers: bytes a token of each decoder layer that takes part in the backward pass, in fp32 and bf16.
    boundary: bytes a token between two layers, which is all that gradient checkpointing keeps of a layer.
    pairs: bytes a token and a token of its row, in all layers, where attention keeps its matrix. short: as
    pairs, but only for rows of at most SHORT tokens.
    after: bytes a token from the last layer to the head.
    work: bytes a token while one layer is computed. fixed: bytes whatever T is.
    logits: bytes a supervised token. chunk: bytes of the loss's fp32 copies of at most CHUNK of them.
    """

    layers: tuple[int, ...]
    boundary: int
    pairs: int
    short: int
    after: int
    work: int
    fixed: int
    logits: int
    chunk: int

    def kept(self, tokens: int, longest_row: int, checkpointing: bool) -> int:
        """Bytes of a micro-batch, but for the logits."""
        row = min(longest_row, tokens)
        one = max(self.layers, default=0)
        pairs = self.pairs + (self.short if row <= SHORT else 0)
        if checkpointing and self.layers:
            per_token = self.boundary * len(self.layers) + one
            pairs = pairs // len(self.layers)
        else:
            per_token = sum(self.layers)
        per_token += one  # one layer's gradients are there beside what it has kept
        return tokens * (per_token + self.after + self.work + pairs * row) + self.fixed

    def of_logits(self, supervised: int) -> int:
        """Bytes of the logits of `supervised` tokens and of the loss's work on them."""
        return supervised * self.logits + min(supervised, CHUNK) * self.chunk


_PROJECTS_OUT = ("o_proj", "out", "dense", "c_proj", "wo")
"""How the names of attention's last layer begin."""


def activations_of(
    model: Any,
    targets: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    fused: bool = True,
    on_cpu: bool = True,
) -> Activations:
    """Of a model on meta with an adapter on `targets`, of these ranks (by the same names).

    fused: the layers are 4-bit ones, of which fused_lora takes those without dropout and DoRA.
    on_cpu: where short rows are computed by plain products.
    """
    fused = fused and not recipe.dropout and not recipe.use_dora
    config = model.config.get_text_config()
    hidden, size = config.hidden_size, dtype.itemsize
    blocks = _blocks(model)
    first = next(
        (at for at, block in enumerate(blocks) if any(_inside(block, name) for name in targets)), None
    )
    taking_part = blocks[first:] if first is not None else []
    head = model.get_output_embeddings()
    body = [layer for layer in targets.values() if layer is not head]
    widths = [max(layer.in_features, layer.out_features) for layer in body]
    logits = size * config.vocab_size
    if len(body) < len(targets):
        # PEFT adds to a layer that is not quantized in fp32: the delta, the sum and its gradient.
        logits += 2 * _FP32 * config.vocab_size
    return Activations(
        layers=tuple(
            _layer_bytes(model, block, targets, ranks, recipe, config, size, fused) for block in taking_part
        ),
        boundary=size * hidden,
        pairs=_pair_bytes(config, recipe, size) * len(taking_part),
        short=size * config.num_attention_heads * len(taking_part) if on_cpu else 0,
        after=_FP32 * hidden,
        work=_WORK_COPIES * _FP32 * max(widths, default=0),
        fixed=_fixed_bytes(model, targets, recipe, size),
        logits=logits,
        chunk=_CHUNK_COPIES * _FP32 * config.vocab_size,
    )


def _blocks(model: nn.Module) -> list[str]:
    """Names of the decoder's layers, in order: the longest list of modules in the tree."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    inside = {id(module) for module in decoder.modules()}
    name, found = max(
        ((name, module) for name, module in lists if id(module) in inside), key=lambda item: len(item[1])
    )
    return [f"{name}.{number}" for number in range(len(found))]


def _inside(block: str, name: str) -> bool:
    return name.startswith(f"{block}.")


def _layer_bytes(
    model: nn.Module,
    block: str,
    targets: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    recipe: Recipe,
    config: Any,
    size: int,
    fused: bool,
) -> int:
    """Bytes a token that one decoder layer keeps."""
    heads = config.num_attention_heads
    queries = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kept: int = 4 * size * queries  # queries, keys and values repeated for the query heads, the output
    for module in model.get_submodule(block).modules():
        if "norm" in type(module).__name__.lower():
            weight = getattr(module, "weight", None)
            width = weight.numel() if weight is not None else config.hidden_size
            kept += _FP32 * (queries if width < config.hidden_size else width)
    inside = {name: layer for name, layer in targets.items() if _inside(block, name)}
    if fused:
        kept += _FP32 * sum(ranks[name] for name in inside) + size * _shared_inputs(inside, config)
    else:
        kept += sum(_adapted_bytes(layer, ranks[name], recipe, size) for name, layer in inside.items())
    return kept + _between_bytes(model.get_submodule(block), config, size)


def _shared_inputs(layers: Mapping[str, nn.Linear], config: Any) -> int:
    """Width of the inputs that are kept as they are, once for all layers of a module that get the same one.

    The output projection of attention gets what attention keeps.
    """
    found = set()
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        if not ("attn" in parent or "attention" in parent) or not last.startswith(_PROJECTS_OUT):
            found.add((parent, layer.in_features))
    return sum(width for _, width in found)


def _adapted_bytes(layer: nn.Linear, rank: int, recipe: Recipe, size: int) -> int:
    """PEFT's own: fp32 copies of the input and of A's product; dropout's mask; DoRA's two products."""
    kept = _FP32 * (layer.in_features + rank)
    if recipe.dropout:
        kept += _FP32 * layer.in_features
    if recipe.use_dora:
        kept += (_FP32 + size) * layer.out_features
    return kept


def _between_bytes(block: nn.Module, config: Any, size: int) -> int:
    """What the MLP keeps between its products: a gate's input and output, and what it is multiplied with."""
    hidden = config.hidden_size
    names = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    outside = {name: layer for name, layer in names.items() if "attn" not in name and "attention" not in name}
    widened = sum(layer.out_features for layer in outside.values() if layer.in_features <= hidden)
    inner = max((layer.in_features for layer in outside.values()), default=0)
    kept = size * (3 * inner if inner and widened >= 2 * inner else widened)
    experts = getattr(config, "num_experts_per_tok", None) or 0
    if experts:
        each = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        kept += experts * size * (3 * each + 2 * hidden)
    return kept


def _pair_bytes(config: Any, recipe: Recipe, size: int) -> int:
    """Attention that the fused kernel does not know keeps its weights in fp32 and in the base's type."""
    window = getattr(config, "sliding_window", None)
    longest = recipe.max_length if isinstance(recipe.max_length, int) else 2048
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is None and (window is None or window >= longest):
        return 0
    heads: int = config.num_attention_heads
    return heads * (_FP32 + size * (3 if softcap else 1))


def _fixed_bytes(model: Any, targets: Mapping[str, nn.Linear], recipe: Recipe, size: int) -> int:
    """The largest weight, unpacked for its product; DoRA unpacks in fp32 and norms it with the update."""
    head = model.get_output_embeddings()
    body = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    largest = max((layer.in_features * layer.out_features for layer in body), default=0)
    if not recipe.use_dora:
        return size * largest
    adapted = max(layer.in_features * layer.out_features for layer in targets.values())
    return max(size * largest, 3 * _FP32 * adapted)
