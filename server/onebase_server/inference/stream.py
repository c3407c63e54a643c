"""One request's outputs as they come: from the engine's socket to the answering task, and tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from onebase_engine.engine.messages import FinishReason, ScoredToken, SequenceOutput
from onebase_server.inference.detokenizer import PieceDecoder, StopStrings
from onebase_server.inference.thoughts import AnyThoughtReader


@dataclass(slots=True)
class TokenInfo:
    """One token with its log-probability (natural), and where its text begins in the choice's text."""

    token: int
    offset: int
    logprob: float | None
    top: Sequence[tuple[int, float]] | None


@dataclass(slots=True)
class OutputPiece:
    """Part of one choice that became certain at once. The last piece has a finish reason."""

    index: int
    text: str
    reasoning: str = ""
    """Part of the thought before the text, which comes to its end before the text begins, unless the format
    lets thoughts and text take turns."""
    tokens: list[TokenInfo] = field(default_factory=list)
    """Tokens of the text; those of the thought only if token ids were asked for."""
    ids: list[int] = field(default_factory=list)
    """Token ids as they were computed, if they were asked for. They include those that are no part of the
    text: the stop token, and tokens of a stop string. `tokens` then has an entry for each."""
    finish_reason: FinishReason | None = None
    stop: str | None = None
    """The stop string that ended it."""


class ChoiceDecoder:
    """Turns one sequence's outputs into pieces.

    A token's logprobs leave with the piece in which its text begins, so that held-back text (an
    incomplete character, or what may become a stop string) holds its tokens back too.

    Stop strings end the answer, not the thought before it.
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
        thought: AnyThoughtReader | None = None,
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
        self._thought = thought
        self._offsets: list[int] = []
        """Offsets of the tokens that may turn out to be the answer's first ones."""
        self._thought_tokens = 0

    @property
    def reasoning_tokens(self) -> int:
        """Return the number of tokens before the answer: the thought with its marks."""
        thought = self._thought
        if thought is None or not thought.thinks:
            return 0
        whole = thought.start is None and not thought.interleaved
        return self.completion_tokens if whole else self._thought_tokens

    @property
    def stopped_here(self) -> bool:
        """A stop string ended the choice: the engine does not know yet."""
        return self._stops.matched is not None

    def feed(self, output: SequenceOutput) -> OutputPiece | None:
        """Return the next piece, or None when there is nothing to say yet. Not to be called once finished."""
        before = self.completion_tokens
        reasoning, text = ("", "") if self._discard_tokens else self._read_tokens(output)
        if output.finish is not None and not self.stopped_here:
            thought, tail = self._split(self._decoder.flush(), end=True)
            reasoning += thought
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
        if not (text or reasoning or tokens or ids) and self.finish_reason is None:
            return None
        return OutputPiece(self.index, text, reasoning, tokens, ids, self.finish_reason, self._stops.matched)

    def _read_tokens(self, output: SequenceOutput) -> tuple[str, str]:
        """Return what of the thought and of the answer is certain with these tokens."""
        reasoning, text = "", ""
        last = len(output.tokens) - 1
        for position, token in enumerate(output.tokens):
            self.completion_tokens += 1
            ends = position == last and output.stop_token is not None
            if output.logprobs is not None and (self._with_ids or not ends):
                self._waiting.append(_token_info(output.logprobs[position], self._decoded))
            if ends:
                break
            thought, piece = self._split(self._decoder.push(token))
            reasoning += thought
            text += piece if self.completion_tokens < self._min_tokens else self._stops.push(piece)
            if self.stopped_here:
                break
        return reasoning, text

    def _split(self, piece: str, *, end: bool = False) -> tuple[str, str]:
        """Return what of the thought and of the answer is certain with a piece of the whole text."""
        thought, before = self._thought, self._decoded
        if thought is not None and thought.interleaved:
            return self._take_turns(thought, piece, end=end)
        self._decoded += len(piece)
        if thought is None or thought.start is not None:
            return "", piece
        if not end:
            self._offsets.append(before)
        made = thought.feed(piece, end=end)
        if thought.inside:
            self._offsets.clear()
        if thought.start is None:
            return made
        first = thought.start
        self._thought_tokens = self.completion_tokens - sum(offset >= first for offset in self._offsets)
        if not self._with_ids:
            self._waiting = [info for info in self._waiting if info.offset >= first]
        for info in self._waiting:
            info.offset = max(0, info.offset - first)
        self._decoded -= first
        return made

    def _take_turns(self, thought: AnyThoughtReader, piece: str, *, end: bool) -> tuple[str, str]:
        """Return what is certain with a piece, where a token is either of a thought or of the answer."""
        within = thought.inside
        made = thought.feed(piece, end=end)
        self._thought_tokens += within and not end
        if within and not made[1] and not end and not self._with_ids and self._waiting:
            del self._waiting[-1]
        self._decoded += len(made[1])
        return made

    def _release_tokens(self) -> list[TokenInfo]:
        waiting = self._waiting
        if self._thought is not None and self._thought.start is None and not self._with_ids:
            if self.finish_reason is not None or self._thought.inside:
                waiting.clear()
            return []
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


def _token_info(value: ScoredToken, offset: int) -> TokenInfo:
    return TokenInfo(value.token, offset, value.logprob, value.top)


def prompt_token_infos(
    prompt: Sequence[int], logprobs: Sequence[ScoredToken], decoder: PieceDecoder
) -> list[TokenInfo]:
    """Return the prompt's tokens for `echo`; the first has no logprob, since nothing comes before it."""
    infos: list[TokenInfo] = []
    offset = 0
    for position, token in enumerate(prompt):
        known = logprobs[position - 1] if 0 < position <= len(logprobs) else None
        infos.append(TokenInfo(token, offset, known.logprob if known else None, known.top if known else None))
        offset += len(decoder.push(token))
    return infos
