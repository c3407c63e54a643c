"""Write base and adapter as one 16-bit model in GGUF, for llama.cpp and Ollama.

The tensors and fields are those that llama.cpp's `convert_hf_to_gguf.py` makes of the merged model
(https://github.com/ggml-org/llama.cpp, MIT). The merged model itself is never written: each tensor is
merged, written and dropped. `llama-quantize` makes the result smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from onebase_adapters.export.adapter_parts import opened_adapter
from onebase_adapters.export.base_files import BaseFiles, ExportError, OnProgress, open_base
from onebase_adapters.export.gguf_names import GgufNames, names_of
from onebase_adapters.export.gguf_vocabulary import read_vocabulary
from onebase_adapters.export.merged import MergedModel, MergedTensor, check_room
from onebase_engine.base.experts import experts_per_token

_INSTEAD = "export it as merged"
_ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight")
"""Ends of the names of routers, which llama.cpp reads in fp32."""
_ROTARY = ("default", "linear", "llama3")
"""transformers' kinds of rotary embedding that can be exported."""


@dataclass(frozen=True)
class _Planned:
    """A tensor to write: its name in GGUF, and its name in the merged model."""

    name: str
    tensor: MergedTensor
    exact: bool
    """Whether it is written in fp32, as tensors of one dimension and routers are."""


def export(
    adapter: Path, target: Path, *, base: str, options: Mapping[str, str], progress: OnProgress
) -> dict[str, object]:
    """Write base and adapter as one GGUF file, with the arguments and errors of `merged.export`."""
    import gguf

    files = open_base(base, progress, options)
    with opened_adapter(adapter, files) as parts:
        names, model = names_of(files), MergedModel(files, parts)
        check_base(files)
        vocabulary = read_vocabulary(files.folder, files.text_config.vocab_size)
        planned = _plan(model, names)
        half = (
            gguf.GGMLQuantizationType.F16 if model.dtype == torch.float16 else gguf.GGMLQuantizationType.BF16
        )
        size = sum(_bytes(one) for one in planned)
        check_room(target, size)
        writer = gguf.GGUFWriter(target, names.arch_name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(options.get("name", adapter.name))
        _add_settings(writer, files, gguf)
        writer.add_file_type(
            gguf.LlamaFileType.MOSTLY_F16 if model.dtype == torch.float16 else gguf.LlamaFileType.MOSTLY_BF16
        )
        vocabulary.add_to(writer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write(writer, planned, model, names, half, size, progress)
    return {"base": files.name, "base_folder": str(files.folder), "bytes": target.stat().st_size}


def _plan(model: MergedModel, names: GgufNames) -> list[_Planned]:
    """Return the tensors to write; of experts, which the files have one by one, one tensor for all."""
    found: list[_Planned] = []
    experts: dict[tuple[str, int], dict[int, MergedTensor]] = {}
    for tensors in model.shards().values():
        for tensor in tensors:
            place = model.base.expert_parts.get(tensor.name)
            if place is None:
                exact = len(tensor.shape) == 1 or tensor.name.endswith(_ROUTERS)
                found.append(_Planned(names.of(tensor.name), tensor, exact))
            elif place.expert is None:
                raise ExportError(
                    f"{tensor.name}: the experts of one file are not written as GGUF: {_INSTEAD}"
                )
            else:
                experts.setdefault((place.parameter, place.part), {})[place.expert] = tensor
    for (parameter, part), by_number in experts.items():
        ordered = [by_number[number] for number in sorted(by_number)]
        shape = len(ordered), *ordered[0].shape
        stacked = MergedTensor(parameter, shape, partial(_stack, ordered), model.dtype)
        found.append(_Planned(names.of_experts(parameter)[part], stacked, exact=False))
    return found


def _stack(tensors: list[MergedTensor]) -> torch.Tensor:
    return torch.stack([tensor.make() for tensor in tensors])


def check_base(base: BaseFiles) -> None:
    """Raise ExportError if llama.cpp would compute the base in another way than transformers."""
    config, rotary = base.text_config, _rotary(base)
    if (activation := config.hidden_act) != "silu":
        raise ExportError(f"hidden_act: {activation} is not written as GGUF: {_INSTEAD}")
    if rotary.get("rope_type", "default") not in _ROTARY:
        raise ExportError(f"rope_type: {rotary['rope_type']} is not written as GGUF: {_INSTEAD}")
    if rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(f"partial_rotary_factor: a part of the head is not written as GGUF: {_INSTEAD}")
    _check_experts(base)
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise ExportError(
            f"sliding_window: {base.name} looks at the last {window} tokens, and llama.cpp would at all: "
            f"{_INSTEAD}"
        )


def _check_experts(base: BaseFiles) -> None:
    """Raise ExportError if llama.cpp would route tokens in another way than transformers."""
    config = base.text_config
    normalizes = {"qwen3_moe": True, "olmoe": False}.get(config.model_type)
    if normalizes is not None and config.norm_topk_prob != normalizes:
        raise ExportError(f"norm_topk_prob: {config.norm_topk_prob} is not written as GGUF: {_INSTEAD}")
    if getattr(config, "clip_qkv", None) is not None:
        raise ExportError(f"clip_qkv is not written as GGUF: {_INSTEAD}")
    layers = {place.parameter for place in base.expert_parts.values()}
    if layers and len(layers) != 2 * config.num_hidden_layers:
        raise ExportError(f"layers without experts in {base.name} are not written as GGUF: {_INSTEAD}")


def _rotary(base: BaseFiles) -> dict[str, Any]:
    return dict(getattr(base.text_config, "rope_parameters", None) or {})


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_settings(writer: Any, base: BaseFiles, gguf: Any) -> None:
    """Write the model's dimensions and its rotary embedding."""
    config, rotary, head = base.text_config, _rotary(base), _head_size(base.text_config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if experts := experts_per_token(config):
        writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
        writer.add_expert_used_count(experts)
        if size := getattr(config, "moe_intermediate_size", None):
            writer.add_expert_feed_forward_length(size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    if rotary.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary["factor"]))


def frequency_factors(base: BaseFiles) -> npt.NDArray[np.float32] | None:
    """Return the divisor of each frequency of Llama 3's rotary embedding, [head size / 2], or None.

    Between two wavelengths the factor rises from 1 to `factor`, as in transformers' `modeling_rope_utils`.
    """
    rotary = _rotary(base)
    if rotary.get("rope_type") != "llama3":
        return None
    low, high, factor = (float(rotary[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    context, head = float(rotary["original_max_position_embeddings"]), _head_size(base.text_config)
    factors = []
    for place in range(0, head, 2):
        wavelength = 2 * math.pi * float(rotary["rope_theta"]) ** (place / head)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def _bytes(planned: _Planned) -> int:
    return math.prod(planned.tensor.shape) * (4 if planned.exact else 2)


def _write(
    writer: Any,
    planned: list[_Planned],
    model: MergedModel,
    names: GgufNames,
    half: Any,
    size: int,
    progress: OnProgress,
) -> None:
    """Write all headers first, then the tensors one after the other."""
    factors = frequency_factors(model.base)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for one in planned:
        dtype = np.dtype(np.float32 if one.exact else np.float16)
        kind = None if one.exact else half
        writer.add_tensor_info(one.name, one.tensor.shape, dtype, _bytes(one), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    done = 0
    for one in planned:
        tensor = names.rows(one.tensor.name, one.tensor.make())
        written = tensor.float().numpy() if one.exact else tensor.view(torch.int16).numpy()
        writer.write_tensor_data(written)
        done += _bytes(one)
        progress("merging", done / size)
    writer.close()
