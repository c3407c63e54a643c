"""Write an adapter as a LoRA in GGUF, which llama.cpp and Ollama apply to a base of theirs.

The tensors and fields are those that llama.cpp's `convert_lora_to_gguf.py` writes
(https://github.com/ggml-org/llama.cpp, MIT). llama.cpp multiplies B @ A by alpha / rank with one alpha for
the file and the rank of each module, so ranks may differ. What that cannot express (rsLoRA, an alpha for
some modules) is multiplied into B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from onebase_adapters.export.adapter_parts import AdapterParts, opened_adapter
from onebase_adapters.export.base_files import BaseFiles, ExportError, OnProgress, open_base
from onebase_adapters.export.gguf_names import GgufNames, names_of
from onebase_adapters.export.merged import check_room
from onebase_adapters.format.spec import ModuleSpec

_INSTEAD = "export it as merged or gguf, which hold the whole model, or as peft"
_WHY_NOT = {
    "dora": "DoRA scales whole weights, and a LoRA in GGUF only adds to them",
    "saved": "modules_to_save replaces a module, and a LoRA in GGUF only adds to weights",
    "tokens": "trainable_token_indices replaces rows, and a LoRA in GGUF only adds to weights",
}
"""Reasons for the refusal, by the kind of module."""


def export(
    adapter: Path, target: Path, *, base: str, options: Mapping[str, str], progress: OnProgress
) -> dict[str, object]:
    """Write a PEFT folder's adapter as one GGUF file, with the arguments and errors of `merged.export`."""
    import gguf

    files = open_base(base, progress)
    with opened_adapter(adapter, files) as parts:
        names = names_of(files)
        check_adapter(parts, files)
        size = 4 * parts.spec.parameters
        check_room(target, size)
        writer = gguf.GGUFWriter(target, names.arch_name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(options.get("name", adapter.name))
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _alpha(parts))
        if parts.spec.invocation:
            # Unsigned, or llama.cpp refuses the file; gguf would write integers as signed ones.
            key, unsigned = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, gguf.GGUFValueType.UINT32
            tokens = list(parts.spec.invocation)
            writer.add_key_value(key, tokens, gguf.GGUFValueType.ARRAY, sub_type=unsigned)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        modules = parts.spec.modules
        for number, module in enumerate(modules, 1):
            for name, matrix in matrices(parts, files, names, module):
                writer.add_tensor(name, matrix)
            progress("converting", number / len(modules))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {"base": files.name, "base_folder": str(files.folder), "bytes": target.stat().st_size}


def check_adapter(adapter: AdapterParts, base: BaseFiles) -> None:
    """Raise ExportError if a LoRA in GGUF cannot express the adapter."""
    for module in adapter.spec.modules:
        if module.kind in _WHY_NOT:
            raise ExportError(f"{module.name}: {_WHY_NOT[module.kind]}: {_INSTEAD}")
        if module.bias:
            raise ExportError(f"{module.name}: a LoRA in GGUF has no bias (lora_bias): export it as peft")
        if base.tied and module.name in (base.embedding, base.head):
            raise ExportError(
                f"{module.name}: embedding and head of {base.name} are one tensor in GGUF, and the adapter "
                f"changes one of them alone: {_INSTEAD}"
            )


def matrices(
    adapter: AdapterParts, base: BaseFiles, names: GgufNames, module: ModuleSpec
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield the two matrices of a module as GGUF names them: `lora_a` [rank, in], `lora_b` [out, rank], fp32.

    The embedding's `lora_a` is [vocabulary, rank].
    """
    if module.experts:
        yield from _of_experts(adapter, names, module)
        return
    parameter = f"{module.name}.weight"
    a, b = adapter.part(module.name, "lora_A"), adapter.part(module.name, "lora_B")
    b = _scaled(adapter, module, b)
    if module.name == base.embedding:
        a = a.T.contiguous()
    name = names.of(parameter)
    yield f"{name}.lora_a", a.numpy()
    yield f"{name}.lora_b", names.rows(parameter, b).numpy()


def _of_experts(
    adapter: AdapterParts, names: GgufNames, module: ModuleSpec
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield `lora_a` [experts, rank, in] and `lora_b` [experts, out, rank]; gate and up have A in common."""
    a, b = adapter.expert_matrices(module.name)
    found = names.of_experts(module.name)
    for name, own in zip(found, _scaled(adapter, module, b).chunk(len(found), dim=1), strict=True):
        yield f"{name}.lora_a", a.numpy()
        yield f"{name}.lora_b", own.contiguous().numpy()


def _scaled(adapter: AdapterParts, module: ModuleSpec, b: torch.Tensor) -> torch.Tensor:
    """Return B, multiplied by what the file's alpha and the module's rank do not say."""
    ratio = adapter.scale(module.name) / (_alpha(adapter) / module.rank)
    return b if ratio == 1.0 else b * ratio


def _alpha(adapter: AdapterParts) -> float:
    """Return the alpha of the file. llama.cpp takes 0 to mean that B @ A is added unscaled."""
    return adapter.spec.alpha or 1.0
