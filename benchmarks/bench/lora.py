"""Random LoRA adapters in PEFT's format: right in shape, meaningless in content, good for timing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
B_STD = 0.02
"""Standard deviation of B, which is zero in a fresh PEFT adapter, so that each adapter changes the text."""


def make_adapters(
    base_folder: Path, folder: Path, count: int, rank: int = 16, seed: int = 0
) -> dict[str, Path]:
    """Write `count` adapters on q, k, v and o named a0, a1, ... below `folder`, the same for the same seed.

    base_folder: the base's safetensors folder; only the shapes of its tensors are read.

    Raises:
        ValueError: the base has no such layers.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for file in sorted(base_folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for key in sorted(tensors.keys()):
                module = key.removesuffix(".weight")
                if module != key and module.rsplit(".", 1)[-1] in ATTENTION:
                    rows, columns = tensors.get_slice(key).get_shape()
                    shapes[module] = rows, columns
    if not shapes:
        raise ValueError(f"{base_folder} has no weights named {', '.join(ATTENTION)}")
    adapters = {f"a{index}": folder / f"a{index}" for index in range(count)}
    for index, path in enumerate(adapters.values()):
        write_adapter(path, shapes, rank, ATTENTION, [seed, index])
    return adapters


def write_adapter(
    path: Path, shapes: Mapping[str, tuple[int, int]], rank: int, targets: Sequence[str], seed: Sequence[int]
) -> None:
    """Write one adapter as PEFT's two files. A is drawn as PEFT draws it: uniform, bound 1/sqrt(in).

    shapes: (out, in) of the base's layers that it adapts, by name. targets: last parts of those names.
    """
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    for module, (rows, columns) in shapes.items():
        prefix, bound = f"base_model.model.{module}", columns**-0.5
        tensors[f"{prefix}.lora_A.weight"] = rng.uniform(-bound, bound, (rank, columns)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.normal(0.0, B_STD, (rows, rank)).astype(np.float32)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_gguf_adapter(adapter: Path, base_folder: Path, file: Path) -> None:
    """Write the same adapter as llama.cpp reads it.

    Of a Llama the rows of q and k lie in another order there, for its way to turn them by their positions.
    """
    from gguf import GGUFValueType, GGUFWriter

    config = json.loads((base_folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    written = json.loads((adapter / "adapter_config.json").read_text())
    writer = GGUFWriter(file, config["model_type"])
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", written["lora_alpha"])
    if invocation := written.get("alora_invocation_tokens"):
        key, unsigned = "adapter.alora.invocation_tokens", GGUFValueType.UINT32
        writer.add_key_value(key, invocation, GGUFValueType.ARRAY, sub_type=unsigned)
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as tensors:
        for key in sorted(tensors.keys()):
            *_, layer, _, module, kind, _ = key.split(".")
            tensor = tensors.get_tensor(key)
            if kind == "lora_B" and module in heads and config["model_type"] == "llama":
                parts = tensor.reshape(heads[module], 2, -1, tensor.shape[1])
                tensor = np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(tensor.shape)
            writer.add_tensor(f"blk.{layer}.{names[module]}.weight.{kind.lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
