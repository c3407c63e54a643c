"""A row: one choice of one request, from its arrival to its final event."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from onebase_engine.engine.drafts import Drafts
from onebase_engine.engine.messages import AdapterRef, FinishReason, Pooling, Sampling, TokenLogprob

COMING = -1
"""Stands for a row's last token while it is drawn and the step after it is planned."""


@dataclass(frozen=True)
class AdapterMix:
    """A row's adapters as they act: sorted by digest, duplicates summed, zero weights dropped.

    It is part of every KV block's key, so two rows share blocks only if they run the very same function.
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
    """A row's different tokens and how often each is there, counted on as the row grows."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._times = np.zeros(64, dtype=np.float32)
        self._read = 0

    def read(self, tokens: Sequence[int], start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Ids [n] int64 and times [n] fp32 of the tokens from `start` on, which is the same at each call."""
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
class Row:
    """State of one choice. `tokens`: prompt and completion; the first `computed` have KV in `blocks`."""

    id: str
    choice: int
    tokens: list[int]
    sampling: Sampling
    mix: AdapterMix
    arrival: int
    """Position in the order of arrival; a preempted row keeps it."""
    arrived_at: float
    """Monotonic seconds."""
    tenant: str = "default"
    priority: int = 0
    background: bool = False
    """It only fills what other rows leave free."""
    grammar: str | None = None
    """Key of the grammar that its text follows."""
    pooling: Pooling | None = None
    branch: int = 0
    """So many tokens at the prompt's end are a branch."""
    leader: Row | None = None
    """The choice that prefills the shared prompt first, so that this row finds it in the prefix cache."""
    prompt_length: int = field(init=False)
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    """int32, as a step's table has them."""
    late: list[int] = field(default_factory=list)
    """Its blocks that come back from host memory only after the next step: until then it computes nothing."""
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix keys of the row's full blocks, extended as blocks fill."""
    charged: int = 0
    """Prompt tokens that its tenant's counter has, or that the prefix cache gave."""
    passed: int = 0
    """Rows that were admitted before it, although it had its turn: it lacked blocks."""
    yields_at: int = 0
    """Generated tokens from which on it may give its place to a row of another tenant."""
    cached_tokens: int | None = None
    """Prompt tokens taken from the prefix cache at first admission; None before it."""
    queue_seconds: float | None = None
    reported: bool = False
    """Whether the first output, with `cached_tokens` and `queue_seconds`, has been sent."""
    prompt_scored: bool = False
    prompt_scores: list[TokenLogprob] = field(default_factory=list)
    """Collected over the prefill chunks, sent at once with the first token."""
    pooled: list[np.ndarray] = field(default_factory=list)
    """Of hidden states [hidden] fp64: the last one, or the sum of those of all tokens up to `computed`, or
    what the classifier makes of each."""
    finish: FinishReason | None = None
    drafts: Drafts | None = None
    forced: list[int] = field(default_factory=list)
    """What its grammar says comes next, as far as is known: a draft that is right but for how it is cut into
    tokens."""
    seen: TokenCounts = field(default_factory=TokenCounts)
    """Of prompt and completion; counted if it is asked for."""
    completed: TokenCounts = field(default_factory=TokenCounts)
    """Of the completion."""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def ends(self) -> bool:
        """Whether the token that is coming is its last, whichever it is."""
        return self.tokens[-1] == COMING and self.generated >= self.sampling.max_tokens

    @property
    def generates(self) -> bool:
        """Whether it goes on after its prompt."""
        return self.pooling is None and not self.branch

    @property
    def scores_prompt(self) -> bool:
        return self.sampling.prompt_logprobs is not None and not self.prompt_scored

    @property
    def first_scored(self) -> int:
        """The first token whose logits are wanted, where the prompt is scored."""
        return self.prompt_length - self.branch - 1 if self.branch else 0

    @property
    def reusable(self) -> int:
        """Tokens from the beginning that need not be computed again if their KV is there."""
        if self.pooling is not None and self.pooling.kind != "last":
            return 0
        return self.first_scored if self.scores_prompt else len(self.tokens) - 1

    @property
    def prefilled(self) -> bool:
        return self.computed >= self.prompt_length


@dataclass(frozen=True)
class Ahead:
    """A row as it will be if the first tokens of its draft are right."""

    row: Row
    draft: tuple[int, ...]

    @property
    def sampling(self) -> Sampling:
        return self.row.sampling

    @property
    def choice(self) -> int:
        return self.row.choice

    @property
    def prompt_length(self) -> int:
        return self.row.prompt_length

    @property
    def tokens(self) -> list[int]:
        return [*self.row.tokens, *self.draft]

    @property
    def generated(self) -> int:
        return self.row.generated + len(self.draft)

    @property
    def seen(self) -> TokenCounts:
        return TokenCounts()

    @property
    def completed(self) -> TokenCounts:
        return TokenCounts()


@dataclass(frozen=True)
class Segment:
    """Tokens `start:stop` of a row that one step computes, and those of a draft after its last token."""

    row: Row
    start: int
    stop: int
    draft: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.stop - self.start + len(self.draft)

    @property
    def tokens(self) -> list[int]:
        return [*self.row.tokens[self.start : self.stop], *self.draft]

    @property
    def samples(self) -> bool:
        """Whether the segment reaches the row's last token, whose logits give the next one."""
        return self.stop == len(self.row.tokens) and self.row.generates

    @property
    def scored(self) -> range:
        """The tokens whose logits score the prompt's next ones."""
        row = self.row
        if not row.scores_prompt:
            return range(0)
        return range(max(self.start, row.first_scored), min(self.stop, row.prompt_length - 1))

    @property
    def pooled(self) -> range:
        """The tokens whose hidden states are wanted."""
        if self.row.pooling is None:
            return range(0)
        last = len(self.row.tokens) - 1
        return range(max(self.start, last) if self.row.pooling.kind == "last" else self.start, self.stop)


@dataclass(frozen=True)
class Plan:
    """What one step computes: `decodes` are segments of one token, and drafts, `prefills` longer ones."""

    decodes: list[Segment]
    prefills: list[Segment]

    @property
    def segments(self) -> list[Segment]:
        return self.decodes + self.prefills

    def written(self, block_size: int) -> set[int]:
        """The KV blocks that the step writes to."""
        return {
            block
            for one in self.segments
            for block in one.row.blocks[one.start // block_size : -(-(one.start + one.length) // block_size)]
        }

    def unfinished(self) -> Plan:
        """The same without rows that have ended meanwhile."""
        going = [[one for one in some if one.row.finish is None] for some in (self.decodes, self.prefills)]
        return Plan(*going)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)
