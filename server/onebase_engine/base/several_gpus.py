"""A base that is too large for one GPU: its decoder's layers lie on several, in order.

What is no decoder layer (embedding, last norm, head) lies on the first GPU, where a pass begins and ends. A
layer's weights, its part of the KV cache and what adapters have for it lie on its own GPU, and what it is
called with is brought there, once for each GPU and pass. The GPUs work one after the other.

accelerate loads by the map that is made here. Its own (`infer_auto_device_map`) fills one GPU before the
next, and leaves a KV cache nothing on the first; its hooks bring what a layer is called with once for each
layer, and not for each GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from onebase_engine.base.layers import input_embedding

DeviceMap = Mapping[str, torch.device]
"""Devices of modules and tensors, by name; no module is inside another one."""


class SpreadError(Exception):
    """The base cannot lie on several GPUs; the message says why."""


def decoder_layers(model: Any) -> dict[str, nn.Module]:
    """Return the layers whose states the KV cache holds, by name and in order.

    Raises SpreadError where they are no list of modules.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        layers = list(module) if isinstance(module, nn.ModuleList) else []
        # What sees or hears has layers as well, which attend over no cache.
        attending = [layer for layer in layers if any(hasattr(one, "layer_idx") for one in layer.modules())]
        if len(attending) == len(layers) == count:
            return {f"{name}.{number}": layer for number, layer in enumerate(layers)}
    raise SpreadError(f"{type(model).__name__} has no list of {count} decoder layers")


def device_map(model: Any, devices: Sequence[torch.device], room: Sequence[int]) -> dict[str, torch.device]:
    """Assign every part of a model to a device: layers as `shares` says, the rest to the first device.

    Args:
        model: its modules; their parameters may be on meta.
        room: bytes of each device for layers and their part of the KV cache.

    Raises:
        SpreadError: it has not as many layers, or the first device has no room for the rest.
    """
    layers = decoder_layers(model)
    if len(layers) < len(devices):
        raise SpreadError(f"it has {len(layers)} decoder layers, which cannot lie on {len(devices)} GPUs")
    if room[0] <= 0:
        raise SpreadError(f"what is no decoder layer does not fit on {devices[0]}")
    found = dict.fromkeys(_outside(model, "", layers), devices[0])
    counts = shares(len(layers), room)
    own = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    return found | dict(zip(layers, own, strict=True))


def shares(layers: int, room: Sequence[int]) -> list[int]:
    """Return the number of layers for each device, at least one, in proportion to its room.

    A token of the KV cache then takes the same part of each device.
    """
    ends = [round(layers * part / sum(room)) for part in accumulate(room)]
    for number in range(len(room)):
        least, most = number + 1, layers - (len(room) - 1 - number)
        before = ends[number - 1] if number else 0
        ends[number] = min(max(ends[number], least, before + 1), most)
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _outside(module: nn.Module, prefix: str, layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the names of the modules and tensors that hold everything but the layers."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path in layers:
            continue
        if any(layer.startswith(f"{path}.") for layer in layers):
            yield from _outside(child, f"{path}.", layers)
        else:
            yield path
    for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield f"{prefix}{name}"


def device_of(name: str, where: DeviceMap) -> torch.device:
    """Return the device of a module, by its name."""
    while name not in where:
        name, _, _ = name.rpartition(".")
    return where[name]


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """Return the devices on which a model lies, the one with its embedding first."""
    own = (parameter.device for parameter in model.parameters())
    return tuple(dict.fromkeys([input_embedding(model).weight.device, *own]))


# ---- passes ------------------------------------------------------------------------------------


class Crossings:
    """Tensors that a pass copies from one device to the next. Each view of a base has its own."""

    def __init__(self, home: torch.device) -> None:
        self._home = home
        self._brought: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        """Original tensor, stored so that its id is not used again, and its copy on the device."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Crossings:
        return Crossings(self._home)

    def begin(self, module: nn.Module, args: Any, named: Any) -> tuple[Any, Any]:
        """Forget, before the first layer, copies that a failed pass has left."""
        self._brought.clear()
        return args, named

    def bring(self, module: nn.Module, args: Any, named: Any) -> tuple[Any, Any]:
        """Copy all arguments of a layer that is not on the first device to its own device."""
        device = next(module.parameters()).device
        return self._moved(args, device), self._moved(named, device)

    def back(self, module: nn.Module, args: Any, named: Any, output: Any) -> Any:
        """Copy the last layer's output to the first device."""
        self._brought.clear()
        return _each(output, lambda tensor: tensor.to(self._home))

    def _moved(self, value: Any, device: torch.device) -> Any:
        return _each(value, lambda tensor: self._there(tensor, device))

    def _there(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if tensor.device == device:
            return tensor
        key = id(tensor), device
        if key not in self._brought:
            self._brought[key] = tensor, tensor.to(device)
        return self._brought[key][1]


def _each(value: Any, move: Any) -> Any:
    """Rebuild tensors, tuples, lists and dictionaries with each tensor moved."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if type(value) in (tuple, list):
        return type(value)(_each(one, move) for one in value)
    if type(value) is dict:
        return {name: _each(one, move) for name, one in value.items()}
    return value


def link(model: nn.Module) -> None:
    """Let passes of a model cross from device to device, if it lies on several. Views of it do so too."""
    first, *others = devices_of(model)
    if not others:
        return
    crossings, layers = Crossings(first), list(decoder_layers(model).values())
    layers[0].register_forward_pre_hook(crossings.begin, with_kwargs=True)
    for layer in layers:
        if next(layer.parameters()).device != first:
            layer.register_forward_pre_hook(crossings.bring, with_kwargs=True)
    layers[-1].register_forward_hook(crossings.back, with_kwargs=True)
