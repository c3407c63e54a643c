"""The grammars of one tenant's sequences, and the process that follows them.

A sequence's mask is requested when the step begins that samples from it, and a step takes what has come by
its end. A mask that is late is kept for a later step. Of a tenant that makes steps wait too often, and after
a process has ended, masks are requested ahead of the step, which leaves the sequence out until they are
there.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import numpy as np

from onebase_engine.engine import grammar_link as link
from onebase_engine.engine.grammar_link import (
    DID_NOT_START,
    MASK_BYTES,
    WAS_NOT_STARTED,
    Compile,
    Compiled,
    Forced,
    Forget,
    MaskRequest,
    Masks,
    Process,
    ProcessGoneError,
    Template,
    TokensDrawn,
)
from onebase_engine.engine.messages import Grammar
from onebase_engine.engine.sequence import Segment, SequenceState

GRACE_PART, GRACE_CREDIT = 0.1, 0.05
"""Largest part of the time that steps wait for the masks of one tenant, and seconds that may be saved up."""
DEATHS = 2
"""Processes that ended while they had one grammar to compile, after which the grammar is to blame."""

logger = logging.getLogger(__name__)


class GrammarError(Exception):
    """A sequence cannot continue as its grammar says."""


@dataclass(frozen=True)
class _Answered:
    """Masks of a sequence that has `generated` tokens, and of those after each token of the draft."""

    generated: int
    draft: tuple[int, ...]
    masks: np.ndarray | GrammarError
    """[1 + draft, words] int32."""
    shared: bool
    """Whether they lie in the memory that the next request writes to."""


@dataclass(frozen=True)
class _InFlight:
    """A sequence of a MaskRequest, as it was sent."""

    sequence: SequenceState
    generated: int
    draft: tuple[int, ...]
    place: int


@dataclass
class Follower:
    """One tenant's grammars and the process that follows them. It begins with the first grammar."""

    shape: tuple[int, int]
    """Masks of one step, and words of a mask."""
    vocabulary: int
    process: Process | None = None
    users: dict[str, int] = field(default_factory=dict)
    """Sequences by grammar."""
    grammars: dict[str, Grammar] = field(default_factory=dict)
    opening: set[str] = field(default_factory=set)
    """Grammars that have not been reported yet."""
    compiled: set[str] = field(default_factory=set)
    at_any_cost: set[str] = field(default_factory=set)
    """Grammars that are compiled whatever the tenant has spent: sequences were admitted with them, or the
    tenant has paid for their trial."""
    compiling: str | None = None
    to_compile: list[str] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)
    """Grammars that were being compiled when a process ended, and how often it did nothing else. They are
    compiled while no masks are in flight."""
    errors: dict[str, str] = field(default_factory=dict)
    """Reasons by grammar that could not be compiled again."""
    reported: dict[int, int] = field(default_factory=dict)
    """Tokens of each sequence that the process knows."""
    unstarted_since: float | None = None
    """Monotonic time since which no process has started, if one has failed to."""
    number: int = 0
    in_flight: list[_InFlight] = field(default_factory=list)
    answered: dict[int, _Answered] = field(default_factory=dict)
    due: dict[int, SequenceState] = field(default_factory=dict)
    """Sequences whose masks are requested ahead of the step that needs them."""
    suspects: dict[int, SequenceState] = field(default_factory=dict)
    """Sequences whose masks were in flight when a process ended. Each is tried alone."""
    drawn: dict[int, SequenceState] = field(default_factory=dict)
    """Sequences of the last TokensDrawn, until it is answered."""
    drawn_number: int = 0
    costly: set[str] = field(default_factory=set)
    """Grammars whose forced tokens are not asked for any more, since a process ended meanwhile."""
    compiling_since: float = 0.0
    in_flight_since: float = 0.0
    """Monotonic times."""
    compiling_cpu: float = 0.0
    """Time of a processor, in seconds, that the process had used before the grammar that it compiles."""
    ahead: bool = False
    """Whether the masks in flight are of a later step than the one that is computed."""
    grace_spent: float = 0.0
    """Time on the monotonic clock up to which the time that steps waited is accounted for; see GRACE_PART."""

    # ---- grammars ---------------------------------------------------------------------------

    def queue(self, key: str) -> None:
        """Have a grammar compiled in its turn."""
        if key != self.compiling and key not in self.to_compile:
            self.to_compile.append(key)

    def release(self, key: str, count: int) -> None:
        """Note that so many sequences fewer use a grammar."""
        self.users[key] -= count
        if not self.users[key]:
            del self.users[key], self.grammars[key]
            for known in (self.opening, self.compiled, self.at_any_cost, self.costly):
                known.discard(key)
            self.deaths.pop(key, None)
            self.errors.pop(key, None)
            if key in self.to_compile:
                self.to_compile.remove(key)
            if key != self.compiling:  # else when it is compiled, if nobody uses it again by then
                self._send(Forget([], [key]))
        if not self.users:
            self.unstarted_since = None

    def forget(self, sequence: SequenceState) -> None:
        """Note that a sequence has ended."""
        for known in (self.answered, self.due, self.suspects):
            known.pop(sequence.arrival, None)
        if self.reported.pop(sequence.arrival, None) is not None:
            self._send(Forget([sequence.arrival], []))

    def awaits(self, sequence: SequenceState) -> bool:
        """Return True if the next mask of a sequence is not there and cannot be requested in this step."""
        if self._mask_of(sequence) is not None or sequence.grammar in self.errors:
            return False
        return self.is_busy or sequence.arrival in self.due or sequence.grammar not in self.compiled

    @property
    def is_busy(self) -> bool:
        """Whether no masks can be requested at the moment."""
        return bool(self.in_flight or self.suspects) or self.compiling in self.deaths

    def work(self, template: Template, *, kept_only: bool = False) -> None:
        """Send what the process can do next: a grammar to compile, masks that are due.

        kept_only: no grammar is compiled for new sequences, which may use those that are kept.

        Raises:
            OSError: no process can be started.
        """
        if self.process is None and self.users:
            self._start(template)
        suspect = next(iter(self.suspects.values()), None)
        if suspect is not None:
            self._try_alone(suspect, kept_only)
            return
        if self.compiling is None and self.to_compile:
            key = self.to_compile[0]
            if not (self.in_flight and key in self.deaths):
                self._compile(key, kept_only)
        if not self.in_flight and self.compiling not in self.deaths:
            due = [(sequence, ()) for sequence in self.due.values() if sequence.grammar in self.compiled]
            self.request(due, ahead=True)

    def _try_alone(self, suspect: SequenceState, kept_only: bool) -> None:
        """Have the process do one thing at a time, so that it is clear what it ends of."""
        if self.in_flight or self.compiling is not None:
            return
        if suspect.grammar in self.compiled:
            self.request([(suspect, ())], ahead=True)
        elif self.to_compile:
            key = suspect.grammar
            key = key if key is not None and key in self.to_compile else self.to_compile[0]
            self._compile(key, kept_only)

    def _compile(self, key: str, kept_only: bool) -> None:
        self.to_compile.remove(key)
        self.compiling, self.compiling_since = key, time.monotonic()
        self.compiling_cpu = 0.0 if self.process is None else self.process.cpu_seconds()
        self._send(Compile(key, self.grammars[key], kept_only and key not in self.at_any_cost))
        self._expect()

    def compile_cost(self) -> float:
        """Return the seconds of a processor that the grammar which is being compiled has taken: at most, if
        the process has ended."""
        if self.compiling is None or self.process is None:
            return 0.0
        elapsed = min(time.monotonic() - self.compiling_since, link.COMPILE_SECONDS)
        return max(0.0, self.process.cpu_seconds(self.compiling_cpu + elapsed) - self.compiling_cpu)

    def has_grace(self) -> bool:
        """Return True if steps may wait for the tenant's masks."""
        return self.grace_spent - time.monotonic() < GRACE_CREDIT / GRACE_PART

    def charge_grace(self, seconds: float) -> None:
        """Account for the time that a step waited."""
        self.grace_spent = max(self.grace_spent, time.monotonic()) + seconds / GRACE_PART

    # ---- masks ------------------------------------------------------------------------------

    def request(
        self, wanted: Iterable[tuple[SequenceState, tuple[int, ...]]], *, ahead: bool = False
    ) -> None:
        """Request masks of sequences and their drafts that are not there. None may be in flight."""
        sent: list[_InFlight] = []
        place, self.ahead = 0, ahead
        for sequence, draft in wanted:
            if self._mask_of(sequence) is None and place + len(draft) < self.shape[0]:
                sent.append(_InFlight(sequence, sequence.generated, draft, place))
                self.due.pop(sequence.arrival, None)
                place += len(draft) + 1
        if not sent:
            return
        self.answered = {number: one for number, one in self.answered.items() if not one.shared}
        self.number += 1
        self.in_flight, self.in_flight_since = sent, time.monotonic()
        self._send(
            MaskRequest(
                self.number,
                [
                    (one.sequence.arrival, *self._news(one.sequence), list(one.draft), one.place)
                    for one in sent
                ],
            )
        )
        self.reported |= {one.sequence.arrival: one.generated for one in sent}
        self._expect()

    def masks(self, segment: Segment) -> np.ndarray | GrammarError | None:
        """Return the masks of a segment, [1 + draft, words] int32, or None if they have not come.

        Of a draft without masks nothing is allowed, so that the sequence gets one token.
        """
        answered = self._mask_of(segment.sequence)
        if answered is None and segment.sequence.grammar in self.errors:
            return GrammarError(f"the process that compiles it {self.errors[segment.sequence.grammar]}")
        if answered is None or isinstance(answered.masks, GrammarError):
            return None if answered is None else answered.masks
        count = len(segment.draft) + 1
        if answered.draft[: count - 1] == segment.draft:
            return answered.masks[:count]
        masks = np.zeros((count, self.shape[1]), np.int32)
        masks[0] = answered.masks[0]
        return masks

    def note_drawn(self, sequences: list[SequenceState], foresee: bool) -> None:
        """Take in that sequences have new tokens. Tokens that are forced come into `SequenceState.forced`
        later."""
        if self.in_flight or not self.has_grace():
            self.due |= {sequence.arrival: sequence for sequence in sequences}
            return
        asked = {
            sequence.arrival: sequence
            for sequence in sequences
            if sequence.grammar in self.compiled
            and sequence.grammar not in self.costly
            and not sequence.forced
        }
        if foresee and asked:
            self.drawn_number += 1
            self.drawn = asked
            news = [(number, *self._news(sequence)) for number, sequence in asked.items()]
            self._send(TokensDrawn(self.drawn_number, news))
            self.reported |= {number: sequence.generated for number, sequence in asked.items()}

    def _mask_of(self, sequence: SequenceState) -> _Answered | None:
        answered = self.answered.get(sequence.arrival)
        return answered if answered is not None and answered.generated == sequence.generated else None

    def _news(self, sequence: SequenceState) -> tuple[str, list[int]]:
        """Return a sequence's grammar and the tokens that the process does not know."""
        return sequence.grammar or "", sequence.tokens[
            sequence.prompt_length + self.reported.get(sequence.arrival, 0) :
        ]

    # ---- the process ------------------------------------------------------------------------

    def receive(self, *, in_time: bool = False) -> Iterator[Compiled]:
        """Take in what has come; yield the grammars that have been compiled.

        in_time: masks are for the step that is computed, and need not be kept beyond the next request.

        Raises:
            ProcessGoneError: the process has ended, hangs, or lies.
        """
        if self.process is None:
            return
        messages = self.process.receive()
        if self.process.pid is not None:
            self.unstarted_since = None
        for message in messages:
            if isinstance(message, Masks):
                self._receive_masks(message, shared=in_time and not self.ahead)
            elif isinstance(message, Forced):
                self._receive_forced(message)
            elif isinstance(message, Compiled) and message.key == self.compiling:
                self._receive_compiled(message)
                yield message
        self._expect()
        self.process.check_deadline()
        if self.compiling is not None:
            self.process.check_wait(self.compiling_since)
        if self.in_flight:
            self.process.check_wait(self.in_flight_since)

    def lose(self, reason: str, *, blameless: bool = False) -> list[tuple[str, str]]:
        """End the process, which hangs, lies or has ended; the next one continues where the sequences are.

        blameless: nothing that it did is the cause.

        Returns:
            Grammars of which processes have ended too often, with the reason.
        """
        if self.unstarted_since is None:
            logger.error("the process that follows a tenant's grammars %s; another takes its place", reason)
        if reason in (DID_NOT_START, WAS_NOT_STARTED) and self.unstarted_since is None:
            self.unstarted_since = time.monotonic() if self.process is None else self.process.began
        self.end()
        interrupted = [self.compiling] if blameless and self.compiling is not None else []
        if blameless:
            self.compiling, self.in_flight, self.drawn = None, [], {}
        self.costly |= {
            sequence.grammar for sequence in self.drawn.values() if sequence.grammar in self.users
        }
        self.drawn = {}
        blamed = self._blame_compiling(reason)
        self._suspect_in_flight(reason)
        again = self.compiled | {*self.to_compile} | self.deaths.keys() | {*interrupted}
        # Those that may have ended a process come last.
        self.to_compile = sorted(
            (again & self.users.keys()) - self.errors.keys(), key=self.deaths.__contains__
        )
        self.compiled.clear()
        return blamed

    def _blame_compiling(self, reason: str) -> list[tuple[str, str]]:
        """Note that the process ended while it compiled a grammar; return the grammar if it is to blame."""
        key, self.compiling = self.compiling, None
        if key is None or key not in self.users:
            return []
        self.deaths[key] = self.deaths.get(key, 0) + (not self.in_flight)
        if self.deaths[key] < DEATHS:
            return []
        self.fail(key, reason)
        return [(key, reason)]

    def fail(self, key: str, reason: str) -> None:
        """Have all sequences of a grammar end with an error."""
        self.errors[key] = reason
        if key in self.to_compile:
            self.to_compile.remove(key)
        self.suspects = {
            number: sequence for number, sequence in self.suspects.items() if sequence.grammar != key
        }

    @property
    def gives_up(self) -> bool:
        """Whether processes have failed to start for too long."""
        since = self.unstarted_since
        return since is not None and time.monotonic() - since > 2 * link.START_SECONDS

    def _suspect_in_flight(self, reason: str) -> None:
        """Have sequences whose masks were in flight tried alone; one that was alone gets an error."""
        in_flight, self.in_flight = self.in_flight, []
        if len(in_flight) == 1 and in_flight[0].sequence.arrival in self.suspects:
            (sent,) = in_flight
            error = GrammarError(f"the process that follows its grammar {reason}")
            del self.suspects[sent.sequence.arrival]
            self.answered[sent.sequence.arrival] = _Answered(sent.generated, (), error, shared=False)
        else:
            self.suspects |= {
                sent.sequence.arrival: sent.sequence for sent in in_flight if sent.sequence.finish is None
            }

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
        self.process = None
        self.reported.clear()

    def _start(self, template: Template) -> None:
        """Raises OSError: no process can be started."""
        memory = os.memfd_create("masks")
        size = self.shape[0] * self.shape[1] * MASK_BYTES
        try:
            os.ftruncate(memory, size)
            self._memory = np.frombuffer(mmap.mmap(memory, size), dtype=np.int32).reshape(self.shape)
            self.process = Process(template, memory)
        finally:
            os.close(memory)

    def _send(self, message: msgspec.Struct) -> None:
        """Send it if there is a process; one that has ended is found by `receive`."""
        if self.process is not None:
            with suppress(ProcessGoneError):
                self.process.send(message)

    def _expect(self) -> None:
        if self.process is not None:
            seconds = link.MASK_SECONDS * bool(self.in_flight) + link.COMPILE_SECONDS * (
                self.compiling is not None
            )
            self.process.expect(seconds)

    def _receive_masks(self, message: Masks, shared: bool) -> None:
        if message.number != self.number:
            return
        for sent in self.in_flight:
            number = sent.sequence.arrival
            masks = self._memory[sent.place : sent.place + len(sent.draft) + 1]
            error = message.errors.get(number)
            if error is None and not _allows_any(masks[0], sent.sequence.words or self.vocabulary):
                error = "its grammar allows no token here"
            given = GrammarError(error) if error is not None else masks if shared else masks.copy()
            self.suspects.pop(number, None)
            if sent.sequence.finish is None:
                self.answered[number] = _Answered(sent.generated, sent.draft, given, shared)
        self.in_flight = []

    def _receive_forced(self, message: Forced) -> None:
        """Accept tokens that sequences must go on with, up to the first that is not in their vocabularies.

        Raises ProcessGoneError: no adapter has such tokens.
        """
        if message.number != self.drawn_number:
            return
        known = range(self.vocabulary)
        for number, tokens in message.tokens.items():
            if number not in self.drawn or not all(token in known for token in tokens):
                raise ProcessGoneError("names tokens or sequences that there are not")
            sequence = self.drawn[number]
            words = sequence.words or self.vocabulary
            end = next((place for place, token in enumerate(tokens) if token >= words), len(tokens))
            sequence.forced = tokens[:end]
        self.drawn = {}

    def _receive_compiled(self, message: Compiled) -> None:
        """Raises ProcessGoneError: the time cannot be."""
        if not 0 <= message.seconds < math.inf:
            raise ProcessGoneError("names a time that cannot be")
        self.compiling = None
        if message.key not in self.users:
            self._send(Forget([], [message.key]))
            return
        self.deaths.pop(message.key, None)
        if message.error is None:
            self.compiled.add(message.key)
            self.at_any_cost.add(message.key)
        elif not message.not_kept:
            self.fail(message.key, f"says: {message.error}")


def _allows_any(mask: np.ndarray, words: int) -> bool:
    """Return True if a mask allows a token of a vocabulary of so many."""
    whole, rest = divmod(words, 32)
    return bool(mask[:whole].any()) or (rest > 0 and bool(int(mask[whole]) & ((1 << rest) - 1)))
