"""One request's outputs as they come: from the engine's socket to the answering task, and tokens to text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onebase_edge.errors import ClientGoneError, OneBaseError, SlowReaderError
from onebase_engine.engine.messages import FinishReason, RowOutput, Submit, TokenLogprob
from onebase_server.inference.detokenizer import PieceDecoder, StopStrings


@dataclass
class Usage:
    """Tokens: `cached` of the prompts' came from the prefix cache."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass
class Moments:
    """Timestamps of a request, on the monotonic clock that all processes share; 0: not yet."""

    came: float = field(default_factory=time.monotonic)
    submitted: float = 0.0
    """Time at which its adapters were in memory and it was submitted to the engine."""
    begun: float = 0.0
    """Time of the first step of the sequence that waited longest."""
    first: float = 0.0
    """Time of its first token."""
    last: float = 0.0
    """Time of its last token, or of the end of a request that only reads."""


def prompt_tokens(submit: Submit) -> int:
    """Return the number of tokens in the prompt and its branches."""
    return len(submit.prompt) + sum(map(len, submit.branches))


class Inflight:
    """A bounded mailbox: the engine's side never waits, the reader's side may.

    One request is one or more submits (prompts) of `n` rows each. `buffer_limit` counts outputs that
    the reader has not taken yet; one more, and the request fails with SlowReaderError.

    Args:
        on_cut: called when the request is cut off, to free a reader's connection at once.
        on_ended: called once the engine has ended the last row, or is gone with all of them.
        goes_on: whether it is the next part of a request whose last part has just given up its places.
        on_gap: called with the seconds from one of a row's outputs to the next.
    """

    def __init__(
        self,
        submits: Sequence[Submit],
        buffer_limit: int,
        *,
        on_cut: Callable[[], None] = lambda: None,
        on_ended: Callable[[], None] = lambda: None,
        goes_on: bool = False,
        on_gap: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.goes_on = goes_on
        self.submits = tuple(submits)
        self.open_rows = {submit.id: len(submit.choices) for submit in submits}
        self._unseen = {submit.id: prompt_tokens(submit) for submit in submits}
        self.computed = Usage()
        """Tokens that the engine has computed for it, including those that nobody read."""
        self.moments = Moments()
        self._last_at: dict[tuple[str, int], float] = {}
        self._on_gap = on_gap
        self.given_up = False
        """Whether nobody waits for it any more, so that its sequences end early."""
        self.on_ended = on_ended
        self._on_cut = on_cut
        self._limit = buffer_limit
        self._pending: list[RowOutput] = []
        self._failure: OneBaseError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def tenant(self) -> str:
        """Tenant of the request."""
        return self.submits[0].tenant

    @property
    def background(self) -> bool:
        """Return True if its sequences only use capacity that other requests leave free."""
        return self.submits[0].background

    @property
    def rows(self) -> int:
        """Number of sequences that the engine has not ended yet."""
        return sum(self.open_rows.values())

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def broken(self) -> bool:
        """Return True if it failed, and not because its caller left or was too slow."""
        return self.failed and not isinstance(self._failure, ClientGoneError | SlowReaderError)

    def push(self, output: RowOutput, at: float) -> bool:
        """Deliver one output, made at `at`. False: the reader is too slow, and was just cut off."""
        self._count(output, at)
        if output.finish is not None:
            left = self.open_rows[output.id] - 1
            if left:
                self.open_rows[output.id] = left
            else:
                del self.open_rows[output.id]
        if self._failure is not None:
            return True
        if len(self._pending) >= self._limit:
            self._pending.clear()
            self.fail(SlowReaderError())
            self._on_cut()
            return False
        self._pending.append(output)
        self._wake()
        return True

    def _count(self, output: RowOutput, at: float) -> None:
        computed = self.computed
        if (output.tokens or output.finish == "stop") and output.id in self._unseen:
            computed.prompt += self._unseen.pop(output.id)
            computed.cached += output.cached_tokens or 0
        computed.completion += len(output.tokens)
        moments = self.moments
        if output.queue_seconds is not None:
            moments.begun = max(moments.begun, moments.submitted + output.queue_seconds)
        if output.tokens:
            row = (output.id, output.choice)
            if row in self._last_at:
                self._on_gap(at - self._last_at[row])
            else:
                moments.first = moments.first or at
            self._last_at[row] = moments.last = at
        elif output.finish == "stop":
            moments.last = at

    def fail(self, error: OneBaseError) -> None:
        """End the request: outputs already here are still taken, then `error` is raised."""
        if self._failure is None:
            self._failure = error
            self._wake()

    async def take(self) -> list[RowOutput]:
        """Return all outputs since the last call, at least one.

        Raises what the request failed with.
        """
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        batch, self._pending = self._pending, []
        return batch

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


@dataclass(slots=True)
class TokenInfo:
    """One token with its log-probability (natural), and where its text begins in the choice's text."""

    token: int
    offset: int
    logprob: float | None
    top: Sequence[tuple[int, float]] | None


@dataclass(slots=True)
class Piece:
    """Part of one choice that became certain at once. The last piece has a finish reason."""

    index: int
    text: str
    tokens: list[TokenInfo] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    """Token ids as they were computed, if they were asked for. They include those that are no part of the
    text: the stop token, and tokens of a stop string. `tokens` then has an entry for each."""
    finish_reason: FinishReason | None = None
    stop: str | None = None
    """The stop string that ended it."""


class Choice:
    """Turns one row's outputs into pieces.

    A token's logprobs leave with the piece in which its text begins, so that held-back text (an
    incomplete character, or what may become a stop string) holds its tokens back too.
    """

    def __init__(
        self,
        index: int,
        decoder: PieceDecoder,
        stops: Sequence[str],
        *,
        min_tokens: int = 0,
        offset: int = 0,
        discard_tokens: bool = False,
        with_ids: bool = False,
    ) -> None:
        self.index = index
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._decoder = decoder
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens if stops else 0
        self._decoded = offset
        self._released = offset
        self._waiting: list[TokenInfo] = []
        self._discard_tokens = discard_tokens
        self._with_ids = with_ids

    @property
    def stopped_here(self) -> bool:
        """A stop string ended the choice: the engine does not know yet."""
        return self._stops.matched is not None

    def feed(self, output: RowOutput) -> Piece | None:
        """The next piece, or None when there is nothing to say yet. Not to be called once finished."""
        before = self.completion_tokens
        text = "" if self._discard_tokens else self._read_tokens(output)
        if output.finish is not None and not self.stopped_here:
            tail = self._decoder.flush()
            self._decoded += len(tail)
            text += self._stops.push(tail)
            if not self.stopped_here:
                text += self._stops.flush()
        if self.stopped_here:
            self.finish_reason = "stop"
        elif output.finish is not None:
            self.finish_reason = "length" if self._discard_tokens else output.finish
        self._released += len(text)
        tokens = self._release_tokens()
        ids = output.tokens[: self.completion_tokens - before] if self._with_ids else []
        if not text and not tokens and not ids and self.finish_reason is None:
            return None
        return Piece(self.index, text, tokens, ids, self.finish_reason, self._stops.matched)

    def _read_tokens(self, output: RowOutput) -> str:
        text = ""
        last = len(output.tokens) - 1
        for position, token in enumerate(output.tokens):
            self.completion_tokens += 1
            ends = position == last and output.stop_token is not None
            if output.logprobs is not None and (self._with_ids or not ends):
                self._waiting.append(_token_info(output.logprobs[position], self._decoded))
            if ends:
                break
            piece = self._decoder.push(token)
            self._decoded += len(piece)
            text += piece if self.completion_tokens < self._min_tokens else self._stops.push(piece)
            if self.stopped_here:
                break
        return text

    def _release_tokens(self) -> list[TokenInfo]:
        waiting = self._waiting
        if not waiting:
            return []
        if self.finish_reason is not None and (self._with_ids or not self.stopped_here):
            ready, self._waiting = waiting, []
            return ready
        count = 0
        while count < len(waiting) and waiting[count].offset < self._released:
            count += 1
        ready, self._waiting = waiting[:count], waiting[count:]
        return ready


def _token_info(value: TokenLogprob, offset: int) -> TokenInfo:
    return TokenInfo(value.token, offset, value.logprob, value.top)


def prompt_token_infos(
    prompt: Sequence[int], logprobs: Sequence[TokenLogprob], decoder: PieceDecoder
) -> list[TokenInfo]:
    """The prompt's tokens for `echo`; the first has no logprob, since nothing comes before it."""
    infos: list[TokenInfo] = []
    offset = 0
    for position, token in enumerate(prompt):
        known = logprobs[position - 1] if 0 < position <= len(logprobs) else None
        infos.append(TokenInfo(token, offset, known.logprob if known else None, known.top if known else None))
        offset += len(decoder.push(token))
    return infos
