"""Choose the next token of each row, so that no row depends on its neighbours: by the kernels in C where they
are, else by PyTorch.

All filters are thresholds on values (as in transformers' logits processors), never positions in a
sorted order: ties, common in bf16 logits, fall the same way in every batch. The noise of a draw is a
function of (seed, choice, token index) alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from onebase_engine.engine.messages import TokenLogprob
from onebase_engine.engine.row import Ahead, Row
from onebase_engine.kernels.cpu import CpuKernels, Draw

NUCLEUS_CANDIDATES = 1024
"""Most likely tokens tried for top_p before a row's whole vocabulary is sorted."""
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
    logits: torch.Tensor,
    rows: Sequence[Row | Ahead],
    eos_ids: frozenset[int],
    kernels: CpuKernels | None = None,
) -> list[Drawn]:
    """The next token of each row from raw logits [rows, vocab]; by `kernels` if there are any."""
    if kernels is not None and logits.dtype in (torch.bfloat16, torch.float32) and logits.is_contiguous():
        chosen = _drawn_by(kernels, logits, rows, eos_ids)
    else:
        chosen = _drawn(logits, rows, eos_ids)
    return [
        Drawn(None) if token is None else Drawn(token, _score(logits[i], token, row.sampling.logprobs))
        for i, (token, row) in enumerate(zip(chosen, rows, strict=True))
    ]


def _drawn(logits: torch.Tensor, rows: Sequence[Row | Ahead], eos_ids: frozenset[int]) -> list[int | None]:
    """By PyTorch."""
    raw = logits.float()
    finite = torch.isfinite(raw.amax(dim=-1)).tolist()
    adjusted = _adjust(raw, rows, eos_ids)
    tokens = adjusted.argmax(dim=-1)
    random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 and finite[i]]
    if random:
        tokens[random] = _sample(adjusted[random], [rows[i] for i in random])
    return [token if known else None for token, known in zip(tokens.tolist(), finite, strict=True)]


def _drawn_by(
    kernels: CpuKernels, logits: torch.Tensor, rows: Sequence[Row | Ahead], eos_ids: frozenset[int]
) -> list[int | None]:
    """By the kernels in C."""
    draws: list[Draw] = []
    adjusted: dict[int, torch.Tensor] = {}
    for i, (own, row) in enumerate(zip(logits, rows, strict=True)):
        sampling, noise, temperature = row.sampling, 0.0, 0.0
        if sampling.temperature > 0:
            noise = uniform(sampling.seed, row.choice, row.generated)
            temperature = max(sampling.temperature, _COLDEST)
        if _adjusts(row):
            own = adjusted[i] = _adjust(own.float()[None], [row], eos_ids)[0]
        filters = temperature, sampling.top_p, sampling.min_p
        draws.append(
            Draw(own.data_ptr(), own.dtype == torch.float32, max(sampling.top_k, 0), noise, *filters)
        )
    tokens = kernels.draw(draws, logits.shape[1])
    for i in adjusted:
        # The row's own logits must be finite as well, those that were taken away included.
        tokens[i] = tokens[i] if bool(torch.isfinite(logits[i].amax())) else None
    return tokens


def draw_apart(
    logits: torch.Tensor,
    rows: Sequence[Row | Ahead],
    eos_ids: frozenset[int],
    kernels: CpuKernels | None = None,
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


def _adjust(raw: torch.Tensor, rows: Sequence[Row | Ahead], eos_ids: frozenset[int]) -> torch.Tensor:
    """Penalties, bias and min_tokens, on a copy, for the rows that have any."""
    adjusted: torch.Tensor | None = None
    for i, row in enumerate(rows):
        if not _adjusts(row):
            continue
        sampling = row.sampling
        if adjusted is None:
            adjusted = raw.clone()
        if sampling.penalizes:
            _penalize(adjusted[i], row)
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=raw.device)
            adjusted[i, ids] += torch.tensor(list(sampling.logit_bias.values()), device=raw.device)
        if row.generated < sampling.min_tokens:
            adjusted[i, [*eos_ids, *sampling.stop_token_ids]] = -torch.inf
    return raw if adjusted is None else adjusted


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


def _sample(logits: torch.Tensor, rows: Sequence[Row | Ahead]) -> torch.Tensor:
    """Inverse-CDF draws, [rows] int64, after top_k, top_p and min_p in this order."""
    settings = [row.sampling for row in rows]
    temperature = _column([max(s.temperature, _COLDEST) for s in settings], logits)
    # Relative to the highest logit, so that no temperature, however low, overflows.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities = _kept_by_top_k(scaled, [s.top_k for s in settings]).softmax(dim=-1)
    floor = torch.maximum(
        _nucleus_floor(probabilities, [s.top_p for s in settings]),
        probabilities.amax(dim=-1, keepdim=True) * _column([s.min_p for s in settings], logits),
    )
    kept = torch.where(probabilities >= floor, probabilities, 0.0).double()
    cumulative = kept.cumsum(dim=-1)
    draws = [uniform(row.sampling.seed, row.choice, row.generated) for row in rows]
    target = _column(draws, cumulative) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # Rounding may put the target on the very end: the last token that was kept.
    last = kept.shape[-1] - 1 - kept.flip(-1).ne(0).to(torch.int8).argmax(dim=-1)
    return torch.minimum(index, last)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _kept_by_top_k(logits: torch.Tensor, ks: Sequence[int]) -> torch.Tensor:
    vocabulary = logits.shape[-1]
    limited = [(i, min(k, vocabulary)) for i, k in enumerate(ks) if k > 0]
    if not limited:
        return logits
    best = logits.topk(max(k for _, k in limited), dim=-1).values
    floor = torch.full((len(ks), 1), -torch.inf, dtype=logits.dtype, device=logits.device)
    for i, k in limited:
        floor[i, 0] = best[i, k - 1]
    return logits.masked_fill(logits < floor, -torch.inf)


def _nucleus_floor(probabilities: torch.Tensor, ps: Sequence[float]) -> torch.Tensor:
    """Smallest probability inside each row's nucleus, [rows, 1]; 0 where top_p is off."""
    floor = torch.zeros(len(ps), 1, dtype=probabilities.dtype, device=probabilities.device)
    limited = [i for i, p in enumerate(ps) if p < 1.0]
    if not limited:
        return floor
    candidates = min(NUCLEUS_CANDIDATES, probabilities.shape[-1])
    best = probabilities[limited].topk(candidates, dim=-1).values
    for row, values in zip(limited, best, strict=True):
        cumulative = values.double().cumsum(dim=-1)
        if cumulative[-1] < ps[row]:
            values = probabilities[row].sort(descending=True).values
            cumulative = values.double().cumsum(dim=-1)
        inside = int((cumulative < ps[row]).sum())
        floor[row, 0] = values[min(inside, len(values) - 1)]
    return floor
