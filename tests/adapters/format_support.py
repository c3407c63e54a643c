"""Small adapters as bytes, and bases as the format sees them: layers and tensors by name."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from onebase_adapters.format.canonical import AdapterFormatError, AdapterSpec, canonicalize
from onebase_engine.base.layers import LayerShape
from onebase_engine.base.view import view

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Q0, Q1, EMBEDDING, NORM, HEAD = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.embed_tokens",
    "model.norm",
    "lm_head",
)
LAYERS = {
    EMBEDDING: LayerShape(10, 8, "embedding"),
    Q0: LayerShape(8, 6),
    Q1: LayerShape(8, 6),
    "model.layers.0.input_layernorm": LayerShape(8, 8, "norm"),
    "model.layers.1.input_layernorm": LayerShape(8, 8, "norm"),
    NORM: LayerShape(8, 8, "norm", bias=True),
    HEAD: LayerShape(8, 10),
}
"""A base of two layers, 8 wide, with ten tokens."""

A0, B0 = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
PAIR = {A0: torch.ones(2, 8), B0: torch.ones(6, 2)}
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
ROWS = f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"

BASE = {
    f"{EMBEDDING}.weight": torch.linspace(-1, 1, 80).reshape(10, 8).bfloat16(),
    f"{HEAD}.weight": torch.linspace(-2, 2, 80).reshape(10, 8).bfloat16(),
    f"{NORM}.weight": torch.ones(8, dtype=torch.bfloat16),
    f"{NORM}.bias": torch.zeros(8, dtype=torch.bfloat16),
    f"{Q0}.weight": torch.ones(24, 1, dtype=torch.uint8),
}
TIED = {name: tensor for name, tensor in BASE.items() if name != f"{HEAD}.weight"}
"""The same with a tied head, as `named_parameters` lists it: once."""


def write(folder: Path, tensors: Mapping[str, torch.Tensor] = PAIR, **fields: Any) -> Path:
    (folder / CONFIG).write_text(json.dumps({**SETTINGS, **fields}))
    save_file(dict(tensors), folder / WEIGHTS)
    return folder


def write_raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A weights file byte by byte; `length`: what it says of its header's size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    declared = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", declared) + text + data)


def entry(start: int, shape: list[int]) -> dict[str, Any]:
    size = 4
    for n in shape:
        size *= n
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}


def read(
    folder: Path,
    max_rank: int = 64,
    layers: Mapping[str, LayerShape] = LAYERS,
    base: Mapping[str, torch.Tensor] = BASE,
    target: Path | None = None,
) -> AdapterSpec:
    if target is None:
        with tempfile.TemporaryDirectory() as temporary:
            return read(folder, max_rank, layers, base, Path(temporary))
    files = folder / CONFIG, folder / WEIGHTS
    return canonicalize(*files, layers, max_rank, target, base_tensor=base.get)


def refusal(folder: Path, **arguments: Any) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as refused:
        read(folder, **arguments)
    str(refused.value).encode()
    assert len(str(refused.value)) < 500
    return refused.value


def layers_of(base: nn.Module) -> dict[str, LayerShape]:
    """The layers of a real base that an adapter may name."""
    hidden = base.get_input_embeddings().embedding_dim  # type: ignore[operator]
    layers: dict[str, LayerShape] = {}
    for name, module in base.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None) is not None
        if isinstance(module, nn.Embedding):
            layers[name] = LayerShape(module.num_embeddings, module.embedding_dim, "embedding")
        elif isinstance(module, nn.Linear):
            layers[name] = LayerShape(module.in_features, module.out_features, bias=bias)
        elif (
            "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.numel() == hidden
        ):
            layers[name] = LayerShape(hidden, hidden, "norm", bias)
    return layers


def read_for(base: nn.Module, folder: Path, target: Path | None = None) -> AdapterSpec:
    """Read a folder as an adapter of a real base."""
    return read(folder, layers=layers_of(base), base=dict(base.named_parameters()), target=target)


def train(base: nn.Module, folder: Path, fields: dict[str, Any], seed: int = 1, **saving: Any) -> Path:
    """An adapter that PEFT made and saved, with everything trainable in it changed at random."""
    torch.manual_seed(seed)
    model = get_peft_model(
        view(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **fields})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **{"save_embedding_layers": False, **saving})
    return folder


def logits(base: nn.Module, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What PEFT's own model of the folder answers."""
    model = in_one_layout(PeftModel.from_pretrained(view(base), str(folder)).eval())
    with torch.inference_mode():
        result: torch.Tensor = model(tokens).logits
    return result


def in_one_layout(model: PeftModel) -> PeftModel:
    """The model with each LoRA matrix stored row by row.

    With `ensure_weight_tying` PEFT ties the head's A to the embedding's B, transposed. Some processors sum a
    product with a transposed matrix in another order: the same numbers, other last bits.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "lora_" in name and not parameter.is_contiguous():
            owner, _, child = name.rpartition(".")
            own = nn.Parameter(parameter.detach().contiguous(), requires_grad=False)
            setattr(model.get_submodule(owner), child, own)
    return model
