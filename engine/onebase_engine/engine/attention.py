"""Attention over paged KV blocks, plugged into transformers' `AttentionInterface`.

Every decoder keeps its own modelling code and calls `paged_attention` with q, k and v of the packed step;
the kernels compute it (`kernels/interface.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onebase_engine.base.layers import set_attention
from onebase_engine.engine.kv_cache import KVCache
from onebase_engine.kernels.interface import AttentionKernel, Contexts, Kernels, Rotation

NAME = "onebase_paged"

_COMPUTED = frozenset({"scaling", "softcap", "sliding_window"})
"""Options of a decoder's attention that the kernels compute."""
_WITHOUT_EFFECT = frozenset({"position_ids", "logits_to_keep"})
"""Options that decoders pass to every attention and that are ignored: the step has the positions, and which
logits are kept is no concern of attention."""


class UnsupportedAttentionError(Exception):
    """The model's attention asks for something that paged attention does not do."""


class PagedAttention:
    """Shared by all attention modules of the served view; `step` is set before each forward pass."""

    def __init__(self, kernels: Kernels) -> None:
        self.cache: KVCache | None = None
        self.step: Contexts | None = None
        self.shapes: dict[int, tuple[int, int, int]] = {}
        """Filled by the probe pass: layer -> (kv heads, key dim, value dim)."""
        self.rotation: Rotation | None = None
        """Rotation that the next call has yet to apply to q and k."""
        self._kernels = kernels
        self._layers: dict[int, AttentionKernel] = {}

    def attach(self, model: nn.Module) -> None:
        """Make the view's attention modules call this object."""
        register()
        set_attention(model, NAME)
        for module in model.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.paged = self  # type: ignore[assignment]

    def replace_cache(self, cache: KVCache | None) -> None:
        """Attend over another cache from now on, or over none."""
        self.cache = cache
        self._layers.clear()

    def forward(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """Compute attention: q [1, heads, T, d], k and v [1, kv heads, T, d] -> [1, T, heads, d of v]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if self.cache is None or self.step is None:
            return self._probe(module, layer, q, k, v, options)
        rotation, self.rotation = self.rotation, None
        attention = self._kernel(layer, self.cache, options)
        return attention(q[0], k[0], v[0], self.step, rotation).unsqueeze(0)

    def _kernel(self, layer: int, cache: KVCache, options: dict[str, Any]) -> AttentionKernel:
        if layer not in self._layers:
            settings = options["scaling"], options.get("softcap"), options.get("sliding_window")
            self._layers[layer] = self._kernels.attention(cache.layers[layer], *settings)
        return self._layers[layer]

    def _probe(
        self,
        module: nn.Module,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        if layer in self.shapes:
            raise UnsupportedAttentionError("its layers call attention more than once")
        if not (getattr(module, "is_causal", True) and options.pop("is_causal", True)):
            raise UnsupportedAttentionError("its attention is not causal")
        # An unknown option may change what attention gives, as sinks (s_aux) and sparse indices do.
        known = _COMPUTED | _WITHOUT_EFFECT
        foreign = sorted(name for name, value in options.items() if name not in known and _acts(value))
        if foreign:
            raise UnsupportedAttentionError(
                f"its attention asks for {', '.join(foreign)}, which paged attention does not know"
            )
        self.shapes[layer] = (k.shape[1], k.shape[3], v.shape[3])
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


def _acts(value: object) -> bool:
    """Return True unless the value of an option switches it off, as a dropout of 0 does."""
    return isinstance(value, torch.Tensor) or bool(value)


def register() -> None:
    """Register paged attention with transformers. Safe to repeat.

    No mask function is registered: transformers makes no mask for attention that has none. With one it would
    look for packed sequences in every step, which makes the host wait for the device.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers, through the PagedAttention that the module carries.

    Raises:
        UnsupportedAttentionError: there is a mask, such as a learned bias, which blocks have no place for.
    """
    if attention_mask is not None:
        raise UnsupportedAttentionError(
            "it gives attention a mask of its own, such as a learned bias, which paged attention cannot apply"
        )
    paged: PagedAttention = module.paged  # type: ignore[assignment]
    if options.get("scaling") is None:
        options["scaling"] = query.shape[-1] ** -0.5
    return paged.forward(module, query, key, value, options), None
