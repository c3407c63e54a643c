"""Greedy replies to held-out prompts, from the model as it stands in the middle of a run.

Prompts are packed without padding, and each row attends to keys of its own; what is computed for a row does
not depend on the other rows (bit for bit on the CPU, up to rounding on CUDA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from onebase_adapters.training.attention import NAME, PackedAttention

BATCH_TOKENS = 8192
"""Keys and values held at once, in tokens: a batch takes as many rows as this allows."""
_ROWS_ALIGNED = 4
"""On the CPU an fp32 product gives a row the same bits whatever the other rows are, if their number is a
multiple of this."""


def generate_replies(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    on_progress: Callable[[float], None] | None = None,
    wait: Callable[[], None] = lambda: None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """The most probable reply to each prompt, token by token, without its end-of-turn token.

    Args:
        model: a view of the base, plain or with PEFT's adapter; left as it was, training mode included.
        prompts: token ids each. An empty one, or one that fills the base's context, gets an empty reply.
        max_tokens: longest reply.
        on_progress: gets the part that is done, from 0 to 1.
        wait: called between layers, many times for each token; what it raises ends the generation.
        batch_tokens: tokens of rows generated together, prompts and replies.
    """
    limit = getattr(_text_config(model), "max_position_embeddings", None) or 2**31
    rows = [_Row(place, list(ids), min(len(ids) + max_tokens, limit)) for place, ids in enumerate(prompts)]
    stops = stop_ids(model, tokenizer)
    done = 0
    with _generating(model, wait) as attention:
        for batch in _batches(rows, batch_tokens):
            for part in _reply(model, attention, batch, stops, max_tokens):
                if on_progress:
                    on_progress((done + part * len(batch)) / len(rows))
            done += len(batch)
    return [tokenizer.decode(row.reply, skip_special_tokens=True) for row in rows]


def stop_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a reply: those of the base's generation config, of its config and of the tokenizer."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), _text_config(model), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)


@dataclass(eq=False)
class _Row:
    """ids: the prompt. end: most tokens of prompt and reply."""

    place: int
    ids: list[int]
    end: int
    reply: list[int] = field(default_factory=list)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer, [1, kv heads, end, d]."""

    @property
    def length(self) -> int:
        """Tokens up to the last one that was generated."""
        return len(self.ids) + len(self.reply)


class _CachedAttention(PackedAttention):
    """Attends within packed prompts and keeps their keys and values; then one token a row."""

    rows: Sequence[_Row] = ()
    decoding = False

    def forward(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """q [1, heads, T, d], k and v [1, kv heads, T, d] -> [1, T, heads, d of v]."""
        layer: Any = module.layer_idx
        if not self.decoding:
            start = 0
            for row in self.rows:
                part = slice(start, start := start + len(row.ids))
                row.keys[layer] = _kept(k[:, :, part], row.end)
                row.values[layer] = _kept(v[:, :, part], row.end)
            return super().forward(module, q, k, v, options)
        self._gate.wait()
        output = v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])
        for at, row in enumerate(self.rows):
            place, length = row.length - 1, row.length
            row.keys[layer][:, :, place] = k[:, :, at]
            row.values[layer][:, :, place] = v[:, :, at]
            first = max(0, length - (options.get("sliding_window") or length))
            past = slice(first, length)
            output[:, at] = _attend(
                q[:, :, at, None], row.keys[layer][:, :, past], row.values[layer][:, :, past], options
            )[:, :, 0]
        return output


def _kept(states: torch.Tensor, capacity: int) -> torch.Tensor:
    held = states.new_empty(*states.shape[:2], capacity, states.shape[3])
    held[:, :, : states.shape[2]] = states
    return held


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """One query [1, heads, 1, d] over all of k and v [1, kv heads, n, d], as eager attention."""
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = q.reshape(1, kv_heads, heads // kv_heads, q.shape[3])
    scores = grouped @ k.transpose(2, 3) * options["scaling"]
    if (softcap := options.get("softcap")) is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).reshape(1, heads, 1, v.shape[3])


def _batches(rows: Sequence[_Row], limit: int) -> Iterator[list[_Row]]:
    """Rows of like length together, so that they end at like times; those that can reply at all."""
    batch: list[_Row] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (row.end, row.place)):
        if not row.ids or row.length >= row.end:
            continue
        if batch and tokens + row.end > limit:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += row.end
    if batch:
        yield batch


def _reply(
    model: nn.Module, attention: _CachedAttention, rows: list[_Row], stops: frozenset[int], most: int
) -> Iterator[float]:
    """Generate the replies of one batch; yields the part that is done after each token."""
    live = rows
    for step in range(most):
        attention.rows, attention.decoding = live, step > 0
        following = _next_tokens(model, attention)
        going = []
        for row, token in zip(live, following, strict=True):
            if token not in stops:
                row.reply.append(token)
                if row.length < row.end:
                    going.append(row)
                    continue
            row.keys, row.values = {}, {}
        live = going
        yield (step + 1) / most if live else 1.0
        if not live:
            return


def _next_tokens(model: nn.Module, attention: _CachedAttention) -> list[int]:
    """The most probable next token of each row: after its prompt, or after its last token."""
    parts = [
        (row.reply[-1:], range(row.length - 1, row.length))
        if attention.decoding
        else (row.ids, range(len(row.ids)))
        for row in attention.rows
    ]
    ids = [token for tokens, _ in parts for token in tokens]
    positions = [position for _, places in parts for position in places]
    lengths = [len(tokens) for tokens, _ in parts]
    ends = torch.tensor(lengths).cumsum(0) - 1
    if spare := -len(ids) % _ROWS_ALIGNED:
        ids += ids[:1] * spare
        positions += range(spare)
        lengths.append(spare)
    device = next(model.parameters()).device
    attention.set_lengths(lengths, device, alone=True)
    output = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=_aligned(ends).to(device),
        use_cache=False,
    )
    following: list[int] = output.logits[0, : len(parts)].argmax(dim=-1).tolist()
    return following


def _aligned(ends: torch.Tensor) -> torch.Tensor:
    """Places of which logits are taken, the last one more often, so that the head too has aligned rows."""
    spare = -len(ends) % _ROWS_ALIGNED
    return torch.cat([ends, ends[-1:].expand(spare)])


@dataclass(frozen=True)
class _Wait:
    wait: Callable[[], None]


@contextmanager
def _generating(model: nn.Module, wait: Callable[[], None]) -> Iterator[_CachedAttention]:
    """Eval mode without gradients and with our attention; afterwards everything is as it was."""
    tree: Any = _plain(model)
    modes = [(module, module.training) for module in model.modules()]
    layers = [(m, m.__dict__.get("packed")) for m in tree.modules() if hasattr(m, "layer_idx")]
    implementation = tree.config._attn_implementation
    attention = _CachedAttention(_Wait(wait))
    try:
        model.eval()
        attention.attach(tree)
        with torch.no_grad():
            yield attention
    finally:
        if implementation != NAME:
            tree.set_attn_implementation(implementation)
        for module, packed in layers:
            if packed is None:
                module.__dict__.pop("packed", None)
            else:
                module.packed = packed
        for module, training in modes:
            module.training = training


def _plain(model: Any) -> Any:
    """The base's tree, with the adapter's layers in it, but without PEFT's model around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
