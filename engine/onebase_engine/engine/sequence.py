"""State of one sequence, which is one choice of one request, from its arrival to its final event."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from onebase_engine.engine.drafts import Drafts
from onebase_engine.engine.messages import AdapterRef, FinishReason, Pooling, Sampling, ScoredToken


@dataclass(frozen=True)
class AdapterMix:
    """A sequence's effective adapters: sorted by digest, duplicates summed, zero weights dropped.

    It is part of every KV block's key, so two sequences share blocks only if they run the very same function.
    """

    terms: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, refs: list[AdapterRef]) -> AdapterMix:
        weights: dict[str, float] = {}
        for ref in refs:
            weights[ref.digest] = weights.get(ref.digest, 0.0) + ref.weight
        return cls(tuple(sorted((digest, weight) for digest, weight in weights.items() if weight)))

    @cached_property
    def digests(self) -> tuple[str, ...]:
        return tuple(digest for digest, _ in self.terms)


class TokenCounts:
    """Distinct tokens of a sequence and their counts, updated as the sequence grows."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._times = np.zeros(64, dtype=np.float32)
        self._read = 0

    def read(self, tokens: Sequence[int], start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [n] int64 and counts [n] fp32 of the tokens from `start` on, which must never change."""
        for number in range(max(self._read, start), len(tokens)):
            place = self._places.setdefault(tokens[number], len(self._places))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._times = np.concatenate([self._times, np.zeros_like(self._times)])
            self._ids[place] = tokens[number]
            self._times[place] += 1
        self._read = len(tokens)
        return self._ids[: len(self._places)], self._times[: len(self._places)]


@dataclass(eq=False)
class SequenceState:
    """State of one sequence. `tokens`: prompt and completion; the first `computed` have KV in `blocks`."""

    id: str
    choice: int
    tokens: list[int]
    sampling: Sampling
    mix: AdapterMix
    arrival: int
    """Position in the order of arrival; a preempted sequence keeps it."""
    arrived_at: float
    """Arrival, in monotonic seconds."""
    acts_from: int = 0
    """Number of leading tokens on which the adapters do not act: those before the invocation of an activated
    LoRA."""
    tenant: str = "default"
    words: int = 0
    """Number of tokens of its vocabulary, which begin its logits; 0: all that the logits have."""
    priority: int = 0
    background: bool = False
    """Whether the sequence only uses what others leave free."""
    grammar: str | None = None
    """Key of the grammar that its text follows."""
    pooling: Pooling | None = None
    branch: int = 0
    """Number of tokens at the prompt's end that are a branch."""
    leader: SequenceState | None = None
    """Sequence that prefills the shared prompt first, so that this one finds it in the prefix cache."""
    prompt_length: int = field(init=False)
    drawing: bool = False
    """Whether one more token than `tokens` has is being drawn while the step after it is planned."""
    computed: int = 0
    blocks: list[array[int]] = field(default_factory=list)
    """KV blocks of each group of layers, int32 as in a step's tables; the block of zeros for those that were
    released."""
    states: tuple[int, int] = (0, -1)
    """Places of the recurrent state behind the computed tokens, and of the one that the next step writes."""
    branch_at: int = 0
    """Length of a prefix that another sequence has as well, and behind which no recurrent state is kept."""
    snapshot: bytes | None = None
    """Key of the newest snapshot of its recurrent state behind generated tokens."""
    late: list[int] = field(default_factory=list)
    """Own blocks that the next step does not restore from host memory yet; until then nothing is computed."""
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix keys of the full blocks, extended as blocks fill."""
    charged: int = 0
    """Number of prompt tokens that the tenant's counter includes, or that came from the prefix cache."""
    passed: int = 0
    """Number of sequences admitted although it was this one's turn, because it lacked blocks."""
    skipped: int = 0
    """Number of steps in a row in which decodes of other tenants went first."""
    yields_at: int = 0
    """Number of generated tokens from which on it may yield its place to another tenant's sequence."""
    cached_tokens: int | None = None
    """Number of prompt tokens from the prefix cache at first admission; None before it."""
    queue_seconds: float | None = None
    reported: bool = False
    """Whether the first output, with `cached_tokens` and `queue_seconds`, has been sent."""
    prompt_scored: bool = False
    prompt_scores: list[ScoredToken] = field(default_factory=list)
    """Prompt logprobs collected over the prefill chunks, sent at once with the first token."""
    pooled: list[np.ndarray] = field(default_factory=list)
    """Pooled hidden states [hidden] fp64: the last one, the sum of all up to `computed`, or the classifier's
    values of each."""
    finish: FinishReason | None = None
    drafts: Drafts | None = None
    forced: list[int] = field(default_factory=list)
    """Tokens that the grammar forces next, as far as is known. As a draft they are right, except that the
    text may be cut into other tokens."""
    seen: TokenCounts = field(default_factory=TokenCounts)
    """Token counts of prompt and completion, updated when they are read."""
    completed: TokenCounts = field(default_factory=TokenCounts)
    """Token counts of the completion."""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def length(self) -> int:
        """Number of tokens, with the one that is being drawn."""
        return len(self.tokens) + self.drawing

    @property
    def generated(self) -> int:
        return self.length - self.prompt_length

    @property
    def pending(self) -> int:
        """Number of tokens whose KV is still to be computed; 1 while decoding."""
        return self.length - self.computed

    @property
    def ends(self) -> bool:
        """Whether the token in flight is the last one, whatever it is."""
        return self.drawing and self.generated >= self.sampling.max_tokens

    @property
    def generates(self) -> bool:
        """Whether the sequence continues after its prompt."""
        return self.pooling is None and not self.branch

    @property
    def scores_prompt(self) -> bool:
        return self.sampling.prompt_logprobs is not None and not self.prompt_scored

    @property
    def first_scored(self) -> int:
        """Number of the first token whose logits are needed if the prompt is scored."""
        return self.prompt_length - self.branch - 1 if self.branch else 0

    @property
    def reusable(self) -> int:
        """Number of leading tokens that need not be computed again if their KV is cached."""
        if self.pooling is not None and self.pooling.kind != "last":
            return 0
        return self.first_scored if self.scores_prompt else self.length - 1

    @property
    def prefilled(self) -> bool:
        return self.computed >= self.prompt_length


@dataclass(frozen=True)
class DraftedSequence:
    """A sequence as it will be if the first tokens of its draft are right."""

    sequence: SequenceState
    draft: tuple[int, ...]

    @property
    def sampling(self) -> Sampling:
        return self.sequence.sampling

    @property
    def choice(self) -> int:
        return self.sequence.choice

    @property
    def words(self) -> int:
        return self.sequence.words

    @property
    def prompt_length(self) -> int:
        return self.sequence.prompt_length

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens, *self.draft]

    @property
    def generated(self) -> int:
        return self.sequence.generated + len(self.draft)

    @property
    def seen(self) -> TokenCounts:
        return TokenCounts()

    @property
    def completed(self) -> TokenCounts:
        return TokenCounts()


@dataclass(frozen=True)
class Segment:
    """Tokens `start:stop` of a sequence that one step computes, and those of a draft after its last token."""

    sequence: SequenceState
    start: int
    stop: int
    draft: tuple[int, ...] = ()
    end_place: int = -1
    """Place for the recurrent state at the last end of a block that right tokens of the draft go past."""

    @property
    def length(self) -> int:
        return self.stop - self.start + len(self.draft)

    @property
    def tokens(self) -> list[int]:
        """Token ids, with -1 for the one that is being drawn: `Packer.fill` fills it in."""
        known = self.sequence.tokens[self.start : self.stop]
        return [*known, *[-1] * (self.stop - self.start - len(known)), *self.draft]

    @property
    def samples(self) -> bool:
        """Whether the segment reaches the sequence's last token, whose logits give the next one."""
        return self.stop == self.sequence.length and self.sequence.generates

    @property
    def scored(self) -> range:
        """Numbers of the tokens whose logits score the prompt's next ones."""
        sequence = self.sequence
        if not sequence.scores_prompt:
            return range(0)
        return range(max(self.start, sequence.first_scored), min(self.stop, sequence.prompt_length - 1))

    @property
    def pooled(self) -> range:
        """Numbers of the tokens whose hidden states are needed."""
        if self.sequence.pooling is None:
            return range(0)
        last = self.sequence.length - 1
        return range(max(self.start, last) if self.sequence.pooling.kind == "last" else self.start, self.stop)


@dataclass(frozen=True)
class StepPlan:
    """Work of one step: `decodes` are segments of one token, plus drafts, and `prefills` are longer ones."""

    decodes: list[Segment]
    prefills: list[Segment]
    bounded_decodes: int | None = None
    """Number of decodes that would make those of lighter tenants wait; None if nothing of the step would."""

    @property
    def segments(self) -> list[Segment]:
        return self.decodes + self.prefills

    def written(self, block_size: int) -> set[int]:
        """Return the KV blocks to which the step writes."""
        return {
            block
            for segment in self.segments
            for blocks in segment.sequence.blocks
            for block in blocks[
                segment.start // block_size : -(-(segment.start + segment.length) // block_size)
            ]
        }

    def unfinished(self) -> StepPlan:
        """Return the plan without sequences that have ended since."""
        unfinished = [
            [segment for segment in segments if segment.sequence.finish is None]
            for segments in (self.decodes, self.prefills)
        ]
        return replace(self, decodes=unfinished[0], prefills=unfinished[1])

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)
