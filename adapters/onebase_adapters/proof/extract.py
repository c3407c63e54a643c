"""Take an adapter's finished tensors out of PEFT's own model of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from onebase_adapters.format.canonical import AdapterFormatError
from onebase_adapters.format.spellings import unnested
from onebase_adapters.proof.experts import weights_of
from onebase_engine.kernels.weights import AdapterWeights, LoraWeights, ModuleWeights, SavedModule, TokenRows

_REPLACED = 1 / 4
"""Largest part of a resized matrix's rows that are stored by themselves, in fp32; with more, all are."""


@torch.no_grad()
def extract(model: Any, adapter: str) -> AdapterWeights:
    """Return the weights of PEFT's active `adapter`, by the full name of the base's module, in host memory.

    Raises:
        AdapterFormatError: two kinds meet in one module, or a module has parts that no slot holds.
    """
    weights: dict[str, ModuleWeights] = {}
    invocation = getattr(model.peft_config[adapter], "alora_invocation_tokens", None) or ()
    for name, module in _adapted(model.get_base_model(), adapter, tuple(invocation)):
        outer = next((other for other in weights if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise AdapterFormatError("unsupported_kind", f"{outer} is adapted in two ways at once")
        weights[name] = module
    return weights


def _adapted(
    tree: nn.Module, adapter: str, invocation: tuple[int, ...]
) -> Iterator[tuple[str, ModuleWeights]]:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    shared: dict[int, torch.Tensor] = {}
    for name, module in tree.named_modules():
        if isinstance(module, ParamWrapper):
            if adapter in module.scaling:
                yield f"{unnested(name)[0]}.{module.parameter_name}", weights_of(module, adapter)
        elif isinstance(module, LoraLayer) and adapter in module.scaling:
            activated = adapter in module.lora_variant and adapter not in module.lora_magnitude_vector
            yield name, replace(_lora(module, adapter), invocation=invocation if activated else ())
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            yield name, _saved(name, module.modules_to_save[adapter], shared)
        elif isinstance(module, TrainableTokensWrapper):
            yield name, _tokens(module.token_adapter, adapter, shared)


def _lora(layer: Any, adapter: str) -> LoraWeights:
    bias = None
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        bias = layer.lora_B[adapter].bias
    else:
        a, b = layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter]
    return LoraWeights(
        _in_host_memory(a.float()),
        _in_host_memory(b.float()),
        float(layer.scaling[adapter]),
        bias=None if bias is None else _in_host_memory(bias.float()),
        gain=_gain(layer, adapter) if adapter in layer.lora_magnitude_vector else None,
    )


def _gain(layer: Any, adapter: str) -> torch.Tensor:
    """Return DoRA's magnitude by the norm of W + scale * B @ A, [out], as PEFT computes it in a forward
    pass."""
    from peft.utils.integrations import dequantize_module_weight

    dora = layer.lora_magnitude_vector[adapter]
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        weight = dequantize_module_weight(layer.get_base_layer()).float()
    else:
        a, b = layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter].T
        weight = layer.get_base_layer().weight
    norm = dora.get_weight_norm(
        weight=weight,
        lora_weight=dora.get_lora_weight(lora_A=a, lora_B=b, adapter_name=adapter),
        scaling=layer.scaling[adapter],
        adapter_name=adapter,
    )
    return _in_host_memory((dora.weight / norm).float())


def _saved(name: str, module: nn.Module, shared: dict[int, torch.Tensor]) -> SavedModule:
    own = {key: _in_host_memory(tensor, shared) for key, tensor in module.named_parameters()}
    if not own.keys() <= {"weight", "bias"}:
        raise AdapterFormatError("unsupported_kind", f"{name} has parts that cannot be saved: {sorted(own)}")
    return SavedModule(**own)


def _tokens(layer: Any, adapter: str, shared: dict[int, torch.Tensor]) -> TokenRows:
    indices = torch.tensor(layer.token_indices[adapter], dtype=torch.int64)
    order = indices.argsort()
    delta = layer.trainable_tokens_delta[adapter]
    # A tied head has its embedding's very rows.
    rows = shared.setdefault(id(delta), delta.detach().float().cpu()[order])
    return TokenRows(shared.setdefault(id(layer.token_indices), indices[order]), rows)


@torch.no_grad()
def compacted(weights: AdapterWeights, base: Any, names: Iterable[str]) -> AdapterWeights:
    """Return the weights with matrices of the resized embedding and head as the rows that are not the base's.

    A matrix with many such rows stays whole.
    """
    result, shared = dict(weights), list[TokenRows]()
    for name in names:
        module, own = weights[name], base.get_submodule(name).weight
        if not isinstance(module, SavedModule):
            continue
        both = min(len(module.weight), len(own))
        pieces = zip(torch.split(module.weight[:both], 4096), torch.split(own[:both], 4096), strict=True)
        same = torch.cat([(mine == theirs.cpu()).all(1) for mine, theirs in pieces])
        indices = torch.cat([torch.nonzero(~same)[:, 0], torch.arange(both, len(module.weight))])
        if len(indices) > _REPLACED * len(module.weight):
            continue
        rows = TokenRows(indices, module.weight[indices].float(), len(module.weight))
        # Those of a tied pair are mostly the same.
        equal = (
            one for one in shared if torch.equal(one.indices, indices) and torch.equal(one.rows, rows.rows)
        )
        result[name] = next(equal, rows)
        shared.append(rows)
    return result


def _in_host_memory(tensor: torch.Tensor, shared: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
    """Copy a tensor to host memory. PEFT puts matrices next to the base; only those in slots may stay on a
    GPU."""
    copy = tensor.detach().cpu().contiguous()
    return copy if shared is None else shared.setdefault(id(tensor), copy)
