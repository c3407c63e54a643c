"""One base for several processes: `publish` in the one that loaded it, `attach` in the others.

On the CPU every tensor moves into one file in memory (a memfd), so that there is one copy of it, also in the
process that loaded it. Others map that file privately: what they write stays theirs. (A file descriptor per
tensor would need more than `ulimit -n` allows, and a container's /dev/shm holds no base.)

On CUDA the tensors stay where they are and travel as IPC handles. The process that published must outlive
those that attach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from onebase_engine.base import manifest as wire
from onebase_engine.base.experts import ExpertStack, Int8Stack, place_stacks
from onebase_engine.base.layers import empty_base
from onebase_engine.base.load import (
    BaseSettings,
    UnsupportedBaseError,
    freeze,
    import_bitsandbytes,
    quantized_statistics,
    read_config,
)
from onebase_engine.base.manifest import Manifest, ManifestError, QuantizedLayer, Segment, TensorPlace
from onebase_engine.base.shared_memory import SharedMemoryError, file_size, lay_out, open_tensors, share


class AttachError(Exception):
    """The base cannot be shared, or what was published does not fit the base's folder."""


def publish(base: nn.Module, fd: int | None) -> bytes:
    """Make a freshly loaded base attachable and return the manifest that `attach` needs.

    On the CPU this moves every tensor into the file `fd`, storage by storage, and points the base's own
    tensors there. They are the same objects, tied ones stay tied, and views of the base follow; addresses
    taken earlier (`fingerprint`) are no longer right. What the file held before is dropped.

    Args:
        fd: of a memfd; may be None on CUDA. It may be closed afterwards, the base keeps its mapping.

    Raises:
        AttachError: the memory cannot be shared; the message says what to change.
    """
    named = _named_tensors(base)
    tensors = _distinct(named)
    try:
        return _manifest(base, named, tensors, *share(tensors, fd))
    except (SharedMemoryError, ManifestError) as error:
        raise AttachError(str(error)) from error


def describe(base: nn.Module) -> tuple[bytes, list[tuple[int, torch.Tensor]], int]:
    """Lay out the file in which `attach` finds the base on the CPU.

    Returns:
        The manifest; a tensor of each storage, with the byte at which the storage belongs; the file's size.
    """
    named = _named_tensors(base)
    tensors = _distinct(named)
    segments, places, storages = lay_out(tensors)
    return _manifest(base, named, tensors, segments, places), storages, file_size(segments)


def _distinct(named: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in named.values()}.values())


def _manifest(
    base: nn.Module,
    named: Mapping[str, torch.Tensor],
    tensors: Sequence[torch.Tensor],
    segments: list[Segment],
    places: list[TensorPlace],
) -> bytes:
    index = {id(tensor): i for i, tensor in enumerate(tensors)}
    return wire.encode(
        Manifest(
            architecture=type(base).__name__,
            flags=[flag for flag in wire.FLAGS if getattr(base, flag, False)],
            storages=segments,
            tensors=places,
            names={name: index[id(tensor)] for name, tensor in named.items()},
            layers=dict(_quantized_layers(base)),
        )
    )


def attach(settings: BaseSettings, manifest: bytes, fd: int | None) -> nn.Module:
    """Return the base that another process published: frozen, in eval mode, as `load_base` returns it.

    The module tree is built without memory from the folder's config; its tensors are those of the other
    process, mapped privately on the CPU. That takes some MB of memory in all.

    Args:
        settings: the folder and the dtype that the base was loaded with.
        manifest: what `publish` returned there.
        fd: of the file that it was published into; may be closed afterwards.

    Raises:
        AttachError: what was published does not fit the folder, or cannot be mapped.
    """
    import_bitsandbytes()
    try:
        plan = wire.decode(manifest)
        tensors = open_tensors(plan.storages, plan.tensors, fd)
    except (SharedMemoryError, ManifestError) as error:
        raise AttachError(str(error)) from error
    tree = _empty_tree(settings)
    if type(tree).__name__ != plan.architecture:
        raise AttachError(f"{settings.folder} is a {type(tree).__name__}, published was {plan.architecture}")
    _fill(tree, plan, tensors)
    for flag in plan.flags:
        setattr(tree, flag, True)
    return freeze(tree)


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base's tensors like `base_tensors`, with every name of a tied tensor."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for name, module in model.named_modules():
        for label, tensor in quantized_statistics(module):
            tensors[f"{name}.weight#{label}"] = tensor
    return tensors


def _quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    layer: Any
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        if kind == "Linear4bit":
            yield name, _described_4bit(layer)
        elif isinstance(layer, ExpertStack):
            yield name, _described_experts(layer)
        elif kind == "Linear8bitLt":
            size_in, size_out = layer.in_features, layer.out_features
            yield (
                name,
                QuantizedLayer(
                    kind="Linear8bitLt", size_in=size_in, size_out=size_out, threshold=layer.state.threshold
                ),
            )


def _described_4bit(layer: Any) -> QuantizedLayer:
    state = layer.weight.quant_state
    return QuantizedLayer(
        kind="Linear4bit",
        size_in=layer.in_features,
        size_out=layer.out_features,
        compute_dtype=wire.dtype_name(layer.compute_dtype),
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        shape=tuple(state.shape),
        dtype=wire.dtype_name(state.dtype),
        nested_blocksize=state.state2.blocksize if state.nested else 0,
        nested_dtype=wire.dtype_name(state.state2.dtype) if state.nested else "float32",
    )


def _described_experts(stack: ExpertStack) -> QuantizedLayer:
    return QuantizedLayer(
        kind="Int8Stack" if isinstance(stack, Int8Stack) else "ExpertStack",
        size_in=stack.size_in,
        size_out=stack.size_out,
        blocksize=stack.blocksize,
        dtype=wire.dtype_name(stack.dtype),
        transposed=stack.transposed,
    )


def _empty_tree(settings: BaseSettings) -> nn.Module:
    """Build the base's modules with parameters that take no memory."""
    from transformers import GenerationConfig

    try:
        config = read_config(settings.folder)
        tree = empty_base(config, dtype=settings.dtype, attn_implementation="eager", trust_remote_code=False)
    except (OSError, ValueError, UnsupportedBaseError) as error:
        raise AttachError(f"cannot build the modules of {settings.folder}: {error}") from error
    with contextlib.suppress(OSError):
        tree.generation_config = GenerationConfig.from_pretrained(settings.folder, local_files_only=True)
    module: nn.Module = tree
    return module


def _fill(tree: nn.Module, plan: Manifest, tensors: Sequence[torch.Tensor]) -> None:
    """Put every tensor into the tree, by its names. Raises AttachError if one is missing or left over."""
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    plain: dict[str, int] = {}
    for name, number in plan.names.items():
        weight, _, label = name.partition("#")
        if label:
            statistics.setdefault(weight.removesuffix(".weight"), {})[label] = tensors[number]
        else:
            plain[name] = number
    parameters: dict[int, nn.Parameter] = {}
    for name, layer in plan.layers.items():
        number = plan.names[f"{name}.weight"]
        if layer.kind in ("ExpertStack", "Int8Stack"):
            buffers = {
                buffer.removeprefix(f"{name}."): tensors[place]
                for buffer, place in plan.names.items()
                if buffer.startswith(f"{name}.") and place != number
            }
            module: Any = expert_stack(tree, name, layer, tensors[number], buffers)
        else:
            module = quantized_module(tree, name, layer, tensors[number], statistics.get(name, {}))
        parameters[number] = module.weight
    own = {name for name, _ in tree.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in tree.named_buffers(remove_duplicate=False)}
    odd = sorted(own ^ plain.keys())
    if odd:
        raise AttachError(f"the modules of the base's folder and the published tensors differ in {odd[0]}")
    for name, number in plain.items():
        module_name, _, child = name.rpartition(".")
        owner: Any = tree.get_submodule(module_name)
        if child in owner._buffers:
            owner._buffers[child] = tensors[number]
            continue
        if number not in parameters:
            parameters[number] = nn.Parameter(tensors[number], requires_grad=False)
        owner._parameters[child] = parameters[number]


def expert_stack(
    tree: nn.Module,
    name: str,
    layer: QuantizedLayer,
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
) -> ExpertStack:
    """Replace the parameter `name` by a stack of experts over the given tensors and return it."""
    kind = Int8Stack if layer.kind == "Int8Stack" else ExpertStack
    stack = kind(
        weight,
        statistics,
        size_in=layer.size_in,
        size_out=layer.size_out,
        blocksize=layer.blocksize,
        dtype=wire.dtype_of(layer.dtype),
        transposed=layer.transposed,
    )
    try:
        place_stacks(tree, {name: stack})
    except AttributeError:
        raise AttachError(f"the base's folder has no experts {name}") from None
    return stack


def quantized_module(
    tree: nn.Module,
    name: str,
    layer: QuantizedLayer,
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
) -> Any:
    """Replace the linear layer `name` by a bitsandbytes layer over the given tensors and return it."""
    import bitsandbytes as bnb

    try:
        plain: Any = tree.get_submodule(name)
    except AttributeError:
        raise AttachError(f"the base's folder has no layer {name}") from None
    bias = plain.bias is not None
    module: Any
    if layer.kind == "Linear4bit":
        module = bnb.nn.Linear4bit(
            layer.size_in,
            layer.size_out,
            bias=bias,
            compute_dtype=wire.dtype_of(layer.compute_dtype),
            compress_statistics=layer.nested_blocksize > 0,
            quant_type=layer.quant_type,
            quant_storage=weight.dtype,
            device="meta",
        )
        module.weight = _weight_4bit(module, layer, weight, statistics)
    else:
        module = bnb.nn.Linear8bitLt(
            layer.size_in,
            layer.size_out,
            bias=bias,
            has_fp16_weights=False,
            threshold=layer.threshold,
            device="meta",
        )
        rows, scales = statistics["state_CB"], statistics["state_SCB"]
        module.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=rows, SCB=scales)
    parent, _, child = name.rpartition(".")
    setattr(tree.get_submodule(parent), child, module)
    return module


def _weight_4bit(
    module: nn.Module, layer: QuantizedLayer, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]
) -> nn.Parameter:
    import bitsandbytes as bnb

    stats: dict[str, Any] = {
        "quant_type": layer.quant_type,
        "absmax": statistics["absmax"],
        "quant_map": statistics["code"],
        "blocksize": layer.blocksize,
        "dtype": layer.dtype,
        "shape": layer.shape,
    }
    if layer.nested_blocksize:
        stats |= {
            "nested_absmax": statistics["nested_absmax"],
            "nested_quant_map": statistics["nested_code"],
            "nested_blocksize": layer.nested_blocksize,
            "nested_dtype": layer.nested_dtype,
            "nested_offset": 0.0,
        }
    parameter: Any = bnb.nn.Params4bit.from_prequantized(
        weight, stats, requires_grad=False, device=weight.device, module=module
    )
    if layer.nested_blocksize:
        parameter.quant_state.offset = statistics["offset"]
    result: nn.Parameter = parameter
    return result
