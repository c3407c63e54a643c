"""Choose the next token of each sequence, so that no sequence depends on its neighbours.

All filters are thresholds on values (as in transformers' logits processors), never positions in a
sorted order: ties, common in bf16 logits, fall the same way in every batch. The noise of a draw is a
function of (seed, choice, token index) alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import numpy as np
import torch
from torch.nn import functional

from onebase_engine.engine.grammar_follower import GrammarError
from onebase_engine.engine.messages import ScoredToken
from onebase_engine.engine.sequence import DraftedSequence, SequenceState
from onebase_engine.kernels.interface import Draws, Kernels
from onebase_engine.kernels.reference import sent

Mask = np.ndarray | GrammarError | None
"""Tokens that a sequence's grammar allows next, [words] int32: the lowest bit of the first is token 0."""

_FIRST_TOKENS = 8
"""Number of generated tokens among which a thought begins, if the answer has one."""
_COLDEST = torch.finfo(torch.float32).tiny
"""Smallest temperature above 0."""


_SCORED_AT_ONCE = 16
"""Number of fp32 rows scored at once; with a large vocabulary each takes half a megabyte."""
_DEEP = 64
"""Number of values in a column whose maximum is found first: see `_largest`."""
_ALIGNED = 8
"""Alignment, in fp32 numbers: at least as many as a GPU reads at a time."""


@dataclass(frozen=True)
class Drawn:
    """New token of one sequence; None if its logits are not finite or it raised `error`: it fails alone."""

    token: int | None
    logprob: ScoredToken | None = None
    error: Exception | None = None


def uniform(seed: int, choice: int, index: int) -> float:
    """Return the random number of one token, in [0, 1): 53 bits of blake2b(seed, choice, token index)."""
    counter = struct.pack("<QII", seed & 0xFFFFFFFFFFFFFFFF, choice, index)
    (bits,) = struct.unpack("<Q", blake2b(counter, digest_size=8).digest())
    return float((bits >> 11) * 2.0**-53)


def forced_end(sequence: SequenceState | DraftedSequence) -> int | None:
    """Return the token that ends the sequence's thought, if the next token has to be that one."""
    budget = sequence.sampling.thought
    # Asked first: the tokens of a draft are a copy of its whole context.
    if budget is None or not budget.tokens <= sequence.generated <= budget.tokens + _FIRST_TOKENS:
        return None
    first = sequence.prompt_length
    if budget.begin is not None:
        begins = sequence.tokens[first : first + _FIRST_TOKENS]
        if budget.begin not in begins:
            return None
        first += begins.index(budget.begin) + 1
    if len(sequence.tokens) - first != budget.tokens:  # it goes on, or has ended
        return None
    return None if budget.end in sequence.tokens[first:] else budget.end


def begin_draw(
    logits: torch.Tensor,
    sequences: Sequence[SequenceState | DraftedSequence],
    eos_ids: frozenset[int],
    kernels: Kernels,
    masks: Sequence[Mask] = (),
) -> Callable[[], list[Drawn]]:
    """Begin to draw next tokens from raw logits [rows, vocab]. The returned function waits for them.

    `masks`: one for each sequence, or none at all.
    """
    if not sequences:
        return list
    widths = [sequence.words or logits.shape[1] for sequence in sequences]
    if any(width != logits.shape[1] for width in widths):
        return _begin_by_width(logits, widths, sequences, eos_ids, kernels, masks)
    adjusted = [
        _adjusted(one, sequence, eos_ids) if _adjusts(sequence) else one
        for one, sequence in zip(logits, sequences, strict=True)
    ]
    allowed = [
        _allowed(mask, sequence, eos_ids, logits.shape[1])
        for mask, sequence in zip(masks or [None] * len(sequences), sequences, strict=True)
    ]
    drawing = kernels.draw(adjusted, _draws(sequences), allowed)
    return lambda: _drawn(drawing(), logits, sequences, masks)


def _begin_by_width(
    logits: torch.Tensor,
    widths: Sequence[int],
    sequences: Sequence[SequenceState | DraftedSequence],
    eos_ids: frozenset[int],
    kernels: Kernels,
    masks: Sequence[Mask],
) -> Callable[[], list[Drawn]]:
    """Begin to draw the rows of each vocabulary by themselves, so that none depends on another's size."""
    reads: list[tuple[list[int], Callable[[], list[Drawn]]]] = []
    for width in sorted(set(widths)):
        places = [place for place, own in enumerate(widths) if own == width]
        rows = logits[places, :width] if len(places) < len(widths) else logits[:, :width].contiguous()
        own_masks = [masks[place] for place in places] if masks else ()
        own_eos = frozenset(token for token in eos_ids if token < width)
        some = [sequences[place] for place in places]
        reads.append((places, begin_draw(rows, some, own_eos, kernels, own_masks)))

    def read() -> list[Drawn]:
        drawn = {place: one for places, wait in reads for place, one in zip(places, wait(), strict=True)}
        return [drawn[place] for place in range(len(widths))]

    return read


def _allowed(
    mask: Mask, sequence: SequenceState | DraftedSequence, eos_ids: frozenset[int], width: int
) -> np.ndarray | None:
    """Return a grammar's mask for a vocabulary of `width` tokens.

    Grammars know the text of the base's tokens, and the ids of all. Where a token of the base may end the
    text, so may those that end it by the adapter's own tokenizer.
    """
    if not isinstance(mask, np.ndarray):
        return None
    words = -(-width // 32)
    if len(mask) >= words and not sequence.sampling.end_token_ids:
        return mask[:words]
    own = np.zeros(words, dtype=np.int32)
    own[: len(mask)] = mask[:words]
    bits = own.view(np.uint32)
    if any(bits[token // 32] >> np.uint32(token % 32) & 1 for token in eos_ids):
        for token in sequence.sampling.end_token_ids:
            bits[token // 32] |= np.uint32(1 << token % 32)
    return own


def _drawn(
    chosen: list[int | None],
    logits: torch.Tensor,
    sequences: Sequence[SequenceState | DraftedSequence],
    masks: Sequence[Mask],
) -> list[Drawn]:
    """Combine the tokens with the requested logprobs."""
    scores: dict[int, ScoredToken] = {}
    # One k at a time: among equal values, which come first depends on how many are asked for.
    for top in {sequence.sampling.logprobs for sequence in sequences}:
        if top is None:
            continue
        places = [
            i
            for i, sequence in enumerate(sequences)
            if sequence.sampling.logprobs == top and chosen[i] is not None
        ]
        tokens = [token for token in (chosen[i] for i in places) if token is not None]
        scores |= zip(places, score_tokens(logits[places], tokens, top), strict=True)
    drawn = [Drawn(token, scores.get(i)) for i, token in enumerate(chosen)]
    for i, mask in enumerate(masks):
        if isinstance(mask, GrammarError):
            drawn[i] = Drawn(None, error=mask)
    return drawn


def _draws(sequences: Sequence[SequenceState | DraftedSequence]) -> Draws:
    """Return the sampling settings and random numbers of all sequences as arrays."""
    settings = [sequence.sampling for sequence in sequences]
    temperatures = [max(one.temperature, _COLDEST) if one.temperature > 0 else 0.0 for one in settings]
    noise = [
        uniform(sequence.sampling.seed, sequence.choice, sequence.generated)
        if sequence.sampling.temperature > 0
        else 0.0
        for sequence in sequences
    ]
    return Draws(
        temperature=np.array(temperatures, dtype=np.float32),
        top_k=np.array([max(one.top_k, 0) for one in settings], dtype=np.int64),
        top_p=np.array([one.top_p for one in settings], dtype=np.float32),
        min_p=np.array([one.min_p for one in settings], dtype=np.float32),
        uniform=np.array(noise),
    )


def draw(
    logits: torch.Tensor,
    sequences: Sequence[SequenceState | DraftedSequence],
    eos_ids: frozenset[int],
    kernels: Kernels,
    masks: Sequence[Mask] = (),
) -> list[Drawn]:
    """Draw with `begin_draw` and wait for the result."""
    return begin_draw(logits, sequences, eos_ids, kernels, masks)()


def begin_draw_apart(
    logits: torch.Tensor,
    sequences: Sequence[SequenceState | DraftedSequence],
    eos_ids: frozenset[int],
    kernels: Kernels,
    masks: Sequence[Mask] = (),
) -> Callable[[], list[Drawn]]:
    """Begin to draw like `begin_draw`, but an exception fails only the sequence that raises it.

    Raises, at once or when the result is waited for:
        torch.AcceleratorError, or an exception that every one of several sequences raises.
    """

    def apart(error: Exception) -> list[Drawn]:
        if len({getattr(sequence, "sequence", sequence) for sequence in sequences}) == 1:
            return [Drawn(None, error=error) for _ in sequences]
        alone = [
            begin_draw_apart(logits[i : i + 1], [sequence], eos_ids, kernels, masks[i : i + 1])()[0]
            for i, sequence in enumerate(sequences)
        ]
        if all(drawn.error is not None for drawn in alone):
            raise error
        return alone

    try:
        read = begin_draw(logits, sequences, eos_ids, kernels, masks)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        return partial(list, apart(error))  # in no variable: what is in this frame, the error holds

    def read_apart() -> list[Drawn]:
        try:
            return read()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            return apart(error)

    return read_apart


def score_tokens(
    logits: torch.Tensor, tokens: Sequence[int], top: int, named: Sequence[Sequence[int]] = ()
) -> list[ScoredToken]:
    """Return logprobs under raw logits [rows, vocab]: one token's in each row, and the `top` largest.

    named: further tokens of each row; none at all if it is empty.
    """
    scored: list[ScoredToken] = []
    for first in range(0, len(tokens), _SCORED_AT_ONCE):
        chunk = tokens[first : first + _SCORED_AT_ONCE]
        raw = logits[first : first + len(chunk)].float()
        if padding := -raw.shape[1] % _ALIGNED:
            # A GPU sums a row that begins elsewhere in another order: by its place among the others.
            raw = functional.pad(raw, (0, padding), value=-torch.inf)
        logprobs = torch.log_softmax(raw, dim=-1)[:, : logits.shape[1]]
        more = named[first : first + len(chunk)] or [[]] * len(chunk)
        width = 1 + max(map(len, more))
        wanted = np.zeros((len(chunk), width), dtype=np.int64)
        for row, (token, others) in enumerate(zip(chunk, more, strict=True)):
            wanted[row, : 1 + len(others)] = [token, *others]
        chosen = logprobs.gather(1, sent(wanted, logits.device))
        values, indices = _largest(logprobs, top, ordered=logits.device.type != "cpu")
        # All are fp64 exactly, and an accelerator is waited for once.
        rows = torch.cat([chosen, values, indices], dim=1).tolist()
        for token, others, numbers in zip(chunk, more, rows, strict=True):
            best, ids = numbers[width : width + values.shape[1]], numbers[width + values.shape[1] :]
            alternatives = list(zip(map(int, ids), best, strict=True))
            scored.append(ScoredToken(token, numbers[0], alternatives, numbers[1 : 1 + len(others)]))
    return scored


def _largest(values: torch.Tensor, count: int, *, ordered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `topk` of each row of [rows, size], faster: only columns with the largest maxima are searched.

    `ordered`: equal values come in order of place. A GPU picks them by an algorithm that depends on the
    number of rows, a CPU row by row.
    """
    rows, size = values.shape
    keys = _ranks(values) if ordered else values
    columns = size // _DEEP
    if count >= columns:
        indices = keys.topk(min(count, size)).indices
        return values.gather(1, indices), indices
    folded = columns * _DEEP
    best = keys[:, :folded].view(rows, _DEEP, columns).amax(1).topk(count).indices
    down = torch.arange(0, folded, columns, device=values.device)
    rest = torch.arange(folded, size, device=values.device).expand(rows, -1)
    places = torch.cat([(best[:, :, None] + down).view(rows, -1), rest], dim=1)
    indices = places.gather(1, keys.gather(1, places).topk(count).indices)
    return values.gather(1, indices), indices


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Return int64 keys, all different in a row of [rows, size] fp32, in the order of the values.

    Among equal values the first place has the largest key.
    """
    bits = (values + 0.0).contiguous().view(torch.int32)  # no zero below zero
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last_first = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return (ascending.long() << 32) | last_first


def _adjusted(
    raw: torch.Tensor, sequence: SequenceState | DraftedSequence, eos_ids: frozenset[int]
) -> torch.Tensor:
    """Return a sequence's logits [vocab], fp32, after penalties, bias and min_tokens.

    All are NaN unless the largest raw one is finite, even if that one is removed.
    """
    sampling = sequence.sampling
    logits = raw.float().clone()
    if sampling.penalizes:
        _penalize(logits, sequence)
    if sampling.logit_bias:
        bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        logits[sent(np.array(list(sampling.logit_bias)), raw.device)] += sent(bias, raw.device)
    if sequence.generated < sampling.min_tokens:
        ends = np.array([*eos_ids, *sampling.end_token_ids, *sampling.stop_token_ids], dtype=np.int64)
        logits.index_fill_(0, sent(ends, raw.device), -torch.inf)
    return torch.where(torch.isfinite(raw.amax()), logits, torch.nan)


def _adjusts(sequence: SequenceState | DraftedSequence) -> bool:
    sampling = sequence.sampling
    return bool(sequence.generated < sampling.min_tokens or sampling.logit_bias or sampling.penalizes)


def _penalize(logits: torch.Tensor, sequence: SequenceState | DraftedSequence) -> None:
    """Apply repetition penalty (CTRL, arXiv:1909.05858) to all tokens, OpenAI's two to the completion."""
    sampling = sequence.sampling
    if sampling.repetition_penalty != 1.0:
        ids, _ = sequence.seen.read(sequence.tokens)
        seen = sent(ids, logits.device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.generated and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = sequence.completed.read(sequence.tokens, sequence.prompt_length)
        times = sent(counts, logits.device).to(logits.dtype)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * times
        logits[sent(ids, logits.device)] -= penalties
