"""Choose the next token of each row, so that no row depends on its neighbours.

All filters are thresholds on values (as in transformers' logits processors), never positions in a
sorted order: ties, common in bf16 logits, fall the same way in every batch. The noise of a draw is a
function of (seed, choice, token index) alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from onebase_engine.engine.messages import TokenLogprob
from onebase_engine.engine.row import Ahead, Row
from onebase_engine.kernels.interface import Draws, Kernels

_COLDEST = torch.finfo(torch.float32).tiny
"""Of temperatures above 0."""


@dataclass(frozen=True)
class Drawn:
    """One row's new token; None when its logits are not finite or it raised `error`: it fails alone."""

    token: int | None
    logprob: TokenLogprob | None = None
    error: Exception | None = None


def uniform(seed: int, choice: int, index: int) -> float:
    """The draw of one token, in [0, 1): counter-based, 53 bits of blake2b(seed, choice, token index)."""
    counter = struct.pack("<QII", seed & 0xFFFFFFFFFFFFFFFF, choice, index)
    (bits,) = struct.unpack("<Q", blake2b(counter, digest_size=8).digest())
    return float((bits >> 11) * 2.0**-53)


def draw(
    logits: torch.Tensor, rows: Sequence[Row | Ahead], eos_ids: frozenset[int], kernels: Kernels
) -> list[Drawn]:
    """The next token of each row from raw logits [rows, vocab]."""
    if not rows:
        return []
    own = list(logits)
    adjusted = [i for i, row in enumerate(rows) if _adjusts(row)]
    for i in adjusted:
        own[i] = _adjust(own[i].float().clone(), rows[i], eos_ids)
    chosen = kernels.draw(own, _draws(rows))
    for i in adjusted:
        # The row's own logits must be finite as well, those that were taken away included.
        chosen[i] = chosen[i] if bool(torch.isfinite(logits[i].amax())) else None
    return [
        Drawn(None) if token is None else Drawn(token, _score(logits[i], token, row.sampling.logprobs))
        for i, (token, row) in enumerate(zip(chosen, rows, strict=True))
    ]


def _draws(rows: Sequence[Row | Ahead]) -> Draws:
    """How each row's token is drawn."""
    settings = [row.sampling for row in rows]
    temperatures = [max(one.temperature, _COLDEST) if one.temperature > 0 else 0.0 for one in settings]
    noise = [
        uniform(row.sampling.seed, row.choice, row.generated) if row.sampling.temperature > 0 else 0.0
        for row in rows
    ]
    return Draws(
        temperature=np.array(temperatures, dtype=np.float32),
        top_k=np.array([max(one.top_k, 0) for one in settings], dtype=np.int64),
        top_p=np.array([one.top_p for one in settings], dtype=np.float32),
        min_p=np.array([one.min_p for one in settings], dtype=np.float32),
        uniform=np.array(noise),
    )


def draw_apart(
    logits: torch.Tensor, rows: Sequence[Row | Ahead], eos_ids: frozenset[int], kernels: Kernels
) -> list[Drawn]:
    """`draw`, but an exception is that of the row which raises it: the others get their tokens.

    Raises:
        torch.AcceleratorError, or what every one of several rows raises: it is nobody's in particular.
    """
    try:
        return draw(logits, rows, eos_ids, kernels)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        if len({getattr(row, "row", row) for row in rows}) == 1:
            return [Drawn(None, error=error) for _ in rows]
        apart = [draw_apart(logits[i : i + 1], [row], eos_ids, kernels)[0] for i, row in enumerate(rows)]
        if all(drawn.error is not None for drawn in apart):
            raise
        return apart


def score_prompt(logits: torch.Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log probabilities of `targets`, each under its row of raw logits [len(targets), vocab]."""
    return [
        TokenLogprob(target, *_top(torch.log_softmax(row.float(), dim=-1), target, top))
        for row, target in zip(logits, targets, strict=True)
    ]


def _score(raw: torch.Tensor, token: int, top: int | None) -> TokenLogprob | None:
    if top is None:
        return None
    return TokenLogprob(token, *_top(torch.log_softmax(raw.float(), dim=-1), token, top))


def _top(logprobs: torch.Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    if not top:
        return float(logprobs[token]), []
    values, indices = logprobs.topk(min(top, len(logprobs)))
    return float(logprobs[token]), list(zip(indices.tolist(), values.tolist(), strict=True))


def _adjust(logits: torch.Tensor, row: Row | Ahead, eos_ids: frozenset[int]) -> torch.Tensor:
    """Penalties, bias and min_tokens, written into a row of logits [vocab] fp32."""
    sampling = row.sampling
    if sampling.penalizes:
        _penalize(logits, row)
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    if row.generated < sampling.min_tokens:
        logits[[*eos_ids, *sampling.stop_token_ids]] = -torch.inf
    return logits


def _adjusts(row: Row | Ahead) -> bool:
    sampling = row.sampling
    return bool(row.generated < sampling.min_tokens or sampling.logit_bias or sampling.penalizes)


def _penalize(logits: torch.Tensor, row: Row | Ahead) -> None:
    """Repetition (CTRL, arXiv:1909.05858) over prompt and completion; OpenAI's two over the completion."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        ids, _ = row.seen.read(row.tokens)
        seen = torch.from_numpy(ids).to(logits.device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.generated and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = row.completed.read(row.tokens, row.prompt_length)
        times = torch.from_numpy(counts).to(logits)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * times
        logits[torch.from_numpy(ids).to(logits.device)] -= penalties
