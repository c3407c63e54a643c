"""What transformers' modules compute in many small calls, computed by the kernels in C in few.

Their modelling code stays as it is. Layers that it calls with the same rows are multiplied at the first call,
a gated MLP is one call and `down_proj`, and queries and keys are turned by their positions where attention
reads them. Each is used if a pass of the whole model gives the same bits with it and without.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from onebase_engine.engine.attention import PagedAttention
from onebase_engine.kernels.cpu import CpuKernels, NativeLayers
from onebase_engine.lora.linear import SharedRows
from onebase_engine.lora.slots import SlotLinear

logger = logging.getLogger(__name__)

_ROTARY = "apply_rotary_pos_emb"
_TURNED_MULTIPLE = 32


def fuse(
    model: nn.Module, attention: PagedAttention, kernels: CpuKernels, run: Callable[[], torch.Tensor]
) -> None:
    """Fuse what can be fused in a served view.

    Args:
        run: a pass of the whole model over some rows, for its logits.
    """
    _try("layers of the same rows", run, list(_shared_rows(model)))
    _try("positions", run, list(_rotations(model, attention)))
    if kernels.gates:
        _try("gated MLPs", run, list(_gated(model)))


_Switch = tuple[Callable[[], None], Callable[[], None]]
"""On, and off again."""


def _try(title: str, run: Callable[[], torch.Tensor], switches: list[_Switch]) -> None:
    if not switches:
        return
    expected = run()
    for on, _ in switches:
        on()
    try:
        same = torch.equal(run(), expected)
    except Exception:
        logger.exception("kernels: %s cannot be fused", title)
        same = False
    if not same:
        logger.info("kernels: %s are not fused, which would change bits", title)
        for _, off in switches:
            off()


def _layers(module: nn.Module, *names: str) -> list[SlotLinear] | None:
    """Layers of these names that the kernels compute, over rows of one size; None if they are not that."""
    found = [getattr(module, name, None) for name in names]
    layers = [layer for layer in found if isinstance(layer, SlotLinear) and layer.native is not None]
    sizes = {layer.base.in_features for layer in layers}
    return layers if len(layers) == len(names) and len(sizes) == 1 else None


def _shared_rows(model: nn.Module) -> Iterator[_Switch]:
    for module in model.modules():
        if (layers := _layers(module, "q_proj", "k_proj", "v_proj")) is not None:
            yield _sharing(layers)


def _sharing(layers: list[SlotLinear]) -> _Switch:
    shared = SharedRows(layers)

    def switch(to: SharedRows | None) -> None:
        for layer in layers:
            layer.shared = to

    return lambda: switch(shared), lambda: switch(None)


def _gated(model: nn.Module) -> Iterator[_Switch]:
    for module in model.modules():
        both, down = _layers(module, "gate_proj", "up_proj"), getattr(module, "down_proj", None)
        if both is not None and isinstance(down, SlotLinear) and hasattr(module, "act_fn"):
            gate, up = both
            if gate.base.out_features == up.base.out_features:
                yield _gating(module, gate, up, down)


def _gating(module: Any, gate: SlotLinear, up: SlotLinear, down: SlotLinear) -> _Switch:
    whole = module.forward
    both = NativeLayers([layer.native for layer in (gate, up) if layer.native is not None], gated=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor
        odd = gate.replacements or up.replacements or x.dtype != torch.bfloat16
        if odd or gate.native is None or up.native is None:
            y = whole(x)
        else:
            hidden = both(x.reshape(-1, x.shape[-1]).contiguous(), gate.rows.row_terms)[0]
            y = down(hidden.view(*x.shape[:-1], -1))
        return y

    return lambda: setattr(module, "forward", forward), lambda: delattr(module, "forward")


def _rotations(model: nn.Module, attention: PagedAttention) -> Iterator[_Switch]:
    for module in model.modules():
        if getattr(module, "paged", None) is attention:
            function = inspect.unwrap(type(module).forward)
            if _ROTARY in function.__code__.co_names and _ROTARY in function.__globals__:
                yield _rotating(module, attention, function)


def _rotating(module: Any, attention: PagedAttention, function: Any) -> _Switch:
    """The module's own code, with another function in place of the one that turns queries and keys."""
    turn = function.__globals__[_ROTARY]

    def later(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any
    ) -> Any:
        fits = cos.shape == (1, q.shape[2], q.shape[3]) and q.shape[3] == k.shape[3]
        plain = cos.dtype == sin.dtype == q.dtype == torch.bfloat16 and not (more or named)
        native = attention.step is not None and attention.step.native is not None
        attention.rotation = None
        if not (fits and plain and native and q.shape[3] % _TURNED_MULTIPLE == 0):
            return turn(q, k, cos, sin, *more, **named)
        attention.rotation = cos.contiguous(), sin.contiguous()
        return q, k

    names = {**function.__globals__, _ROTARY: later}
    own = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return lambda: setattr(module, "forward", MethodType(own, module)), lambda: delattr(module, "forward")
