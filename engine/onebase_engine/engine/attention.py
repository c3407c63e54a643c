"""Attention over paged KV blocks, plugged into transformers' `AttentionInterface`.

Every decoder keeps its own modelling code and calls `paged_attention` with q, k and v of the packed step;
the kernels compute it (`kernels/interface.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onebase_engine.base.layers import set_attention
from onebase_engine.base.load import CHUNKED
from onebase_engine.engine.kv_cache import KVCache, Shape, Sight
from onebase_engine.kernels.interface import AttentionKernel, AttentionSettings, Contexts, Kernels, Rotation

NAME = "onebase_paged"

_COMPUTED = frozenset({"scaling", "softcap", "sliding_window", "s_aux"})
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
        self.shapes: dict[int, Shape] = {}
        """Filled by the probe pass: layer with keys and values of its own -> (kv heads, key dim, value
        dim)."""
        self.lenders: dict[int, int] = {}
        """Filled by the probe pass: layer that attends to another layer's keys and values -> that layer."""
        self.sights: dict[int, Sight] = {}
        """Filled by the probe pass: layer with keys and values of its own -> what is seen of them, also by
        layers that borrow them."""
        self.groups = 1
        """Filled by the probe pass: largest number of heads that share keys and values."""
        self.rows = RowPositions()
        self.rotation: Rotation | None = None
        """Rotation that the next call has yet to apply to q and k."""
        self._kernels = kernels
        self._layers: dict[int, AttentionKernel] = {}
        self._probed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Keys and values of each layer in the probe pass, kept until `end_probe`."""

    def attach(self, model: nn.Module) -> None:
        """Make the view's attention modules call this object."""
        register()
        self.rows.attach(model)
        set_attention(model, NAME)
        for module in model.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.paged = self  # type: ignore[assignment]

    def end_probe(self) -> set[int]:
        """Return the layers that the probe pass has seen, and drop what it has kept."""
        self._probed.clear()
        return self.shapes.keys() | self.lenders.keys()

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
        attention = self._kernel(module, layer, self.cache, options)
        return attention(q[0], k[0], v[0], self.step, rotation).unsqueeze(0)

    def _kernel(
        self, module: nn.Module, layer: int, cache: KVCache, options: dict[str, Any]
    ) -> AttentionKernel:
        if layer not in self._layers:
            sinks = options.get("s_aux")
            settings = AttentionSettings(
                options["scaling"],
                options.get("softcap"),
                options.get("sliding_window"),
                chunk_of(module),
                sinks=None if sinks is None else sinks.detach().float().contiguous(),
                writes=layer not in self.lenders,
            )
            lender = self.lenders.get(layer, layer)
            self._layers[layer] = self._kernels.attention(cache.layers[lender], settings)
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
        if layer in self.shapes or layer in self.lenders:
            raise UnsupportedAttentionError("its layers call attention more than once")
        if not (getattr(module, "is_causal", True) and options.pop("is_causal", True)):
            raise UnsupportedAttentionError("its attention is not causal")
        # An unknown option may change what attention gives, as sparse indices do.
        known = _COMPUTED | _WITHOUT_EFFECT
        foreign = sorted(name for name, value in options.items() if name not in known and _acts(value))
        if foreign:
            raise UnsupportedAttentionError(
                f"its attention asks for {', '.join(foreign)}, which paged attention does not know"
            )
        self.groups = max(self.groups, q.shape[1] // k.shape[1])
        sinks = options.get("s_aux")
        if sinks is not None and sinks.shape != q.shape[1:2]:
            raise UnsupportedAttentionError(
                f"its attention has sinks of shape {list(sinks.shape)}, which are not one a head"
            )
        sight = Sight(options.get("sliding_window"))
        if sight.window is None:
            sight = Sight(chunk=chunk_of(module))
        for other, (keys, values) in self._probed.items():
            if k is keys and v is values:
                self.lenders[layer] = lender = self.lenders.get(other, other)
                self.sights[lender] = _both(self.sights[lender], sight)
                break
        else:
            self.shapes[layer] = (k.shape[1], k.shape[3], v.shape[3])
            self.sights[layer] = sight
        self._probed[layer] = k, v
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


class RowPositions:
    """Positions of a pass's rows, for modules that count them by themselves.

    Llama 4 scales queries by their positions, which it takes to be those of one text, after what the cache
    holds. This stands in for the cache: what it "holds" is a number for each row.
    """

    def __init__(self) -> None:
        self.positions: torch.Tensor | None = None
        """Positions [T] int64, set before each pass; None: rows are one text."""

    def attach(self, model: nn.Module) -> None:
        """Give the positions to the modules of a view that count them."""
        for module in model.modules():
            if getattr(module, "attn_temperature_tuning", False):
                module.register_forward_pre_hook(self._give, with_kwargs=True)

    def _give(self, module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        stands_in = self.positions is not None and named.get("cache") is None
        return args, {**named, "cache": self} if stands_in else named

    def get_seq_length(self, layer: int = 0) -> torch.Tensor | int:
        """Return what is to be added to each row's number for its position, [T]."""
        if self.positions is None:
            return 0
        return self.positions - torch.arange(len(self.positions), device=self.positions.device)

    def update(
        self, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as they are: attention has a cache of its own."""
        return k, v


def chunk_of(module: Any) -> int | None:
    """Return the size of the chunks of positions within which a module attends; None: it has none.

    transformers tells it to the mask alone.
    """
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None) or ()
    if module.layer_idx < len(kinds) and kinds[module.layer_idx] == CHUNKED:
        size: int = config.attention_chunk_size  # type: ignore[union-attr]
        return size
    return None


def _both(one: Sight, other: Sight) -> Sight:
    """Return what is seen by two layers of the same keys."""
    if one == other or one.window is None or other.window is None:
        return one if one == other else Sight()
    return Sight(max(one.window, other.window))


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
