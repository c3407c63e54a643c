"""Attention over paged KV blocks, plugged into transformers' `AttentionInterface`.

Every decoder keeps its own modelling code and calls `paged_attention` with q, k and v of the packed
step. The numbers are those of transformers' eager attention: scores in the model's dtype, softmax in
fp32, weights rounded back. On the CPU a row's bits depend on nothing but the row, which takes care: the
libraries sum in an order that they choose by a product's shape. `product_shapes.py` says which shapes agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from onebase_engine.engine.kv_cache import KVCache
from onebase_engine.engine.product_shapes import (
    FIXED_KEYS,
    FIXED_ROWS,
    QUERY_CHUNK,
    QUERY_MULTIPLE,
    Heads,
    ProductShapes,
    find_shapes,
)
from onebase_engine.kernels.cpu import Contexts, CpuKernels, NativeAttention

NAME = "onebase_paged"


class UnsupportedAttentionError(Exception):
    """The model's attention asks for something that paged attention does not do."""


@dataclass
class Context:
    """Queries at packed rows `start:stop` and the KV slots that they may see.

    `slots` is [rows, length] for decodes (one query a row, and perhaps padding rows after them) or [length]
    for one prefill segment; `positions` [queries] are the queries' own positions: a query sees keys at
    positions up to its own.
    """

    start: int
    stop: int
    slots: torch.Tensor
    positions: torch.Tensor
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def hidden(self, window: int | None) -> torch.Tensor:
        """True where a query must not look, [queries, length]; made once a step for each window size."""
        if window not in self._masks:
            keys = torch.arange(self.slots.shape[-1], device=self.slots.device)
            mask = keys > self.positions[:, None]
            if window is not None:
                mask |= keys <= self.positions[:, None] - window
            self._masks[window] = mask
        return self._masks[window]


@dataclass
class AttentionStep:
    """Where this step's keys are written, and its contexts; `native` says both for the kernels in C."""

    write_slots: torch.Tensor | None = None
    decodes: Sequence[Context] = ()
    prefills: Sequence[Context] = ()
    native: Contexts | None = None


class PagedAttention:
    """Shared by all attention modules of the served view; `step` is set before each forward pass."""

    def __init__(self) -> None:
        self.cache: KVCache | None = None
        self.step: AttentionStep | None = None
        self.shapes: dict[int, tuple[int, int, int]] = {}
        """Filled by the probe pass: layer -> (kv heads, key dim, value dim)."""
        self.heads: set[Heads] = set()
        """Filled by the probe pass."""
        self.products = ProductShapes()
        self._kernels: CpuKernels | None = None
        self._block_size = 0
        self._layers: dict[int, NativeAttention] = {}
        self.rotation: tuple[torch.Tensor, torch.Tensor] | None = None
        """By which the next call's q and k are still to be turned: cosines and sines [T, dim]."""

    def use(self, kernels: CpuKernels | None, block_size: int) -> None:
        """Compute by these kernels from now on, over the cache and its blocks."""
        self._kernels, self._block_size = kernels, block_size
        self._layers = {}

    def attach(self, model: nn.Module) -> None:
        """Make the view's attention modules call this object."""
        register()
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        for module in model.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.paged = self  # type: ignore[assignment]

    def find_products(self, dtype: torch.dtype, device: torch.device, longest: int) -> ProductShapes:
        """Settle the shapes of products for contexts of up to `longest` tokens; the packer keeps to them."""
        if device.type == "cpu" and self._kernels is None:
            self.products = find_shapes(frozenset(self.heads), dtype, longest)
        return self.products

    def forward(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """q [1, heads, T, d], k and v [1, kv heads, T, d] -> [1, T, heads, d of v]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if self.cache is None or self.step is None:
            return self._probe(module, layer, q, k, v, options)
        keys, values, step = self.cache.keys[layer], self.cache.values[layer], self.step
        if step.native is not None:
            rotation, self.rotation = self.rotation, None
            attention = self._native(layer, q.shape[1], options)
            return attention(q[0], k[0], v[0], step.native, rotation).unsqueeze(0)
        if step.write_slots is None:
            raise RuntimeError("the step does not say where its keys go")
        keys.index_copy_(1, step.write_slots, k[0])
        values.index_copy_(1, step.write_slots, v[0])
        scores = _Scores(options["scaling"], options.get("softcap"), options.get("sliding_window"))
        out = v.new_zeros(q.shape[2], q.shape[1], v.shape[3])
        for context in step.decodes:
            _decode(q[0], keys, values, context, scores, self.products, out)
        for context in step.prefills:
            _prefill(q[0], keys, values, context, scores, self.products, out)
        return out.unsqueeze(0)

    def _native(self, layer: int, heads: int, options: dict[str, Any]) -> NativeAttention:
        if layer not in self._layers:
            if self.cache is None or self._kernels is None:
                raise RuntimeError("there are no kernels for this step, or no KV cache")
            settings = options["scaling"], options.get("softcap"), options.get("sliding_window")
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            self._layers[layer] = self._kernels.attention(keys, values, heads, self._block_size, *settings)
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
        if not getattr(module, "is_causal", True):
            raise UnsupportedAttentionError("its attention is not causal")
        foreign = [name for name in ("s_aux", "position_bias", "head_mask") if options.get(name) is not None]
        if foreign:
            raise UnsupportedAttentionError(f"its attention uses {', '.join(foreign)}")
        self.shapes[layer] = (k.shape[1], k.shape[3], v.shape[3])
        self.heads.add(Heads(k.shape[1], q.shape[1] // k.shape[1], k.shape[3], v.shape[3]))
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


def register() -> None:
    """Tell transformers about paged attention. Safe to repeat.

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
    """The function that transformers calls; the module carries the PagedAttention that it belongs to."""
    paged: PagedAttention = module.paged  # type: ignore[assignment]
    if options.get("scaling") is None:
        options["scaling"] = query.shape[-1] ** -0.5
    return paged.forward(module, query, key, value, options), None


@dataclass(frozen=True)
class _Scores:
    scaling: float
    softcap: float | None
    window: int | None

    def weights(self, raw: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return attention_weights(raw, hidden, self.scaling, self.softcap)


def attention_weights(
    raw: torch.Tensor, hidden: torch.Tensor, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """Softmax weights of raw q.k products [..., m, length], in eager attention's order of rounding.

    `hidden`: True where a query must not look.
    """
    scores = raw * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(raw.dtype)


def _decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: Context,
    scores: _Scores,
    products: ProductShapes,
    out: torch.Tensor,
) -> None:
    rows, length = context.slots.shape
    kv_heads = keys.shape[0]
    flat = context.slots.view(-1)
    k = keys.index_select(1, flat).view(kv_heads, rows, length, -1)
    v = values.index_select(1, flat).view(kv_heads, rows, length, -1)
    count = context.stop - context.start
    part = nn.functional.pad(q[:, context.start : context.stop], (0, 0, 0, rows - count))
    grouped = part.reshape(kv_heads, -1, rows, part.shape[-1]).transpose(1, 2)
    mixed = _attend(grouped, k, v, context.hidden(scores.window)[:, None], scores, products)
    out[context.start : context.stop] = mixed.permute(1, 0, 2, 3).reshape(rows, q.shape[0], -1)[:count]


def _prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: Context,
    scores: _Scores,
    products: ProductShapes,
    out: torch.Tensor,
) -> None:
    kv_heads = keys.shape[0]
    k, v = keys.index_select(1, context.slots), values.index_select(1, context.slots)
    hidden = context.hidden(scores.window)
    groups = q.shape[0] // kv_heads
    for start in range(context.start, context.stop, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, context.stop)
        count = stop - start
        grouped = q[:, start:stop].reshape(kv_heads, groups * count, q.shape[-1])
        masked = hidden[start - context.start : stop - context.start].repeat(groups, 1)
        mixed = _attend(grouped, k, v, masked, scores, products)
        out[start:stop] = mixed.reshape(q.shape[0], count, -1).transpose(0, 1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    scores: _Scores,
    products: ProductShapes,
) -> torch.Tensor:
    """q [..., m, d], k, v [..., length, d], hidden broadcastable to [..., m, length] -> [..., m, d of v]."""
    if products.fixed:
        return _attend_fixed(q, k, v, hidden, scores)
    if q.device.type != "cpu":
        return torch.matmul(scores.weights(torch.matmul(q, k.transpose(-1, -2)), hidden), v)
    count = q.shape[-2]
    if hidden.shape[-2] == 1:  # a decode: all its rows see the same keys
        padding = (0, 0, 0, max(0, products.queries - count))
    else:
        padding = (0, 0, 0, -count % QUERY_MULTIPLE)
        hidden = nn.functional.pad(hidden, padding)
    q = nn.functional.pad(q, padding)
    weights = scores.weights(torch.matmul(q, k.transpose(-1, -2)), hidden)
    return torch.matmul(weights, v)[..., :count, :]


def _attend_fixed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scores: _Scores
) -> torch.Tensor:
    """The same with every product in fp32, of FIXED_ROWS queries and FIXED_KEYS keys."""
    count, dtype = q.shape[-2], q.dtype
    q = nn.functional.pad(q, (0, 0, 0, -count % FIXED_ROWS))
    keys = [part.float() for part in torch.split(k, FIXED_KEYS, dim=-2)]
    values = [part.float() for part in torch.split(v, FIXED_KEYS, dim=-2)]
    parts: list[torch.Tensor] = []
    for start in range(0, q.shape[-2], FIXED_ROWS):
        tile = q[..., start : start + FIXED_ROWS, :].float().contiguous()
        raw = torch.cat([torch.matmul(tile, part.transpose(-1, -2)) for part in keys], dim=-1).to(dtype)
        real = min(FIXED_ROWS, count - start)
        mask = hidden if hidden.shape[-2] == 1 else hidden[..., start : start + real, :]
        weights = nn.functional.pad(scores.weights(raw[..., :real, :], mask), (0, 0, 0, FIXED_ROWS - real))
        pieces = torch.split(weights.float(), FIXED_KEYS, dim=-1)
        products = (torch.matmul(piece, part) for piece, part in zip(pieces, values, strict=True))
        parts.append(sum(products, start=torch.zeros(())).to(dtype))
    return torch.cat(parts, dim=-2)[..., :count, :]
