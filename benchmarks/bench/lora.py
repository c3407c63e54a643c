"""Random LoRA adapters in PEFT's format: right in shape, meaningless in content, good for timing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_adapters(
    base_folder: Path,
    folder: Path,
    count: int,
    rank: int = 16,
    targets: tuple[str, ...] = TARGETS,
    b_std: float = 0.02,
    seed: int = 0,
) -> dict[str, Path]:
    """Writes `count` adapters named a0, a1, ... below `folder`, the same ones for the same seed.

    A is drawn as PEFT draws it (uniform, bound 1/sqrt(in)); B, zero in a fresh PEFT adapter, is
    normal with `b_std`, so that each adapter changes the text.

    Args:
        base_folder: the base's safetensors folder; only the shapes of its tensors are read.
        targets: last parts of the names of the linear layers to adapt.

    Raises:
        ValueError: no weight in the base has one of the target names.
    """
    shapes = dict(_target_shapes(base_folder, targets))
    if not shapes:
        raise ValueError(f"{base_folder} has no weights named {', '.join(targets)}")
    adapters: dict[str, Path] = {}
    for index in range(count):
        path = folder / f"a{index}"
        write_adapter(path, shapes, rank, targets, b_std, [seed, index])
        adapters[path.name] = path
    return adapters


def write_adapter(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    targets: tuple[str, ...],
    b_std: float,
    seed: Sequence[int],
) -> None:
    """One adapter as PEFT's two files. `shapes`: (out, in) of the base's layers that it adapts, by name."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    save_file(_tensors(shapes, rank, b_std, rng), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(_config(rank, targets), indent=2))


def write_gguf_adapter(adapter: Path, base_folder: Path, file: Path) -> None:
    """The same adapter as llama.cpp reads it, of a base of the Llama family.

    There the rows of q and k lie in another order, for its way to turn them by their positions.
    """
    from gguf import GGUFWriter

    config = json.loads((base_folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    writer = GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(
        "adapter.lora.alpha", json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    )
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as tensors:
        for key in sorted(tensors.keys()):
            *_, layer, _, module, kind, _ = key.split(".")
            tensor = tensors.get_tensor(key)
            if kind == "lora_B" and module in heads:
                parts = tensor.reshape(heads[module], 2, -1, tensor.shape[1])
                tensor = np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(tensor.shape)
            writer.add_tensor(f"blk.{layer}.{names[module]}.weight.{kind.lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _target_shapes(base_folder: Path, targets: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """(module name, (out, in)) of every target layer, in the order of names."""
    for file in sorted(base_folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for key in sorted(tensors.keys()):
                module = key.removesuffix(".weight")
                if module != key and module.rsplit(".", 1)[-1] in targets:
                    rows, columns = tensors.get_slice(key).get_shape()
                    yield module, (rows, columns)


def _tensors(
    shapes: Mapping[str, tuple[int, int]], rank: int, b_std: float, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    tensors: dict[str, NDArray[np.float32]] = {}
    for module, (rows, columns) in shapes.items():
        bound = columns**-0.5
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.uniform(-bound, bound, (rank, columns)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.normal(0.0, b_std, (rows, rank)).astype(np.float32)
    return tensors


def _config(rank: int, targets: tuple[str, ...]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "inference_mode": True,
    }
