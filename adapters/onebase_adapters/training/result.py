"""The finished adapter as a PEFT folder: config, tensors and a model card."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from onebase_adapters.store.atomic_files import atomic_directory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(
    model: Any,
    folder: Path,
    *,
    base: str,
    commit: str | None,
    card: Callable[[int], str],
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write what `PeftModel.from_pretrained` loads; returns the bytes of the tensors' file.

    The folder appears whole. Base weights are never in it, also when `lm_head` is a target.

    Args:
        model: a PeftModel with one adapter in fp32.
        base: what goes into the config as the base's name. commit: of the base, if it has one.
        card: gives the text of README.md, told the bytes of the tensors' file.
        dtype: of the tensors in the file; whatever it is, they are loaded as fp32 again.
    """
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base
    config.revision = commit
    if isinstance(config.target_modules, set):
        # A set is written in an order of its own in each process: the same adapter would have another digest.
        config.target_modules = sorted(config.target_modules)
    with atomic_directory(folder) as work:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.save_pretrained(work, save_embedding_layers=False)
        tensors = load_file(work / WEIGHTS)
        _check(tensors)
        if dtype != torch.float32:
            halved = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            save_file(halved, work / WEIGHTS, metadata={"format": "pt"})
        # safetensors writes files that only their owner may read.
        (work / WEIGHTS).chmod((work / CONFIG).stat().st_mode)
        (work / "README.md").write_text(card((work / WEIGHTS).stat().st_size), encoding="utf-8")
    return (folder / WEIGHTS).stat().st_size


def _check(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of the trained adapter is not finite")
