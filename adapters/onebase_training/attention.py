"""Attention of several rows in one packed sequence, where each row attends to itself only.

It plugs into transformers' `AttentionInterface`, so that every decoder keeps its own modelling code. A packed
sequence of rows costs about as much as the rows alone: only rows of about the same length are padded to one
shape, for attention alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from onebase_engine.base.layers import set_attention
from onebase_engine.base.load import UnsupportedBaseError
from onebase_engine.engine.attention import RowPositions, chunk_of
from onebase_engine.kernels.interface import AttentionSettings
from onebase_engine.kernels.reference import attention_weights
from onebase_training.events import Gate
from onebase_training.kernels import ShortAttention

NAME = "onebase_packed"
SHORT = 256
"""Length of a row, in tokens, up to which plain products are faster on the CPU than torch's flash attention:
its backward pass costs three times as much at 100 tokens, and half as much at 600."""


class UnsupportedTrainingError(UnsupportedBaseError):
    """The base's attention needs something that training does not support."""


class PackedAttention:
    """State shared by all attention modules of a view; the rows' lengths are set before each pass.

    They must stay set until the backward pass is done, because gradient checkpointing computes them again.
    """

    def __init__(self, gate: Gate) -> None:
        self.groups: tuple[Group, ...] = ()
        self._rows = RowPositions()
        self._gate = gate

    def set_lengths(self, lengths: Sequence[int], device: torch.device) -> None:
        """Set the lengths of the packed sequence's rows, in order."""
        self.groups = grouped(lengths, device)
        self._rows.positions = torch.cat([torch.arange(length, device=device) for length in lengths])

    def attach(self, model: nn.Module) -> None:
        """Make the attention modules of a view call this object."""
        register()
        self._rows.attach(model)
        set_attention(model, NAME)
        for module in model.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.packed = self  # type: ignore[assignment]

    def forward(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """Attend over q [1, heads, T, d], k and v [1, kv heads, T, d]. Returns [1, T, heads, d of v]."""
        self._gate.wait()
        if q.requires_grad:
            q.register_hook(self._wait_backwards)  # type: ignore[no-untyped-call]
        if not getattr(module, "is_causal", True):
            raise UnsupportedTrainingError(
                "the base's attention looks ahead, which training does not do: choose another base"
            )
        sinks = options.get("s_aux")
        settings = AttentionSettings(
            options["scaling"],
            options.get("softcap"),
            options.get("sliding_window"),
            chunk_of(module),
            None if sinks is None else sinks.float(),
        )
        dropout = options.get("dropout") or 0.0
        rows = []
        for group in self.groups:
            padded = (group.padded(q.squeeze(0)), group.padded(k.squeeze(0)), group.padded(v.squeeze(0)))
            rows.append(group.packed(_attend(padded, group.length, settings, dropout)))
        return (torch.cat(rows) if len(rows) > 1 else rows[0]).unsqueeze(0)

    def _wait_backwards(self, gradient: torch.Tensor) -> None:
        self._gate.wait()


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend for a module of transformers, some of which give the mask by keyword.

    Raises:
        UnsupportedTrainingError: the mask is the decoder's own; the registered one is None.
    """
    if attention_mask is not None:
        raise UnsupportedTrainingError(
            "the base gives its attention a mask of its own, which training would leave out: choose another "
            "base"
        )
    packed: PackedAttention = module.packed  # type: ignore[assignment]
    return packed.forward(module, query, key, value, options), None


def register() -> None:
    """Register NAME with transformers; calling it again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def _attend(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    length: int,
    settings: AttentionSettings,
    dropout: float,
) -> torch.Tensor:
    """Attend in the fastest way: q [n, heads, L, d], k and v [n, kv heads, L, d] -> [n, heads, L, d of v]."""
    q, k, v = states
    seen = min(settings.window or length, settings.chunk or length)
    if settings.softcap is not None or settings.sinks is not None or seen < length:
        return _explicit(q, k, v, settings, dropout)
    if q.device.type == "cpu" and length <= SHORT and not dropout:
        short: Any = ShortAttention.apply
        output: torch.Tensor = short(q, k, v, settings.scaling)
        return output
    groups = q.shape[1] // k.shape[1]
    shared = groups > 1 and k.shape[-1] == v.shape[-1] <= 256 and _has_flash(q, k, v, dropout)
    if not shared:
        k, v = _repeated(k, groups), _repeated(v, groups)
    return nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, dropout_p=dropout, scale=settings.scaling, enable_gqa=shared
    )


def _has_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> bool:
    """Return True if a GPU's flash attention computes this with its gradients and with shared heads as they
    are; otherwise plain products of all pairs would."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.device.type not in ("cuda", "meta"):
        return False
    if q.device.type == "meta":
        return True
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    return can_use_flash_attention(SDPAParams(q, k, v, None, dropout, True, True))


def _repeated(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat [n, kv heads, L, d] to [n, heads, L, d], one for each query head."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: AttentionSettings, dropout: float
) -> torch.Tensor:
    """Attend as transformers' eager attention does, with softcap, windows, chunks and sinks."""
    groups = q.shape[1] // k.shape[1]
    place = torch.arange(q.shape[2], device=q.device)
    hidden = (place > place[:, None]) | (place < settings.first_seen(place[:, None]))
    raw = q @ _repeated(k, groups).transpose(2, 3)
    sinks = None if settings.sinks is None else settings.sinks[:, None, None]
    weights = attention_weights(raw, hidden, settings.scaling, settings.softcap, sinks)
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    return weights @ _repeated(v, groups)


STEP = 32
"""Limit, in tokens, below which the rows of one group differ in length; they are padded to the longest."""


class Group:
    """Consecutive rows of the packed sequence, from token `start` on.

    length: L, tokens that each of the n rows is padded to.
    """

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device) -> None:
        self.start, self.tokens = start, sum(lengths)
        self.count, self.length = len(lengths), max(lengths)
        self._full = all(length == self.length for length in lengths)
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        # What stands in the padding is the row's last token: a number that is never looked at.
        taken = [
            begin + min(place, length - 1)
            for begin, length in zip(starts, lengths, strict=True)
            for place in range(self.length)
        ]
        kept = [
            number * self.length + place for number, length in enumerate(lengths) for place in range(length)
        ]
        self._taken = torch.tensor(taken, device=device)
        self._kept = torch.tensor(kept, device=device)

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """Pad this group's part of [heads, T, d] to [n, heads, L, d]."""
        return self.rows(states.transpose(0, 1)).transpose(1, 2)

    def rows(self, states: torch.Tensor) -> torch.Tensor:
        """Pad this group's part of [T, ...] to [n, L, ...]."""
        part = states[self.start : self.start + self.tokens]
        if not self._full:
            part = _Rows.apply(part, self._taken, self._kept)  # type: ignore[no-untyped-call]
        return part.reshape(self.count, self.length, *part.shape[1:])

    def packed(self, states: torch.Tensor) -> torch.Tensor:
        """Pack [n, heads, L, d] into [tokens of the group, heads, d]."""
        return self.flat(states.transpose(1, 2))

    def flat(self, states: torch.Tensor) -> torch.Tensor:
        """Pack [n, L, ...] into [tokens of the group, ...]."""
        rows = states.flatten(0, 1)
        if self._full:
            return rows
        kept: torch.Tensor = _Rows.apply(rows, self._kept, None)  # type: ignore[no-untyped-call]
        return kept


def grouped(lengths: Sequence[int], device: torch.device) -> tuple[Group, ...]:
    """Group neighbours of about one length. Sorting rows by length makes the groups few and full."""
    groups: list[Group] = []
    start, rows = 0, list[int]()
    for length in lengths:
        if rows and math.ceil(length / STEP) != math.ceil(rows[0] / STEP):
            groups.append(Group(start, rows, device))
            start, rows = start + sum(rows), []
        rows.append(length)
    return (*groups, Group(start, rows, device))


class _Rows(torch.autograd.Function):
    """Selects rows by number. Backwards, each row gets its place's gradient; padding gets none.

    torch's own indexing adds gradients up one by one, which on the CPU takes longer than attention does.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, taken: torch.Tensor, kept: torch.Tensor | None
    ) -> torch.Tensor:
        """Select from states [m, ...] the rows `taken`: [len(taken), ...].

        kept: position of each row of `states` in the result; None if `taken` has every row at most once, and
        the rest is padding.
        """
        ctx.taken, ctx.kept, ctx.count = taken, kept, len(states)
        return states.index_select(0, taken)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.kept is not None:
            return gradient.index_select(0, ctx.kept), None, None
        whole = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return whole.index_copy_(0, ctx.taken, gradient), None, None
