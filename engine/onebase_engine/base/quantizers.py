"""Quantizers with which transformers loads a base that has experts, or whose files hold MXFP4 or fp8.

Importing this module registers them, and imports transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import FineGrainedFP8Config
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import dequantize_convertops
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from onebase_engine import machine
from onebase_engine.base.experts import (
    ExpertStack,
    expert_matrices,
    place_stacks,
    quantize_stack,
    quantize_stack_to_int8,
)

_NF4, _INT8, _READER = "onebase_nf4", "onebase_int8", "onebase_fp8"


def with_experts(config: Any, stored: Mapping[str, Any]) -> Any:
    """Return transformers' settings of bitsandbytes so that experts are quantized as well.

    stored: fields by which the files say that they hold MXFP4 or fp8; none where weights are plain.
    """
    config.quant_method = _INT8 if config.load_in_8bit else _NF4
    config.from_mxfp4 = stored.get("quant_method") == "mxfp4"
    config.from_fp8 = plain_from_fp8(stored) if stored.get("quant_method") == "fp8" else None
    return config


def plain_from_fp8(stored: Mapping[str, Any]) -> Any:
    """Return transformers' settings by which weights in fp8 become plain ones.

    stored: fields by which the files say how they hold them.
    """
    config = FineGrainedFP8Config(**{**stored, "dequantize": True})
    config.quant_method = _READER
    return config


def unscaled(
    quantized: torch.Tensor, scales: torch.Tensor, block: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Return the weights that blocks of fp8 stand for: quantized [..., rows, columns], scales [..., blocks,
    blocks].

    The last blocks of both may be smaller than `block`. Scales in uint8 are exponents (E8M0).
    """
    if scales.dtype == torch.uint8:
        scales = (scales.float() - 127).exp2()
    for axis, size in zip((-2, -1), block, strict=True):
        scales = scales.float().repeat_interleave(size, axis).narrow(axis, 0, quantized.shape[axis])
    return (quantized.float() * scales).to(dtype)


class _QuantizeExperts(ConversionOps):  # type: ignore[misc]
    """Conversion that quantizes the experts' parameters, and leaves others to bitsandbytes."""

    def __init__(self, quantizer: Any, linear: Any) -> None:
        self.quantizer, self.linear = quantizer, linear

    def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in [path for path in input_dict if path in self.quantizer.places]:
            value = input_dict.pop(path)
            matrices = value[0] if isinstance(value, list) else value
            transposed = self.quantizer.places[path].transposed
            stack = self.quantizer.stack_of()(matrices, transposed=transposed)
            self.quantizer.stacks[path] = stack
            # transformers puts parameters where it has read them, and checks that all are there.
            found[path] = stack.weight
            del value, matrices
            _release_files()
        found |= self.linear.convert(input_dict, **given)
        return found


class _UnpackMxfp4(ConversionOps):  # type: ignore[misc]
    """Conversion of the experts' parameters from MXFP4 to plain ones."""

    def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, Any]:
        path = given["full_layer_name"]
        name = path.rpartition(".")[2]
        blocks, scales = (input_dict[f"{name}_{part}"] for part in ("blocks", "scales"))
        # Read in the base's dtype, which holds every byte as it is.
        octets = [(one[0] if isinstance(one, list) else one).to(torch.uint8) for one in (blocks, scales)]
        dtype = given["model"].get_parameter(path).dtype
        return {path: dequantize_convertops(*octets, dtype).detach()}


class _UnscaleFp8(Fp8Dequantize):  # type: ignore[misc]
    """Conversion of weights from fp8 to plain ones.

    Where the last block is smaller, as of DeepSeek-V3's 576 rows, transformers' own fails or takes blocks
    of another size.
    """

    def _dequantize_one(self, quantized: Any, scales: Any, output_dtype: Any = None) -> torch.Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        *others, rows, columns = quantized.shape
        grid = block and (*others, -(-rows // block[0]), -(-columns // block[1]))
        # Integers hold two numbers in fp4 each.
        if grid == tuple(scales.shape) and quantized.is_floating_point():
            return unscaled(quantized, scales, block, output_dtype or torch.bfloat16)
        plain: torch.Tensor = super()._dequantize_one(quantized, scales, output_dtype)
        return plain


@register_quantizer(_READER)
class _Fp8Reader(FineGrainedFP8HfQuantizer):  # type: ignore[misc]
    """Quantizer for fp8 that gives plain weights: it reads, and quantizes nothing."""

    def __init__(self, config: Any, **given: Any) -> None:
        super().__init__(config, **given | {"pre_quantized": True})

    def get_load_operations(self) -> Any:
        return {"dequantize": _UnscaleFp8}


class _ConcatenateApart(Concatenate):  # type: ignore[misc]
    """Concatenation that frees each part when it is copied: all at once they would be there twice."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        **given: Any,
    ) -> dict[str, torch.Tensor]:
        found = [input_dict.pop(source) for source in source_patterns if source in input_dict]
        parts = [part for one in found for part in (one if isinstance(one, list) else [one])]
        del found
        _release_files()
        sizes = [part.shape[self.dim] for part in parts]
        shape = list(parts[0].shape)
        shape[self.dim] = sum(sizes)
        whole = parts[0].new_empty(shape)
        for target in whole.split(sizes, self.dim):
            target.copy_(parts.pop(0))
        return {self.get_target_pattern(list(target_patterns)): whole}


def _release_files() -> None:
    """Let go of what was read of the files: they stay mapped until the end, and a mixture's are several times
    as large as its base."""
    machine.release_mapped_files(".safetensors")


class _KnowsExperts:
    """Part of a quantizer of bitsandbytes that also knows experts, and reads MXFP4 and fp8.

    Parameters are quantized one after the other, while they are loaded.
    """

    quantization_config: Any

    def stack_of(self) -> Callable[..., ExpertStack]:
        """Return the function that quantizes a parameter of experts."""
        raise NotImplementedError

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **named: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **named)  # type: ignore[misc]
        if self.quantization_config.from_fp8 is not None:
            # Read as they are: a scale has more digits than the base's dtype.
            model._get_dtype_plan = lambda dtype: {"weight": None, "experts": None}
        self.places = {one.path: one for one in expert_matrices(model)}
        self.stacks: dict[str, ExpertStack] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **named: Any) -> bool:
        needs: bool = super().param_needs_quantization(model, param_name, **named)  # type: ignore[misc]
        return param_name in self.places or needs

    def get_weight_conversions(self) -> list[Any]:
        names = {one.name for one in self.places.values()} if self.quantization_config.from_mxfp4 else ()
        own = (
            WeightConverter([f"{name}_blocks", f"{name}_scales"], name, [_UnpackMxfp4()]) for name in names
        )
        return [*super().get_weight_conversions(), *own]  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        if self.quantization_config.from_fp8 is None:
            found = super().update_weight_conversions(weight_conversions, model)  # type: ignore[misc]
        else:
            reader = _Fp8Reader(self.quantization_config.from_fp8)
            found = reader.update_weight_conversions(weight_conversions, model)
        for place, converter in enumerate(found):
            if isinstance(converter, WeightConverter):
                found[place] = copy.copy(converter)
                found[place].operations = [
                    _ConcatenateApart(one.dim) if type(one) is Concatenate else one
                    for one in converter.operations
                ]
        return found

    def get_quantize_ops(self) -> Any:
        return _QuantizeExperts(self, super().get_quantize_ops())  # type: ignore[misc]

    def _process_model_after_weight_loading(self, model: Any, **named: Any) -> Any:
        place_stacks(model, self.stacks)
        # The places hold modules, and the model holds its quantizer.
        self.places.clear()
        self.stacks.clear()
        return super()._process_model_after_weight_loading(model, **named)  # type: ignore[misc]


@register_quantizer(_NF4)
class _Nf4Quantizer(_KnowsExperts, Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Quantizer of bitsandbytes for 4 bits that also knows experts."""

    def stack_of(self) -> Callable[..., ExpertStack]:
        double_quant = self.quantization_config.bnb_4bit_use_double_quant
        return partial(quantize_stack, blocksize=64, double_quant=double_quant)


@register_quantizer(_INT8)
class _Int8Quantizer(_KnowsExperts, Bnb8BitHfQuantizer):  # type: ignore[misc]
    """Quantizer of bitsandbytes for int8 that also knows experts."""

    def stack_of(self) -> Callable[..., ExpertStack]:
        return quantize_stack_to_int8
